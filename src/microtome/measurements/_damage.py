"""How much each group of texts needs each set of neurons: the damage matrix.

Formula:  D[s, g] = mean over the tokens of g of (loss without the neurons of set s - loss), in nats; the neurons are
          set to 0 in every layer at once.
          Control: the same for random sets of as many neurons in each layer, none of them in any set, each drawn from
          the 8 of its layer whose mean size, E |a_n| |w_out,n| over all groups, is nearest on a logarithmic scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Edit, Zero
from microtome.errors import ArgumentError, error
from microtome.measurements._neuron_weights import output_directions
from microtome.method import Batches, Text
from microtome.metric import token_loss
from microtome.model import Model
from microtome.stream import ExampleMeans, TokenBatch, difference_interval, mean_interval

NEAREST = 8
"""Neurons of the nearest size of which a control is drawn."""

Neurons = Sequence[tuple[int, int]]
"""(layer, neuron), each once."""

Sizes = Mapping[int, Float[Tensor, " neuron"]]


def damage(
    model: Model,
    sets: Mapping[str, Neurons] | xr.Dataset,
    text: Any,
    *,
    tokens: int = 8_000,
    length: int = 128,
    rows: int = 4,
    controls: int = 2,
) -> xr.Dataset:
    """What each group of a text loses when each set of neurons is switched off, beside matched random sets.

    Formula:  D[s, g] = mean over the tokens of g of (loss without set s - loss); see this file's head for the controls.
    Source:   Tang et al., "Language-Specific Neurons: The Key to Multilingual Capabilities in Large Language Models",
              2024 (arXiv 2402.16438), perplexity of each language without the neurons of each. Departs: differences of
              loss in nats, with intervals over rows, beside random sets matched by layer and mean size.
    Cost:     1 + sets x (1 + controls) forwards over the text.
    Check:    an empty set does no damage; the neurons of a planted group hurt it alone; tests/laws/test_damage.py.

    Args:
        model: an open causal model.
        sets: by name, (layer, neuron) of each set; or the result of the measure `group_neurons`, whose chosen neurons
            are a set for each group.
        text: a mapping from groups to texts, or whatever a measure reads.
        tokens: of the text to read, shared equally between groups.
        length: tokens of a row.
        rows: rows of a batch.
        controls: random sets for each set; their damage is averaged.

    Returns:
        A dataset with `damage` [set, group], its control `damage_random` and `damage_diff`, the difference, each with
        the ends of its 95 % interval over rows as `_lo` and `_hi` (NaN below 8 rows); `loss` [group]; `neurons` [set].
        A group with no tokens but first ones has NaN.

    Raises:
        ArgumentError: a neuron does not exist or is named twice, no set is given, or a layer has too few neurons
            outside of the sets to draw controls from.
        DataError: there is too little text.
        ModelUnsupported: the model does not predict the next token.

    >>> found = mt.measure(model, "group_neurons", text=texts)
    >>> microtome.measurements.damage(model, found, texts)
    """
    model.require_next_token()
    chosen = neuron_sets(model, sets)
    read = Text(text, tokens=tokens, length=length, rows=rows).batches(model, apart=True)
    sizes = neuron_sizes(model, read)
    rng = torch.Generator().manual_seed(current().seed)
    taken = {neuron for own in chosen.values() for neuron in own}
    drawn = [[matched(sizes, own, taken, rng) for _ in range(controls)] for own in chosen.values()]
    plan = [[own, *others] for own, others in zip(chosen.values(), drawn, strict=True)]
    kept = _read(model, read, plan)
    return _dataset(model, chosen, read, kept)


def neuron_sets(model: Model, sets: Mapping[str, Neurons] | xr.Dataset) -> dict[str, list[tuple[int, int]]]:
    """The sets by name, each neuron checked."""
    if isinstance(sets, xr.Dataset):
        if "group_selected" not in sets:
            do = 'give the result of mt.measure(model, "group_neurons", ...)'
            raise error(ArgumentError, "the dataset has no group_selected", got=", ".join(map(str, sets)), do=do)
        chosen = sets["group_selected"]
        layers, neurons = chosen["layer"].values, chosen["neuron"].values
        given: dict[str, Any] = {
            str(name): [(int(layers[i]), int(neurons[j])) for i, j in np.argwhere(chosen.sel(group=name).values == 1)]
            for name in chosen["group"].values
        }
    else:
        given = dict(sets)
    if not given:
        raise error(ArgumentError, "no set of neurons is given", do="give sets={name: [(layer, neuron), ...]}")
    found: dict[str, list[tuple[int, int]]] = {}
    for name, own in given.items():
        found[str(name)] = [(int(layer), int(neuron)) for layer, neuron in own]
        for layer, neuron in found[str(name)]:
            site = Site("mlp.post", layer)
            there = site in model.anatomy.hook_points and 0 <= neuron < model.anatomy.size(site, "neuron")
            if not there or found[str(name)].count((layer, neuron)) > 1:
                what = f'the set "{name}" holds a neuron {"twice" if there else "that the model has not"}'
                do = "name each neuron once, as (layer, neuron)"
                raise error(ArgumentError, what, got=f"({layer}, {neuron})", do=do)
    return found


def neuron_sizes(model: Model, read: Batches) -> dict[int, Float[Tensor, " neuron"]]:
    """By layer, the mean size of what each neuron adds [neuron]."""
    layers = [site.layer for site in model.anatomy.hook_points if site.name == "mlp.post" and site.layer is not None]
    total: dict[int, Tensor] = {}
    count = 0
    for batch in read.parts:
        text = torch.ones(batch.tokens.shape, dtype=torch.bool) if batch.text is None else batch.text
        count += int(text.sum())

        def see(site: Site, x: Tensor, text: Tensor = text) -> None:
            own = x[text.to(x.device)].abs().sum(0, dtype=torch.float64).cpu()
            assert site.layer is not None
            total[site.layer] = total.get(site.layer, torch.zeros_like(own)) + own

        model.run(batch.tokens, observe={f"{','.join(map(str, layers))}.mlp.post": see}, logits=False)
    norms = {i: output_directions(model, i).detach().double().norm(dim=-1).cpu() for i in total}
    return {i: x / count * norms[i] for i, x in total.items()}


def matched(sizes: Sizes, own: Neurons, taken: set[tuple[int, int]], rng: torch.Generator) -> list[tuple[int, int]]:
    """As many other neurons of the same layers, each of about the size of one of the set.

    Raises:
        ArgumentError: a layer has not enough.
    """
    found: list[tuple[int, int]] = []
    free = {i: torch.tensor([(i, n) not in taken for n in range(len(x))]) for i, x in sizes.items()}
    for layer, neuron in own:
        apart = (sizes[layer].log() - sizes[layer][neuron].log()).abs().nan_to_num(0.0, posinf=1e300)
        apart[~free[layer]] = torch.inf
        near = apart.argsort(stable=True)[:NEAREST]
        near = near[apart[near] < torch.inf]
        if not len(near):
            what = f"layer {layer} has too few neurons outside of the sets to draw controls from"
            raise error(ArgumentError, what, got=f"{len(sizes[layer])} neurons", do="give smaller sets, or controls=0")
        other = int(near[int(torch.randint(len(near), (), generator=rng))])
        free[layer][other] = False
        found.append((layer, other))
    return found


def _off(neurons: Neurons) -> list[Edit]:
    """Edits that set neurons to 0."""
    by_layer: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        by_layer.setdefault(layer, []).append(neuron)
    return [Zero(f"{layer}.mlp.post[{','.join(map(str, some))}]") for layer, some in sorted(by_layer.items())]


def _read(model: Model, read: Batches, plan: Sequence[Sequence[Neurons]]) -> list[dict[str, ExampleMeans]]:
    """By group, what was kept of the loss, and of the damage of each set and of its controls."""
    n = len(plan)
    kept = [{"loss": ExampleMeans(1), "damage": ExampleMeans(n), "damage_random": ExampleMeans(n)} for _ in read.groups]
    for done, batch in enumerate(read.parts):
        whole = _loss(model, batch, [])
        values = {"loss": whole.unsqueeze(-1)}
        lost = [[_loss(model, batch, _off(some)) - whole if some else torch.zeros_like(whole) for some in own]
                for own in plan]  # fmt: skip
        values["damage"] = torch.stack([own[0] for own in lost], dim=-1)
        if all(len(own) > 1 for own in lost):
            values["damage_random"] = torch.stack([torch.stack(own[1:]).mean(0) for own in lost], dim=-1)
        predicted = torch.ones(batch.tokens.shape, dtype=torch.bool) if batch.text is None else batch.text.clone()
        predicted[:, 0] = False
        for group in batch.group.unique().tolist():
            for name, x in values.items():
                kept[group][name].update(x, batch.start, predicted & (batch.group == group))
        current().report("switching neurons off", done + 1, len(read.parts))
    return kept


def _loss(model: Model, batch: TokenBatch, edits: list[Edit]) -> Float[Tensor, "example pos"]:
    """The loss of every token, 0 at the first one of each row."""
    logits = model.run(batch.tokens, edits=edits).logits
    return torch.nn.functional.pad(token_loss(logits, batch.tokens.to(logits.device)), (1, 0)).double().cpu()


def _dataset(
    model: Model, sets: Mapping[str, Neurons], read: Batches, kept: Sequence[Mapping[str, ExampleMeans]]
) -> xr.Dataset:
    """The matrix with its intervals, as a dataset that says what it is."""
    variables: dict[str, Any] = {"neurons": ("set", [len(own) for own in sets.values()], {"unit": "neurons",
                                 "meaning": "how many neurons the set has"})}  # fmt: skip
    meanings = {
        "loss": "mean next-token loss of the group",
        "damage": "mean increase of the group's loss without the set",
        "damage_random": "the same without random neurons of the same layers and sizes",
    }
    results = {
        name: [own[name].result(empty=True) for own in kept]
        for name in meanings if any(own[name].examples for own in kept)
    }  # fmt: skip
    for name, groups in results.items():
        ends = [mean_interval(one.total, weights=one.count) for one in groups]
        variables |= _named(name, ends, meanings[name])
    if "damage_random" in results:
        pairs = zip(results["damage"], results["damage_random"], strict=True)
        ends = [
            difference_interval(one.total, other.total, weights=one.count, control_weights=other.count)
            for one, other in pairs
        ]
        variables |= _named("damage_diff", ends, "damage minus damage_random")
    data = xr.Dataset(variables, coords={"set": list(sets), "group": list(read.groups)})
    told = {"method": "damage", "text": read.source, "seed": current().seed}
    return data.assign_attrs(dict(model.provenance) | told)


def _named(name: str, ends: Sequence[Sequence[Tensor]], meaning: str) -> dict[str, Any]:
    """A variable and its ends, of every group [set, group], or [group] where there is one value a group."""
    found: dict[str, Any] = {}
    for at, ending in enumerate(("", "_lo", "_hi")):
        x = torch.stack([one[at] for one in ends], dim=-1).numpy()
        dims, x = (("group",), x[0]) if name == "loss" else (("set", "group"), x)
        found[name + ending] = (dims, x, {"unit": "nats", "meaning": meaning})
    return found
