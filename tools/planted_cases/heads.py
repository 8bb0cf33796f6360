"""Heads whose kind is known because it was made, and how many of them the measures of heads find.

Each case returns what was planted, how much of it was found, and how often it was found where nothing was planted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import microtome as mt
from microtome import planted
from microtome.measurements import cmr_curve, commit_separation, fit_cmr, head_types, pruning_curve, selectable
from microtome.measurements._head_map import followers, ngram_shares, reach, spread
from microtome.measurements._hopfield import updates
from microtome.measurements._norm_parts import parts_of
from microtome.measurements._rank_bound import fit_error
from microtome.planted._llama import Layout, bench

Case = dict[str, str]
WORDS = ("zero", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _case(measure: str, what: str, found: Sequence[bool], false: Sequence[bool]) -> Case:
    """A row of the table."""
    return {
        "measure": measure, "planted": what, "found": f"{sum(found)} of {len(found)}",
        "false": f"{sum(false)} of {len(false)}",
    }  # fmt: skip


def patterns(width: int = 32) -> dict[str, Tensor]:
    """Patterns [1, 1, q, k] of one kind each: at the token before, at all alike, at four of them, at the first."""
    place = torch.arange(width)
    back = torch.nn.functional.one_hot((place - 1).clamp(min=0), width)
    even = torch.ones(width, width).tril()
    some = even * (place % max(1, width // 4) == 0)
    first = torch.nn.functional.one_hot(torch.zeros_like(place), width)
    made = {"previous": back, "even": even, "some": some, "first": first}
    return {name: (x / x.sum(1, keepdim=True)).double()[None, None] for name, x in made.items()}


def head_that_follows_subjects() -> Case:
    """Of 40 heads the one that looks from verbs to subjects is found by it, and no head by a relation it has not."""
    sentences = mt.measurements.template_sentences(64)
    rng = torch.Generator().manual_seed(0)
    made: list[tuple[Tensor, list[tuple[int, int]]]] = []
    for sentence in sentences:
        n = len(sentence.words)
        pattern = torch.rand(4, 10, n, n, generator=rng).tril()
        for a, b, name in sentence.arcs:
            if name == "nsubj":
                pattern[2, 3, b, a] = 2.0
        made.append((pattern, [(i, i + 1) for i in range(n)]))
    data = mt.measurements.arc_scores(sentences, made)
    sure = (data["best_diff_lo"] > 0).to_series().to_dict()
    at = data.sel(relation="nsubj")
    found = sure.pop("nsubj") and (int(at["best_layer"]), int(at["best_head"])) == (2, 3) and float(at["best"]) == 1
    return _case("dependency_heads", "a head that looks from verbs to subjects", [found], list(sure.values()))


def keys_at_rest() -> Case:
    """Queries near one of some keys come to rest at it where the slope is steep, and between all where it is flat."""
    rng = torch.Generator().manual_seed(0)
    key = torch.linalg.qr(torch.randn(16, 16, generator=rng, dtype=torch.float64))[0].unsqueeze(0) * 6
    near = key + 0.3 * torch.randn(key.shape, generator=rng, dtype=torch.float64)
    sees = torch.ones(16, 16, dtype=torch.bool)
    steep, flat = (updates(near, key, sees, slope, 8) for slope in (2.0, 1e-3))
    found = ((steep["k90"][-1] == 1) & (steep["moved"][-1] < 1e-6)).flatten().tolist()
    return _case("hopfield_updates", "queries near a stored key", found, (flat["k90"][-1] < 15).flatten().tolist())


def modes_of_heads() -> Case:
    """The previous-token head is single, the even head global, the head with four keys a subset."""
    wanted = {"previous": "mode_single", "first": "mode_single", "even": "mode_global", "some": "mode_subset"}
    found: list[bool] = []
    false: list[bool] = []
    for name, pattern in patterns().items():
        modes = {mode: float(x[:, 16:].mean()) for mode, x in spread(pattern).items() if mode.startswith("mode")}
        found.append(modes.pop(wanted[name]) == 1)
        false += [x > 0 for x in modes.values()]
    return _case("head_map", "patterns of one, four and all keys", found, false)


def distances_of_heads() -> Case:
    """The head at the token before is within 1, and no other."""
    found: list[bool] = []
    false: list[bool] = []
    for name, pattern in patterns().items():
        share = float(reach(pattern)["within_1"][:, 16:].mean())
        (found if name == "previous" else false).append(share > 0.9)
    return _case("head_map", "a pattern that looks one token back", found, false)


def ngram_heads() -> Case:
    """A head of order n attends to what followed the last n - 1 tokens, and not to what followed others."""
    tokens = torch.randint(0, 4, (1, 96), generator=torch.Generator().manual_seed(0))
    found: list[bool] = []
    false: list[bool] = []
    keys = {n: followers(tokens, n) for n in (2, 3, 4)}
    for n, some in keys.items():
        there = some.any(-1)[0]
        pattern = (some / some.sum(-1, keepdim=True).clamp(min=1)).double().unsqueeze(1)
        for m in (2, 3, 4):
            shares = ngram_shares(pattern, keys[m], m)
            score = float(shares[f"ngram{m}_attention"][0, there & keys[m].any(-1)[0]].mean())
            control = float(shares[f"ngram{m}_elsewhere"][0, there & keys[m].any(-1)[0]].mean())
            # a head of a longer context is right for a shorter one too, never the other way round
            (found if m <= n else false).append(score - control > 0.5)
    return _case("head_map", "heads of bigrams, trigrams and 4-grams", found, false)


def induction_is_a_bigram_head() -> Case:
    """The induction head of a Llama is found on a text, by what follows the same token, and no other head."""
    it = planted.induction()
    half = torch.stack([torch.randperm(1000, generator=torch.Generator().manual_seed(s))[:24] for s in range(8)])
    data = mt.measure(it.model, "head_map", text=torch.cat([half, half], dim=1))
    return _heads(data, "ngram2_attention_diff", [it.truth["induction_head"]], 0.5, "head_map", "an induction head")


def previous_token_in_text() -> Case:
    """The previous-token head of a Llama is found on a text of random tokens."""
    it = planted.induction()
    text = torch.stack([torch.randperm(1000, generator=torch.Generator().manual_seed(s))[:32] for s in range(8)])
    data = mt.measure(it.model, "head_map", text=text)
    truth = [it.truth["previous_token_head"]]
    return _heads(data, "previous_attention_diff", truth, 0.5, "head_map", "a previous-token head")


def sinks_are_single() -> Case:
    """The heads of a Llama that wait at the first token have all of their attention there, and no other head has."""
    it = planted.sink()
    fillers = torch.tensor(it.truth["fillers"])
    text = torch.stack([fillers[torch.randperm(64, generator=torch.Generator().manual_seed(s))[:31]] for s in range(8)])
    text = torch.cat([torch.zeros(8, 1, dtype=torch.long), text], dim=1)
    data = mt.measure(it.model, "head_map", text=text)
    heads = [tuple(head) for head in it.truth["heads"]]
    return _heads(data, "mode_single", heads, 0.9, "head_map", "heads that wait at the first token")


def _heads(data: Any, column: str, truth: Sequence[tuple[int, ...]], least: float, measure: str, what: str) -> Case:
    """How many of the planted heads, and of the others, have a column above a bound."""
    found: list[bool] = []
    false: list[bool] = []
    for layer in data["layer"].values:
        for head in data["head"].values:
            inside = (int(layer), int(head)) in {tuple(t) for t in truth}
            (found if inside else false).append(bool(data[column].sel(layer=layer, head=head) > least))
    return _case(measure, what, found, false)


RECALLS = ((1.0, 1.0, 0.0), (0.7, 0.8, 0.2), (0.4, 0.9, 0.5), (0.6, 0.5, 0.1), (0.3, 0.7, 0.3))
"""beta_enc, beta_rec and gamma of heads that are made."""


def recall_by_context() -> Case:
    """Curves of known parameters are fitted by them; curves of noise are not."""
    found: list[bool] = []
    for known in RECALLS:
        fit = fit_cmr(0.7 * cmr_curve(*(torch.tensor(x, dtype=torch.float64) for x in known)))
        near = [abs(float(fit[n]) - x) < 0.02 for n, x in zip(("beta_enc", "beta_rec", "gamma"), known, strict=True)]
        found.append(all(near) and float(fit["distance"]) < 1e-2)
    noise = torch.randn(40, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return _case("repeat_lags", "curves of the retrieved-context model", found,
                 [float(x) < 0.2 for x in fit_cmr(noise)["distance"]])  # fmt: skip


def induction_recalls_what_followed() -> Case:
    """The induction head of a Llama recalls like the model with both betas 1 and gamma 0."""
    it = planted.induction()
    data = mt.measure(it.model, "repeat_lags", sequences=8, period=24)
    layer, head = it.truth["induction_head"]
    own = {name: float(data[f"cmr_{name}"][layer, head]) for name in ("beta_enc", "beta_rec", "gamma", "distance")}
    right = own["distance"] < 0.1 and own["beta_enc"] > 0.95 and own["beta_rec"] > 0.95 and own["gamma"] < 0.05
    others = [float(data["cmr_distance"][i, h]) < 0.1 for i in range(2) for h in range(4) if (i, h) != (layer, head)]
    return _case("repeat_lags", "an induction head", [right], others)


class Words:
    """A tokenizer whose first ids are words of a series."""

    bos_token_id, eos_token_id, all_special_ids = None, None, ()

    def decode(self, ids: Sequence[int], **_: object) -> str:
        """The text of one id."""
        return f" {WORDS[ids[0]]}" if ids[0] < len(WORDS) else f" w{ids[0]}"


def moving_heads(seed: int = 0) -> tuple[mt.Model, dict[str, tuple[int, int]], list[tuple[int, int]]]:
    """A Llama whose heads move tokens: one copies, one counts on, one maps by a permutation, one suppresses copies.

    Returns:
        The model, its heads by what they do, and the permutation as pairs of ids.
    """
    n = 32
    layout = Layout(code=n, out=n)
    it = bench(layout, vocab=n, layers=3, heads=4, d_head=32, d_mlp=16, seed=seed)
    it.model.W_E[:, layout["code"]] = torch.eye(n)
    it.model.W_U[layout["out"]] = 20.0 * torch.eye(n)
    order = torch.randperm(n, generator=it.rng)
    next_one = torch.arange(n).roll(-1)
    writes: dict[str, Tensor] = {
        "copying": torch.eye(n), "successor": torch.eye(n)[next_one], "permutation": torch.eye(n)[order],
        "suppression": -torch.eye(n),
    }  # fmt: skip
    heads: dict[str, tuple[int, int]] = {}
    for i, (name, moved) in enumerate(writes.items()):
        layer = i % 3
        heads[name] = (layer, it.free_head(layer))
        it.move(*heads[name], it.part("code"), moved @ it.part("out").T)
    made = it.finish({"heads": heads})
    pairs = [(s, int(order[s])) for s in range(n) if int(order[s]) != s]
    return mt.open(made.model.hf, tokenizer=Words(), prove=False), heads, pairs


def copying_by_weights() -> Case:
    """The head that copies has positive eigenvalues alone; the one that suppresses copies has none."""
    model, heads, _ = moving_heads()
    data = mt.measure(model, "ov_copying")
    return _heads(data, "ov_copying", [heads["copying"]], 0.9, "ov_copying", "a head that copies")


def copying_by_maps() -> Case:
    """The head that copies maps every token to itself, and no other head does."""
    model, heads, _ = moving_heads()
    data = mt.measure(model, "head_functions", top=1)
    return _heads(data, "maps_copying", [heads["copying"]], 0.5, "head_functions", "a head that copies")


def suppression_by_maps() -> Case:
    """The head that writes minus a copy suppresses every token, and no other head does."""
    model, heads, _ = moving_heads()
    data = mt.measure(model, "head_functions", top=1)
    return _heads(data, "suppress_copying", [heads["suppression"]], 0.5, "head_functions", "a head that suppresses")


def successors_by_maps() -> Case:
    """The head that counts on maps every day to the next, and no other head does."""
    model, heads, _ = moving_heads()
    data = mt.measure(model, "head_functions", top=1)
    return _heads(data, "successor", [heads["successor"]], 0.9, "head_functions", "a head that counts on")


def permutation_by_maps() -> Case:
    """The head that permutes tokens maps all pairs of the permutation, and no other head does."""
    model, heads, pairs = moving_heads()
    data = mt.measurements.relation_scores(model, {"planted": pairs}, top=1).sel(relation="planted")
    return _heads(data, "maps", [heads["permutation"]], 0.9, "relation_scores", "a permutation in W_V W_O")


def counting_head(seed: int = 0) -> tuple[mt.Model, tuple[int, int], dict[str, list[int]]]:
    """A Llama with two series of tokens that share a code of n mod 10, and a head that counts this code on."""
    layout = Layout(digit=10, series=2, out=12)
    it = bench(layout, vocab=20, layers=2, heads=4, d_head=32, d_mlp=16, seed=seed)
    series = {name: list(range(10 * s, 10 * s + 10)) for s, name in enumerate(("one", "two"))}
    for s, ids in enumerate(series.values()):
        for place, token in enumerate(ids):
            code = torch.nn.functional.one_hot(torch.tensor([(place + 1) % 10, 10 + s]), 12).sum(0).to(it.model.dtype)
            it.model.W_E[token, :12] = code
            it.model.W_U[layout["out"], token] = 20.0 * code
    on = torch.block_diag(torch.eye(10).roll(1, dims=1), torch.eye(2))
    head = (1, it.free_head(1))
    it.move(*head, torch.cat([it.part("digit"), it.part("series")], dim=1), on @ it.part("out").T)
    return mt.open(it.finish({}).model.hf, tokenizer=Words(), prove=False), head, series


def ordinals_moved_by_their_digit() -> Case:
    """The digit of one series is read and moved by what the other teaches; where tokens share no code it is not."""
    model, head, series = counting_head()
    data = mt.measurements.ordinal_direction(model, head, series)
    found = [bool(x > 0.9) for name in ("accuracy", "moved") for x in data[name].values]
    model, heads, _ = moving_heads()
    apart = {"one": list(range(8, 18)), "two": list(range(20, 30))}
    none = mt.measurements.ordinal_direction(model, heads["successor"], apart)
    false = [bool(x > 0.5) for name in ("accuracy", "moved") for x in none[name].values]
    return _case("ordinal_direction", "a code of n mod 10, counted on by a head", found, false)


def relations_lost_with_their_heads() -> Case:
    """Each relation is lost without the head that was planted for it; without the other's it is not."""
    model, heads, pairs = moving_heads()
    relations = {"permutation": pairs, "successor": [(s, (s + 1) % 32) for s in range(32)]}
    data = mt.measurements.relation_damage(model, relations, heads=1, top=1, controls=2)
    sets = zip(data["layer"].values[:, 0].tolist(), data["head"].values[:, 0].tolist(), strict=True)
    chosen = [head == heads[name] for name, head in zip(relations, sets, strict=True)]
    damage = data["damage"].values
    found = [right and float(damage[i, i]) > 1 for i, right in enumerate(chosen)]
    false = [float(damage[0, 1]) > 1, float(damage[1, 0]) > 1, *(data["damage_random"] > 1).values.tolist()]
    return _case("relation_damage", "heads of a permutation and of successors", found, false)


