"""Planted cases of neurons on a text: what each measure finds among neurons of known kinds, and among the others."""

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import microtome as mt
from microtome import planted
from microtome.measurements import concept_neurons, confidence_effects, damage, group_arithmetic, out_of_distribution
from microtome.measurements import neuron_facets as facets
from microtome.measurements._polysemy import CLASSES

SEEDS = (0, 1)


def words_of(it: planted.Planted, rows: int = 24, length: int = 48, seed: int = 0) -> dict[str, torch.Tensor]:
    """By group, rows of BOS and random words of that group."""
    rng = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for g, words in enumerate(it.truth["groups"]):
        drawn = torch.tensor(words)[torch.randint(len(words), (rows, length), generator=rng)]
        found[f"group {g}"] = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), drawn], dim=1)
    return found


def mixed(it: planted.Planted, rows: int = 48, length: int = 64, seed: int = 0) -> torch.Tensor:
    """Rows of BOS and random words of all groups, with the special tokens and the bigram from the 20th place on."""
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(6, it.model.anatomy.d_vocab, (rows, length), generator=rng)
    late = torch.arange(length).expand(rows, length) >= 20
    for token in range(1, 6):
        words[(torch.rand(rows, length, generator=rng) < 0.03) & late] = token
    at = (torch.rand(rows, length - 1, generator=rng) < 0.02) & late[:, :-1]
    words[:, :-1][at], words[:, 1:][at] = it.truth["bigram"]
    return torch.cat([torch.zeros(rows, 1, dtype=torch.int64), words], dim=1)


def told(measure: str, what: str, found: int, of: int, false: int, among: int) -> dict[str, Any]:
    """A row of the table."""
    return {"measure": measure, "planted": what, "found": f"{found} of {of}", "false": f"{false} of {among}"}


def group_neurons() -> dict[str, Any]:
    """The neurons of three groups, by the entropy, the difference of rates and the average precision."""
    found = false = among = 0
    for seed in SEEDS:
        it = planted.neurons(seed)
        own = it.truth["neurons"]["group"]
        data = mt.measure(it.model, "group_neurons", text=words_of(it, seed=seed), share=3 / 42)
        lape, ap, less = (data[name].values for name in ("lape", "group_ap", "group_firing_diff"))
        for g, n in enumerate(own):
            chosen = data["group_selected"].values[:, 1, n].tolist()
            found += lape[1, n] < 1e-9 and chosen == [float(g == h) for h in range(3)]
            found += ap[g, 1, n] > 0.99
            found += less[g, 1, n] > 0.9
        for layer, n in it.truth["others"]:
            false += (
                int(lape[layer, n] < 0.2) + int((ap[:, layer, n] > 0.9).sum()) + int((less[:, layer, n] > 0.9).sum())
            )
            false += int(data["group_selected"].values[:, layer, n].sum())
            among += 1
    return told(
        "group_neurons",
        "a neuron of each of 3 groups, by lape, precision and difference",
        found,
        9 * len(SEEDS),
        false,
        among,
    )


def group_gradient() -> dict[str, Any]:
    """The neurons that each of three groups needs, by the gradient of its loss."""
    found = false = among = 0
    for seed in SEEDS:
        it = planted.neurons(seed)
        data = mt.measure(it.model, "group_gradient", text=words_of(it, rows=16, length=30, seed=seed))
        more = data["group_gradient_diff"].values
        for g, n in enumerate(it.truth["neurons"]["group"]):
            found += int(more[g, 1, n] > 0.1)
            others = it.truth["others"]
            false += sum(int(more[g, layer, m] > 0.02) for layer, m in others)
            among += len(others)
    return told("group_gradient", "a neuron that each of 3 groups needs", found, 3 * len(SEEDS), false, among)


def group_damage() -> dict[str, Any]:
    """What each group loses without each group's neuron: more than 0.2 nats on the diagonal and nowhere else."""
    found = false = among = 0
    it = planted.neurons()
    sets = {f"group {g}": [(1, n)] for g, n in enumerate(it.truth["neurons"]["group"])}
    data = damage(it.model, sets, words_of(it, rows=10, length=30), rows=10)
    for name, hurt in (("damage", 0.2), ("damage_random", 0.02)):
        for s in range(3):
            for g in range(3):
                big = data[name].values[s, g] > hurt and data[f"{name}_lo"].values[s, g] > 0
                if s == g and name == "damage":
                    found += int(big and data["damage_diff_lo"].values[s, g] > 0)
                else:
                    false += int(big)
                    among += 1
    return told("damage", "a neuron that each of 3 groups needs", found, 3, false, among)


