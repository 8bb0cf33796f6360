"""Which way of probing a kind is, which options it has, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from microtome.errors import ArgumentError, error
from microtome.probes._classes import Fitter, classes, code_lengths, fitter_of, mixture, similarity
from microtome.probes._concept import concepts
from microtome.probes._ideal import tastes
from microtome.probes._problem import Outcome, Problem
from microtome.probes._signals import encoding, preference

OWN: Mapping[str, tuple[str, ...]] = {
    "k": ("sparse",), "hidden": ("mlp", "kan", "similarity"), "delays": ("ridge",),
    "target": ("linear", "sparse", "mass-mean", "concept", "mdl", "similarity"),
    "inputs": ("concept",), "splits": ("concept",),
    "shift": ("linear", "sparse", "mass-mean", "mlp", "kan"),
    "prototypes": ("ideal",), "causal": ("linear", "sparse", "mass-mean", "concept", "mdl"),
}  # fmt: skip
"""By option: the kinds that have it."""
DEFAULTS: Mapping[str, Any] = {"k": 8, "hidden": 32, "delays": (0,), "splits": 40, "prototypes": 2}


@dataclass(frozen=True)
class Options:
    """The options of the kinds, as they were given."""

    l2: float
    k: int | None
    hidden: int | None
    delays: Sequence[int] | None
    inputs: Any
    splits: int | None
    prototypes: int | None
    answer: str | int | None
    foil: str | int | None
    target: str | None

    def of(self, name: str) -> Any:
        """An option, or its default."""
        value = getattr(self, name)
        return DEFAULTS[name] if value is None else value


def refuse_idle(kind: str, given: Mapping[str, Any]) -> None:
    """Refuse options that a kind does not have.

    Raises:
        ArgumentError: names the option, and the kinds that have it.
    """
    for name, kinds in OWN.items():
        if not _idle(given.get(name)) and kind not in kinds:
            allowed = ", ".join(kinds)
            what = f"{name} is no option of probes of the kind {kind}"
            raise error(ArgumentError, what, allowed=f"kinds {allowed}", do=f"leave {name} out, or name one of these")
    if kind == "concept" and given.get("answer") is None:
        raise error(ArgumentError, "a concept is tested on the logit of a token", do='name it: answer=" good"')
    if given.get("foil") is not None and given.get("answer") is None:
        raise error(ArgumentError, "a foil is subtracted from an answer", got="no answer", do="name the answer too")
    if given.get("answer") is not None and kind not in OWN["causal"]:
        what = f"answer is no option of probes of the kind {kind}"
        raise error(ArgumentError, what, allowed=f"kinds {', '.join(OWN['causal'])}", do="leave it out")
    if any(delay < 0 for delay in given.get("delays") or ()):
        raise error(ArgumentError, "delays must be 0 or more rows", got=str(given["delays"]), do="name the past")


def _idle(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, Sequence) and len(cast("Sequence[Any]", value)) == 0)


def target_of(problem: Problem, name: str | None) -> int:
    """The number of the class that is asked for: the one named, or the last.

    Raises:
        ArgumentError: there is no such class.
    """
    if name is None:
        return len(problem.classes) - 1
    if name not in problem.classes:
        allowed = ", ".join(problem.classes[:12]) or "none"
        raise error(ArgumentError, f'no class "{name}"', allowed=allowed, do="name one of these as target")
    return problem.classes.index(name)


def probed(problem: Problem, kind: str, options: Options) -> Outcome:
    """What probing of a kind gives."""

    def fitter(name: str) -> Fitter:
        return fitter_of(problem, name, options.l2, options.of("k"), options.of("hidden"))

    other: dict[str, Callable[[], Outcome]] = {
        "mdl": lambda: code_lengths(problem, options.l2),
        "mix": lambda: mixture(problem, options.l2),
        "ridge": lambda: encoding(problem, tuple(options.of("delays"))),
        "preference": lambda: preference(problem, options.l2),
        "ideal": lambda: tastes(problem, options.of("prototypes"), options.l2),
        "concept": lambda: _concept(problem, options),
        "similarity": lambda: similarity(problem, fitter("mlp"), target_of(problem, options.target)),
    }
    return other[kind]() if kind in other else classes(problem, fitter(kind))


def _concept(problem: Problem, options: Options) -> Outcome:
    model = problem.model
    assert options.answer is not None
    token, foil = model.to_id(options.answer), None if options.foil is None else model.to_id(options.foil)
    target, splits = target_of(problem, options.target), options.of("splits")
    return concepts(problem, target, options.inputs, token, foil, splits, options.l2)
