"""What a network is trained to do: a compiled program, or an algorithm in plain Python that names its variables.

Either says what the answers are, and what they become when one variable, or what one part of the program passes to
another, comes from a second input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from microtome.errors import DataError, error
from microtome.planted._corruptions import Corruptions, corruptions
from microtome.planted._exchange import Exchange
from microtome.planted._folder import Planted
from microtome.planted._programs import PROGRAMS, Tokens, Value, decode, program
from microtome.planted._truth import EdgeName, head_of, mlp_of
from microtome.shown import shown

Let = Callable[[str, Any], Any]
"""Given to an algorithm as `let`: names an intermediate value, and gives back what it is to be."""
TRIED = 32
"""Inputs on which a program is compared with its own model, or an algorithm with itself."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a program says at every position but the first.

    Attributes:
        labels: numbers of the outputs.
        there: where it says anything.
    """

    labels: Int[Tensor, "batch pos"]
    there: Bool[Tensor, "batch pos"]


class Compiled:
    """A compiled program as what is taught: its own transformer is intervened on.

    Raises:
        DataError: its outputs are numbers, or it disagrees with its own model.
    """

    def __init__(self, it: Planted) -> None:
        named = str(it.truth.get("program"))
        if named not in PROGRAMS or not it.truth.get("edges"):
            got, do = it.model.anatomy.name, "pass a name of planted.PROGRAMS, or what planted.program gave"
            raise error(DataError, "this is no compiled program", got=got, do=do)
        if it.truth["outputs"] is None:
            do = "choose one whose outputs are labels"
            raise error(DataError, f'the program "{named}" has one number as its output', allowed="labels", do=do)
        self.it, self.name, self.length = it, named, it.model.anatomy.n_ctx
        self.vocabulary, self.outputs = tuple(it.truth["vocabulary"]), tuple(it.truth["outputs"])
        inside = it.truth["nodes"]
        self.variables = tuple(n for n in inside if head_of(n) is not None or mlp_of(n) is not None)
        self.edges: tuple[EdgeName, ...] = tuple((u, v, x) for u, v, x in it.truth["edges"])
        self._require_agreement()

    def _require_agreement(self) -> None:
        own, rng = PROGRAMS[self.name], Random(0)
        drawn = [own.sample(own, rng, own.max_length) for _ in range(TRIED)]
        made = decode(self.it, self.it.model.run([own.encode(x) for x in drawn]).logits)
        pairs = [(a, b) for x, row in zip(drawn, made, strict=True) for a, b in zip(own.evaluate(x), row, strict=True)]
        right = sum(a == b for a, b in pairs if a is not None)
        of = sum(a is not None for a, _ in pairs)
        if right < of:
            raise error(
                DataError, f'the program "{self.name}" disagrees with its own model',
                got=f"{right} of {of} answers", allowed="all of them", do="pass a model that computes the program",
            )  # fmt: skip

    def draw(self, n: int, seed: int, length: int) -> Corruptions:
        """As `corruptions`."""
        return corruptions(self.it, n, seed, length=length)

    def answers(self, inputs: Corruptions) -> Answers:
        """What it says."""
        return self._labelled(self.it.model.run(inputs.clean).logits)

    def with_variable(self, inputs: Corruptions, name: str) -> Answers:
        """What it says where a node has its activations of the source."""
        edit = Exchange.of(self.it.model, inputs).node(name)
        return self._labelled(self.it.model.run(inputs.clean, edits=[edit]).logits)

    def with_edge(self, inputs: Corruptions, edge: EdgeName) -> Answers:
        """What it says where an edge carries what it does in the source."""
        edit = Exchange.of(self.it.model, inputs).edge(edge)
        return self._labelled(self.it.model.run(inputs.clean, edits=[edit]).logits)

    @staticmethod
    def _labelled(logits: Tensor) -> Answers:
        own = logits[:, 1:].detach()
        return Answers(own.argmax(-1), own.amax(-1) > 0.5)


def _anything(vocabulary: tuple[str, ...], rng: Random, length: int) -> list[str]:
    return rng.choices(vocabulary, k=length)


@shown
@dataclass(frozen=True)
class Algorithm:
    """A program in plain Python that names its variables, for `train`.

    >>> def repeats(x, let):
    ...     before = let("before", [None, *x[:-1]])
    ...     return [None, *(a == b for a, b in zip(before[1:], x[1:]))]
    >>> planted.Algorithm("repeats", tuple("abc"), 6, (False, True), ("before",), repeats)

    Attributes:
        name: of the network that is trained.
        vocabulary: the tokens that it takes; the id of a token is its place, and BOS comes after the last.
        max_length: the longest input, BOS not counted.
        outputs: the values that it may give, each a label.
        variables: the names that it gives to `let`.
        evaluate: tokens and `let` to one value per position, None where there is none; variables may hold anything.
        edges: which parts read which, as (sender, receiver, input) with variables, `embed`, `pos_embed` and `output`
            for nodes; nothing where this is not known.
        sample: draws the tokens of an input of some length; random tokens by default.
    """

    name: str
    vocabulary: tuple[str, ...]
    max_length: int
    outputs: tuple[Value, ...]
    variables: tuple[str, ...]
    evaluate: Callable[[Tokens, Let], Sequence[Value]]
    edges: tuple[EdgeName, ...] = ()
    sample: Callable[[tuple[str, ...], Random, int], list[str]] = _anything


class Plain:
    """An algorithm as what is taught.

    Raises:
        DataError: it has too few tokens, outputs or variables, or one twice; its inputs are of other tokens or lengths;
            it names other variables, gives other outputs, or answers differently when asked again.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.own, self.name, self.length = algorithm, algorithm.name, algorithm.max_length + 1
        self.vocabulary, self.outputs = algorithm.vocabulary, algorithm.outputs
        self.variables, self.edges = algorithm.variables, algorithm.edges
        self._require_parts()
        rng = Random(0)
        for _ in range(TRIED):
            x = self._sampled(rng, algorithm.max_length)
            values, held = self._run(x, {})
            if self._run(x, held)[0] != values:
                got, do = f"{x}", "let it depend on its tokens and variables alone"
                raise error(DataError, f'the algorithm "{self.name}" disagrees with itself', got=got, do=do)

    def _require_parts(self) -> None:
        """Refuse an algorithm of which nothing can be taught.

        Raises:
            DataError: names what it has too little of, or twice.
        """
        own = {"vocabulary": (self.vocabulary, 2), "outputs": (self.outputs, 1), "variables": (self.variables, 1)}
        for part, (held, least) in own.items():
            if len(held) < least:
                what = f'the algorithm "{self.name}" needs more {part}'
                raise error(DataError, what, got=len(held), allowed=f"{least} or more", do=f"give more {part}=")
            twice = [x for x in held if held.count(x) > 1]
            if twice:
                what, do = f'the {part} of the algorithm "{self.name}" name one twice', "name each of them once"
                raise error(DataError, what, got=repr(twice[0]), do=do)
        if self.own.max_length < 1:
            what = f'the algorithm "{self.name}" takes no token'
            raise error(DataError, what, got=f"max_length={self.own.max_length}", allowed="1 or more")

    def _sampled(self, rng: Random, length: int) -> list[str]:
        """The tokens of an input.

        Raises:
            DataError: they cannot be drawn, or are others, or not so many.
        """
        try:
            drawn = list(self.own.sample(self.vocabulary, rng, length))
        except Exception as problem:
            got, do = f"{type(problem).__name__}: {problem}", "give another sample="
            what = f'the algorithm "{self.name}" draws no input of length {length}'
            raise error(DataError, what, got=got, do=do) from problem
        other = [t for t in drawn if t not in self.vocabulary]
        if other or len(drawn) != length:
            got = repr(other[0]) if other else f"{len(drawn)} tokens for a length of {length}"
            what = f'the algorithm "{self.name}" draws what is no input'
            raise error(DataError, what, got=got, allowed=f"tokens of {', '.join(self.vocabulary)}",
                        do="give another sample=")  # fmt: skip
        return drawn

    def _run(self, tokens: Tokens, given: Mapping[str, Any]) -> tuple[list[Value], dict[str, Any]]:
        """Its values, and its variables; some as they are given."""
        held: dict[str, Any] = {}

        def let(name: str, value: Any) -> Any:
            held[name] = given.get(name, value)
            return held[name]

        try:
            values = list(self.own.evaluate(tokens, let))
        except Exception as problem:
            got, do = f"{type(problem).__name__}: {problem}", "give another evaluate="
            raise error(DataError, f'the algorithm "{self.name}" fails on {list(tokens)}', got=got, do=do) from problem
        if set(held) != set(self.variables):
            do = "let it name each of them, by let(name, value)"
            raise error(
                DataError, f'the algorithm "{self.name}" names other variables', got=", ".join(held) or "none",
                allowed=", ".join(self.variables) or "none", do=do,
            )  # fmt: skip
        other = [v for v in values if v is not None and v not in self.outputs]
        if other or len(values) != len(tokens):
            got = repr(other[0]) if other else f"{len(values)} values for {len(tokens)} tokens"
            allowed = f"a value per token, each one of {', '.join(map(repr, self.outputs))}, or None"
            raise error(DataError, f'the algorithm "{self.name}" gives what is no output', got=got, allowed=allowed)
        return values, held

    def draw(self, n: int, seed: int, length: int) -> Corruptions:
        """Half of the sources are drawn anew, and half differ in one token; positions are shuffled."""
        rng, bos = Random(seed), len(self.vocabulary)
        rows: list[list[list[int]]] = [[], [], []]
        for i in range(n):
            clean = self._ids(self._sampled(rng, length - 1))
            other = [*clean]
            at = rng.randrange(length - 1)
            other[at] = rng.choice([t for t in range(bos) if t != clean[at]])
            source = self._ids(self._sampled(rng, length - 1)) if i % 2 else other
            for held, row in zip(rows, (clean, source, rng.sample(range(1, length), length - 1)), strict=True):
                held.append([0 if held is rows[2] else bos, *row])
        return Corruptions(*map(torch.tensor, rows))

    def _ids(self, tokens: Tokens) -> list[int]:
        return [self.vocabulary.index(t) for t in tokens]

    def _words(self, row: Tensor) -> list[str]:
        return [self.vocabulary[i] for i in row[1:].tolist()]

    def answers(self, inputs: Corruptions) -> Answers:
        """What it says."""
        return self._labelled([self._run(self._words(row), {})[0] for row in inputs.clean])

    def with_variable(self, inputs: Corruptions, name: str) -> Answers:
        """What it says where a variable has its value of the source."""
        rows: list[list[Value]] = []
        for row, other in zip(inputs.clean, inputs.corrupt, strict=True):
            value = self._run(self._words(other), {})[1][name]
            rows.append(self._run(self._words(row), {name: value})[0])
        return self._labelled(rows)

    def with_edge(self, inputs: Corruptions, edge: EdgeName) -> Answers | None:
        """Nothing: plain Python has variables, and no edges to intervene on."""
        return None

    def _labelled(self, rows: Sequence[Sequence[Value]]) -> Answers:
        labels = [[0 if v is None else self.outputs.index(v) for v in row] for row in rows]
        return Answers(torch.tensor(labels), torch.tensor([[v is not None for v in row] for row in rows]))


Taught: TypeAlias = Compiled | Plain
"""What a network can be trained to do."""


def taught(given: str | Planted | Algorithm) -> Taught:
    """What was given, as what can be taught.

    Raises:
        DataError: it is no such program, or disagrees with itself.
    """
    if isinstance(given, Algorithm):
        return Plain(given)
    return Compiled(program(given) if isinstance(given, str) else given)
