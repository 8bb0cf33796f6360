"""What an error advises, in the words of the command that met it.

Errors are written for whoever calls a function: "give answer= or metric=". Here each way out that they name is put as
the options of the command, and one that the command does not have is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from microtome.errors import MicrotomeError

VERBS = r"(?:pass|give|use|leave|open|choose|name|raise|shorten|read|build|write|run|sum|copy|install|measure)\b"
WAYS = re.compile(rf",? or (?={VERBS})|,? or (?=\w+=)|, (?={VERBS})")
GIVEN = re.compile(r"""\b([a-z_]+)=("[^"]*"|'[^']*'|True|False|-?\d+\b)?""")
POSITIONS = re.compile(r"(?:its tokens as |its positions as )?\(first, end\)")
CODE = re.compile(
    r"\w=|\bmt\.|\w\(|\s\[\w+, |`(?!microtome )[^`]*`|token ids?\b|[a-z]{2}[A-Z]"
    r"|\b(?:Task|Settings|Statistic|Freeze|Edge|Argument)\b"
)
"""What only a program can do."""


@dataclass(frozen=True)
class Written:
    """How an argument is written on the command line.

    Attributes:
        on: its option, or its name where it is taken by position.
        off: what turns it off, if anything does.
        flag: whether it takes no value.
    """

    on: str
    off: str = ""
    flag: bool = False

    def given(self, value: str | None) -> str:
        """It with a value as Python writes it; "" where the command cannot say that."""
        if value == "False":
            return self.off
        if value is None or self.flag:
            return self.on
        return f"{self.on} {value.strip(chr(34) + chr(39))}"


def written(command: Any) -> dict[str, Written]:
    """By name of an argument, how a command takes it."""
    found: dict[str, Written] = {}
    for p in getattr(command, "params", ()):
        longest = max(p.opts, key=len)
        if not longest.startswith("-"):
            found[p.name] = Written(p.name.upper())
            continue
        option = Written(longest, next(iter(p.secondary_opts), ""), bool(getattr(p, "is_flag", False)))
        found |= {p.name: option, longest.strip("-").replace("-", "_"): option}
    return found


def advice(do: str, options: Mapping[str, Written]) -> str:
    """Advice in the words of a command; "" where nothing of it can be done there."""
    ways: list[str] = []
    verb = ""
    for part in WAYS.split(do):
        verb = verb if re.match(r"\w+=", part) else part.split(" ")[0]
        way = f"{verb} {part}" if re.match(r"\w+=", part) else part
        way = POSITIONS.sub("positions, such as @3 or @3-5", GIVEN.sub(lambda m: _option(m, options), way))
        if not CODE.search(re.sub("`microtome [^`]*`", "", way)):
            ways.append(way)
    return ", or ".join(ways)


def _option(match: re.Match[str], options: Mapping[str, Written]) -> str:
    known = options.get(match[1])
    return (known.given(match[2]) if known else "") or match[0]


def in_words_of(problem: MicrotomeError, command: Any) -> str:
    """The text of an error, for whoever runs a command."""
    if problem.do is None:
        return str(problem)
    do = advice(problem.do, written(command))
    return problem.told + (f" To do: {do}." if do else "")
