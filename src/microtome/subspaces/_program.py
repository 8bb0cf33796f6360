"""A program against a model: are the program's variables where they are said to be, and are tokens variables?

Formula:  the program is run on a base input with one variable as it was on a source input; the model is run on the base
          prompt with a part of its activations from the source prompt.
          accuracy = share of swaps after which both say the same, over swaps that change the program's answer;
          kept     = the same over swaps that do not.
          Tokens as variables: the text names the variables so far, one of them changed.
          follows  = share of texts after which the model says the program's next value with that variable changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch

from microtome.anatomy import Indices, parse
from microtome.context import current
from microtome.errors import ArgumentError, MicrotomeError, PromptError, error
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.stream import mean_interval
from microtome.subspaces._exchange import Exchange
from microtome.subspaces._score import ENDS, by_entity, projection
from microtome.subspaces._subspace import Subspace
from microtome.subspaces._swaps import Swap
from microtome.subspaces._ways import random_basis

Let = Callable[[str, Any], Any]
"""Given to a program as `let`: names an intermediate value, and gives back what it is to be."""
Program = Callable[..., Any]
Inputs = Sequence[Mapping[str, Any]]

GEIGER = Source(
    "Geiger et al.", "Causal Abstractions of Neural Networks", 2021, "2106.02997", "interchange intervention accuracy",
    departs="swaps that change the program's answer and swaps that do not are counted apart",
)  # fmt: skip
PROGRAM = Annotated[
    Program,
    Argument("a function of the inputs and of `let`, which it calls with a name and a value for each variable",
             command=False),
]  # fmt: skip
INPUTS = Annotated[Inputs, Argument("the inputs of the program, by name", command=False)]
WRITE = Argument("makes the prompt, a text or token ids", command=False)
ANSWER = Annotated[
    Callable[[Any], str | int],
    Argument("makes the one token that stands for what the program gives, text or id", command=False),
]
LEAST = Annotated[
    float, Argument("share of the inputs on which program and model must agree", "share", least=0, most=1)
]


@dataclass(frozen=True)
class _Ran:
    """One run of a program: what it gave, and its variables in the order in which they were named."""

    output: Any
    variables: Mapping[str, Any]


def _run(program: Program, inputs: Mapping[str, Any], swapped: Mapping[str, Any]) -> _Ran:
    """Run a program with some variables as given.

    Raises:
        ArgumentError: it fails, or names a variable twice.
    """
    held: dict[str, Any] = {}

    def let(name: str, value: Any) -> Any:
        if name in held:
            raise error(ArgumentError, f'the program names its variable "{name}" twice', do="give each its own name")
        held[name] = swapped.get(name, value)
        return held[name]

    try:
        return _Ran(program(**inputs, let=let), held)
    except MicrotomeError:
        raise
    except Exception as problem:
        got, do = f"{type(problem).__name__}: {problem}", "give a function of these inputs and let"
        raise error(ArgumentError, f"the program fails on {dict(inputs)}", got=got, do=do) from problem


def _ran(program: Program, inputs: Inputs) -> list[_Ran]:
    """The runs of a program on all inputs.

    Raises:
        ArgumentError: there are fewer than two, one is no mapping, or it gives another answer when its
            variables are as they were.
    """
    if len(inputs) < 2:
        raise error(ArgumentError, "a swap needs two inputs", got=len(inputs), do="give more inputs")
    listed: Sequence[Any] = inputs
    odd = next((given for given in listed if not isinstance(given, Mapping)), None)
    if odd is not None:
        do = 'write such as {"a": 1, "b": 2}'
        raise error(ArgumentError, "an input names its values", got=f"{type(odd).__name__} {odd!r}", do=do)
    found = [_run(program, given, {}) for given in inputs]
    for given, ran in zip(inputs, found, strict=True):
        if _run(program, given, ran.variables).output != ran.output:
            raise error(
                ArgumentError, "the program does not depend on its inputs and variables alone",
                got=f"two answers to {dict(given)}", do="leave chance and state out of it",
            )  # fmt: skip
    return found


def _token(model: Model, answer: Callable[[Any], str | int], value: Any) -> int:
    """The token of a value of the program.

    Raises:
        PromptError: it is not one token.
        ArgumentError: the function that makes it fails.
    """
    given = _called(answer, "answer", value)
    return int(given) if isinstance(given, int) else model.to_id(given)


def _prompt(model: Model, write: Callable[..., Any], *of: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of the prompt that `write` makes.

    Raises:
        ArgumentError: it fails.
    """
    given = _called(write, "write", *of)
    return tuple(model.to_batch(given).rows[0].tolist())


