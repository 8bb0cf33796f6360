"""Tasks of numbers: a later year, and a sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from numpy.random import Generator

from microtome.errors import PromptError, error
from microtome.tasks._pair import Draft, draft
from microtome.tasks._tokens import Misfit, Tokens
from microtome.tasks._words import words

YEARS = "The {event} lasted from the year {start} to the year {prefix}"


def greater_than(tokens: Tokens, rng: Generator) -> Iterator[Draft]:
    """An event that began in some year; its end is any later year of the century (or decade, see `_given`)."""
    given = _given(tokens)
    while True:
        event = words("events")[rng.integers(len(words("events")))]
        start = int(rng.integers(11, 20)) * 100 + int(rng.integers(2, 99))
        cut = 10 ** (4 - given)
        earliest = start // cut * cut + (1 if given == 2 else 0)
        ends = [f"{rest:0{4 - given}d}" for rest in range(cut)]
        later = start % cut + 1
        if start == earliest or later == cut:
            continue  # nothing to corrupt, or no later year
        values = {"event": event, "start": str(start), "prefix": str(start)[:given]}
        yield draft(YEARS, values, {"start": str(earliest)}, ends[later:], ends[:later], f"{given} digits given")


def _given(tokens: Tokens) -> int:
    """How many digits of the last year the prompt ends in: two, or three where tokens of three digits cut years so."""
    for given in (2, 3):
        prompt = f"The war lasted from the year 1732 to the year {'1745'[:given]}"
        if _continues(tokens, prompt, ["1745"[given:]]) is not None:
            return given
    raise error(
        PromptError,
        'the task "greater_than" needs years that are cut into tokens after their second or third digit',
        got=str(tokens.words(tokens.ids(" 1732"))),
        do="use another task, or a model with another tokenizer",
    )


def addition(tokens: Tokens, rng: Generator) -> Iterator[Draft]:
    """Two worked sums, then one to do. Operands are below 50 where two digits are one token, else sums below ten."""
    spaced = _continues(tokens, "1 + 2 =", [" 3"]) == 1
    lead, behind = (" ", "") if spaced else ("", " ")
    at_least_float32 = _continues(tokens, "31 + 26 =" + behind, [lead + "57"]) == 1
    template = "{x} + {y} = {z}\n{v} + {w} = {u}\n{a} + {b} =" + behind
    while True:
        a, b, other = _operands(rng, at_least_float32)
        right, wrong = a + b, a + other
        x, y = _example(rng, at_least_float32, (right, wrong))
        v, w = _example(rng, at_least_float32, (right, wrong, x + y))
        values = {"x": x, "y": y, "z": x + y, "v": v, "w": w, "u": v + w, "a": a, "b": b}
        texts = {name: str(value) for name, value in values.items()}
        yield draft(template, texts, {"b": str(other)}, f"{lead}{right}", f"{lead}{wrong}")


def _operands(rng: Generator, at_least_float32: bool) -> tuple[int, int, int]:
    """Two operands, and another second one, all sums written with as many digits."""
    while True:
        if at_least_float32:
            a, b, other = (int(i) for i in rng.integers(10, 50, 3))
        else:
            a, b, other = (int(i) for i in rng.integers(1, 9, 3))
        if b != other and (at_least_float32 or (a + b < 10 and a + other < 10)):
            return a, b, other


def _example(rng: Generator, at_least_float32: bool, sums: tuple[int, ...]) -> tuple[int, int]:
    """A worked sum whose result is none of these, so that no answer or foil can be copied from it."""
    while True:
        x, y, _ = _operands(rng, at_least_float32)
        if x + y not in sums:
            return x, y


def _continues(tokens: Tokens, prompt: str, texts: Sequence[str]) -> int | None:
    """How many tokens the first text adds to a prompt; None where it changes the end of the prompt."""
    try:
        return len(tokens.continuations(prompt, texts)[0])
    except Misfit:
        return None
