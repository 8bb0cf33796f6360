"""The methods that are known, read from source without importing any: names, kinds, commands.

A method is declared in a module of one of the rooms of methods; reading the source of these modules for their
declarations takes a few milliseconds, importing them takes seconds. Packages outside register theirs as entry points:

    [project.entry-points."microtome.methods"]
    punctuation = "my_package.punctuation"

The name is that of a method, the value the module that declares it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint, entry_points

from microtome.errors import nearest

ROOMS = ("measurements", "explain", "probes", "change", "circuits", "subspaces", "claims")
"""Rooms whose modules declare methods."""

ENTRY_POINTS = "microtome.methods"
KINDS = ("measure", "question", "change")


@dataclass(frozen=True)
class Entry:
    """A method that is known and need not be imported yet.

    Attributes:
        name, kind: as declared; of an entry point the kind is known when it is imported.
        module: that declares it.
        summary: the first line of its docstring.
        command: its name on the command line, if it has one.
        problem: why it cannot be used, if it cannot.
    """

    name: str
    kind: str | None
    module: str
    summary: str
    command: str = ""
    problem: str = ""


KNOWN_AS: dict[str, str] = {
    "maps": "head_functions", "relations": "head_functions", "successor": "head_functions",
    "successor_heads": "head_functions", "copying": "ov_copying", "ov": "ov_copying", "entropy": "head_map",
    "ngram": "head_map", "hopfield": "head_map", "previous_token": "induction", "prefix_matching": "induction",
    "duplicate_token": "induction", "cmr": "repeat_lags", "lags": "repeat_lags", "in_context_learning": "in_context",
    "icl": "in_context", "taylor": "head_importance", "michel": "head_importance", "importance": "head_importance",
    "ablation": "head_ablation", "low_rank": "attention_rank", "rank": "attention_rank", "hull": "unselectable",
    "separability": "selectivity", "delimiters": "attention_targets", "registers_and_sinks": "registers",
    "sink": "sinks", "massive_activations": "massive", "lape": "group_neurons", "language_neurons": "group_neurons",
    "entropy_neurons": "confidence_neurons", "perplexity": "loss", "cka": "layer_similarity", "dead": "neuron_events",
    "anisotropy": "geometry", "shortgpt": "ablation_loss", "probes": "probe", "probing": "probe", "tcav": "probe",
    "cav": "probe", "mdl": "probe",
}  # fmt: skip
"""Names under which papers and other tools know what a method measures; a name that is wrong is answered by them."""


def likely(name: str, names: Iterable[str]) -> str:
    """What was likely meant by a name that no method has, as text that ends an error: as `microtome.errors.nearest`."""
    known = KNOWN_AS.get(name.strip().lower().replace("-", "_").replace(" ", "_"))
    every = list(names)
    return f' Did you mean "{known}"?' if known in every else nearest(name, every)


REGISTERED: dict[str, Entry] = {}
"""Methods that were registered in this process, whoever declared them."""


def entries() -> dict[str, Entry]:
    """Every method of the package, of entry points, and registered in this process, by name."""
    found = {entry.name: entry for entry in own()}
    for point in points():
        command = point.name.replace("_", "-")
        found.setdefault(point.name, Entry(point.name, None, point.value, f"from {point.value}", command))
    return found | REGISTERED


def points() -> list[EntryPoint]:
    """The methods that packages outside register."""
    return list(entry_points(group=ENTRY_POINTS))


@cache
def own() -> tuple[Entry, ...]:
    """The methods of the package, read from its source."""
    found: list[Entry] = []
    for room in ROOMS:
        folder = resources.files("microtome") / room
        for file in sorted(folder.iterdir(), key=lambda f: f.name) if folder.is_dir() else ():
            if file.name.endswith(".py"):
                found += _in_source(file.read_text(encoding="utf-8"), f"microtome.{room}.{file.name[:-3]}")
    return tuple(found)


def _in_source(text: str, module: str) -> Iterator[Entry]:
    """The methods that a module declares at its top level."""
    if not any(f"@{kind}(" in text for kind in KINDS):
        return
    for node in ast.parse(text).body:
        for decorator in getattr(node, "decorator_list", ()):
            call = decorator.func.id if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) else ""
            if call in KINDS and isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = decorator.args[0] if decorator.args else None
                name = first.value if isinstance(first, ast.Constant) else node.name
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                given = {k.arg: k.value.value for k in decorator.keywords if isinstance(k.value, ast.Constant)}
                yield Entry(str(name), call, module, summary, str(given.get("command", "")))