def importance_of_induction() -> Case:
    """On repeated tokens the loss rises by nats without either head of the circuit, and by nothing without another."""
    it = planted.induction()
    part = torch.stack([torch.randperm(1000, generator=torch.Generator().manual_seed(s))[:8] for s in range(8)])
    data = mt.measure(it.model, "head_ablation", text=part.repeat(1, 8))
    truth = [it.truth["induction_head"], it.truth["previous_token_head"]]
    return _heads(data, "loss_without_head", truth, 0.5, "head_ablation", "both heads of an induction circuit")


def pruning_spares_induction() -> Case:
    """Greedy pruning leaves the induction head to the end, where it alone still lowers the loss by half a nat.

    No head does so in models of random weights, and on texts without repeats none of these. The head before it is
    saturated: no gradient tells of it.
    """
    it = planted.induction()
    rows = [torch.randperm(1000, generator=torch.Generator().manual_seed(s))[:64] for s in range(4)]
    once = torch.stack(rows)
    head, gain = _spared(it.model, once[:, :8].repeat(1, 8))
    found = head == tuple(it.truth["induction_head"]) and gain > 0.5
    none = [_spared(it.model, once), *(_spared(random_llama(s), once[:, :8].repeat(1, 4) % 200) for s in range(3))]
    return _case("pruning_curve", "an induction head", [found], [gain > 0.5 for _, gain in none])


