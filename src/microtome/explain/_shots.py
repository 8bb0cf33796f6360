"""Tasks as pairs of input and output, and how prompts with demonstrations are written of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.files import whole_file
from microtome.model import Model

Piece = str | Sequence[int]
"""An input or an output: a text, or token ids, which stand in a prompt as they are."""


def cut(template: str) -> tuple[str, str, str]:
    """What stands around the input up to the output, without the spaces before it; these spaces; and what follows.

    Raises:
        ArgumentError: the template does not hold both, once.
    """
    if template.count("{input}") != 1 or template.count("{output}") != 1:
        do = 'write both once, such as "{input} -> {output}\\n"'
        raise error(ArgumentError, "the template must hold {input} and {output}", got=repr(template), do=do)
    before, _, ends = template.partition("{output}")
    begins = before.rstrip(" ")
    return begins, before[len(begins) :], ends


def pairs_in(task: Any) -> list[tuple[Piece, Piece]]:
    """Pairs of input and output, given as such or in a file.

    Raises:
        DataError: the file cannot be read, or they are no pairs.
    """
    given: Any = task
    if isinstance(task, str | Path):
        path = whole_file(task, (".json",), "as a task")
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise error(DataError, f"cannot read a task from {task}", got=str(problem), do="check it") from problem
    found: list[tuple[Piece, Piece]] = []
    if not isinstance(given, Sequence) or isinstance(given, str):
        got, do = type(given).__name__, "give a list of (input, output), or a file of these"
        raise error(DataError, "a task is a list of pairs", got=got, do=do)
    for number, item in enumerate(given):
        held: Any = item
        pair = (held.get("input"), held.get("output")) if isinstance(held, Mapping) else _both(held)
        texts = all(isinstance(x, str) and x for x in pair)
        ids = all(isinstance(x, Sequence) and not isinstance(x, str) and len(x) for x in pair)
        if len(pair) != 2 or not (texts or ids):
            got, do = f"{item!r} as number {number}", "write an input and an output"
            raise error(DataError, "a task is made of pairs of texts, or of token ids", got=got, do=do)
        found.append(cast("tuple[Piece, Piece]", pair))
    return found


def _both(item: Any) -> tuple[Any, ...]:
    """The two parts of a pair; none of what has no parts."""
    return tuple(item) if isinstance(item, Sequence) and not isinstance(item, str) else ()


@dataclass(frozen=True)
class Deck:
    """The pairs of a task in the order drawn, and how prompts are written of them."""

    model: Model
    pairs: Sequence[tuple[Piece, Piece]]
    asked: int
    """How many of the first are asked about; the others demonstrate."""
    begins: str
    ends: str
    gap: str
    """What stands between a prompt and its answer."""
    shots: int

    @classmethod
    def of(cls, model: Model, task: Any, template: str, shots: int, asked: int) -> Deck:
        """Read and shuffle them.

        Raises:
            DataError: the file cannot be read, or there are too few pairs.
            ArgumentError: the template lacks something.
        """
        begins, gap, ends = cut(template)
        pairs = pairs_in(task)
        if len(pairs) < asked + shots:
            do = "give more, or fewer samples, tests and shots"
            raise error(DataError, "the task has too few pairs", got=len(pairs), allowed=f"{asked + shots}", do=do)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(current().seed)).tolist()
        return cls(model, [pairs[i] for i in order], asked, begins, ends, gap, shots)

    def prompt(self, number: int, *, shots: bool = True, shuffled: bool = False) -> Any:
        """The prompt that asks for the answer of a pair: behind demonstrations, own or with other answers, or none."""
        ask = self._asked(self.pairs[number][0])
        return self.shown(number, shuffled=shuffled) + ask if shots else ask

    def shown(self, number: int, *, shuffled: bool = False) -> Any:
        """The demonstrations of a prompt, drawn from the pairs that are not asked about.

        Shuffled, they have the answers of as many other pairs, drawn alike: these need not be the same answers in
        another order, and one may be right by chance.
        """
        generator = torch.Generator().manual_seed(1_000_003 * current().seed + number)
        rest = len(self.pairs) - self.asked
        chosen = torch.randperm(rest, generator=generator)[: self.shots].tolist()
        others = torch.randperm(rest, generator=generator)[: self.shots].tolist()
        shown: Any = "" if isinstance(self.pairs[0][0], str) else []
        for i, other in zip(chosen, others if shuffled else chosen, strict=True):
            given, output = self.pairs[self.asked + i][0], self.pairs[self.asked + other][1]
            answer = self.gap + output + self.ends if isinstance(output, str) else list(output)
            shown = shown + self._asked(given) + answer
        return shown

    def _asked(self, given: Piece) -> Any:
        return self.begins.replace("{input}", given) if isinstance(given, str) else list(given)

    def answer(self, number: int) -> int:
        """The first token of the answer of a pair, as it follows the prompt."""
        output = self.pairs[number][1]
        return self.model.continuation(self.gap + output)[0] if isinstance(output, str) else self.model.to_id(output[0])
