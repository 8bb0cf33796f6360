"""Neurons that write a concept: value vectors near a direction, and what their keys do before and after tuning.

Formula:  v the concept, a direction of the stream: given, or the mean of the last layer's resid_post over the text of
          one group less that of another (tokens but first ones);  cosine_n = cos(w_out,n, v);
          of all neurons, the `top` with the largest cosine are reported; `chance`: what the largest cosine of as many
          random directions exceeds with a chance of 5 %, from cos^2 ~ Beta(1/2, (d - 1)/2);
          activation[n, g], firing[n, g] = mean of a_n, and share of tokens with gate > 0 (activation in plain MLPs),
          over the tokens of group g but first ones;
          written[g] = mean over those of sum over the reported n of a_n w_out,n . v / |v|;
          Control: as many other neurons of the same layers and mean sizes, each drawn of the 8 nearest.
          Of a second model, the same neurons with its own weights and the same v: `_after`; written_change is the
          difference, row by row;  cos_in, cos_gate, cos_out: of each neuron's weights before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from microtome.anatomy import Site, at_least_float32, parse
from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.measurements._damage import matched, neuron_sizes
from microtome.measurements._group_arithmetic import later_tokens
from microtome.measurements._neuron_weights import neuron_directions, output_directions
from microtome.measurements._similarity import require_one_tokenizer
from microtome.method import Batches, Text
from microtome.model import Model
from microtome.stream import ExampleMeans, TokenBatch, mean_interval

Units = Sequence[tuple[int, int]]
"""(layer, neuron) of each."""
CHANCE = 0.05


def concept_neurons(
    model: Model,
    concept: Tensor | tuple[str, str],
    text: Any,
    *,
    after: Model | None = None,
    top: int = 32,
    words: int = 5,
    tokens: int = 8_000,
    length: int = 128,
    rows: int = 4,
) -> xr.Dataset:
    """The neurons whose value vectors point at a concept, where they fire, and what tuning does to them.

    Formula:  see this file's head.
    Source:   Li, Yong and Bach, "Preference Tuning For Toxicity Mitigation Generalizes Across Languages", 2024
              (arXiv 2406.16235); Geva et al., "Transformer Feed-Forward Layers Are Key-Value Memories", 2021 (arXiv
              2012.14913). Departs: the concept may be a difference of group means in place of a trained probe; random
              neurons beside.
    Cost:     2 forwards over the text for either model, 3 where the concept is of groups; d_model operations a neuron.
    Check:    a planted neuron that writes a group's topic is the first, and is seen to fall silent in a tuned copy;
              tests/laws/test_concept_neurons.py, tests/planted/test_neurons.py.

    Args:
        model: an open model.
        concept: [d_model] a direction of the stream, such as a probe's; or the names of two groups of the text, of
            which it is the first less the second.
        text: a mapping from groups to texts, or whatever a measure reads.
        after: the same model tuned, with the same tokens, layers and neurons.
        top: how many neurons to report.
        words: how many tokens that each promotes to name.
        tokens: of the text to read, shared equally between groups.
        length: tokens of a row.
        rows: rows of a batch.

    Returns:
        A dataset over `unit`, with the coordinates `layer` and `neuron`: `cosine`, `promoted` (text; empty where the
        stream cannot be read as logits), `activation` and `firing` [unit, group], each of the control too as `_random`;
        `written`, `written_random` [group] with the ends of their 95 % intervals over rows as `_lo` and `_hi` (NaN
        below 8 rows, all NaN without tokens); `chance`. With `after` also `.._after`, `written_change`,
        `written_random_change` [group] with intervals, `cos_in`, `cos_gate` (gated), `cos_out` [unit], `_random` too.

    Raises:
        ArgumentError: the direction is none of the stream, a group is not of the text, the models differ in shape, or
            more neurons are asked for than half of a layer's.
        SiteError: the model's MLPs have no neurons.
        DataError: the tokenizers differ, or there is too little text.

    >>> found = microtome.measurements.concept_neurons(base, ("rude", "polite"), texts, after=tuned)
    """
    layers = _layers(model)
    _require_alike(model, after)
    read = Text(text, tokens=tokens, length=length, rows=rows).batches(model, apart=True)
    v = _direction(model, concept, read).double().cpu()
    v = v / v.norm()
    cosine = {i: cosine_similarity(output_directions(model, i).detach().double().cpu(), v, dim=-1) for i in layers}
    units = _nearest(cosine, top)
    others = matched(neuron_sizes(model, read), units, set(units), torch.Generator().manual_seed(current().seed))
    variables: dict[str, Any] = {}
    for end, some in (("", units), ("_random", others)):
        variables |= {f"cosine{end}": _unit([float(cosine[i][n]) for i, n in some], "cosine", "of value and concept")}
        variables |= _weights_of(model, after, some, v, end)
    kept = _read(read, [model] if after is None else [model, after], [units, others], v)
    variables |= _activity(kept, units)
    variables["promoted"] = _unit(_promoted(model, units, words), "token", "tokens that the neuron promotes most")
    variables["chance"] = ((), _chance(sum(map(len, cosine.values())), len(v)), {"unit": "cosine", "meaning": CAN})
    coords = {"layer": ("unit", [i for i, _ in units]), "neuron": ("unit", [n for _, n in units])}
    told = {"method": "concept_neurons", "text": read.source, "seed": current().seed}
    data = xr.Dataset(variables, coords=coords | {"group": list(read.groups)})
    return data.assign_attrs(dict(model.provenance) | told)


CAN = "the largest of as many random directions is above it in 5 % of cases"


def _unit(values: Any, unit: str, meaning: str) -> tuple[str, Any, dict[str, str]]:
    return "unit", values, {"unit": unit, "meaning": meaning}


def _layers(model: Model) -> list[int]:
    """The layers that have neurons.

    Raises:
        SiteError: none has.
    """
    points = [site for site in model.anatomy.hook_points if site.name == "mlp.post" and site.layer is not None]
    if not points:
        model.anatomy.sites(parse("*.mlp.post"))  # says why there are none
    return [site.layer for site in points if site.layer is not None]


def _require_alike(model: Model, after: Model | None) -> None:
    """Refuse a second model that is no tuned copy of the first.

    Raises:
        ArgumentError: it has other layers or sizes.
        DataError: it reads a text as other tokens.
    """
    if after is None:
        return
    shapes = [
        (m.anatomy.d_model, m.anatomy.d_vocab, [m.anatomy.size(Site("mlp.post", i), "neuron") for i in _layers(m)])
        for m in (model, after)
    ]
    if shapes[0] != shapes[1]:
        got = f"d_model {shapes[1][0]}, {len(shapes[1][2])} layers of {shapes[1][2][:1]} neurons"
        raise error(ArgumentError, "after is no tuned copy of the model: its sizes differ", got=got,
                    do="give a checkpoint of the same model")  # fmt: skip
    require_one_tokenizer(model, after)


def _direction(model: Model, concept: Tensor | tuple[str, str], read: Batches) -> Float[Tensor, " d_model"]:
    """The concept as a direction of the stream.

    Raises:
        ArgumentError: it is none, or names a group that the text has not.
    """
    d = model.anatomy.d_model
    if isinstance(concept, Tensor):
        if concept.shape != (d,) or not bool(concept.isfinite().all()) or not bool(concept.any()):
            got = f"shape {list(concept.shape)}" if concept.shape != (d,) else "zeros, or what is not finite"
            raise error(
                ArgumentError, "concept is no direction of the stream", got=got, allowed=f"[{d}]", do="give one"
            )
        return concept.detach()
    for name in concept:
        if name not in read.groups or len(set(concept)) != 2:
            raise error(ArgumentError, "concept must name two groups of the text", got=" and ".join(concept),
                        allowed=", ".join(read.groups), do="name two")  # fmt: skip
    toward, away = (read.groups.index(name) for name in concept)
    last = Site("resid_post", model.anatomy.n_layers - 1)
    total, count = torch.zeros(2, d, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for batch in read.parts:
        masks = [later_tokens(batch) & (batch.group == group) for group in (toward, away)]

        def see(site: Site, x: Tensor, masks: Sequence[Tensor] = masks) -> None:
            for row, mask in enumerate(masks):
                total[row] += x[mask.to(x.device)].sum(0, dtype=torch.float64).cpu()
                count[row] += int(mask.sum())

        if any(bool(mask.any()) for mask in masks):
            model.run(batch.tokens, observe={str(last): see}, logits=False)
    means = total / count.unsqueeze(1)
    found = means[0] - means[1]
    if not bool(found.isfinite().all()) or not bool(found.any()):
        raise error(DataError, "the two groups have no different means", got=" and ".join(concept), do="give more text")
    return found


def _nearest(cosine: Mapping[int, Float[Tensor, " neuron"]], top: int) -> list[tuple[int, int]]:
    """The neurons of the largest cosines, the largest first.

    Raises:
        ArgumentError: there are too many, so that a layer could hold no controls.
    """
    most = min(len(x) for x in cosine.values()) // 2
    if not 1 <= top <= most:
        raise error(ArgumentError, "top must be a number of neurons", got=top, allowed=f"1 to {most}", do="give fewer")
    every = [(i, n) for i, x in cosine.items() for n in range(len(x))]
    order = torch.cat(list(cosine.values())).argsort(descending=True, stable=True)[:top]
    return [every[place] for place in order.tolist()]


def _chance(neurons: int, d: int) -> float:
    """See `chance` in this file's head."""
    from scipy.stats import beta

    tail = 2 * (1 - (1 - CHANCE) ** (1 / neurons))  # of |cos|, as half of the directions point the other way
    return float(beta.isf(tail, 0.5, (d - 1) / 2) ** 0.5)


