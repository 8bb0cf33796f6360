"""Tasks of copying: a repeat of random tokens, and a word from a longer context."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator

from microtome.errors import PromptError, error
from microtome.tasks._pair import Draft, Pair, draft, with_places
from microtome.tasks._tokens import Tokens
from microtome.tasks._words import words

NEEDLES = ("The secret word is", "The password for today is", "The name of the song is")


def induction(tokens: Tokens, rng: Generator, length: int = 16) -> Iterator[Pair]:
    """Random different tokens, then the same again without the last one, which is the answer.

    In the corrupt prompt another token, the foil, stands in its place. Spans: `source`, where the answer stands, and
    `previous`, the token before it, which is also the last token of the prompt.
    """
    usable = [i for i in range(tokens.n_vocab) if i not in tokens.special]
    start = tokens.start
    most = len(usable) - 1 if tokens.n_ctx is None else min(len(usable) - 1, (tokens.n_ctx - len(start) + 1) // 2)
    if not 2 <= length <= most:
        raise error(
            PromptError, "random repeats of this length cannot be drawn", got=str(length),
            allowed=f"2 to {most} tokens", do="choose another length",
        )  # fmt: skip
    while True:
        row = tuple(usable[i] for i in rng.choice(len(usable), length + 1, replace=False))
        once, foil = row[:-1], row[-1]
        clean, corrupt = start + once + once[:-1], start + once[:-1] + (foil,) + once[:-1]
        at = len(start) + length
        spans = with_places({"previous": (at - 2, at - 1), "source": (at - 1, at)}, len(clean))
        right, wrong = tokens.words((once[-1], foil))
        shown = [(" " if tokens.tokenizer is None else "").join(tokens.words(ids)) for ids in (clean, corrupt)]
        ids = (clean, corrupt, right, wrong, (once[-1],), (foil,))
        yield Pair(shown[0], shown[1], *ids, spans, f"length {length}")


def needle(tokens: Tokens, rng: Generator, sentences: int = 8) -> Iterator[Draft]:
    """Sentences that say nothing of a word, one among them that names it, and at the end the question for it."""
    filler = words("filler")
    if not 1 <= sentences <= len(filler):
        raise error(
            PromptError, "the context cannot have that many sentences", got=str(sentences),
            allowed=f"1 to {len(filler)}", do="choose another number of sentences",
        )  # fmt: skip
    while True:
        around = [filler[i] for i in rng.permutation(len(filler))[:sentences]]
        asked = NEEDLES[rng.integers(len(NEEDLES))]
        right, wrong = (words("needles")[i] for i in rng.permutation(len(words("needles")))[:2])
        depth = int(rng.integers(len(around) + 1))
        text = " ".join([*around[:depth], f"{asked} {{needle}}.", *around[depth:], asked])
        yield draft(text, {"needle": right}, {"needle": wrong}, f" {right}", f" {wrong}", f"sentence {depth}")