def _spared(model: mt.Model, tokens: Tensor) -> tuple[tuple[int, int], float]:
    """The head that greedy pruning leaves to the end, and how far it alone lowers the loss."""
    curve = pruning_curve(model, tokens, steps=model.anatomy.n_layers * model.anatomy.n_heads, draws=1)
    loss = curve["loss"].values
    return (int(curve["layer"][-1]), int(curve["head"][-1])), float(loss[-1] - loss[-2])


def keys_inside_the_hull() -> Case:
    """A key that is a mean of others is reported; keys of equal norm never are."""
    found: list[bool] = []
    false: list[bool] = []
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        keys = torch.randn(40, 6, generator=rng, dtype=torch.float64)
        keys = keys / keys.norm(dim=1, keepdim=True)
        false += (~selectable(keys)).tolist()
        weight = torch.rand(3, 40, generator=rng, dtype=torch.float64) ** 4
        inside = weight / weight.sum(1, keepdim=True) @ keys
        seen = selectable(torch.cat([keys, inside]))
        found += (~seen[40:]).tolist()
        false += (~seen[:40]).tolist()
    return _case("unselectable", "keys inside the hull of the others", found, false)


def short_inputs_selected_when_scaled() -> Case:
    """Inputs inside the hull of longer ones cannot be selected, and can once all have one norm."""
    found: list[bool] = []
    false: list[bool] = []
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(30, 6, generator=rng, dtype=torch.float64)
        weight = torch.rand(3, 30, generator=rng, dtype=torch.float64) ** 4
        x = torch.cat([x, weight / weight.sum(1, keepdim=True) @ x])
        seen = {name: selectable(part) for name, part in parts_of(x).items()}
        found += (~seen["none"][30:]).tolist()
        false += (~seen["scaling"]).tolist()
    return _case("norm_parts", "inputs inside the hull, without and with scaling", found, false)


