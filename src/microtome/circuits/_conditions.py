"""Heads of one condition: in its circuit whatever pairs are drawn, in that of another condition never; and ablated.

Formula:  of the pairs of each condition, those of even numbers choose heads, those of odd numbers judge them;
          pairs that choose are drawn anew, `resamples` times, with as many as there are; the circuit of a drawing
          is that of the largest mean scores; in(h), in_other(h) are the shares of circuits that hold head h;
          h is chosen where in >= sure and in_other <= 1 - sure;
          damage = (m(clean) - m(clean, chosen heads at their mean)) / |mean of m(clean) - m(corrupt)|, in each
          condition by itself, on its pairs that judge; the head's mean is over all positions of their clean prompts;
          selective = the mean damage here minus that of the other condition, with Welch's interval (other pairs, not
          the same ones twice); the gap is taken as known. NaN where a condition has one pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.change import means
from microtome.circuits._differences import difference_of_means
from microtome.circuits._scores import from_scores
from microtome.context import current
from microtome.edit import Edit, Mean
from microtome.explain import (
    AnswerOfClean,
    Clean,
    Corrupt,
    FoilOfCorrupt,
    Pairs,
    ReadMetric,
    edge_scores,
    pairs_given,
    pairs_of,
)
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.stream import mean_interval

GROUPS = ("this condition", "the other")
HEADS = ("layer", "head")
ENDS = ("", "_lo", "_hi")
TOGETHER = 8
"""Prompts that are run together."""

PARK = Source(
    "Park et al.", "Does Time Have Its Place? Temporal Heads: Where Language Models Recall Time-specific Information",
    2025, "2502.14258", departs="any two conditions; heads must be chosen over drawings of the pairs; the damage is a "
    "share of the gap between clean and corrupt prompts, beside as many random heads of the same layers",
)  # fmt: skip


@question(
    "condition_heads",
    title="heads of one condition",
    question="Which heads carry answers of one condition and not of another, and what does losing them cost in each?",
    columns=(
        Column("held", "share", "drawings of the pairs whose circuit holds the head", "held_other", (0, 1), HEADS),
        Column("held_other", "share", "the same of the other condition", range=(0, 1), dims=HEADS),
        Column("chosen", "1", "1 where the head is of this condition alone", "none: a class", (0, 1), HEADS),
        Column("count", "heads", "how many are", "none: a count", (0, None), ()),
        Column("damage", "share", "part of the gap between clean and corrupt prompts that is lost with the chosen "
               "heads at their mean, on pairs that did not choose them", "damage_random", dims=("group",)),
        Column("damage_random", "share", "the same for as many random other heads of the same layers",
               dims=("group",)),
        Column("selective", "share", "the damage here minus that to the other condition", "selective_random", dims=()),
        Column("selective_random", "share", "the same of the random heads", dims=()),
    ),
    source=PARK,
    cost="scores of all edges of half of the pairs; 3 + draws forwards of each of the others",
    check="tests/laws/test_conditions.py, tests/planted/test_conditions.py",
    call='mt.circuits.condition_heads(model, mt.tasks.build("fact.capital", model, n=8), '
    'other=mt.tasks.build("fact.plural", model, n=8))',
    reading="A head of one condition is in its circuit and not in the other's, however the pairs are drawn; without "
    "them answers of this condition should fall, those of the other should not, and random heads should matter less.",
    needs=("sum", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z"),
)  # fmt: skip
def condition_heads(
    model: Model,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    other: Annotated[Any, Argument("pairs of the other condition: a task, or a file", from_text=str)],
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    method: Annotated[str, Argument("how edges are scored", choices=("eap", "eap-ig", "clean-corrupted"))] = "eap",
    edges: Annotated[float, Argument("edges of a circuit: how many, or a share below 1", least=0)] = 0.005,
    resamples: Annotated[int, Argument("how often pairs are drawn", "times", least=1)] = 50,
    sure: Annotated[float, Argument("share of drawings that must agree", "share", least=0.5, most=1)] = 0.9,
    draws: Annotated[int, Argument("random sets of as many heads", "sets", least=1)] = 5,
) -> Found:  # fmt: skip
    """Find the heads that are in the circuit of one condition only, and ablate them in both, on other pairs.

    Raises:
        PromptError: pairs do not align, or there is nothing to read.
        ArgumentError: there are not as many edges.
        SiteError: the stream of the model is not a sum over its parts.
    """
    both = [
        pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric),
        pairs_given(model, other),
    ]
    generator = torch.Generator().manual_seed(current().seed)
    choosing, judging = ([pairs[k::2] for pairs in both] for k in (0, 1))
    held = [_held(model, pairs, method, edges, resamples, generator) for pairs in choosing]
    chosen = (held[0] >= sure) & (held[1] <= 1 - sure + 1e-9)
    random = [alike(chosen, generator) for _ in range(draws)]
    values: dict[str, Any] = {
        "held": held[0],
        "held_other": held[1],
        "chosen": chosen.double(),
        "count": int(chosen.sum()),
    }
    drawn = int(random[0].sum())
    sets = [chosen, *random] if bool(chosen.any()) and all(map(len, judging)) else []
    lost = [damage_of(model, pairs, judging, sets) for pairs in judging]
    lost = lost if drawn == values["count"] else [x[:1] for x in lost]  # too few others: no control
    for name, of in (("damage", lambda x: x[0]), ("damage_random", lambda x: x[1:].mean(0))):
        own = [of(x) for x in lost]
        found = [mean_interval(x) for x in own]
        for end, parts in zip(ENDS, zip(*found, strict=True), strict=True):
            values[name + end] = (("group",), torch.stack(list(parts)))
        less = difference_of_means(own[0], own[1], paired=False)
        values |= {f"selective{name[len('damage') :]}{end}": ((), float(x)) for end, x in zip(ENDS, less, strict=True)}
    layers, heads = chosen.shape
    names = [f"{i}.attn.z[{h}]" for i, h in chosen.nonzero().tolist()]
    attrs = {"heads": names, "pairs": len(both[0]), "pairs_other": len(both[1]), "resamples": resamples, "sure": sure}
    attrs |= {"pairs_judged": [len(pairs) for pairs in judging], "random_heads": drawn}
    coords = {"layer": list(range(layers)), "head": list(range(heads)), "group": list(GROUPS)}
    return Found(values, coords=coords, attrs=attrs | {"method": f"{method}, {edges:g} edges"})


def _held(
    model: Model, pairs: Pairs, method: str, edges: float, resamples: int, generator: torch.Generator
) -> Float[Tensor, "layer head"]:
    """The share of drawings of the pairs whose circuit holds each head."""
    scores = edge_scores(model, pairs, "noise", method=method, steps=5, rules=None).scores
    n, a, report = len(pairs), model.anatomy, current().counting("drawing pairs")
    found = torch.zeros(a.n_layers, a.n_heads, dtype=torch.float64)
    for done in range(resamples):
        drawn = torch.randint(n, (n,), generator=generator)
        circuit = from_scores(model, scores[drawn].mean(0), edges, prune=False).pruned()
        inside = set(circuit.nodes)
        found += torch.tensor([[f"{i}.attn.z[{h}]" in inside for h in range(a.n_heads)] for i in range(a.n_layers)])
        report(done + 1, resamples)
    return found / resamples


def alike(chosen: Bool[Tensor, "layer head"], generator: torch.Generator) -> Bool[Tensor, "layer head"]:
    """As many random heads of the same layers, none of them chosen; fewer where a layer has too few others."""
    found = torch.zeros_like(chosen)
    for own, row in zip(chosen, found, strict=True):
        free = (~own).nonzero().flatten()
        row[free[torch.randperm(len(free), generator=generator)[: int(own.sum())]]] = True
    return found


def damage_of(
    model: Model, pairs: Pairs, both: Sequence[Pairs], sets: Sequence[Bool[Tensor, "layer head"]]
) -> Float[Tensor, "set pair"]:
    """What each pair loses with the heads of each set at their mean, as a share of the mean gap; NaN without sets."""
    if not sets:
        return torch.full((2, len(pairs)), torch.nan, dtype=torch.float64)
    held = means(model, [pair[0].tolist() for some in both for pair in some.tokens], "*.attn.z")
    with torch.no_grad():
        clean, corrupt = (_read(model, pairs, side) for side in (0, 1))
        rows: list[Tensor] = []
        for heads in sets:
            edits = [Mean(f"{i}.attn.z[{h}]", mean=held[f"{i}.attn.z"][h]) for i, h in heads.nonzero().tolist()]
            rows.append(clean - _read(model, pairs, 0, edits))
    return torch.stack(rows) / (clean - corrupt).mean().abs()


def _read(model: Model, pairs: Pairs, side: int, edits: Sequence[Edit] = ()) -> Float[Tensor, " pair"]:
    found = torch.full((len(pairs),), torch.nan, dtype=torch.float64)
    for some in pairs.batches(TOGETHER):
        batch = pairs.take(some)
        found[some] = batch.read(model.run([pair[side] for pair in batch.tokens], edits=edits)).double().cpu()
    return found
