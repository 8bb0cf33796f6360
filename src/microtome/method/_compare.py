"""Two models of one shape on the same text: what moved, and how sure that is.

Formula:  X_change = X(b) - X(a), by layer, head or neuron. Where a measure keeps its values by example, the change is
          that of each example, so that its interval is that of pairs. moved_<matrix> = |W(b) - W(a)| / |W(a)|
          (Frobenius), by layer.
Law:      a model compared with itself has no change anywhere; with the roles exchanged every change has the other sign.
Check:    tests/laws/test_compare.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.method._arguments import require_model
from microtome.method._declare import Method
from microtome.method._look import Text, Weights
from microtome.method._pass import Bound, Pass, coordinates
from microtome.method._result import Result, counting, said_of_intervals
from microtome.method._statistic import paired_changes
from microtome.method.runner import bound_by_look, chosen_measures, of_weights
from microtome.model import Model

MEASURES = ("stream", "head_norms", "induction", "activations", "firing", "neuron_weights", "loss")
"""What is compared by default."""

MATRICES = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")
CHANGE = "change"
_SHAPE = ("n_layers", "n_heads", "n_kv_heads", "d_mlp", "d_vocab")


def compare(a: Model, b: Model, *names: str, text: Any = None, **options: Any) -> Result:
    """What differs between two models of one shape: base and tuned, two checkpoints, a model and its edited copy.

    Cost:  that of the measures on each model; one pass over the weights of both.
    Check: tests/laws/test_compare.py.

    Args:
        a: an open model.
        b: another with the same numbers of layers, heads and neurons, and the same vocabulary.
        names: of the measures; those of `MEASURES` by default.
        text: for those that read a text, as in `mt.measure`.
        options: arguments of the measures.

    Returns:
        For each column X of the measures `X_a`, `X_b` and `X_change`, with the ends of the 95 % interval of the change
        where the values are means over examples; `moved_W_Q` and the like by layer. Lists (top examples) are left out.

    Raises:
        DataError: the models have other shapes, or read text as other tokens.
        ArgumentError: there is no such measure or argument, or it compares groups.
        SiteError: a model lacks a site that a measure reads.

    >>> mt.compare(base, tuned, "stream", "induction", text="notes.txt")
    """
    require_model(a)
    require_model(b)
    _require_alike(a, b)
    chosen = chosen_measures(names or MEASURES, options)
    if grouped := [one.method.name for one in chosen if one.compares]:
        do = "leave it out, or measure each model"
        raise error(ArgumentError, f'the measure "{grouped[0]}" compares groups, not models', do=do)
    found: dict[str, Any] = {}
    with counting() as cost:
        looks = zip(*(bound_by_look(m, chosen, text, options, None).items() for m in (a, b)), strict=True)
        for (look, ours), (_, theirs) in looks:
            if isinstance(look, Weights):
                tables = of_weights(a, ours, None), of_weights(b, theirs, None)
                for one in ours:
                    name = one.measure.method.name
                    found |= _columns(one.measure.method, tables[0][name], tables[1][name], {})
            else:
                found |= _on_batches(a, b, look, ours, theirs)
        found |= _moved(a, b)
        attrs = _attrs(a, b, [one.method for one in chosen]) | cost.attrs | said_of_intervals(found)
    data = xr.Dataset(found, coords=_coordinates(a, found))
    return Result.of(data.assign_attrs(attrs))


def _require_alike(a: Model, b: Model) -> None:
    """Refuse models whose units do not correspond."""
    shapes = [{name: getattr(m.anatomy, name) for name in _SHAPE} for m in (a, b)]
    other = [f"{name} {shapes[0][name]} and {shapes[1][name]}" for name in _SHAPE if shapes[0][name] != shapes[1][name]]
    if other:
        what = f"{a.anatomy.name} and {b.anatomy.name} have other shapes, so that their units do not correspond"
        raise error(DataError, what, got=", ".join(other), do="compare their layers by similarity")
    probe = "The quick brown fox, 1984: naïve café."
    ids = [None if m.tokenizer is None else m.tokenizer(probe)["input_ids"] for m in (a, b)]
    if ids[0] != ids[1]:
        raise error(DataError, f"{a.anatomy.name} and {b.anatomy.name} read text as other tokens", do="give token ids")


def _on_batches(a: Model, b: Model, look: Any, ours: Sequence[Bound], theirs: Sequence[Bound]) -> dict[str, Any]:
    """The columns of measures that read batches, which both models read at the same time."""
    batches = look.batches(a)
    passes = Pass(a, ours, look), Pass(b, theirs, look)
    stage, count = "reading the text" if isinstance(look, Text) else "reading repeated tokens", len(batches.parts)
    for number in range(count):
        current().report(stage, number, count)
        for one in passes:
            one.update(batches.parts[number])
    current().report(stage, count, count)
    tables = passes[0].results(), passes[1].results()
    found: dict[str, Any] = {}
    for mine, other in zip(ours, theirs, strict=True):
        method = mine.measure.method
        held = [[one.kept.get((None, layer), {}) for layer in one.layers] for one in (mine, other)]
        paired = paired_changes(held[0], held[1], method.columns)
        found |= _columns(method, tables[0][method.name], tables[1][method.name], paired)
    return found


def _columns(method: Method, a: xr.Dataset, b: xr.Dataset, paired: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of one measure: its columns in both models, and the changes."""
    found: dict[str, Any] = {}
    for column in method.columns:
        if column.extra or column.unit in ("token", "index") or column.name not in a or column.name not in b:
            continue
        one, other = (data[column.name].astype("float64") for data in (a, b))
        told = {"unit": column.unit, "meaning": column.meaning}
        for name, value in (("a", one), ("b", other)):
            found[f"{column.name}_{name}"] = (one.dims, value.values, told | {"drawn": False})
        change = f"{column.name}_{CHANGE}"
        meaning = f"b minus a: {column.meaning}"
        found[change] = (one.dims, other.values - one.values, {"unit": column.unit, "meaning": meaning})
        for end, value in zip(("lo", "hi"), paired.get(column.name, ()), strict=False):
            shaped = value.numpy().reshape(one.shape)
            meant = {"unit": column.unit, "meaning": f"end of the 95 % interval over examples of: {meaning}"}
            found[f"{change}_{end}"] = (one.dims, shaped, meant)
    return found