def patterns_of_low_rank() -> Case:
    """Score matrices of rank 2 are fitted by heads of width 2; those of full rank are not."""
    rng = torch.Generator().manual_seed(0)
    found: list[bool] = []
    false: list[bool] = []
    for _ in range(2):
        left, right = (torch.randn(6, 2, generator=rng, dtype=torch.float64) for _ in range(2))
        whole = 3 * torch.randn(6, 6, generator=rng, dtype=torch.float64)
        errors = [min(fit_error(x.softmax(1), 2, 300, rng) for _ in range(3)) for x in (left @ right.T, whole)]
        found.append(errors[0] < 1e-3)
        false.append(errors[1] < 1e-3)
    return _case("pattern_fits", "patterns whose scores have rank 2", found, false)


def random_llama(seed: int = 0) -> mt.Model:
    """A Llama of random weights that nothing was planted in."""
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = LlamaForCausalLM(config)
    return mt.open(hf.requires_grad_(False), prove=False)


def inference_told_apart() -> Case:
    """A commitment passes for the same run and within a batch, and fails for other weights and another prompt."""
    model = random_llama()
    rows = torch.randint(200, (2, 40), generator=torch.Generator().manual_seed(1))
    data = commit_separation(model, rows[:1], rows[1:], every=8, top=32, noise=0.3).sel(dimensions="all")
    passes = {str(change): bool(data["passes"].sel(change=change)) for change in data["change"].values}
    return _case("commit", "other weights, another prompt", [not passes["weight"], not passes["prompt"]],
                 [not passes["same"], not passes["batch"]])  # fmt: skip