def _weights_of(model: Model, after: Model | None, units: Units, v: Tensor, end: str) -> dict[str, Any]:
    """What tuning has done to the weights of neurons."""
    if after is None:
        return {}
    found: dict[str, list[float]] = {}
    made: dict[int, list[dict[str, Tensor]]] = {}
    for layer, n in units:
        if layer not in made:
            made[layer] = [
                {name: x.detach().double().cpu() for name, x in neuron_directions(m, layer).items()}
                for m in (model, after)
            ]
        old, new = made[layer]
        for name in old:
            value = cosine_similarity(old[name][n], new[name][n], dim=0)
            found.setdefault(f"cos_{name.removeprefix('w_')}{end}", []).append(float(value))
        found.setdefault(f"cosine{end}_after", []).append(float(cosine_similarity(new["w_out"][n], v, dim=0)))
    meant = "of the weights before and after"
    return {
        name: _unit(x, "cosine", "of value and concept, tuned" if name.startswith("cosine") else meant)
        for name, x in found.items()
    }


Kept = dict[str, ExampleMeans]


def _read(read: Batches, models: Sequence[Model], sets: Sequence[Units], v: Tensor) -> list[Kept]:
    """By group, activations, firing and what is written, of every model and set; and the changes between models."""
    ends = [f"{end}{when}" for when in ("", "_after")[: len(models)] for end in ("", "_random")]
    writes = [[_writes(m, some, v) for some in sets] for m in models]
    kept: list[Kept] = []
    for _ in read.groups:
        own: Kept = {f"{name}{end}": ExampleMeans(len(sets[0])) for end in ends for name in ("activation", "firing")}
        own |= {f"written{end}": ExampleMeans(1) for end in ends}
        if len(models) > 1:
            own |= {f"written{end}_change": ExampleMeans(1) for end in ("", "_random")}
        kept.append(own)
    for done, batch in enumerate(read.parts):
        values: dict[str, Tensor] = {}
        for when, m, along in zip(("", "_after"), models, writes, strict=False):
            for end, some, write in zip(("", "_random"), sets, along, strict=True):
                post, fires = _seen(m, batch, some)
                values |= {f"activation{end}{when}": post, f"firing{end}{when}": fires}
                values[f"written{end}{when}"] = (post @ write).unsqueeze(-1)
        for end in ("", "_random") if len(models) > 1 else ():
            values[f"written{end}_change"] = values[f"written{end}_after"] - values[f"written{end}"]
        for group in batch.group.unique().tolist():
            mask = later_tokens(batch) & (batch.group == group)
            for name, x in values.items():
                kept[group][name].update(x, batch.start, mask)
        current().report("reading keys of neurons", done + 1, len(read.parts))
    return kept


