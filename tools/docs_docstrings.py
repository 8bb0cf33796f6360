"""Griffe extension: the docstrings as the reference shows them.

The fields of our docstrings (Formula, Source, Cost, Check ...) become a list, formulas as written: Google style knows
`Args`, `Returns` and `Raises`, and would run the others into one paragraph. A method has the docstring that its
declaration makes, with the formula that stands at the head of its file.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any

import griffe

import microtome as mt

FIELDS = ("Question", "Formula", "Shapes", "Units", "Source", "Departs", "Cost", "Check")
FIELD = re.compile(rf"^({'|'.join(FIELDS)}):[ ]+(?=\S)", re.MULTILINE)


class Fields(griffe.Extension):
    """Rewrites the docstring of everything that has fields."""

    def on_class(self, *, cls: Any, **_: Any) -> None:
        """Leave out the constructor that `typing` gives to a protocol."""
        if (init := cls.members.get("__init__")) is not None and init.is_alias:
            cls.del_member("__init__")

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.is_attribute and "property" not in obj.labels:  # a default has the docstring of its type, as of `float`
            obj.docstring = None
        if obj.docstring is None:
            return
        if obj.path in _methods():
            _show_as_declared(obj)
        obj.docstring.value = "\n\n".join(_paragraph(part) for part in obj.docstring.value.split("\n\n"))


@cache
def _methods() -> dict[str, Any]:
    """What implements each method, by its path."""
    functions = [method.function for method in mt.methods().values()]
    return {f"{f.__module__}.{f.__name__}": f for f in functions}


def _show_as_declared(obj: Any) -> None:
    """The docstring of the declaration; what an annotation or a member would add is how the method is made."""
    obj.docstring.value = _declared(_methods()[obj.path], obj.docstring.value)
    for name in list(obj.members):
        obj.del_member(name)
    if obj.is_function:
        obj.returns = None
        for parameter in obj.parameters:
            parameter.annotation = None


def _declared(function: Any, own: str) -> str:
    """The docstring of a method, its formula after its first line."""
    module = sys.modules[function.__module__]
    first, _, rest = (inspect.getdoc(getattr(module, function.__name__)) or own).partition("\n\n")
    _, _, about = (inspect.getdoc(module) or "").partition("\n\n")
    return "\n\n".join(part for part in (first, about, rest) if part)


def _paragraph(text: str) -> str:
    """A paragraph of fields as a list with the field's name in bold, an example as code, any other as it is."""
    if text.startswith(">>>"):
        return f"```python\n{text}\n```"
    parts = FIELD.split(text)
    if len(parts) == 1:
        return text
    fields = list(zip(parts[1::2], parts[2::2], strict=True))
    return "\n\n".join([parts[0].strip()] * bool(parts[0].strip()) + [_item(name, body) for name, body in fields])


def _item(name: str, body: str) -> str:
    lines = [line.strip() for line in body.strip().splitlines()]
    if name == "Formula":
        return f"- **{name}**\n\n" + "\n".join(f"        {line}" for line in lines)
    return f"- **{name}** " + " ".join(lines)
