"""A change of a model: declared once; a function from a model to edits that it can be run under, and that are saved."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

from microtome.edit import Edit
from microtome.errors import DeclarationError, error
from microtome.method._arguments import Parameter, arguments_of, checked, parameters_of, require_declared, split_call
from microtome.method._declare import Method, Source, several
from microtome.method._document import docstring
from microtome.method._registry import register
from microtome.method._result import counting
from microtome.model import Model

P = ParamSpec("P")


@dataclass(frozen=True, eq=False)
class Change:
    """A change as it was declared.

    Attributes:
        method: the declaration.
        parameters: of its function behind the model.
    """

    method: Method
    parameters: tuple[Parameter, ...]

    def make(self, model: Model, given: Mapping[str, Any]) -> list[Edit]:
        """The edits, with arguments that are checked here."""
        with counting():
            edits: Any = self.method.function(model, **checked(self.parameters, given))
        if not isinstance(edits, list) or not all(isinstance(edit, Edit) for edit in edits):
            what = f'the change "{self.method.name}" returns something other than a list of edits'
            raise error(DeclarationError, what, got=type(edits).__name__, do="return edits")
        return edits


def change(
    name: str,
    *,
    question: str,
    source: Source | Sequence[Source],
    cost: str,
    check: str,
    call: str,
    command: str = "",
    title: str = "",
) -> Callable[[Callable[P, list[Edit]]], Callable[P, list[Edit]]]:
    """Declare a change: a function of a model that returns edits.

    Args:
        name: of the function.
        question: what it is for, as a question.
        source: the papers.
        cost: as a formula.
        check: the tests that verify it.
        call: how to write it on the default model.
        command: its name on the command line.
        title: what pages call it.

    Raises:
        DeclarationError: something is missing or wrong; in one line.
    """

    def declare(function: Callable[P, list[Edit]]) -> Callable[P, list[Edit]]:
        parameters = parameters_of(function, 1)
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        method = Method(
            name, "change", question, summary, (), several(source, Source), cost, check, function,
            call=call, command=command, title=title, arguments=arguments_of(parameters),
        )  # fmt: skip
        require_declared(method, parameters)
        made = Change(method, parameters)
        text = docstring(method, parameters)
        register(made)

        @functools.wraps(function)
        def make(*args: P.args, **kwargs: P.kwargs) -> list[Edit]:
            return made.make(*split_call(function, args, kwargs))

        make.__doc__ = text
        return make

    return declare