def _moved(a: Model, b: Model) -> dict[str, Any]:
    """How far each weight matrix moved, by layer; NaN where a layer has none."""
    found: dict[str, Any] = {}
    for name in MATRICES:
        shares = [_share(a, b, layer, name) for layer in range(a.anatomy.n_layers)]
        if any(share == share for share in shares):
            attrs = {
                "unit": "ratio",
                "meaning": f"norm of the change of {name}, relative to its norm in a",
                "range": [0, torch.inf],
            }
            found[f"moved_{name}"] = ("layer", shares, attrs | {"chart": "Change of the weights", "title": name})
    return found


def _share(a: Model, b: Model, layer: int, name: str) -> float:
    """How far a matrix moved; NaN where there is none, as in layers of another kind."""
    if f"{layer}.{name}" in {**a.anatomy.unproven, **b.anatomy.unproven}:
        return float("nan")
    before, after = (getattr(m.layers[layer], name, None) for m in (a, b))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
        return float("nan")
    before, after = at_least_float32(before).detach(), at_least_float32(after).detach()
    return float((after - before).double().norm() / before.double().norm())


def _coordinates(a: Model, found: Mapping[str, Any]) -> dict[str, Any]:
    """The labels of the axes that the variables have."""
    dims = {dim for value in found.values() for dim in ([value[0]] if isinstance(value[0], str) else value[0])}
    every = coordinates(a, [d for d in ("layer", "head", "neuron") if d in dims], [None])
    return {dim: labels for dim, labels in every.items() if dim in dims}


def _attrs(a: Model, b: Model, methods: Sequence[Method]) -> dict[str, Any]:
    """What a comparison says of itself."""
    names = ", ".join(method.name for method in methods)
    other = {f"b_{key}": value for key, value in b.provenance.items() if key in ("model", "fingerprint", "dtype")}
    said = {"method": f"comparison of {names}", "question": "What differs between the two models?"}
    return dict(a.provenance) | other | said | {"seed": current().seed}


def moved_most(data: xr.Dataset, top: int = 5) -> Iterator[dict[str, Any]]:
    """What a comparison found, a row per column: how many units moved for certain, and those that moved most.

    A unit has moved for certain where the 95 % interval of its change leaves out 0; of units that did not move one in
    twenty does so by chance, and none should where both models are the same.

    Args:
        data: what `compare` gave.
        top: how many units to name.

    Yields:
        `column`, `unit`, `units` (how many there are), `certain` (how many moved for certain; None where there are no
        intervals, as of under 8 examples), `largest` (the largest change) and `where` (the units that moved most).
    """
    for name in map(str, data.data_vars):
        if not (name.endswith(f"_{CHANGE}") or name.startswith("moved_")):
            continue
        values = data[name]
        flat = values.values.reshape(-1).astype(np.float64)
        size = np.nan_to_num(np.abs(flat))
        order = [int(k) for k in np.argsort(-size, kind="stable")[:top] if size[k] > 0]
        certain = None
        if f"{name}_lo" in data and bool(np.isfinite(data[f"{name}_lo"]).any()):
            certain = int(((data[f"{name}_lo"] > 0) | (data[f"{name}_hi"] < 0)).sum())
        yield {
            "column": name.removesuffix(f"_{CHANGE}"), "unit": values.attrs.get("unit", ""),
            "units": int(np.isfinite(flat).sum()), "certain": certain,
            "largest": float(flat[order[0]]) if order else 0.0,
            "where": [".".join(str(number) for number in _place(values, k)) for k in order if values.dims],
        }  # fmt: skip


def _place(values: xr.DataArray, flat: int) -> Sequence[int]:
    """The labels of a unit, by its place in a flat array."""
    numbers: list[int] = []
    for dim, size in zip(reversed(values.dims), reversed(values.shape), strict=True):
        flat, place = divmod(flat, size)
        numbers.append(int(values[dim].values[place]) if dim in values.coords else place)
    return numbers[::-1]