def lens_groups() -> dict[str, Any]:
    """The layer whose MLP raises the words of the group that is read: above their share elsewhere there alone."""
    found = false = among = 0
    for seed in SEEDS:
        it = planted.neurons(seed)
        data = mt.measure(it.model, "lens_groups", text=words_of(it, rows=16, length=32, seed=seed))
        more = data["lens_share_diff"].values > 0.1
        found += int(more[:, it.truth["layer"]].sum())
        false += int(more.sum()) - int(more[:, it.truth["layer"]].sum())
        among += more.size - 3
    return told("lens_groups", "a layer that raises the words of each of 3 groups", found, 3 * len(SEEDS), false, among)


def arithmetic() -> dict[str, Any]:
    """In each group's text, the words of every other are said once its neuron is lent its mean; none without."""
    found = false = among = 0
    it = planted.neurons()
    sets = {f"group {g}": [(1, n)] for g, n in enumerate(it.truth["neurons"]["group"])}
    text = words_of(it, rows=8, length=30)
    for t, o in ((0, 1), (1, 2), (2, 0)):
        data = group_arithmetic(it.model, sets, text, target=f"group {t}", other=f"group {o}", rows=8, controls=1)
        for name in ("shift", "shift_random"):
            to = data[name].sel(group=f"group {o}", edit="both").values > 0.1  # in the words of which group
            found += int(name == "shift" and to[t])
            false += int(to.sum()) - int(name == "shift" and to[t])
            among += len(to) - int(name == "shift")
    return told(
        "group_arithmetic", "3 pairs of groups, the words of one in the text of the other", found, 3, false, among
    )


def concept() -> dict[str, Any]:
    """The neuron that raises a group's words is nearest to what the unembedding of these has beyond those of another,
    and fires in its text alone; in a copy whose gate is turned it is silent there, and writes the concept no more.
    """
    found = false = among = 0
    for seed in SEEDS:
        it = planted.neurons(seed)
        text = words_of(it, rows=10, length=24, seed=seed)
        for g, n in enumerate(it.truth["neurons"]["group"]):
            tuned = mt.open(copy.deepcopy(it.model.hf), prove=False)
            tuned.layers[1].W_gate[:, n] = -tuned.layers[1].W_gate[:, n]  # it is silent where it fired
            one, other = (it.model.W_U[:, it.truth["groups"][h]].mean(1) for h in (g, (g + 1) % 3))
            data = concept_neurons(it.model, one - other, text, after=tuned, top=1)
            first = (int(data["layer"][0]), int(data["neuron"][0]))
            own, rest = data.sel(group=f"group {g}"), data.sel(group=[f"group {(g + 2) % 3}"])
            fires = float(own["firing"][0]) > 0.99 and float(own["firing_after"][0]) < 0.01
            found += int(first == (1, n) and float(data["cosine"][0]) > float(data["chance"]))
            found += int(fires and float(own["written_change_hi"]) < -0.02)
            found += int(abs(float(data["cos_gate"][0]) + 1) < 1e-5 and float(data["cos_out"][0]) > 0.99999)
            false += int(abs(float(own["written_random_change"])) > 1e-3) + int(float(rest["firing"][0, 0]) > 0.01)
            false += int(float(data["cosine_random"][0]) > float(data["chance"]))
            among += 3
    what = "a neuron that writes a group's topic, found, silenced, and with another gate"
    return told("concept_neurons", what, found, 9 * len(SEEDS), false, among)


