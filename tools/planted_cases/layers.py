"""Planted cases of layers and the stream: sinks, massive activations, registers, geometry, classes, stages of depth."""

import math
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import microtome as mt
from microtome import planted
from microtome.measurements import loss_at_deltas, register, secondary_sinks, sink_scores

SEEDS = (0, 1, 2)
SCORE = 0.2
"""Of a sink among four heads of which two are planted."""


def told(measure: str, what: str, found: int, of: int, false: int, among: int) -> dict[str, Any]:
    """A row of the table."""
    return {"measure": measure, "planted": what, "found": f"{found} of {of}", "false": f"{false} of {among}"}


def fillers(it: planted.Planted, rows: int = 8, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Rows of BOS and tokens that mean nothing."""
    rng = torch.Generator().manual_seed(seed)
    some = torch.tensor(it.truth["fillers"][4:])
    drawn = some[torch.randint(len(some), (rows, length - 1), generator=rng)]
    return torch.cat([torch.full((rows, 1), it.truth["bos"]), drawn], dim=1)


def as_loud(it: planted.Planted, seed: int = 0) -> int:
    """Make another neuron of the sink's layer as loud as the sink's, but for nothing; its number."""
    weights, own = it.model.layers[it.truth["layer"]], it.truth["neuron"]
    other = (own + 3) % it.model.anatomy.d_mlp
    weights.W_gate[:, other] = weights.W_gate[:, own]
    weights.W_in[:, other] = weights.W_in[:, own]
    noise = torch.zeros_like(weights.W_out[other])
    noise[-8:] = torch.randn(8, generator=torch.Generator().manual_seed(seed))  # the part that nothing reads
    weights.W_out[other] = noise * (0.002 * weights.W_out[own].norm() / noise.norm())
    return other


def second_sinks(it: planted.Planted, tokens: torch.Tensor) -> dict[tuple[int, int], int]:
    """Make one filler a second beginning of text, put one into every other row, and say where they are."""
    marker = it.truth["fillers"][0]
    it.model.W_E[marker] = it.model.W_E[it.truth["bos"]]
    places = {(row, 5 + row): it.truth["layer"] for row in range(0, len(tokens), 2)}
    for row, position in places:
        tokens[row, position] = marker
    return places


def sinks() -> dict[str, Any]:
    """The heads that wait at BOS, and no other, whatever their weights."""
    found = false = among = 0
    for seed in SEEDS:
        it = planted.sink(seed)
        data = mt.measure(it.model, "sinks", text=fillers(it, seed=seed))
        high = data["sink_share"].values > 0.5
        heads = {tuple(head) for head in it.truth["heads"]}
        found += sum(int(high[head]) for head in heads)
        false += int(high.sum()) - sum(int(high[head]) for head in heads)
        among += high.size - len(heads)
    return told("sinks", "heads that wait at BOS", found, 4 * len(SEEDS), false, among)


def massive() -> dict[str, Any]:
    """The dimension and position of the massive activation; none where its neuron writes nothing."""
    found = false = 0
    for seed in SEEDS:
        it = planted.sink(seed)
        data = mt.measure(it.model, "massive", "massive_tokens", text=fillers(it, seed=seed))
        large = (data["max_abs"].values > 100) & (data["massive_ratio"].values > 1000)
        there = (data["max_abs_dim"].values == it.truth["dimension"]) & (data["massive_first"].values == 1)
        found += int((large & there).sum())
        it.model.layers[it.truth["layer"]].W_out[it.truth["neuron"]] = 0.0
        false += int((mt.measure(it.model, "massive", text=fillers(it, seed=seed))["max_abs"].values > 100).sum())
    return told("massive", "one dimension at BOS, in 3 layers", found, 3 * len(SEEDS), false, 3 * len(SEEDS))


def secondary() -> dict[str, Any]:
    """Tokens that become sinks later in a row, with the layer that made them; none of the others."""
    found = of = false = among = 0
    for seed in SEEDS:
        it = planted.sink(seed)
        tokens = fillers(it, seed=seed)
        plain = secondary_sinks(it.model, tokens, threshold=SCORE)
        false, among = false + plain.sizes["sink"], among + tokens.numel() // 2 - len(tokens)
        places = second_sinks(it, tokens)
        listed = secondary_sinks(it.model, tokens, threshold=SCORE)
        rows = zip(*(listed[n].values.tolist() for n in ("row", "position", "made_by", "birth")), strict=True)
        told_of = {(row, position): (maker, birth) for row, position, maker, birth in rows}
        found += sum(told_of.get(place) == (maker, maker + 1) for place, maker in places.items())
        false += len(told_of.keys() - places.keys())
        of, among = of + len(places), among + tokens.numel() // 2 - len(tokens) - len(places)
    return told("secondary_sinks", "a second BOS inside a row, and the MLP that makes it one", found, of, false, among)


def register_neurons() -> dict[str, Any]:
    """The neuron that makes BOS an outlier, and not the one that is as loud there."""
    found = false = among = 0
    for seed in SEEDS:
        it = planted.sink(seed)
        as_loud(it, seed)
        writes = mt.measure(it.model, "registers", text=fillers(it, seed=seed))["register_write"].values
        own = writes[it.truth["layer"], it.truth["neuron"]]
        high = abs(writes) > 0.1 * abs(own)
        found += int(own > 0.5 * planted._sink.MASSIVE)  # pyright: ignore[reportPrivateUsage]
        false, among = false + int(high.sum()) - 1, among + high.size - 1
    return told("registers", "the neuron behind a massive activation", found, len(SEEDS), false, among)


def moved_register() -> dict[str, Any]:
    """Sinks move to a token in front of the text with the neuron that makes them, and not with one as loud."""
    found = false = 0
    for seed in SEEDS:
        it = planted.sink(seed)
        other = as_loud(it, seed)
        tokens = fillers(it, seed=seed)
        tokens = torch.cat([tokens[:, 1:2], tokens], dim=1)
        for neuron in (it.truth["neuron"], other):
            run = it.model.run(tokens, capture="*.attn.pattern", edits=register([(it.truth["layer"], neuron)]))
            for layer, head in it.truth["heads"]:
                alpha = sink_scores(run[f"{layer}.attn.pattern"])[:, head].mean(0)
                moved = bool(alpha[0] > 0.9 and alpha[1] < 0.1)
                found, false = found + int(moved and neuron != other), false + int(moved and neuron == other)
    return told("register", "4 sinks that move with their neuron", found, 4 * len(SEEDS), false, 4 * len(SEEDS))


def tiny(layers: int = 3, *, mute: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """A small Llama with random weights; `mute` lets no branch add anything."""
    config = LlamaConfig(
        vocab_size=60, hidden_size=40, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=56,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        hf: Any = LlamaForCausalLM(config)
        for name, weight in hf.named_parameters():
            weight.normal_(0, 0.15) if weight.dim() > 1 else weight.fill_(1.0)
            if mute and ("o_proj" in name or "down_proj" in name):
                weight.zero_()
    return hf.requires_grad_(False).eval()


def geometry() -> dict[str, Any]:
    """Rows of five directions, each as often: ln 5 nats in every layer; another number for random embeddings."""
    found = false = 0
    tokens = torch.cat([torch.zeros(8, 1, dtype=torch.int64), (torch.arange(20) % 5 + 5).expand(8, -1)], dim=1)
    for rank_five in (True, False):
        hf = tiny()
        if rank_five:
            with torch.no_grad():
                basis = torch.linalg.qr(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)))[0].T
                hf.get_input_embeddings().weight[5:10] = basis
        data = mt.measure(mt.open(hf, prove=False), "geometry", text=tokens)
        hits = int((abs(data["prompt_entropy"].values - math.log(5)) < 1e-5).sum())
        found, false = found + hits * rank_five, false + hits * (not rank_five)
    return told("geometry", "rows of rank 5, entropy ln 5, in 3 layers", found, 3, false, 3)


def attractor() -> dict[str, Any]:
    """The one layer whose MLP takes most of what it reads away again, whatever that is, draws the stream back.

    Between layers on one side of it, and in models of random branches where no layer was given such an MLP, nothing is
    drawn back. One dimension holds a constant so large that norms change nothing; the gates are open wherever it is,
    and neuron n reads dimension n and writes it back with a minus. Pushed before that layer, the stream is nearer
    behind it.
    """
    found = false = among = 0
    tokens = torch.randint(5, 60, (8, 24), generator=torch.Generator().manual_seed(1))
    pairs = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for seed, border in enumerate((1, 2, 3, None, None, None)):
        hf: Any = tiny(5, mute=border is not None, seed=seed)
        with torch.no_grad():
            hf.get_input_embeddings().weight[:, 0] = 40**0.5  # beside 39 small ones: the norm's divisor is about 1
        behind = torch.zeros(5, 5, dtype=torch.bool)
        if border is not None:
            _draws_back(hf.model.layers[border].mlp)
            behind[:border, border:] = True
        data = mt.measure(mt.open(hf, prove=False), "trajectory", text=tokens)
        back = torch.tensor(data["pushed_diff"].values < -0.3)
        found += int(border is not None and bool(back[behind].all()))
        false += int(back[pairs & ~behind].sum())
        among += int((pairs & ~behind).sum())
    return told("trajectory", "a layer that draws the stream back", found, 3, false, among)


def _draws_back(mlp: Any) -> None:
    """Let an MLP take away most of what it reads in all dimensions but the first."""
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight):
            weight.zero_()
        mlp.gate_proj.weight[:39, 0] = 1.0  # silu(6.2) is about 6.2
        for n in range(39):
            mlp.up_proj.weight[n, n + 1] = 1.0
            mlp.down_proj.weight[n + 1, n] = -0.8 / 40**0.5


def shared_kinds() -> dict[str, Any]:
    """Rows of two kinds of tokens are near those of their kind in both views, in all layers: dime is above 0.2 nats.

    It is less where all rows are of one kind, and near 0 of views of different rows. No branch adds anything; the
    tokens of a kind are its direction and a little noise.
    """
    found = false = 0
    rng = torch.Generator().manual_seed(2)
    kinds = torch.arange(32) % 2
    for two in (True, False):
        hf = tiny()
        with torch.no_grad():
            noise = 0.1 * torch.randn(60, 40, generator=rng)
            hf.get_input_embeddings().weight.copy_(noise + torch.eye(40)[(torch.arange(60) >= 30).long()] * two)
        tokens = torch.randint(2, 30, (32, 24), generator=rng) + 30 * kinds[:, None]
        order = torch.randperm(32, generator=rng)
        data = mt.measure(mt.open(hf, prove=False), "invariance", text=tokens[order])
        hits = int((data["dime"].values > 0.2).sum())
        found, false = found + hits * two, false + hits * (not two) + int((data["dime_unpaired"].values > 0.2).sum())
    return told("invariance", "rows of two kinds, by dime, in 3 layers", found, 3, false, 9)


def small_steps() -> dict[str, Any]:
    """Where each token comes four times, what is read stays as it was in 18 of 23 steps; never where none is repeated.

    No branch adds anything, so that the stream of a token is its embedding.
    """
    found = false = 0
    tokens = 5 + torch.stack([torch.randperm(50, generator=torch.Generator().manual_seed(n))[:24] for n in range(8)])
    model = mt.open(tiny(), prove=False)
    for text, runs in ((tokens[:, :6].repeat_interleave(4, dim=1), True), (tokens, False)):
        data = loss_at_deltas(model, text, limits=(1e-6,), sites=("attn.in", "mlp.in", "mlp.post"))
        hits = abs(data["still_at"].values[0] - 18 / 23) < 0.02
        found, false = found + int(hits.sum()) * runs, false + int((data["still_at"].values > 0.02).sum()) * (not runs)
    return told("loss_at_deltas", "tokens that come four times, at 3 sites of 3 layers", found, 9, false, 9)


def neuron_classes() -> dict[str, Any]:
    """A neuron of every class, typical and atypical where that can be, among random ones."""
    hf = tiny(1, mute=False)
    model = mt.open(hf, prove=False)
    e = torch.eye(40)
    # By class: input, gate, output. Of an atypical one the gate has another angle to the input than the others make.
    near = math.sqrt(0.5) * (e[0] + e[1])
    made = {
        0: (e[0], -e[0], e[0]), 1: (e[0], e[1], e[0]), 2: (e[1], -e[0], e[0]), 3: (e[1], e[2], e[0]),
        4: (-e[0], e[1], e[0]), 5: (-e[0], e[0], e[0]), 7: (0.6 * e[0] + 0.8 * e[1], e[1], e[0]), 8: (near - 0.4 * e[0],
        near, e[0]), 9: (e[1], e[1], e[0]), 10: (-0.6 * e[0] + 0.8 * e[1], e[1], e[0]),
    }  # fmt: skip
    weights = model.layers[0]
    for place, (read, gate, write) in enumerate(made.values()):
        weights.W_in[:, place], weights.W_gate[:, place], weights.W_out[place] = read, gate, write
    kinds = mt.measure(model, "neuron_classes")["io_class"].values[0]
    found = sum(int(kinds[place] == kind) for place, kind in enumerate(made))
    others = kinds[len(made) :]
    return told(
        "neuron_classes", "10 neurons of known classes", found, len(made), int((others != 3).sum()), len(others)
    )


def depth() -> dict[str, Any]:
    """Where the only layer that adds anything is the border between two stages of depth."""
    found = 0
    tokens = torch.randint(5, 60, (8, 24), generator=torch.Generator().manual_seed(1))
    for border in range(1, 5):
        hf = tiny(5)
        own: Any = hf.model.layers[border].mlp.down_proj
        with torch.no_grad():
            own.weight.normal_(0, 3.0, generator=torch.Generator().manual_seed(border))
        stages = mt.measure(mt.open(hf, prove=False), "layer_similarity", text=tokens, stages=2)["stage"].values
        found += int(stages.tolist() == [0] * border + [1] * (5 - border))
    same = mt.measure(mt.open(tiny(5), prove=False), "layer_similarity", text=tokens)["cka"].values
    return told("layer_similarity", "the one layer that adds anything", found, 4, int((same < 0.999).sum()), same.size)


CASES = (
    sinks, massive, secondary, register_neurons, moved_register, geometry, attractor, shared_kinds, small_steps,
    neuron_classes, depth,
)  # fmt: skip
