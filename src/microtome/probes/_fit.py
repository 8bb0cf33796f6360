"""Probes: whether a property can be decoded from a model's states, layer by layer, and whether the model uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr

from microtome.context import current
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.probes._causal import Direction, causal_use
from microtome.probes._kinds import Options, probed, refuse_idle, target_of
from microtome.probes._probe import Probe
from microtome.probes._problem import Outcome, Problem, problem, whole
from microtome.probes._readers import Reader, ahead_of_others, pattern

KINDS = (
    "linear",
    "sparse",
    "mass-mean",
    "mlp",
    "kan",
    "mdl",
    "concept",
    "ridge",
    "mix",
    "similarity",
    "preference",
    "ideal",
)
LEVEL = "none: what it is compared with"
L, S = ("layer",), (0, 1)


def _share(name: str, meaning: str, control: str, dims: tuple[str, ...] = L) -> Column:
    return Column(name, "share", meaning, control, S, dims=dims)


def _effects(name: str, meaning: str) -> tuple[Column, Column, Column]:
    control = f"{name}_random"
    return (
        Column(name, "logits", f"change of the answer towards the other class when states are {meaning}", control,
               dims=L),
        Column(control, "logits", "mean size of the same along 20 random directions, as far along each",
               "none: a control", dims=L, interval=False),
        Column(f"{name}_p_value", "probability", f"two-sided p-value of {name} among the random directions",
               "none: a p-value", S, dims=L, interval=False),
    )  # fmt: skip


COLUMNS = (
    _share("accuracy", "share of examples held out whose class is named", "control_task"),
    _share("control_task", "accuracy where each type has a label at random", ""),
    _share("untrained", "accuracy on the states of a model with untrained weights", "control_task"),
    Column("selectivity", "share", "accuracy minus that of the control task; none where no type repeats over folds",
           "none: a difference from one", (-1, 1),
           dims=L),
    _share("surface", "accuracy of a regression on counted tokens, pairs and letters", LEVEL, ()),
    _share("majority", "accuracy of the most frequent class", LEVEL, ()),
    _share("one_direction", "share of pairs ranked as chosen by one direction for all users", "control_task"),
    _share("likelihood", "share of pairs whose chosen text the model finds more likely", LEVEL, ()),
    Column("unit", "unit", "the units that the probe of all examples reads, strongest first",
           "none: names of units", dims=(*L, "rank"), drawn=False, interval=False),
    _share("shifted", "accuracy on the groups of the shift of a probe fitted on all others", "shifted_last"),
    _share("shifted_last", "the same of the last layer", LEVEL, ()),
    Column("bits", "bits", "length of the labels by the online code", "bits_control", (0, None), dims=L,
           interval=False),
    Column("bits_control", "bits", "the same of labels at random by type", dims=L, interval=False),
    Column("bits_untrained", "bits", "the same on the states of a model with untrained weights", "bits_uniform",
           (0, None), dims=L, interval=False),
    Column("bits_uniform", "bits", "length of the labels by the uniform code", LEVEL, dims=(), interval=False),
    Column("compression", "ratio", "bits of the uniform code to those of the online code", "none: 1 says nothing known",
           (0, None), dims=L, interval=False),
    _share("score", "share of inputs whose logit rises along the concept", "score_random"),
    _share("score_random", "mean share along directions between random halves", "none: a control"),
    Column("sensitivity", "logits", "change of the logit per unit of length along the concept", "sensitivity_random",
           dims=L),
    Column("sensitivity_random", "logits", "mean size of the same along directions between random halves",
           "none: a control", dims=L, interval=False),
    Column("concept_p_value", "probability", "two-sided p-value of the sensitivity among random directions",
           "none: a p-value", S, dims=L, interval=False),
    Column("r", "correlation", "correlation of prediction and signal held out", "r_turned", (-1, 1), dims=L),
    Column("r_turned", "correlation", "the same of the signal turned round in time", "none: a control", (-1, 1),
           dims=L),
    Column("r_untrained", "correlation", "the same on the states of a model with untrained weights", "r_turned",
           (-1, 1), dims=L),
    Column("ceiling", "correlation", "largest correlation with the mean of the repetitions", LEVEL, S, dims=(),
           interval=False),
    Column("share_of_ceiling", "share", "correlation as a share of the largest", "none: 1 is all", dims=L,
           interval=False),
    Column("mix_weight", "share", "weight of the layer in the mixture; larger norms have smaller or larger ones "
           "whatever they hold", "mix_norm", S, dims=L, interval=False),
    Column("mix_norm", "share", "norm of the layer's states, as a share of all", "none: a control", S, dims=L,
           interval=False),
    _share("together", "accuracy of one probe of all layers on examples held out", "majority", ()),
    _share("together_control", "the same where each type has a label at random", "majority", ()),
    *_effects("adding", "moved along the direction by the way between the means"),
    *_effects("ablating", "left without the direction"),
    *_effects("patching", "given the other class's mean along the direction"),
)  # fmt: skip
TABLE = Argument("a .csv, .tsv, .jsonl or .parquet file with columns text and label, and if you like group, type, "
                 "position, span; rows or columns; of preferences, chosen and rejected", positional=True,
                 from_text=Path)  # fmt: skip


@question(
    "probe",
    command="probe",
    title="probe",
    question="Can a property of the input be decoded from a model's states, in which layer, and is it used?",
    columns=COLUMNS,
    source=(
        Source("Alain and Bengio", "Understanding intermediate layers using linear classifier probes", 2016,
               "1610.01644", departs="cross-validated by group, beside controls"),
        Source("Hewitt and Liang", "Designing and Interpreting Probes with Control Tasks", 2019, "1909.03368",
               departs="labels are dealt to types in their proportions"),
        Source("Voita and Titov", "Information-Theoretic Probing with Minimum Description Length", 2020, "2003.12298",
               departs="groups stay whole; the strength of the prior is mixed over"),
        Source("Kim et al.", "Interpretability Beyond Feature Attribution: Quantitative Testing with Concept "
               "Activation Vectors (TCAV)", 2017, "1711.11279",
               departs="the test ranks mean sensitivities among random vectors"),
        Source("Gurnee et al.", "Finding Neurons in a Haystack: Case Studies with Sparse Probing", 2023, "2305.01610",
               departs="units are ranked by their F statistic"),
        Source("Marks and Tegmark", "The Geometry of Truth", 2023, "2310.06824"),
    ),
    cost="two forwards of every example, of the model and of an untrained one, and L x folds x 3 regressions",
    check="tests/laws/test_probes.py, tests/laws/test_probes_causal.py, tests/planted/test_probes.py",
    call='mt.probes.probe(model, "data.csv")',
    reading="Labels are decoded where accuracy exceeds the control task, the untrained model and the surface; that is "
    "no proof that the model uses them, which is what adding, ablating and patching show.",
)  # fmt: skip
def probe(
    model: Model,
    data: Annotated[Any, TABLE],
    *,
    site: Annotated[
        str | Sequence[str], Argument('addresses to probe, with commas between them, such as "*.resid_post@-1"')
    ] = "*.resid_post@-1",
    kind: Annotated[str, Argument("how to probe", choices=KINDS)] = "linear",
    field: Annotated[str, Argument("column with the text")] = "text",
    label: Annotated[str, Argument("column with the label; of a signal several with commas are repetitions")] = "label",
    group: Annotated[str | None, Argument('column with the group; "group" where there is one')] = None,
    pool: Annotated[str, Argument("what counts of several positions", choices=("last", "mean"))] = "last",
    folds: Annotated[int, Argument("parts of the data, each held out once", "folds", least=2)] = 5,
    l2: Annotated[float, Argument("strength of the prior, l2/2 |W|^2 on standardised units", least=1e-9)] = 10.0,
    shift: Annotated[Sequence[str], Argument("group to test on, after fitting on the others")] = (),
    untrained: Annotated[bool, Argument("probe a model with untrained weights too")] = True,
    causal: Annotated[bool, Argument("measure what adding, ablating and patching the direction does")] = False,
    answer: Annotated[str | int | None, Argument("token that goes with the target: its logit is read")] = None,
    foil: Annotated[str | int | None, Argument("token that goes with the others: its logit is subtracted")] = None,
    target: Annotated[str | None, Argument("class whose direction is used; the last one by default")] = None,
    k: Annotated[int | None, Argument("units that a sparse probe reads; 8 by default", "units", least=1)] = None,
    hidden: Annotated[int | None, Argument("width of a small network; 32 by default", "units", least=1)] = None,
    delays: Annotated[Sequence[int], Argument("rows before each that a ridge reads; 0 is the row itself")] = (),
    inputs: Annotated[Any, Argument("texts to test a concept on; its own examples by default", command=False)] = None,
    splits: Annotated[int | None, Argument("random splits of a concept; 40 by default", "splits", least=1)] = None,
    prototypes: Annotated[int | None, Argument("points that ideal points mix; 2 by default", "points", least=1)] = None,
    save: Annotated[Any, Argument("file to write the probe to, ending in .safetensors")] = None,
    keep: Annotated[Any, Argument("a function that is called with the probe", command=False)] = None,
) -> Found:
    """What the states of a model tell of labels, layer by layer, beside controls, and whether the model uses it.

    Every score is of examples held out, with all of their group. Of several sites the columns have a first axis `site`.

    Raises:
        DataError: the data cannot be read, have labels of one class, groups that leak, or too few groups for the folds.
        SiteError: a site is not there.
        PromptError: a text cannot be read.
        ArgumentError: an option is none of the kind, or outside what is allowed.
    """
    causal = causal or (answer is not None and kind != "concept")
    options = Options(l2, k, hidden, tuple(delays) or None, inputs, splits, prototypes, answer, foil, target)
    refuse_idle(kind, vars(options) | {"shift": tuple(shift), "causal": causal})
    it = problem(
        model, data, site=site, kind=kind, field=field, label=label, group=group,
        pool="mean" if pool == "mean" else "last", folds=folds, shift=tuple(shift), seed=current().seed,
        untrained=untrained,
    )  # fmt: skip
    number = target_of(it, target) if it.classes else 0
    found = probed(it, kind, options)
    attrs = it.attrs | found.attrs | {"kind": kind, "pool": pool}
    if target is not None or causal or kind == "concept":
        attrs["target"] = it.classes[number]
    units: dict[str, str] = {}
    values = found.values | it.scored(found.each)
    if causal:
        effects, attrs["metric"] = _causal(it, kind, found, number, answer, foil)
        unit = "nats" if foil is None else "logits"
        units = {name: unit for name in effects if not name.endswith("_p_value")}
        values |= effects
    if save is not None or keep is not None:
        _keep(_probe(it, kind, found, pool, number, _scores(it, values, attrs)), save, keep)
    return Found(values, coords=it.coords, attrs=attrs, units=units)


def fit(model: Model, data: Any, **options: Any) -> Probe:
    """Fit a probe to the states of a model, layer by layer: its scores beside their controls, its directions as edits.

    Formula:  by kind, see `microtome.probes.probe`, which is the same as a question and gives the scores alone.
    Source:   that of the kind; see `microtome.probes.probe`. Departs: as there.
    Cost:     two forwards of every example, and L x folds x 3 regressions.
    Check:    tests/laws/test_probes.py.

    Args:
        model: the model.
        data: a table, rows or columns; see `microtome.probes.probe`.
        options: those of `microtome.probes.probe`: site, kind, group, folds, shift, causal, ...

    Returns:
        A `Probe`: `scores` is the result, `direction` and `edit` give its direction and what that does as an edit,
        `predict` reads other texts, `save` and `load` keep it.

    Raises:
        ArgumentError, DataError, PromptError, SiteError: as `microtome.probes.probe`.

    >>> found = mt.probes.fit(model, [("What a joy", "good"), ("How awful", "bad"), ...])
    >>> found.scores["selectivity"], found.direction(12)
    >>> model.run("It was", edits=found.edit(12, "good", strength=2.0))
    """
    held: list[Probe] = []
    scores = probe(model, data, **options, keep=held.append)
    return replace(held[0], scores=scores)


def _sides(it: Problem, kind: str, number: int) -> list[torch.Tensor]:
    """[row] of the rows that are cross-validated, which are of each class of the probe."""
    if kind == "concept":
        own = torch.from_numpy(it.inside == number)
        return [~own, own]
    return [torch.from_numpy(it.inside == i) for i in range(len(it.classes))]


def _direction(it: Problem, kind: str, site: Any, reader: Reader, number: int) -> torch.Tensor:
    """[width] of length 1, along which states of a class lie from those of the others; see `Probe.direction`."""
    x = it.states[site]
    weight = reader.tensors["weight"][:, : x.shape[1]]  # of a signal with delays, that of the first
    if kind in ("mass-mean", "concept"):
        found = ahead_of_others(weight, number)
    else:
        found = pattern(weight, x[torch.from_numpy(it.rows)], number, centred=kind != "preference")
    if "units" in reader.tensors:
        found = torch.zeros_like(found).index_copy(0, reader.tensors["units"], found[reader.tensors["units"]])
    return found / found.norm().clamp(min=1e-30)


def _step(it: Problem, kind: str, site: Any, vector: torch.Tensor, own: torch.Tensor | None) -> float:
    """How far the mean of a class lies from that of the others along a direction.

    Of preferences how far the chosen text lies ahead, of a signal one standard deviation.
    """
    along = (it.states[site] @ vector)[torch.from_numpy(it.rows)]
    if own is None:
        return float(along.mean()) if kind == "preference" else float(along.std(correction=0))
    return float(along[own].mean() - along[~own].mean())


def _causal(
    it: Problem, kind: str, found: Outcome, number: int, answer: str | int | None, foil: str | int | None
) -> tuple[dict[str, Any], str]:
    """What the directions of the class that is asked for do to the answer, and what is read of it."""
    own, at = _sides(it, kind, number)[1 if kind == "concept" else number], 1 if kind == "concept" else number
    made: dict[Any, Direction] = {}
    for site, reader in found.readers.items():
        vector = _direction(it, kind, site, reader, at)
        made[site] = Direction(vector, _step(it, kind, site, vector, own))
    return causal_use(it, made, own.numpy(), answer, foil)


def _probe(it: Problem, kind: str, found: Outcome, pool: str, number: int, scores: xr.Dataset) -> Probe:
    """What was fitted, as a value."""
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    positions = str(it.sites[0]).partition("@")[2]
    classes = (f"not {it.classes[number]}", it.classes[number]) if kind == "concept" else it.classes
    sides = _sides(it, kind, number) if classes else None
    for site, reader in found.readers.items():
        name = whole(it, site) + (f"@{positions}" if positions else "")
        shapes[name] = it.shapes[site]
        tensors |= {f"{name}/{key}": x for key, x in reader.tensors.items()}
        weight = reader.tensors.get("weight")
        if weight is not None:
            ways = [_direction(it, kind, site, reader, i) for i in range(len(weight))]
            steps = [_step(it, kind, site, way, None if sides is None else sides[i]) for i, way in enumerate(ways)]
            tensors[f"{name}/direction"] = torch.stack(ways)
            tensors[f"{name}/step"] = torch.tensor(steps, dtype=torch.float64)
    by_row = any(place is not None for place in it.examples.places)
    return Probe(kind, tuple(shapes), classes, tensors, shapes, pool, scores, by_row)


def _scores(it: Problem, values: dict[str, Any], attrs: dict[str, Any]) -> xr.Dataset:
    """What was found, with the provenance of the model."""
    axes = {name: v if isinstance(v, tuple) else ((), v) for name, v in values.items()}
    variables = {name: (dims, np.asarray(x)) for name, (dims, x) in axes.items()}
    return xr.Dataset(variables, coords=it.coords, attrs=attrs | dict(it.model.provenance))


def _keep(made: Probe, save: Any, keep: Callable[[Probe], Any] | None) -> None:
    if save is not None:
        made.save(save)
    if keep is not None:
        keep(made)