def _writes(model: Model, units: Units, v: Tensor) -> Float[Tensor, " unit"]:
    """[unit] What a unit of each neuron's activation adds along the concept."""
    out = {i: output_directions(model, i).detach().double().cpu() for i, _ in units}
    return torch.stack([out[i][n] @ v for i, n in units])


def _seen(
    model: Model, batch: TokenBatch, units: Units
) -> tuple[Float[Tensor, "row pos unit"], Float[Tensor, "row pos unit"]]:
    """Activations of neurons, and 1 where their gate is above 0."""
    by_layer: dict[int, list[int]] = {}
    for layer, n in units:
        by_layer.setdefault(layer, []).append(n)
    points = model.anatomy.hook_points
    gate = {i: next(s for s in ("mlp.gate", "mlp.pre", "mlp.post") if Site(s, i) in points) for i in by_layer}
    held: dict[tuple[str, int], Tensor] = {}

    def see(site: Site, x: Tensor) -> None:
        assert site.layer is not None
        held[site.name, site.layer] = at_least_float32(x)[..., by_layer[site.layer]].double().cpu()

    sites = {f"{i}.{name}" for i in by_layer for name in ("mlp.post", gate[i])}
    model.run(batch.tokens, observe=dict.fromkeys(sorted(sites), see), logits=False)
    column = {(i, n): place for i, own in by_layer.items() for place, n in enumerate(own)}
    post = torch.stack([held["mlp.post", i][..., column[i, n]] for i, n in units], dim=-1)
    fires = torch.stack([held[gate[i], i][..., column[i, n]] > 0 for i, n in units], dim=-1)
    return post, fires.double()


