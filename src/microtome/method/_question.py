"""A question about prompts: declared once; checks, statistics, labels, provenance and its command follow."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import numpy as np
import xarray as xr
from torch import Tensor

from microtome.context import current
from microtome.method._arguments import Parameter, arguments_of, checked, parameters_of, require_declared, split_call
from microtome.method._control import with_differences
from microtome.method._declare import Column, Method, Source, several
from microtome.method._document import docstring
from microtome.method._needs import require
from microtome.method._registry import register
from microtome.method._result import Result, Subject, column_of, counting, labelled, provenance, spent
from microtome.metric import Metric
from microtome.model import Model
from microtome.run import Prompt
from microtome.stream import mean_interval, sign_flip
from microtome.sweep import Cell, Edge, SweepResult

P = ParamSpec("P")


@dataclass
class Found:
    """What a question's function returns; the frame turns it into a `Result`.

    Attributes:
        values: by column, the values with the axes that it declares, or (axes, values).
        each: by column, the same with a first axis of examples; gives mean, interval, p-value and `_each`.
        weights: [example] how much each example counts, where the values of `each` are sums over that much.
        coords: labels of axes, as `xarray` takes them.
        attrs: further attributes, as plain values.
        units: by column, a unit that is known only at run time.
    """

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    each: Mapping[str, Any] = field(default_factory=dict[str, Any])
    weights: Tensor | None = None
    coords: Mapping[str, Any] = field(default_factory=dict[str, Any])
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    units: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, eq=False)
class Question:
    """A question as it was declared.

    Attributes:
        method: the declaration.
        parameters: of its function behind the model.
        reading: how to read a value, in a sentence or two.
    """

    method: Method
    parameters: tuple[Parameter, ...]
    reading: str

    def ask(self, model: Subject, given: Mapping[str, Any]) -> Result:
        """The answer, with arguments that are checked here."""
        arguments = checked(self.parameters, given)
        if isinstance(model, Model):
            require(model, self.method)
        with counting() as cost:
            found: Any = self.method.function(model, **arguments)
            data = found if isinstance(found, xr.Dataset) else _dataset(self.method, found)
            data = with_differences(self.method, data, found.weights if isinstance(found, Found) else None)
            own = dict(data.attrs)  # with those of the model where a run has given them: another look takes a while
            attributes = provenance(model, self.method, arguments, cost, own) | {"reading": self.reading}
            return Result.of(labelled(self.method, data).assign_attrs(attributes | own))


def question(
    name: str,
    *,
    question: str,
    columns: Column | Sequence[Column],
    source: Source | Sequence[Source],
    cost: str,
    check: str,
    call: str,
    reading: str = "",
    command: str = "",
    title: str = "",
    needs: str | Sequence[str] = (),
) -> Callable[[Callable[P, Any]], Callable[P, Result]]:
    """Declare a question: a function of a model and prompts that returns `Found`.

    Args:
        name: of the function.
        question: what it answers.
        columns: what it returns, each with its axes.
        source: the papers.
        cost: as a formula.
        check: the tests that verify it.
        call: how to write it on the default model.
        reading: how to read a value, in a sentence or two.
        command: its name on the command line; all its required arguments must then declare themselves.
        title: what results and pages call it.
        needs: the sites that a model must have in some layer, or in every one ("*.attn.q"), or what `NEEDS` names;
            checked before it runs.

    Raises:
        DeclarationError: something is missing or wrong; in one line.
    """

    def declare(function: Callable[P, Any]) -> Callable[P, Result]:
        parameters = parameters_of(function, 1)
        docs = inspect.getdoc(function) or ""
        method = Method(
            name, "question", question, docs.partition("\n")[0], several(columns, Column),
            several(source, Source), cost, check, function,
            call=call, command=command, title=title, arguments=arguments_of(parameters), needs=several(needs, str),
        )  # fmt: skip
        require_declared(method, parameters)
        made = Question(method, parameters, reading)
        text = docstring(method, parameters)
        register(made)

        @functools.wraps(function)
        def ask(*args: P.args, **kwargs: P.kwargs) -> Result:
            return made.ask(*split_call(function, args, kwargs))

        ask.__doc__ = text
        return ask

    return declare


def run_sweep(
    model: Model,
    prompt: Prompt,
    cells: Sequence[Cell | Edge],
    metric: Metric,
    *,
    prompts: Sequence[int] | None = None,
    start: Tensor | None = None,
    stage: str = "patching",
) -> SweepResult:
    """Run a sweep under the current settings: first its plan is reported and recorded, then its progress.

    Args:
        model: the model.
        prompt: one or several, as `Model.sweep` takes them, and so are the next four.
        cells: edited runs.
        metric: what is read of each.
        prompts: the number of each cell's prompt.
        start: what enters the first layer instead of the embeddings.
        stage: what its progress is called.
    """
    settings = current()
    sweep = model.sweep(prompt, cells, metric, prompts=prompts, start=start)
    spent(sweep.plan)
    if settings.on_plan is not None:
        settings.on_plan(sweep.plan)
    return sweep.run(settings.counting(stage))


def _dataset(method: Method, found: Found) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for name, given in found.values.items():
        dims, x = _placed(method, name, given)
        variables[name] = (dims, _array(x), _unit(found, name))
    for name, given in found.each.items():
        dims, x = _placed(method, name, given)
        variables |= summarised(method, name, dims, x, _unit(found, name), found.weights)
    return xr.Dataset(variables, coords=dict(found.coords), attrs=dict(found.attrs))


def _unit(found: Found, name: str) -> dict[str, str]:
    return {"unit": found.units[name]} if name in found.units else {}


def _placed(method: Method, name: str, given: Any) -> tuple[tuple[str, ...], Any]:
    """The axes of a value, given with it or declared, and the value."""
    if isinstance(given, tuple):
        return given[0], given[1]
    column, _ = column_of(method, name)
    return (() if column is None or column.dims is None else column.dims), given


def _array(x: Any) -> Any:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def summarised(
    method: Method, name: str, dims: Sequence[str], values: Tensor, attrs: Mapping[str, str], weights: Tensor | None
) -> dict[str, Any]:
    """Values [example, ...] as variables: mean, `_lo` and `_hi`, `_p` where the column has a test, and `_each`."""
    column = method.column(name)
    mean, low, high = mean_interval(values, weights=weights)
    parts = {"": mean, "_lo": low, "_hi": high}
    if column is not None and column.test:
        parts["_p"] = sign_flip(values, seed=current().seed)
    attributes = {end: {"unit": "probability"} if end == "_p" else dict(attrs) for end in parts}
    found: dict[str, Any] = {name + end: (tuple(dims), _array(x), attributes[end]) for end, x in parts.items()}
    return found | {f"{name}_each": (("example", *dims), _array(values.double()), dict(attrs))}
