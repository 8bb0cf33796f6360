"""A measure: declared once, run with any others in as few passes as their inputs allow, merged across machines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from microtome.anatomy import SITES, Site, parse
from microtome.errors import DeclarationError, SiteError, error
from microtome.method._arguments import Parameter, arguments_of, checked, parameters_of, require_declared
from microtome.method._declare import DIMS, WEIGHTS, Column, Method, Source, Unit, called, several
from microtome.method._document import docstring
from microtome.method._look import Look, Text, Weights
from microtome.method._registry import register
from microtome.method._statistic import MeanOverExamples, Statistic
from microtome.model import Model

M = TypeVar("M")


def compares(function: Any) -> bool:
    """Whether what computes a measure compares the groups of a text."""
    return isinstance(function, type) and issubclass(function, Statistic) and function.across is not Statistic.across


@dataclass(frozen=True, eq=False)
class Measure:
    """A measure as it was declared.

    Attributes:
        method: the declaration.
        on: what it looks at, with the defaults of its arguments.
    """

    method: Method
    on: Look

    @property
    def optional(self) -> tuple[str, ...]:
        """Sites that it sees where the model has them."""
        return self.method.optional

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its own arguments: those of the function behind what is seen, or of the statistic's `__init__`."""
        function = self.method.function
        return parameters_of(function, 0 if isinstance(function, type) else 1)

    @property
    def look_parameters(self) -> tuple[Parameter, ...]:
        """The arguments of what it reads, with the defaults that it declares."""
        own = {p.name: p for p in parameters_of(type(self.on))} if fields(self.on) else {}
        return tuple(Parameter(p.name, p.type, getattr(self.on, p.name), p.argument, p.optional) for p in own.values())

    def statistic(self, arguments: Mapping[str, Any]) -> Statistic:
        """What keeps its values, with arguments that are checked here."""
        given = checked(self.parameters, arguments)
        function: Any = self.method.function
        if isinstance(function, type):
            made = function(**given)
            assert isinstance(made, Statistic)
            return made
        assert self.method.of is not None
        dims = len(DIMS[self.method.of]) - (0 if self.whole else self.method.of != "model")
        return MeanOverExamples(function, dims, given)

    @property
    def whole(self) -> bool:
        """Whether it sees whole batches and no sites: it runs the model itself, and returns all layers at once."""
        return not self.method.sites and not isinstance(self.on, Weights)

    @property
    def compares(self) -> bool:
        """Whether it compares the groups of a text, of which it then needs several."""
        return compares(self.method.function)

    def layers(self, model: Model) -> list[int | None]:
        """The layers in which the model has all the sites it reads; None for a measure of the whole model.

        Raises:
            SiteError: there is no such layer; says which site is missing and why.
        """
        a = model.anatomy
        there_of = {site.name for site in a.hook_points}
        absent = next((n for n in self.method.needs if self.whole and n in SITES and n not in there_of), None)
        if absent is not None:  # what runs the model itself sees no sites, and may need some all the same
            what = f'the measure "{self.method.name}" needs {absent}, which {a.name} has in no layer'
            why = a.missing.get(Site(absent, 0)) or "it does not apply here"
            raise error(SiteError, what, got=why, do="leave the measure out")
        if self.whole or all(SITES[name].scope == "model" for name in self.method.sites):
            for name in self.method.sites:
                a.sites(parse(name))
            return [None] if self.method.of == "model" or self.whole else list(range(a.n_layers))
        sites = [name for name in (*self.method.sites, *self.method.needs) if name in SITES]
        inner = [name for name in sites if SITES[name].scope == "layer"]
        weights = [name for name in self.method.needs if name in WEIGHTS]

        def why_not(i: int) -> tuple[str, str] | None:
            for name in inner:
                if Site(name, i) not in a.hook_points:
                    return name, a.missing.get(Site(name, i)) or a.missing.get(Site(name)) or "it does not apply here"
            return next(((name, why) for name in weights if (why := a.unproven.get(f"{i}.{name}"))), None)

        there = [i for i in range(a.n_layers) if why_not(i) is None]
        if not there:
            gone, why = why_not(0) or ("", "")
            what = f'the measure "{self.method.name}" needs {gone}, which {a.name} has in no layer'
            raise error(SiteError, what, got=why, do="leave the measure out")
        self._refuse_uneven(model, inner, there)
        return list(there)

    def _refuse_uneven(self, model: Model, names: Sequence[str], layers: Sequence[int]) -> None:
        """Refuse layers with other numbers of heads or neurons than one another: they make no one table.

        Raises:
            SiteError: they differ.
        """
        a, unit = model.anatomy, self.method.of
        for name in (n for n in names if unit in SITES[n].dims):
            sizes = {i: a.size(Site(name, i), str(unit)) for i in layers}
            if len(set(sizes.values())) > 1:
                found = ", ".join(f"{n} in layer {i}" for i, n in sizes.items())
                what = f'the measure "{self.method.name}" makes one table of all layers, whose {unit}s differ in number'
                raise error(SiteError, what, got=found, do="leave the measure out")


