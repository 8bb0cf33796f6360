"""What each compiled program computes, as plain Python: the reference that its transformer is held to.

A program is a function from a sequence of tokens to a sequence of values, one a position. The weights in `programs/`
were compiled from the same programs written in RASP (Weiss, Goldberg and Yahav, "Thinking Like Transformers", 2021,
arXiv 2106.06981) with Tracr (Lindner et al., "Tracr: Compiled Transformers as a Laboratory for Interpretability", 2023,
arXiv 2301.05062) by `tools/compile_programs.py`; nothing of either is needed to use them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random

from torch import Tensor

from microtome.errors import DataError, nearest
from microtome.planted._folder import Planted, load
from microtome.shown import Listing, shown

Value = str | int | float | bool | None
Tokens = Sequence[str]

LETTERS = tuple("abcd")
DIGITS = tuple("0123")
PARENS = ("(", ")", "x")
MOST = 8
"""The longest input of most programs, BOS not counted."""


def _random(program: Program, rng: Random, length: int) -> list[str]:
    return rng.choices(program.vocabulary, k=length)


def _nearly(x: list[str], program: Program, rng: Random) -> list[str]:
    """The input, or as often the input with one token changed."""
    if rng.random() < 0.5:
        x[rng.randrange(len(x))] = rng.choice(program.vocabulary)
    return x


def _palindromes(program: Program, rng: Random, length: int) -> list[str]:
    half = rng.choices(program.vocabulary, k=(length + 1) // 2)
    return _nearly(half + half[: length // 2][::-1], program, rng)


def _distinct(program: Program, rng: Random, length: int) -> list[str]:
    return rng.sample(program.vocabulary, length)


def _rising(program: Program, rng: Random, length: int) -> list[str]:
    return _nearly(sorted(rng.choices(program.vocabulary, k=length)), program, rng)


def _brackets(program: Program, rng: Random, length: int) -> list[str]:
    """A walk that never falls below zero and ends there."""
    x: list[str] = []
    depth = 0
    for left in range(length, 0, -1):
        steps = ["x"] * (left > depth) + ["("] * (left > depth + 1) + [")"] * (depth > 0)
        x.append(rng.choice(steps))
        depth += {"(": 1, ")": -1}.get(x[-1], 0)
    return _nearly(x, program, rng)


@shown
@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        name: as `program` takes it.
        says: what it computes, in a line.
        vocabulary: the tokens that it takes; the id of a token is its place, and BOS comes after the last.
        max_length: the longest input, BOS not counted.
        evaluate: the reference: tokens to one value per position; None where the program defines none.
        numeric: its one output is the value itself; otherwise outputs are labels, and the largest is the value.
        sample: draws an input of some length, by default of random tokens; where those would nearly all have the same
            answer, one that need not.
    """

    name: str
    says: str
    vocabulary: tuple[str, ...]
    max_length: int
    evaluate: Callable[[Tokens], list[Value]]
    numeric: bool = False
    sample: Callable[[Program, Random, int], list[str]] = _random

    @property
    def bos(self) -> int:
        """The id of the token that every input begins with."""
        return len(self.vocabulary)

    def encode(self, tokens: Tokens) -> list[int]:
        """Token ids, BOS first."""
        return [self.bos, *(self.vocabulary.index(t) for t in tokens)]


def _reverse(x: Tokens) -> list[Value]:
    return list(reversed(x))


def _histogram(x: Tokens) -> list[Value]:
    return [x.count(t) for t in x]


def _double_histogram(x: Tokens) -> list[Value]:
    counts = [x.count(t) for t in x]
    return [counts.count(c) for c in counts]


def _sort(x: Tokens) -> list[Value]:
    return [*sorted(x)] if len(set(x)) == len(x) else [None] * len(x)


def _rank(x: Tokens) -> list[Value]:
    order = sorted(range(len(x)), key=lambda i: x[i])
    return [order.index(i) for i in range(len(x))]


def _sort_by_frequency(x: Tokens) -> list[Value]:
    return sorted(x, key=lambda t: -x.count(t))


def _fraction_of_x(x: Tokens) -> list[Value]:
    return [sum(t == "x" for t in x[: i + 1]) / (i + 1) for i in range(len(x))]


def _pair_balance(x: Tokens) -> list[Value]:
    depth = accumulate((t == "(") - (t == ")") for t in x)
    return [d / (i + 1) for i, d in enumerate(depth)]


def _balanced(x: Tokens) -> list[Value]:
    depths = list(accumulate((t == "(") - (t == ")") for t in x))
    return [min(depths) >= 0 and depths[-1] == 0] * len(x)


def _previous(x: Tokens) -> list[Value]:
    return [None, *x[:-1]]


def _next(x: Tokens) -> list[Value]:
    return [*x[1:], None]


def _first_occurrence(x: Tokens) -> list[Value]:
    return [t not in x[:i] for i, t in enumerate(x)]


def _count_a(x: Tokens) -> list[Value]:
    return [x.count("a")] * len(x)


def _running_count_a(x: Tokens) -> list[Value]:
    return [x[: i + 1].count("a") for i in range(len(x))]


def _palindrome(x: Tokens) -> list[Value]:
    return [list(x) == list(reversed(x))] * len(x)


def _mirrored(x: Tokens) -> list[Value]:
    return [a == b for a, b in zip(x, reversed(x), strict=True)]


def _increment(x: Tokens) -> list[Value]:
    return [str((int(t) + 1) % 4) for t in x]


def _maximum_so_far(x: Tokens) -> list[Value]:
    return list(accumulate(x, max))


def _third_token(x: Tokens) -> list[Value]:
    return [x[2] if len(x) > 2 else None] * len(x)