def neuron_events() -> dict[str, Any]:
    """A dead neuron, one of a token that it lowers, of either of two tokens, of a bigram and of first places."""
    found = false = among = 0
    for seed in SEEDS:
        it = planted.neurons(seed)
        data = mt.measure(it.model, "neuron_events", text=mixed(it, seed=seed))
        own = {kind: numbers[0] for kind, numbers in it.truth["neurons"].items()}
        dead, order = (data[name].values for name in ("dead", "ngram_order"))
        early = data["position_bits"].values > 0.05 + 5 * data["position_bits_chance"].values
        trigger, promoted = data["trigger"].values[1], data["trigger_promotion"].values[1]
        found += int(dead[1, own["dead"]] == 1)
        token = own["token"]
        found += int(order[1, token] == 1 and [*trigger[token][trigger[token] >= 0]] == [it.truth["token"]])
        found += int(promoted[token] < 0.05)
        facets = trigger[own["facets"]]
        found += int(order[1, own["facets"]] == 1 and {*facets[facets >= 0].tolist()} == {*it.truth["facets"]})
        found += int(order[1, own["bigram"]] == 2)
        found += int(early[1, own["positional"]])
        for layer, n in it.truth["others"]:
            false += int(dead[layer, n] == 1) + int(order[layer, n] > 0) + int(early[layer, n])
            among += 1
    return told(
        "neuron_events",
        "dead, token (suppressed), two tokens, bigram, first places",
        found,
        6 * len(SEEDS),
        false,
        among,
    )


class Reader:
    """A tokenizer of `planted.neurons`: words of its groups begin small, or great, or inside of a word."""

    bos_token_id, eos_token_id, all_special_ids = None, None, ()

    def __init__(self, it: planted.Planted) -> None:
        """Call the groups' words and the special tokens by what they are."""
        own = {it.truth["token"]: " =", it.truth["facets"][0]: ",", it.truth["facets"][1]: "7"}
        for words, form in zip(it.truth["groups"], (" w{}", " W{}", "w{}"), strict=True):
            own |= {token: form.format("abcdefghijklmnopqrstuvwxyz"[place]) for place, token in enumerate(words)}
        self.words = own

    def decode(self, ids: list[int], **_: object) -> str:
        """The text of one token; nothing of those that have none."""
        return self.words.get(ids[0], "")


def polysemy() -> dict[str, Any]:
    """A neuron of two tokens of two kinds tells two kinds apart, one of a token or of a group's words one kind; of the
    kinds that have many tokens, no other neuron tells any, and of shuffled kinds none at all.
    """
    found = false = among = 0
    for seed in SEEDS:
        it = planted.neurons(seed)
        model = mt.open(it.model.hf, tokenizer=Reader(it), prove=False)
        data = mt.measure(model, "polysemy", text=mixed(it, seed=seed))
        kinds, own = data["polysemy"].values[1], it.truth["neurons"]
        found += int(kinds[own["facets"][0]] == 2) + int(kinds[own["token"][0]] == 1)
        found += sum(int(kinds[n] == 1) for n in own["group"])
        large = [CLASSES.index(name) for name in ("word", "capital", "inside")]
        beyond = (abs(data["class_auroc"].values[..., large] - 0.5) > 0.4).any(-1)
        false += int((data["polysemy_shuffled"].values > 0).sum()) + sum(int(beyond[at]) for at in it.truth["others"])
        among += kinds.size * 2 + len(it.truth["others"])
    what = "a neuron of two kinds of tokens, and four of one kind"
    return told("polysemy", what, found, 5 * len(SEEDS), false, among)


def frequency_tags() -> dict[str, Any]:
    """The neuron that fires at the first word of every sentence of four."""
    found = false = among = 0
    for seed in SEEDS:
        it = planted.neurons(seed)
        for text, rhythm in ((planted.sentences(it, 16, 64, seed=seed), True), (mixed(it, 16, seed=seed), False)):
            data = mt.measure(it.model, "frequency_tags", text=text)
            power = (data["tag_power"] + data["tag2_power"]).values
            sure = (data["tag_power_diff_lo"].values > 0) & (power > 0.5)
            own = it.truth["neurons"]["periodic"][0]
            found += int(rhythm and sure[1, own])
            some = it.truth["others"] if rhythm else [*it.truth["others"], (1, own)]
            false += sum(int(sure[at]) for at in some)
            among += len(some)
    return told("frequency_tags", "a neuron of the first word of four", found, len(SEEDS), false, among)


