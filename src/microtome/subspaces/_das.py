"""Whether a part of a site holds one attribute and no other: Cause and Isolate, for several ways to find it.

Formula:  x' = base + (source - base) Qᵀ Q at the place of the base prompt, from the place of the source prompt.
          cause      share of swaps about the attribute after which the model says the source's value
          isolate    share of swaps about other attributes after which it still says the base's own
          disentangle = (cause + isolate) / 2
          All over entities that took no part in finding the subspace; an example is an entity, its swaps averaged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.files import PAIRS
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.subspaces._exchange import Exchange, Runs
from microtome.subspaces._score import ENDS, PLAIN, SCORES, has_reader, placebo, scores, twin
from microtome.subspaces._subspace import width_of
from microtome.subspaces._swaps import FOR_PLACEBO, Swaps, of_asked, require_both, require_rank
from microtome.subspaces._ways import METHODS, Features, Given, Plan, features_of, found_in, prepared
from microtome.tasks import Ravel, Task, ravel, read, shares

Data = Ravel | Task | str | os.PathLike[str]
DEFAULT_METHODS = ("neurons", "pca", "random", "das", "mdas")
CONTROLS = ("placebo", "twin")
DEFAULT_CONTROLS = ("placebo",)
MEANS = {
    "random": "random: a subspace drawn by chance",
    "placebo": "placebo: learned from labels drawn by chance, judged by such labels",
    "twin": "twin: DAS in the model with shuffled weights",
}
"""What the ways are that should find nothing, by their names in `found_by`."""
NO_TWIN = ("isolate", "isolate_lo", "isolate_hi", "disentangle", "disentangle_lo", "disentangle_hi")
"""Of the twin: it has no own answers that could stay."""
BESIDE = "none: no column, but two ways of found_by, random (a random subspace) and placebo (labels by chance)"

DATA = Annotated[
    Data,
    Argument("data.tgz or folder of RAVEL, a task, or a .csv or .jsonl file of pairs", positional=True, from_text=str),
]
DICTIONARY = Annotated[
    Given | None,
    Argument("directions or a sparse autoencoder of the site, a .safetensors file: one more way", from_text=str),
]


@dataclass(frozen=True)
class AttributeSwaps:
    """The swaps of one attribute, to find a subspace with and to judge it by.

    Attributes:
        name: of the attribute.
        train, test: the two.
    """

    name: str
    train: Swaps
    test: Swaps


@question(
    "das",
    command="das",
    title="subspaces by interchange",
    question="Which part of a site holds one attribute and no other, and which way to find it does best?",
    columns=(
        Column("cause", "share", "of held-out swaps about the attribute that give the source's value", BESIDE, (0, 1),
               dims=("attribute", "found_by")),
        Column("isolate", "share", "of held-out swaps about other attributes that leave the base's value", BESIDE,
               (0, 1), dims=("attribute", "found_by")),
        Column("disentangle", "share", "mean of cause and isolate", BESIDE, (0, 1), dims=("attribute", "found_by")),
        Column("rank", "dimensions", "of the subspace that was found", "none: a size", dims=("attribute", "found_by")),
        Column("row_share", "share", "of the subspace that the site's reader sees: its squared length in the reader's "
               "row space; only where one matrix reads the site (neurons, a head)",
               "none: a random subspace has rank of the reader / width", (0, 1), dims=("attribute", "found_by")),
        Column("cause_row", "share", "cause of the part of the subspace that the reader sees, alone", "cause_null",
               (0, 1), dims=("attribute", "found_by")),
        Column("cause_null", "share", "cause of the part that nothing reads, alone; where only the two together have "
               "a cause, it is an illusion", dims=("attribute", "found_by"), range=(0, 1)),
        Column("known", "share", "of the questions about the attribute, or of the pairs, that the model answers",
               "none: a share of what was asked", (0, 1), dims=("attribute",)),
    ),
    source=(
        Source("Huang et al.", "RAVEL: Evaluating Interpretability Methods on Disentangling Language Model "
               "Representations", 2024, "2402.17700", "Cause, Isolate, Disentangle; MDAS",
               departs="the first token is read; an example is an entity; sources answer the base's own prompt"),
        Source("Geiger et al.", "Finding Alignments Between Interpretable Causal Variables and Distributed Neural "
               "Representations", 2023, "2303.02536", "DAS", departs="the rotation is the Q of a QR decomposition"),
        Source("Wu et al.", "Interpretability at Scale: Identifying Causal Mechanisms in Alpaca", 2023, "2305.08809",
               "boundless DAS", departs="temperature in shares of the width; our learning rate"),
    ),
    cost="a forward of every question; a learned method: steps x rows forwards and backwards from the site's layer on",
    check="tests/planted/test_subspaces.py, tests/laws/test_subspaces.py",
    call='mt.subspaces.das(model, "ravel/data.tgz", attributes=["Country"], site="14.resid_post")',
    reading="cause above the rows of controls and isolate near 1 mean that the subspace holds this attribute and no "
    "other; what does not exceed the controls is no finding.",
    needs="next token",
)  # fmt: skip
def das(
    model: Model,
    data: DATA,
    *,
    site: Annotated[str | None, Argument('the site, such as "12.resid_post"; the middle layer\'s by default')] = None,
    rank: Annotated[int, Argument("of the subspaces", "dimensions", least=1)] = 16,
    methods: Annotated[Sequence[str], Argument("how to find them", choices=METHODS)] = DEFAULT_METHODS,
    controls: Annotated[
        Sequence[str], Argument("what else to measure beside them", choices=CONTROLS)
    ] = DEFAULT_CONTROLS,
    attributes: Annotated[
        Sequence[str] | None, Argument("of RAVEL: which attributes are swapped; all by default", from_text=str)
    ] = None,
    others: Annotated[
        Sequence[str] | None,
        Argument("of RAVEL: attributes that should stay; by default the same, or all", from_text=str),
    ] = None,
    kind: Annotated[str, Argument("of RAVEL: kind of entities", from_text=str)] = "city",
    entities: Annotated[int, Argument("of RAVEL: how many are asked", "entities", least=2)] = 600,
    templates: Annotated[int, Argument("of RAVEL: prompts per attribute", "prompts", least=1)] = 2,
    at: Annotated[str, Argument("of pairs: span whose last token is the place", from_text=str)] = "end",
    each: Annotated[int, Argument("swaps of either kind per entity", "swaps", least=1)] = 4,
    isolate: Annotated[float, Argument("weight of what should stay, of mdas", least=0)] = 1.0,
    steps: Annotated[int, Argument("of a training", "steps", least=0)] = 200,
    lr: Annotated[float | None, Argument("learning rate; that of the method by default", least=0)] = None,
    batch: Annotated[int, Argument("swaps per step", "swaps", least=1)] = 16,
    sparsity: Annotated[float, Argument("weight of the mean of the mask, of boundless and mask", least=0)] = 0.01,
    dictionary: DICTIONARY = None,
) -> Found:
    """Find the subspace of a site that holds an attribute, in several ways, and judge them by held-out interchanges.

    Of RAVEL, only entities that the model answers take part; those of its training split find the subspace, the others
    judge it. Of pairs, the first half finds it and the second judges it, and nothing is isolated: mdas would be das
    again and is left out, and so is a placebo where there are no three answers to draw labels from.

    Raises:
        PromptError: the model answers too few of the prompts; says the share.
        SiteError: the site is not one place of one layer.
        ArgumentError: the rank is larger than the site, there is no such attribute, mdas is asked for where nothing
            is isolated, a way is named twice, or the dictionary is missing or of another width.
        DataError: the data or the dictionary cannot be read.
        FitError: a mask did not decide.
    """
    site = f"{model.anatomy.n_layers // 2}.resid_post" if site is None else site
    require_rank(rank, width_of(model, site), site)
    plan = Plan(rank, isolate, steps, 0.0, batch, sparsity, current().seed)
    methods = tuple(methods) if dictionary is None or "dictionary" in methods else (*methods, "dictionary")
    features = features_of(dictionary, "dictionary") if "dictionary" in methods else None
    swapped, known = _swaps_of(model, data, kind, attributes, others, entities, templates, each, at)
    methods, controls = _ways(swapped, tuple(methods), tuple(controls))
    runs = Runs(model, [site])
    judged = [_judged(model, runs, one, (methods, controls), plan, lr, features) for one in swapped]
    dims = ("attribute", "found_by")
    table = {
        name: (dims, torch.tensor([[own[name] for own in rows] for rows, _ in judged], dtype=torch.float64))
        for name in (*(part + end for part in SCORES for end in ENDS), *(PLAIN if has_reader(site) else PLAIN[:1]))
    }
    shares_known = [known.get(one.name, share) for one, (_, share) in zip(swapped, judged, strict=True)]
    return Found(
        table | {"known": (dims[:1], torch.tensor(shares_known, dtype=torch.float64))},
        coords={"attribute": [one.name for one in swapped], "found_by": [*methods, *controls]},
        attrs={"site": site, "train_swaps": [len(one.train) for one in swapped],
               "test_swaps": [len(one.test) for one in swapped],
               "test_entities": [len(one.test.entities) for one in swapped],
               "control": "; ".join(MEANS[name] for name in (*methods, *controls) if name in MEANS) or "none"},
    )  # fmt: skip


def _swaps_of(
    model: Model, data: Any, kind: str, attributes: Any, others: Any, entities: int, templates: int, each: int, at: str
) -> tuple[list[AttributeSwaps], dict[str, float]]:
    """By attribute, the swaps of both halves; and the share of questions that the model answers."""
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        data = read(path, model) if path.suffix.lower() in PAIRS else ravel(path, kind)
    if isinstance(data, Task):
        swaps = Swaps.of_pairs(data, at)
        half = len(data) // 2 * 2
        if half < 2:
            raise error(ArgumentError, "pairs must be divided in two halves", got=f"{len(data)} pair", do="give more")
        return [AttributeSwaps(data.name, swaps[:half], swaps[half:])], {}
    if not isinstance(data, Ravel):
        do = "give the path of data.tgz, a Task, or a file of pairs"
        raise error(ArgumentError, "no subspace can be found in this", got=type(data).__name__, do=do)
    chosen = data.require(attributes or ())
    every = tuple(dict.fromkeys((*chosen, *data.require(others or (chosen if len(chosen) > 1 else ())))))
    seed = current().seed
    asked = data.ask(model, every, entities=entities, templates=templates, seed=seed)
    known = {name: share for name, (share, _, _) in shares(asked).items()}
    there = dict.fromkeys(q.entity for q in asked)
    halves = [[name for name in there if (data.split[name] == "train") == train] for train in (True, False)]
    swapped: list[AttributeSwaps] = []
    for name in chosen:
        both = [of_asked(asked, name, own, each=each, seed=seed) for own in halves]
        for own, what in zip(both, ("training", "held-out"), strict=True):
            require_both(own, name, what, sum(q.known for q in asked) / len(asked))
        swapped.append(AttributeSwaps(name, *both))
    return swapped, known


def _ways(
    swapped: Sequence[AttributeSwaps], methods: tuple[str, ...], controls: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    """The methods and controls that say something of these swaps.

    Raises:
        ArgumentError: mdas is asked for beside das where no swap wants isolation, or a way is named twice.
        PromptError: a placebo is asked for where there are too few labels.
    """
    named = (*methods, *controls)
    if not methods or len(set(named)) < len(named):
        raise error(ArgumentError, "ways are named once each", got=", ".join(named) or "none", do="name others")
    if "mdas" in methods and not any(len(one.train.of("isolate")) for one in swapped):
        if methods != DEFAULT_METHODS:
            do = 'take "das"'
            raise error(ArgumentError, "mdas is das where no swap wants isolation", got=", ".join(methods), do=do)
        methods = tuple(name for name in methods if name != "mdas")
    if "placebo" in controls:
        few = next((part for one in swapped for part in (one.train, one.test) if len(part.labels) < FOR_PLACEBO), None)
        if few is not None and controls != DEFAULT_CONTROLS:
            few.placebo()  # says why there is none
        controls = controls if few is None else ()
    return methods, controls


def _judged(
    model: Model,
    runs: Runs,
    one: AttributeSwaps,
    ways: tuple[Sequence[str], Sequence[str]],
    plan: Plan,
    lr: float | None,
    features: Features | None,
) -> tuple[list[dict[str, float]], float]:
    """What each method and control reaches with one attribute, and the share of its base prompts that are answered."""
    (site,) = runs.sites
    (train, share), (test, _) = (prepared(model, own, site, runs) for own in (one.train, one.test))

    methods, controls = ways

    def judged(pair: tuple[Exchange, Exchange], method: str, stage: str) -> dict[str, float]:
        found = found_in(pair[0], method, plan, share, given_lr=lr, features=features)
        return scores(pair[1], found, f"judging {stage}, {one.name}")

    rows = [judged((train, test), name, name) for name in methods]
    if "placebo" in controls:
        false = placebo(train, plan.seed, one.train.labels), placebo(test, plan.seed, one.test.labels)
        rows.append(judged(false, "mdas" if "mdas" in methods else "das", "placebo"))
    if "twin" in controls:
        other = twin(model, plan.seed)
        pair = Exchange(other, site, train.swaps), Exchange(other, site, test.swaps)
        rows.append(judged(pair, "das", "twin") | dict.fromkeys(NO_TWIN, torch.nan))
    return rows, share