def kinds_of_heads() -> Case:
    """The table of kinds calls the planted heads by their names, and no other head by these."""
    it = planted.induction()
    half = torch.stack([torch.randperm(1000, generator=torch.Generator().manual_seed(s))[:24] for s in range(8)])
    data = mt.measure(it.model, "induction", "head_map", text=torch.cat([half, half], dim=1), period=24)
    table = head_types(data)
    wanted = {"induction": it.truth["induction_head"], "previous token": it.truth["previous_token_head"]}
    found = [bool(table["is_kind"].sel(kind=kind, layer=i, head=h)) for kind, (i, h) in wanted.items()]
    false = [
        bool(table["is_kind"].sel(kind=kind, layer=i, head=h))
        for kind, head in wanted.items() for i in range(2) for h in range(4) if (i, h) != tuple(head)
    ]  # fmt: skip
    return _case("head_types", "an induction circuit of two heads", found, false)


CASES: tuple[Callable[[], Case], ...] = (
    head_that_follows_subjects, keys_at_rest, short_inputs_selected_when_scaled, patterns_of_low_rank,
    modes_of_heads, distances_of_heads, ngram_heads, induction_is_a_bigram_head, previous_token_in_text,
    sinks_are_single, recall_by_context, induction_recalls_what_followed, copying_by_weights, copying_by_maps,
    suppression_by_maps, successors_by_maps, permutation_by_maps, relations_lost_with_their_heads,
    ordinals_moved_by_their_digit, importance_of_induction, pruning_spares_induction,
    keys_inside_the_hull,
    inference_told_apart, kinds_of_heads,
)  # fmt: skip

if __name__ == "__main__":
    for case in CASES:
        print(case())