def _successors(x: Tokens) -> list[Value]:
    return [sum(int(b) == int(a) + 1 for a, b in pairwise(x))] * len(x)


def _last_token(x: Tokens) -> list[Value]:
    return [x[-1]] * len(x)


def _detect_ab(x: Tokens) -> list[Value]:
    return [None, *(a == "a" and b == "b" for a, b in pairwise(x))]


def _smaller(x: Tokens) -> list[Value]:
    return [sum(u < t for u in x) for t in x]


def _repeats(x: Tokens) -> list[Value]:
    return [None, *(a == b for a, b in pairwise(x))]


def _swap_pairs(x: Tokens) -> list[Value]:
    return [x[i ^ 1] if i ^ 1 < len(x) else None for i in range(len(x))]


def _more_a_than_b(x: Tokens) -> list[Value]:
    return [x.count("a") > x.count("b")] * len(x)


def _alternate(x: Tokens) -> list[Value]:
    return [t.upper() if i % 2 else t for i, t in enumerate(x)]


def _singletons(x: Tokens) -> list[Value]:
    return [sum(n == 1 for n in Counter(x).values())] * len(x)


def _ascending(x: Tokens) -> list[Value]:
    return [all(a <= b for a, b in pairwise(x))] * len(x)


PROGRAMS: Listing[Program] = Listing(
    {
        p.name: p
        for p in (
            Program("alternate", "upper case at every second position", LETTERS, MOST, _alternate),
            Program(
                "ascending",
                "whether no token is smaller than the one before it",
                DIGITS,
                MOST,
                _ascending,
                sample=_rising,
            ),
            Program("balanced", "whether brackets close what they open", PARENS, MOST, _balanced, sample=_brackets),
            Program("count_a", "how many tokens are a", LETTERS, MOST, _count_a),
            Program("detect_ab", "whether an a and then this b stand here", LETTERS, MOST, _detect_ab),
            Program("double_histogram", "how many tokens occur as often as this one", LETTERS, MOST, _double_histogram),
            Program(
                "first_occurrence", "whether this token is the first of its kind", LETTERS, MOST, _first_occurrence
            ),
            Program(
                "fraction_of_x", "what share of the tokens so far is x", PARENS, MOST, _fraction_of_x, numeric=True
            ),
            Program("histogram", "how often this token occurs", LETTERS, MOST, _histogram),
            Program("increment", "the next digit, 0 after 3", DIGITS, MOST, _increment),
            Program("last_token", "the last token, everywhere", LETTERS, MOST, _last_token),
            Program("maximum_so_far", "the largest token so far", DIGITS, MOST, _maximum_so_far),
            Program("mirrored", "whether the token as far from the other end is the same", LETTERS, MOST, _mirrored),
            Program("more_a_than_b", "whether there are more a than b", LETTERS, MOST, _more_a_than_b),
            Program("next_token", "the token after this one", LETTERS, MOST, _next),
            Program("pair_balance", "share of ( minus share of ) so far", PARENS, MOST, _pair_balance, numeric=True),
            Program(
                "palindrome", "whether it reads the same backwards", LETTERS, MOST, _palindrome, sample=_palindromes
            ),
            Program("previous_token", "the token before this one", LETTERS, MOST, _previous),
            Program("rank", "the place of this token in ascending order, ties in order", DIGITS, 6, _rank),
            Program("repeats", "whether this token is the one before it", LETTERS, MOST, _repeats),
            Program("reverse", "the tokens backwards", LETTERS, MOST, _reverse),
            Program("running_count_a", "how many tokens so far are a", LETTERS, MOST, _running_count_a),
            Program("singletons", "how many tokens occur once", LETTERS, MOST, _singletons),
            Program("smaller", "how many tokens are smaller than this one", DIGITS, MOST, _smaller),
            Program(
                "sort", "the tokens in ascending order, if all differ", tuple("0123456"), 6, _sort, sample=_distinct
            ),
            Program("sort_by_frequency", "the tokens, most frequent first", LETTERS, 5, _sort_by_frequency),
            Program("successors", "how many tokens follow the digit before them", DIGITS, MOST, _successors),
            Program("swap_pairs", "each pair of neighbours, swapped", LETTERS, MOST, _swap_pairs),
            Program("third_token", "the third token, everywhere", LETTERS, MOST, _third_token),
        )
    }
)


def program(name: str) -> Planted:
    """One of the compiled programs, opened: a transformer that computes it exactly, and the circuit that does.

    Source:   Lindner et al., "Tracr: Compiled Transformers as a Laboratory for Interpretability", 2023 (arXiv
              2301.05062). Departs: directions that nobody writes are left out, and scores are not divided by the root
              of d_head; neither changes what is computed.
    Check:    equal to its reference on random inputs; ablating a node changes the output if and only if the node is in
              the circuit; exact effects separate edges; tests/planted/test_programs.py.

    Args:
        name: a key of `PROGRAMS`.

    Returns:
        A `Planted`. Its truth holds `nodes`, `edges` (those that carry what differs between inputs of one length),
        `constant` (edges that carry what does not), `vocabulary`, `bos` and `outputs`, the labels of the logits.

    Raises:
        DataError: there is no such program.
    """
    if name not in PROGRAMS:
        raise DataError(
            f'no program is called "{name}".{nearest(name, list(PROGRAMS))} Programs: {", ".join(PROGRAMS)}.'
        )
    return load(Path(__file__).parent / "programs" / name)


def decode(it: Planted, logits: Tensor) -> list[list[Value]]:
    """The values that logits [batch, pos, output] of a compiled program mean, BOS left out."""
    labels = it.truth["outputs"]
    rows = (logits[..., 0] if labels is None else logits.argmax(-1))[:, 1:].tolist()
    return rows if labels is None else [[labels[i] for i in row] for row in rows]