def _activity(kept: Sequence[Kept], units: Units) -> dict[str, Any]:
    """The means of what was kept, as variables; of what is written with intervals."""
    found: dict[str, Any] = {}
    nothing = torch.full((len(units),), torch.nan, dtype=torch.float64)
    for name in kept[0]:
        what = name.partition("_")[0]
        if what == "written":
            results = [own[name].result(empty=True) for own in kept]
            ends = [mean_interval(one.total, weights=one.count) for one in results]
            for at, ending in enumerate(("", "_lo", "_hi")):
                x = torch.stack([one[at][0] for one in ends]).numpy()
                about = {"unit": "norm", "meaning": "what the neurons add along the concept, mean over tokens"}
                found[name + ending] = ("group", x, about)
            continue
        x = torch.stack([own[name].mean if own[name].examples else nothing for own in kept], dim=-1).numpy()
        about = {"activation": ("1", "mean activation"), "firing": ("share", "tokens with a positive gate")}[what]
        found[name] = (("unit", "group"), x, {"unit": about[0], "meaning": about[1]})
    return found


def _promoted(model: Model, units: Units, words: int) -> list[str]:
    """The tokens that each neuron promotes most, relative to the mean token; nothing of an unreadable stream."""
    norm = model.final_norm
    if norm is None or model.W_U.shape[0] != model.anatomy.d_model:
        return ["" for _ in units]
    unembed = at_least_float32(model.W_U).detach()
    unembed = unembed - unembed.mean(1, keepdim=True)
    found: list[str] = []
    for layer, n in units:
        write = norm.centre(output_directions(model, layer).detach()[n : n + 1]) * norm.gain
        best = (write @ unembed)[0].topk(min(words, unembed.shape[1])).indices
        found.append(" ".join(repr(word) for word in model.to_words(best.cpu())))
    return found