def measure(
    name: str,
    *,
    of: Unit,
    question: str,
    columns: Column | Sequence[Column],
    source: Source | Sequence[Source],
    cost: str,
    check: str,
    on: Look | None = None,
    sites: str | Sequence[str] = (),
    optional: str | Sequence[str] = (),
    needs: str | Sequence[str] = (),
    atlas: bool | Literal["default", "full"] = True,
    title: str = "",
) -> Callable[[M], M]:
    """Declare a measure: a function from what is `Seen` to values by column, or a `Statistic`.

    A function returns, for each column, values [example, pos, unit] or [example, unit] of one layer (of all layers if
    it declares no sites and runs the model itself); their mean over what counts, and its interval over examples, are
    made of them. Of weights it gives the columns themselves, [unit], layer by layer.

    Args:
        name: what it is called by.
        of: what it describes: "model", "layer", "head", "neuron" or "expert_neuron".
        question: what it answers.
        columns: what it returns.
        source: the papers.
        cost: as a formula.
        check: the tests that verify it.
        on: what it reads; a text by default.
        sites: the site names that it sees, in layers that have all of them.
        optional: sites that it sees where the model has them.
        needs: sites and weights that a layer must have though they are not seen, such as "attn_out" or "W_O".
        atlas: whether the atlas runs it: True in all its profiles, "default" or "full" from that one on.
        title: what results and pages call it.

    Raises:
        DeclarationError: something is missing or wrong; in one line.
    """

    def declare(function: M) -> M:
        given: Any = function
        docs = inspect.getdoc(given) or ""
        own = parameters_of(given, 0 if isinstance(given, type) else 1)
        look = Text() if on is None else on
        arguments = arguments_of((*own, *(parameters_of(type(look)) if fields(look) else ())))
        call = called(name, groups=compares(given))
        method = Method(
            name, "measure", question, docs.partition("\n")[0], several(columns, Column),
            several(source, Source), cost, check, given,
            call=call, of=of, atlas=atlas, title=title, arguments=arguments,
            sites=several(sites, str), optional=several(optional, str), needs=several(needs, str),
        )  # fmt: skip
        require_declared(method, own)
        _require_fit(method, look)
        text = docstring(method, own)
        register(Measure(method, look))
        given.__doc__ = text
        return function

    return declare


def _require_fit(method: Method, look: Look) -> None:
    """Refuse a measure whose sites or columns do not go with what it looks at.

    Raises:
        DeclarationError: what it sees of a text is not of its layers, or its function gives columns with further axes.
    """
    if isinstance(look, Weights):
        return
    scopes = {SITES[name].scope for name in (*method.sites, *method.optional)}
    of = f'the measure "{method.name}"'
    if method.of != "model" and "model" in scopes:
        name = next(name for name in (*method.sites, *method.optional) if SITES[name].scope == "model")
        what = f'{of} is of each {method.of}, but sees the site "{name}", which is of the whole model'
        raise error(DeclarationError, what, do='read sites of layers, or declare it of="model"')
    extra = next((column for column in method.columns if column.extra), None)
    if extra is not None and not isinstance(method.function, type):
        what = f'{of} has a column "{extra.name}" with axes of its own, which the mean of a function lacks'
        raise error(DeclarationError, what, got=", ".join(extra.extra), do="make it a Statistic, or leave extra= out")