def _called(function: Callable[..., Any], name: str, *of: Any) -> Any:
    """What a function of the user gives.

    Raises:
        ArgumentError: it fails.
    """
    try:
        return function(*of)
    except MicrotomeError:
        raise
    except Exception as problem:
        got, shown = f"{type(problem).__name__}: {problem}", ", ".join(str(x) for x in of)
        raise error(ArgumentError, f"{name} fails on {shown}", got=got, do=f"give another {name}=") from problem


def _require_agreement(model: Model, agree: Sequence[bool], least: float) -> float:
    """The share of inputs on which program and model agree.

    Raises:
        PromptError: there is none, or too few.
    """
    share = sum(agree) / len(agree)
    if share < least or sum(agree) < 2:
        raise error(
            PromptError, f"the program disagrees with {model.anatomy.name} before anything is swapped",
            got=f"the same answer to {sum(agree)} of {len(agree)} inputs", allowed=f"{least:.0%}, and 2 inputs",
            do="correct the program, the prompts or the answers, or lower least",
        )  # fmt: skip
    return share


@question(
    "interchange",
    title="interchange interventions of a program",
    question="Does the model hold a program's variables at the places where they are said to be?",
    columns=(
        Column("accuracy", "share", "of swaps that change the program's answer after which the model says it too",
               "accuracy_random", (0, 1), dims=("variable",)),
        Column("accuracy_random", "share", "the same with a random subspace of the same rank; of half the width where "
               "all of the site is swapped", range=(0, 1), dims=("variable",)),
        Column("kept", "share", "of swaps that do not change the program's answer after which the model keeps its own",
               "none: 1 without a swap", (0, 1), dims=("variable",)),
        Column("changing", "share", "of the swaps that change the program's answer", "none: of the program alone",
               (0, 1), dims=("variable",)),
        Column("agreement", "share", "of the inputs on which program and model agree without a swap; the others take "
               "no part", "none: the behaviour itself", (0, 1), dims=()),
    ),
    source=GEIGER,
    cost="a forward of every input, and two of every swap from its site's layer on",
    check="tests/planted/test_subspaces.py",
    call='mt.subspaces.interchange(model, program, inputs, write=write, at={"total": "12.resid_post@-1"})',
    needs="next token",
)  # fmt: skip
def interchange(
    model: Model,
    program: PROGRAM,
    inputs: INPUTS,
    *,
    write: Annotated[Callable[[Mapping[str, Any]], Any], WRITE],
    at: Annotated[
        Mapping[str, str | tuple[Subspace, int]],
        Argument("by variable, its place: an address with one position, or a subspace and a position", command=False),
    ],
    answer: ANSWER = str,
    swaps: Annotated[int, Argument("pairs of inputs per variable", "pairs", least=1)] = 200,
    least: LEAST = 0.5,
) -> Found:
    """Interchange accuracy of an alignment: a program's variables at sites or in subspaces of a model.

    The program is a plain function that names its variables as it goes: `total = let("total", a + b)`.

    Raises:
        PromptError: program and model disagree on too many inputs, or an answer is not one token.
        ArgumentError: the program fails, has no such variable, or depends on chance; or a place is not one position.
        SiteError: a place is not one site of one layer.
    """
    ran = _ran(program, inputs)
    prompts = [_prompt(model, write, given) for given in inputs]
    own = [_token(model, answer, one.output) for one in ran]
    said = _said(model, prompts)
    share = _require_agreement(model, [a == b for a, b in zip(said, own, strict=True)], least)
    good = [i for i in range(len(inputs)) if said[i] == own[i]]
    places = {name: _place(model, name, where) for name, where in at.items()}
    rows = {name: [] for name in ("accuracy", "accuracy_random", "kept", "changing")}
    for name, (site, position, subspace) in places.items():
        _require_variable(name, ran)
        pairs = _pairs(len(good), swaps, current().seed)
        made = [
            _swap(model, answer, program, name, inputs[good[i]], ran[good[j]], prompts[good[i]], prompts[good[j]],
                  position, own[good[i]], (good[i], good[j]))
            for i, j in pairs
        ]  # fmt: skip
        for column, value in _measured(Exchange(model, site, made), subspace, f"swapping {name}").items():
            rows[column].append(value)
    values: dict[str, Any] = {}
    for column, triples in rows.items():
        values |= {column + end: ("variable", [x[k] for x in triples]) for k, end in enumerate(ENDS)}
    values = {name: ((dims,), torch.tensor(x, dtype=torch.float64)) for name, (dims, x) in values.items()}
    return Found(
        values | {"agreement": share}, coords={"variable": list(places)},
        attrs={"examples": len(good), "place": [str(where) for where in at.values()]},
    )  # fmt: skip


