"""Arithmetic with groups: add what one group does to its neurons, take away what another does, and see what is said.

Formula:  m_n = mean activation of neuron n over the text of `target` but first tokens; T, O the sets of neurons of
          `target` and of `other`;
          scale:  a_n <- scale a_n for n in O;   add:  a_n <- a_n + strength m_n for n in T;   both: these two in turn;
          rise[e, g] = mean over the tokens of g of (loss under edit e - loss), in nats;
          share[g, h] = mean over the tokens of g of the probability that the next one is a token of group h, as
          `group_tokens` gives tokens to groups;  shift[e, g, h] = the same under edit e - share[g, h].
          Control: the same arithmetic with random neurons of the same layers and sizes, in no set, at their own means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Add, Edit, Scale
from microtome.errors import ArgumentError, DataError, error
from microtome.measurements._damage import Neurons, matched, neuron_sets, neuron_sizes
from microtome.measurements._lens_groups import group_tokens, members
from microtome.method import Batches, Text
from microtome.metric import token_loss
from microtome.model import Model
from microtome.stream import ExampleMeans, TokenBatch, difference_interval, mean_interval

EDITS = ("scale", "add", "both")
Kept = dict[str, ExampleMeans]


def group_arithmetic(
    model: Model,
    sets: Mapping[str, Neurons] | xr.Dataset,
    text: Mapping[str, Any],
    *,
    target: str,
    other: str,
    strength: float = 1.0,
    scale: float = 0.0,
    tokens: int = 8_000,
    length: int = 128,
    rows: int = 4,
    controls: int = 2,
) -> xr.Dataset:
    """Add the mean activation of one group to its neurons, scale those of another, and measure what that does.

    Formula:  see this file's head.
    Source:   Gurgurov et al., "Language Arithmetics: Towards Systematic Language Neuron Identification and
              Manipulation", 2025 (arXiv 2507.22608). Departs: next-token probability of tokens that belong to a group
              in place of the language of generated texts; losses of every group; random neurons beside.
    Cost:     2 forwards over the text, and 3 (1 + controls) edited ones.
    Check:    a strength of 0 and a scale of 1 change nothing; the planted neurons of a group move what is said to its
              words, and others do not; tests/laws/test_group_arithmetic.py, tests/planted/test_neurons.py.

    Args:
        model: an open causal model.
        sets: by group, (layer, neuron) of its set; or the result of the measure `group_neurons`.
        text: a mapping from groups to texts; `target` and `other` among them.
        target: the group whose mean is added to its neurons.
        other: the group whose neurons are scaled.
        strength: of what is added, in means.
        scale: of the activations of the other group's neurons; 0 switches them off.
        tokens: of the text to read, shared equally between groups.
        length: tokens of a row.
        rows: rows of a batch.
        controls: random sets for each set; what they do is averaged.

    Returns:
        A dataset with `rise` [group, edit] and `shift` [group, edit, tokens_of], each beside its control as `_random`
        and the difference as `_diff`, with the ends of their 95 % intervals over rows as `_lo` and `_hi` (NaN below 8
        rows); `loss` [group]; `share` [group, tokens_of], of the whole model; `text_share` [group, tokens_of], of the
        text itself; `vocabulary` [tokens_of] and `neurons` [edit]. Edits are "scale", "add" and "both". A group with no
        tokens but first ones has NaN.

    Raises:
        ArgumentError: `target` and `other` are one, or have no set or no text; a set is refused as by `damage`.
        DataError: there is too little text, or none of `target` but first tokens.
        ModelUnsupported: the model does not predict the next token.

    >>> found = mt.measure(model, "group_neurons", text=texts)
    >>> microtome.measurements.group_arithmetic(model, found, texts, target="fr", other="en")
    """
    model.require_next_token()
    chosen = neuron_sets(model, sets)
    read = Text(text, tokens=tokens, length=length, rows=rows).batches(model, apart=True)
    _require_groups(target, other, chosen, read)
    means, sizes = _target_means(model, read, read.groups.index(target)), neuron_sizes(model, read)
    rng = torch.Generator().manual_seed(current().seed)
    own = {"target": chosen[target], "other": chosen[other]}
    taken = {neuron for some in chosen.values() for neuron in some}
    drawn = [{name: matched(sizes, some, taken, rng) for name, some in own.items()} for _ in range(controls)]
    edits = [_edits(some, means, strength, scale) for some in (own, *drawn)]
    counts = _counts(model, read)
    belongs = members(group_tokens(counts), len(read.groups))
    kept = _read(model, read, edits, belongs)
    numbers = {"scale": len(own["other"]), "add": len(own["target"])}
    made = _dataset(model, read, kept, counts, belongs, numbers | {"both": sum(numbers.values())})
    return made.assign_attrs(target=target, other=other, strength=strength, scale=scale)


def _require_groups(target: str, other: str, sets: Mapping[str, Neurons], read: Batches) -> None:
    """Refuse a pair of groups that is none.

    Raises:
        ArgumentError: see `group_arithmetic`.
    """
    if target == other:
        raise error(ArgumentError, "target and other are the same group", got=target, do="name two groups")
    for name, group in (("target", target), ("other", other)):
        for what, known in (("set of neurons", list(sets)), ("text", list(read.groups))):
            if group not in known:
                raise error(ArgumentError, f"{name} has no {what}", got=group, allowed=", ".join(known), do="name one")


def later_tokens(batch: TokenBatch) -> Tensor:
    """[row, pos] The tokens of the text but first ones."""
    later = torch.ones(batch.tokens.shape, dtype=torch.bool) if batch.text is None else batch.text.clone()
    later[:, 0] = False
    return later


def _target_means(model: Model, read: Batches, group: int) -> dict[int, Float[Tensor, " neuron"]]:
    """By layer, the mean activation of each neuron over the tokens of a group but first ones.

    Raises:
        DataError: there are none.
    """
    layers = [site.layer for site in model.anatomy.hook_points if site.name == "mlp.post" and site.layer is not None]
    total: dict[int, Tensor] = {}
    count = 0
    for batch in read.parts:
        mask = later_tokens(batch) & (batch.group == group)
        count += int(mask.sum())

        def see(site: Site, x: Tensor, mask: Tensor = mask) -> None:
            own = x[mask.to(x.device)].sum(0, dtype=torch.float64).cpu()
            assert site.layer is not None
            total[site.layer] = total.get(site.layer, torch.zeros_like(own)) + own

        if bool(mask.any()):
            model.run(batch.tokens, observe={f"{','.join(map(str, layers))}.mlp.post": see}, logits=False)
    if not count:
        what = "the text of target has no tokens but first ones, whose mean could be added"
        raise error(DataError, what, got=read.groups[group], do="give it a longer text")
    return {layer: x / count for layer, x in total.items()}


def _by_layer(neurons: Neurons) -> list[tuple[int, list[int]]]:
    found: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        found.setdefault(layer, []).append(neuron)
    return sorted(found.items())


def _scaled(neurons: Neurons, factor: float) -> list[Edit]:
    return [Scale(f"{layer}.mlp.post[{','.join(map(str, some))}]", factor) for layer, some in _by_layer(neurons)]


def _added(neurons: Neurons, means: Mapping[int, Tensor], strength: float) -> list[Edit]:
    return [
        Add(f"{layer}.mlp.post[{','.join(map(str, some))}]", value=means[layer][some].float(), strength=strength)
        for layer, some in _by_layer(neurons)
    ]


def _edits(
    sets: Mapping[str, Neurons], means: Mapping[int, Tensor], strength: float, scale: float
) -> dict[str, list[Edit]]:
    """The edits of the arithmetic with two sets, by name."""
    down, up = _scaled(sets["other"], scale), _added(sets["target"], means, strength)
    return {"scale": down, "add": up, "both": [*down, *up]}


def _counts(model: Model, read: Batches) -> Float[Tensor, "group vocab"]:
    """How often each token is in the text of each group."""
    found = torch.zeros(len(read.groups), model.anatomy.d_vocab, dtype=torch.float64)
    for batch in read.parts:
        later = later_tokens(batch)
        places = batch.group[later] * found.shape[1] + batch.tokens[later].cpu()
        found += torch.bincount(places, minlength=found.numel()).reshape(found.shape)
    return found


def _said(
    model: Model, batch: TokenBatch, edits: Sequence[Edit], belongs: Float[Tensor, "vocab group"]
) -> tuple[Float[Tensor, "row pos"], Float[Tensor, "row pos group"]]:
    """Of every token but first ones, its loss, and the probability that tokens of each group had in its place."""
    logits = model.run(batch.tokens, edits=edits).logits
    loss = token_loss(logits, batch.tokens.to(logits.device)).double().cpu()
    mass = torch.stack([row[:-1].float().softmax(-1) @ belongs.to(row.device) for row in logits]).double().cpu()
    return torch.nn.functional.pad(loss, (1, 0)), torch.nn.functional.pad(mass, (0, 0, 1, 0))


def _read(
    model: Model, read: Batches, edits: Sequence[Mapping[str, Sequence[Edit]]], belongs: Float[Tensor, "vocab group"]
) -> list[Kept]:
    """By group, what was kept of the loss and the shares, and of what the edits do to them."""
    n, groups = len(EDITS), belongs.shape[1]
    shapes: dict[str, Any] = {"loss": 1, "share": groups}
    for ending in ("", "_random") if len(edits) > 1 else ("",):
        shapes |= {f"rise{ending}": n, f"shift{ending}": (n, groups)}
    kept = [{name: ExampleMeans(shape) for name, shape in shapes.items()} for _ in read.groups]
    for done, batch in enumerate(read.parts):
        loss, share = _said(model, batch, [], belongs)
        values = {"loss": loss.unsqueeze(-1), "share": share}
        rises: list[Tensor] = []
        shifts: list[Tensor] = []
        for own in edits:
            said = [_said(model, batch, own[name], belongs) if own[name] else (loss, share) for name in EDITS]
            rises.append(torch.stack([one[0] - loss for one in said], dim=-1))
            shifts.append(torch.stack([one[1] - share for one in said], dim=-2))
        values |= {"rise": rises[0], "shift": shifts[0]}
        if len(edits) > 1:
            values |= {"rise_random": torch.stack(rises[1:]).mean(0), "shift_random": torch.stack(shifts[1:]).mean(0)}
        for group in batch.group.unique().tolist():
            for name, x in values.items():
                kept[group][name].update(x, batch.start, later_tokens(batch) & (batch.group == group))
        current().report("arithmetic with groups", done + 1, len(read.parts))
    return kept


MEANT: Mapping[str, tuple[str, str]] = {
    "loss": ("nats", "mean next-token loss of the group"),
    "share": ("share", "mean probability that the next token of the group's text is a token of tokens_of"),
    "rise": ("nats", "mean rise of the group's loss under the edit"),
    "rise_random": ("nats", "the same with random neurons of the same layers and sizes"),
    "shift": ("share", "mean change of share under the edit"),
    "shift_random": ("share", "the same with random neurons of the same layers and sizes"),
}


def _dataset(
    model: Model, read: Batches, kept: Sequence[Kept], counts: Tensor, belongs: Tensor, neurons: Mapping[str, int]
) -> xr.Dataset:
    """The means with their intervals, as a dataset that says what it is."""
    axes = {"loss": (), "share": ("tokens_of",), "rise": ("edit",), "shift": ("edit", "tokens_of")}
    variables: dict[str, Any] = {}

    def put(name: str, ends: Sequence[Sequence[Tensor]], about: tuple[str, str]) -> None:
        for at, ending in enumerate(("", "_lo", "_hi")):
            x = torch.stack([one[at] for one in ends])
            dims = ("group", *axes[name.partition("_")[0]])
            x = x.squeeze(1) if name == "loss" else x
            variables[name + ending] = (dims, x.numpy(), {"unit": about[0], "meaning": about[1]})

    results = {name: [own[name].result(empty=True) for own in kept] for name in kept[0]}
    for name, groups in results.items():
        put(name, [mean_interval(one.total, weights=one.count) for one in groups], MEANT[name])
    for name in ("rise", "shift"):
        if f"{name}_random" in results:
            pairs = zip(results[name], results[f"{name}_random"], strict=True)
            ends = [difference_interval(a.total, b.total, weights=a.count, control_weights=b.count) for a, b in pairs]
            put(f"{name}_diff", ends, (MEANT[name][0], f"{name} minus {name}_random"))
    text = (counts / counts.sum(1, keepdim=True)) @ belongs.double()
    variables |= {
        "text_share": (("group", "tokens_of"), text.numpy(), {"unit": "share", "meaning": "of the text itself"}),
        "vocabulary": ("tokens_of", belongs.sum(0).long().numpy(), {"unit": "tokens", "meaning": "of each group"}),
        "neurons": ("edit", [neurons[name] for name in EDITS], {"unit": "neurons", "meaning": "that it changes"}),
    }  # fmt: skip
    coords = {"edit": list(EDITS), "group": list(read.groups), "tokens_of": list(read.groups)}
    told = {"method": "group_arithmetic", "text": read.source, "seed": current().seed}
    return xr.Dataset(variables, coords=coords).assign_attrs(dict(model.provenance) | told)