def neuron_facets() -> dict[str, Any]:
    """The neuron of either of two tokens has two facets, those of one token or one bigram have one."""
    found = false = among = 0
    for seed in SEEDS:
        it = planted.neurons(seed)
        units = [(1, it.truth["neurons"][kind][0]) for kind in ("facets", "token", "bigram")]
        data = facets(it.model, units, mixed(it, rows=60, seed=seed))
        tokens, cluster = data["token"].values[0], data["facet"].values[0]
        pure = all(len({*tokens[cluster == c].tolist()}) == 1 for c in (0, 1))
        found += int(data["facets"].values[0] == 2 and pure)
        false += int((data["facets"].values[1:] > 1).sum())
        among += 2
    return told("neuron_facets", "a neuron of two tokens", found, len(SEEDS), false, among)


def confidence() -> dict[str, Any]:
    """A neuron of the last MLP that writes into a direction which the unembedding does not read."""
    found = false = among = 0
    for seed in SEEDS:
        hf: Any = tiny(seed)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            gain = hf.model.norm.weight
            v = torch.nn.functional.normalize(torch.randn(len(gain), generator=rng), dim=0)
            read = gain * hf.lm_head.weight
            hf.lm_head.weight.copy_((read - (read @ v)[:, None] * v) / gain)
            hf.model.layers[-1].mlp.down_proj.weight[:, 5] = 4 * v
        model = mt.open(hf, prove=False)
        share = mt.measure(model, "confidence_neurons")["null_share"].values[..., 0]
        effects = confidence_effects(model, [5], torch.randint(90, (8, 16), generator=rng), controls=2)
        direct, total, other = (float(effects[name][0]) for name in ("direct", "total", "direct_random"))
        found += int(share[-1, 5] > 0.999 and direct < 1e-4 and total > 0.01)
        false += int((share > 0.9).sum()) - int(share[-1, 5] > 0.9) + int(other < 1e-4)
        among += share.size
    return told("confidence_neurons", "a neuron that writes where nothing is read", found, len(SEEDS), false, among)


def sparsity() -> dict[str, Any]:
    """In a random Llama, neurons that add nothing and dimensions that are never used."""
    found = false = among = 0
    for seed in SEEDS:
        hf: Any = tiny(seed)
        with torch.no_grad():
            hf.model.layers[1].mlp.down_proj.weight[:, :30] *= 1e-7  # 30 of 40 neurons
        model = mt.open(hf, prove=False)
        text = torch.randint(90, (8, 16), generator=torch.Generator().manual_seed(seed))
        data = mt.measure(model, "sparsity", text=text)
        kept = data["active_at"].values[:, 0]  # at an error of 1 %
        found += int(kept[1] <= 0.25 and data["active"].values[1, 0] <= 0.25)
        false += int(kept[0] < 0.5) + int((data["zeros"].values > 0).sum())
        among += 3
    return told("sparsity", "a layer with 10 neurons of 40 that add anything", found, len(SEEDS), false, among)


def outside() -> dict[str, Any]:
    """A text of a group of words that the calibration rows never had, by the coverage of neurons."""
    found = false = among = 0
    for seed in SEEDS:
        it = planted.neurons(seed)
        one, two, three = words_of(it, 60, 24, seed).values()
        known = torch.stack([one, two], dim=1).flatten(0, 1)
        like = [words_of(it, 60, 24, seed + n)[f"group {n % 2}"] for n in (9, 10, 11)]
        for other, unlike in ((three, True), *((some, False) for some in like)):
            data = out_of_distribution(it.model, known, other, scores=("nac",), rows=30)
            far = float(data["auroc_lo"][0]) > 0.9
            found, false, among = found + int(unlike and far), false + int(far and not unlike), among + int(not unlike)
    return told("out_of_distribution", "rows of an unknown group of words, by nac", found, len(SEEDS), false, among)


def tiny(seed: int) -> LlamaForCausalLM:
    """A random Llama of 2 layers, 32 wide."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=None, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).requires_grad_(False)


CASES = (
    group_neurons,
    group_gradient,
    group_damage,
    lens_groups,
    arithmetic,
    concept,
    neuron_events,
    polysemy,
    frequency_tags,
    neuron_facets,
    confidence,
    sparsity,
    outside,
)
