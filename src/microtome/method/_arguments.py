"""Arguments of a method: read off its annotations once, checked at every call, given as options to its command."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from microtome.anatomy import integer
from microtome.errors import ArgumentError, DeclarationError, error, nearest
from microtome.method._declare import Argument, Method, validate

MISSING = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method's function: its name, its plain type, its default, and what it declares, if it does."""

    name: str
    type: Any
    default: Any
    argument: Argument | None
    optional: bool

    @property
    def required(self) -> bool:
        """Whether a call must give it."""
        return self.default is MISSING


@cache
def parameters_of(function: Callable[..., Any], skip: int = 0) -> tuple[Parameter, ...]:
    """The parameters of a function, or of a class's `__init__`, without the first `skip`."""
    where: Any = inspect.unwrap(function)
    scope = vars(inspect.getmodule(where)) if inspect.isclass(where) else where.__globals__
    return parameters_in(function, scope, skip)


def parameters_in(function: Callable[..., Any], scope: dict[str, Any], skip: int = 0) -> tuple[Parameter, ...]:
    """The parameters of a function, whose annotations are written in the names of a scope."""
    own = list(inspect.signature(function).parameters.values())[skip:]
    return tuple(_parameter(p, scope) for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _parameter(parameter: inspect.Parameter, scope: dict[str, Any]) -> Parameter:
    annotation = parameter.annotation
    kind = eval(annotation, scope) if isinstance(annotation, str) else annotation  # of our own modules
    argument = None
    if get_origin(kind) is Annotated:
        kind, *marks = get_args(kind)
        argument = next((mark for mark in marks if isinstance(mark, Argument)), None)
    optional = False
    if get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind):
        rest = [part for part in get_args(kind) if part is not type(None)]
        optional = True
        kind = rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007 (made at run time)
    return Parameter(parameter.name, kind, parameter.default, argument, optional)


def arguments_of(parameters: Iterable[Parameter]) -> dict[str, Argument]:
    """What the parameters declare, by name."""
    return {p.name: p.argument for p in parameters if p.argument is not None}


def require_declared(method: Method, parameters: Iterable[Parameter]) -> None:
    """Refuse a method that lacks something or contradicts itself, or has an argument without a declaration.

    Raises:
        DeclarationError: says what is wrong, or names the argument.
    """
    validate(method)
    bare = [p.name for p in parameters if p.argument is None]
    if bare:
        what = f'the {method.kind} "{method.name}" has an argument "{bare[0]}" without an Argument in its annotation'
        raise error(DeclarationError, what, do="write Annotated[type, Argument(meaning)]")


def require_model(model: object) -> None:
    """Refuse what is not an open model.

    Raises:
        ArgumentError: with what was given.
    """
    from microtome.model import Model  # here, because declarations are read before models are needed

    if not isinstance(model, Model):
        got = type(model).__name__
        raise error(ArgumentError, "model must be an open model", got=got, do="open it with mt.open")


def split_call(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """What a call of a method's function gives: the model, or what else it is of, and its other arguments by name.

    Raises:
        ArgumentError: too many by position, one twice, no model, or something else than a model.
    """
    from microtome.model import Model

    slots = inspect.signature(function).parameters.values()
    names = [slot.name for slot in slots if slot.kind is slot.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        what = f"too many arguments without a name: {function.__name__} takes {', '.join(names)}"
        raise error(ArgumentError, what, got=len(args), allowed=str(len(names)), do="name the others")
    given = dict(zip(names, args, strict=False))
    twice = sorted(given.keys() & kwargs.keys())
    if twice:
        raise error(ArgumentError, f"{twice[0]} is given twice", do="give it by position or by name")
    given |= kwargs
    first = parameters_of(function)[0]
    if first.name not in given:
        raise error(ArgumentError, f"{first.name} is missing", do="give it first")
    subject = given.pop(first.name)
    if first.type in (MISSING, Model):
        require_model(subject)
    elif isinstance(first.type, type) and not isinstance(subject, first.type):
        what = f"{first.name} must be of the type {first.type.__name__}"
        raise error(ArgumentError, what, got=type(subject).__name__, do="give one first")
    return subject, given


def checked(parameters: Sequence[Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with their defaults, each of the type and inside the limits that it declares.

    Raises:
        ArgumentError: one is unknown, missing, of a wrong type or outside its limits; says what is allowed.
    """
    names = [p.name for p in parameters]
    for name in given:
        if name not in names:
            what = f'no argument "{name}".{nearest(name, names)}'.removesuffix(".")
            raise error(ArgumentError, what, allowed=", ".join(names) or "no arguments", do="use these names")
    found: dict[str, Any] = {}
    for p in parameters:
        if p.name in given:
            found[p.name] = _checked(p, given[p.name])
        elif p.required:
            raise error(ArgumentError, f"{p.name} is missing", do=f"give {p.name}=")
        else:
            found[p.name] = p.default
    return found


def _checked(p: Parameter, value: Any) -> Any:
    if p.argument is None or (value is None and (p.optional or p.default is None)):
        return value
    if p.type is bool:
        return _flag(p.name, value)
    if p.type is int:
        return _number(p.name, p.argument, value, whole=True)
    if p.type is float:
        return _number(p.name, p.argument, value, whole=False)
    if choices := choices_of(p):
        several = get_origin(p.type) in (tuple, Sequence, list) or p.type is Sequence
        return _words(p, choices, value) if several else _word(p.name, choices, value)
    return value


def choices_of(p: Parameter) -> tuple[str, ...]:
    """The words that a parameter allows: those it declares, or those of its `Literal` type."""
    if p.argument is not None and p.argument.choices:
        return p.argument.choices
    inner = next((a for a in get_args(p.type) if get_origin(a) is Literal), p.type)
    return cast("tuple[str, ...]", get_args(inner)) if get_origin(inner) is Literal else ()


def limits(argument: Argument, *, whole: bool) -> str:
    """What a number may be, in words: "an integer of 1 or more", "a number from 0 to 1"."""
    kind = "an integer" if whole else "a number"
    low, high = argument.least, argument.most
    if low is not None and high is not None:
        return f"{kind} from {low:g} to {high:g}"
    if low is not None:
        return f"{kind} of {low:g} or more"
    return kind if high is None else f"{kind} of at most {high:g}"


def _number(name: str, argument: Argument, value: Any, *, whole: bool) -> int | float:
    try:
        number = integer(value) if whole else _real(value)
        low, high = argument.least, argument.most
        inside = (low is None or number >= low) and (high is None or number <= high)
    except (TypeError, ValueError):
        number, inside = 0, False
    if not inside:
        unit = f" ({argument.unit})" if argument.unit else ""
        what = f"{name} must be {limits(argument, whole=whole)}{unit}"
        raise error(ArgumentError, what, got=repr(value), do="choose another value")
    return number


def _real(value: Any) -> float:
    if isinstance(value, bool | str):
        raise TypeError("no number")
    number = float(value)
    if number != number:
        raise ValueError("not a number")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise error(ArgumentError, f"{name} must be True or False", got=repr(value), do="choose one")
    return value


def _word(name: str, choices: tuple[str, ...], value: Any) -> str:
    if value not in choices:
        what = f"{name} must be one of {', '.join(choices)}"
        raise error(ArgumentError, what, got=repr(value), do="choose one of these")
    return value


def _words(p: Parameter, choices: tuple[str, ...], value: Any) -> tuple[str, ...]:
    words: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    for word in words:
        _word(p.name, choices, word)
    if not words and p.default != ():
        raise error(ArgumentError, f"{p.name} names nothing", allowed=", ".join(choices), do="name one or more")
    return words