def _said(model: Model, prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """What the model says after each prompt."""
    found: list[int] = []
    for first in range(0, len(prompts), 32):
        run = model.run([list(tokens) for tokens in prompts[first : first + 32]])
        found += [int(row[a + n - 1].argmax()) for row, (a, n) in zip(run.logits, run.batch.spans, strict=True)]
    return found


def _require_variable(name: str, ran: Sequence[_Ran]) -> None:
    if any(name not in one.variables for one in ran):
        allowed, do = ", ".join(ran[0].variables) or "no variables", f'let the program call let("{name}", value)'
        raise error(ArgumentError, f'the program has no variable "{name}"', allowed=allowed, do=do)


def _place(model: Model, name: str, where: Any) -> tuple[str, int, Subspace | None]:
    """Site, position, and the subspace if there is one, of a variable.

    Raises:
        ArgumentError: it is not one position, or the subspace is of another model.
    """
    if isinstance(where, tuple):
        subspace, position = where
        subspace.require(model)
        return subspace.site, int(position), subspace
    address = parse(where)
    one = address.positions == "last" or (isinstance(address.positions, Indices) and address.positions.is_one)
    if not one:
        do = 'write one, such as "12.resid_post@-1"'
        raise error(ArgumentError, f'the place of "{name}" is not one position', got=str(where), do=do)
    ranges = getattr(address.positions, "ranges", None)
    return str(where).partition("@")[0], -1 if ranges is None else ranges[0][0], None


def _pairs(n: int, wanted: int, seed: int) -> list[tuple[int, int]]:
    """Different pairs of different inputs, drawn by the seed."""
    every = n * (n - 1)
    drawn = np.random.default_rng(seed).permutation(every)[:wanted] if every <= 10**6 else None
    if drawn is None:
        drawn = np.unique(np.random.default_rng(seed).integers(every, size=wanted))
    return [(int(k) // (n - 1), int(k) % (n - 1) + int(int(k) % (n - 1) >= int(k) // (n - 1))) for k in drawn]


def _swap(
    model: Model,
    answer: Callable[[Any], str | int],
    program: Program,
    name: str,
    inputs: Mapping[str, Any],
    source: _Ran,
    base: tuple[int, ...],
    other: tuple[int, ...],
    position: int,
    own: int,
    numbers: tuple[int, int],
) -> Swap:
    """A swap of one variable, with what the program then says.

    Raises:
        PromptError: a prompt has no such position.
    """
    label = _token(model, answer, _run(program, inputs, {name: source.variables[name]}).output)
    places: list[int] = []
    for tokens in (base, other):
        place = position + len(tokens) if position < 0 else position
        if not 0 <= place < len(tokens):
            raise error(PromptError, f'a prompt has no position {position} for "{name}"', got=f"{len(tokens)} tokens")
        places.append(place)
    wants = "isolate" if label == own else "cause"
    return Swap(base, other, places[0], places[1], label, wants, own, name, str(numbers[0]), str(numbers[1]))


def _measured(ready: Exchange, subspace: Subspace | None, stage: str) -> dict[str, tuple[float, float, float]]:
    """Accuracy, its control, kept and changing, each with its interval over base inputs."""
    width = ready.width
    rank = width // 2 if subspace is None or subspace.rank == width else subspace.rank
    part = (lambda x: x) if subspace is None else projection(subspace.basis)
    hits = ready.hits(part, stage=stage)
    control = ready.hits(projection(random_basis(width, rank, current().seed)), stage=f"{stage} at random")
    changing = torch.tensor([float(swap.wants == "cause") for swap in ready.swaps], dtype=torch.float64)
    every = {swap.entity: [] for swap in ready.swaps}
    for swap, changes in zip(ready.swaps, changing.tolist(), strict=True):
        every[swap.entity].append(changes)
    found = {
        "accuracy": by_entity(ready, hits, "cause"), "accuracy_random": by_entity(ready, control, "cause"),
        "kept": by_entity(ready, hits, "isolate"), "changing": {k: sum(x) / len(x) for k, x in every.items()},
    }  # fmt: skip
    return {name: _interval(list(own.values())) for name, own in found.items()}


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    if not values:
        return torch.nan, torch.nan, torch.nan
    mean, low, high = (float(x) for x in mean_interval(torch.tensor(values, dtype=torch.float64)))
    return mean, low, high


@question(
    "token_interchange",
    title="tokens as variables of a program",
    question="When an intermediate result in the text is changed, does the model go on as the program would?",
    columns=(
        Column("follows", "share", "of changed texts after which the model says the program's next value, changed",
               "follows_unchanged", (0, 1), dims=("variable",)),
        Column("follows_unchanged", "share", "the same value after the unchanged text", range=(0, 1),
               dims=("variable",)),
        Column("keeps", "share", "of changed texts after which the model says the next value as if nothing had changed",
               "none: it is the other way to go on", (0, 1), dims=("variable",)),
        Column("right", "share", "of unchanged texts after which the model says the program's next value; the others "
               "take no part", "none: the behaviour itself", (0, 1), dims=("variable",)),
    ),
    source=(
        Source("Zhu et al.", "Chain-of-Thought Tokens are Computer Program Variables", 2025, "2505.04955",
               "random changes of stored values", departs="a value comes from another input; the next token is read"),
        GEIGER,
    ),
    cost="a forward of every input and variable, and one of every changed text",
    check="tests/planted/test_subspaces.py",
    call="mt.subspaces.token_interchange(model, program, inputs, write=write)",
    needs="next token",
)  # fmt: skip
def token_interchange(
    model: Model,
    program: PROGRAM,
    inputs: INPUTS,
    *,
    write: Annotated[Callable[[Mapping[str, Any], Mapping[str, Any]], Any], WRITE],
    answer: ANSWER = str,
    swaps: Annotated[int, Argument("changed texts per variable", "texts", least=1)] = 200,
    least: LEAST = 0.5,
) -> Found:
    """Whether tokens of intermediate results are variables: change one, and compare with the program so changed.

    `write(inputs, variables)` makes the text up to and with the last of the variables, which are the first ones that
    the program names; the model's next token is compared with the next variable, or the program's answer.

    Raises:
        PromptError: program and model disagree on too many texts, or a value is not one token.
        ArgumentError: the program fails, names no variables, or depends on chance.
    """
    ran = _ran(program, inputs)
    names = list(ran[0].variables)
    if not names or any(list(one.variables) != names for one in ran):
        do = "let it name the same variables for every input"
        raise error(ArgumentError, "the program has no variables to change", got=", ".join(names) or "none", do=do)
    table: dict[str, list[tuple[float, float, float]]] = {}
    shares: list[float] = []
    for k, name in enumerate(names):
        own = [_token(model, answer, _next(one, names, k)) for one in ran]
        firsts = [{n: one.variables[n] for n in names[: k + 1]} for one in ran]
        said = _said(model, [_prompt(model, write, g, f) for g, f in zip(inputs, firsts, strict=True)])
        shares.append(_require_agreement(model, [a == b for a, b in zip(said, own, strict=True)], least))
        good = [i for i in range(len(inputs)) if said[i] == own[i]]
        texts: list[tuple[int, ...]] = []
        wanted: list[int] = []
        bases: list[int] = []
        for i, j in ((good[a], good[b]) for a, b in _pairs(len(good), swaps, current().seed)):
            value = ran[j].variables[name]
            changed = _token(model, answer, _next(_run(program, inputs[i], {name: value}), names, k))
            if changed != own[i]:
                texts.append(_prompt(model, write, inputs[i], {**firsts[i], name: value}))
                wanted.append(changed)
                bases.append(i)
        then = _said(model, texts) if texts else []
        rows = list(zip(then, wanted, bases, strict=True))
        for column, hit in {
            "follows": [t == w for t, w, _ in rows], "keeps": [t == own[b] for t, _, b in rows],
            "follows_unchanged": [said[b] == w for _, w, b in rows],
        }.items():  # fmt: skip
            table.setdefault(column, []).append(_interval(_averaged(hit, bases)))
    values: dict[str, Any] = {
        column + end: (("variable",), torch.tensor([x[e] for x in own], dtype=torch.float64))
        for column, own in table.items()
        for e, end in enumerate(ENDS)
    }
    values["right"] = (("variable",), torch.tensor(shares, dtype=torch.float64))
    return Found(values, coords={"variable": names}, attrs={"examples": len(inputs)})


def _next(ran: _Ran, names: Sequence[str], k: int) -> Any:
    """What comes behind the k-th variable."""
    return ran.variables[names[k + 1]] if k + 1 < len(names) else ran.output


def _averaged(hits: Sequence[bool], bases: Sequence[int]) -> list[float]:
    """The mean of the hits of each base."""
    held: dict[int, list[float]] = {}
    for hit, base in zip(hits, bases, strict=True):
        held.setdefault(base, []).append(float(hit))
    return [sum(own) / len(own) for own in held.values()]
