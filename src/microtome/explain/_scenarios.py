"""Causal traces by why the model gives the answer: recalled, suggested by a cue, guessed.

Formula:  of every fact the causal trace of its prompt; its values at the subject's last token and at the prompt's last
          token, averaged over the facts of one label (see tasks/_scenarios.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.errors import PromptError, error
from microtome.explain._tracing import causal_trace
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.stream import mean_interval
from microtome.tasks import Fact, scenarios

JUDGED = ("guess", "heuristic", "recall")
PLACES = ("subject", "last")
BRANCHES = ("mlp", "attn")
ENDS = ("", "_lo", "_hi")


def _gain(branch: str, place: str) -> Column:
    where = "the subject's last token" if place == "subject" else "the last token"
    meaning = f"gain of the answer's probability when {branch} outputs of a window of layers at {where} are restored"
    return Column(f"{branch}_{place}", "probability", meaning, "none: 0 is the corrupted run", dims=("label", "layer"))


@question(
    "scenario_traces",
    title="causal traces by scenario",
    question="Does causal tracing find the same where an answer is recalled and where it is guessed?",
    columns=(
        *(_gain(branch, place) for branch in BRANCHES for place in PLACES),
        Column("facts", "facts", "of this label that were traced", "none: a count", dims=("label",)),
        Column("share", "share", "of all facts that have this label; the rest are answered wrongly", "none: of what "
               "was asked", (0, 1), dims=("label",)),
    ),
    source=Source(
        "Saynova et al.", "Fact Recall, Heuristics or Pure Guesswork? Precise Interpretations of Language Models for "
        "Fact Completion", 2024, "2410.14405", "causal tracing by scenario",
        departs="the scenarios are those of tasks.scenarios; two places, no information flow",
    ),
    cost="the forwards of tasks.scenarios, and of every traced fact what causal_trace costs",
    check="tests/planted/test_grid.py",
    call='mt.explain.scenario_traces(model, mt.tasks.Fact.own("capital"))',
    reading="If recall peaks at the subject in middle layers and the others at the last token in late ones, a trace of "
    "all facts together is a mixture of the two.",
    needs="attention and MLP",
)  # fmt: skip
def scenario_traces(
    model: Model,
    facts: Annotated[Sequence[Fact], Argument("the facts, such as Fact.own()", command=False)],
    *,
    most: Annotated[int, Argument("facts of each label that are traced", "facts", least=1)] = 12,
    agree: Annotated[float, Argument("share of paraphrases answered alike", "share", least=0, most=1)] = 0.75,
    window: Annotated[int, Argument("how many layers of a branch to restore at once", "layers", least=1)] = 10,
    noise: Annotated[float, Argument("size of the noise", "standard deviations of the embeddings", least=0)] = 3.0,
    samples: Annotated[int, Argument("how many draws of the noise to average over", "draws", least=1)] = 3,
) -> Found:
    """Causal traces of facts, averaged by why the model answers them; NaN for a label that no fact has.

    Raises:
        PromptError: there are no facts, or the model answers none of them.
    """
    told = scenarios(model, facts, agree=agree)
    labels = told["label"].values.tolist()
    if not any(label in JUDGED for label in labels):
        got, do = f"0 of {len(facts)}", "ask facts that it knows"
        raise error(PromptError, f"{model.anatomy.name} answers none of the facts", got=got, do=do)
    rows: dict[str, list[Tensor]] = {f"{b}_{p}{end}": [] for b in BRANCHES for p in PLACES for end in ENDS}
    counts: list[int] = []
    for label in JUDGED:
        chosen = [fact for fact, own in zip(facts, labels, strict=True) if own == label][:most]
        counts.append(len(chosen))
        traces = [_traced(model, fact, window, noise, samples) for fact in chosen]
        for name in (f"{b}_{p}" for b in BRANCHES for p in PLACES):
            for end, x in zip(ENDS, _averaged([t[name] for t in traces], model.anatomy.n_layers), strict=True):
                rows[name + end].append(x)
    dims = ("label", "layer")
    values = {name: (dims, torch.stack(own)) for name, own in rows.items()}
    shares = [labels.count(label) / len(labels) for label in JUDGED]
    return Found(
        values | {"facts": (dims[:1], torch.tensor(counts)), "share": (dims[:1], torch.tensor(shares).double())},
        coords={"label": list(JUDGED), "layer": list(range(model.anatomy.n_layers))},
        attrs={"asked": len(facts)},
    )  # fmt: skip


def _traced(model: Model, fact: Fact, window: int, noise: float, samples: int) -> dict[str, Float[Tensor, " layer"]]:
    """By branch and place, the trace of one fact."""
    data = causal_trace(
        model, fact.prompt, subject=fact.subject, window=window, noise=noise, samples=samples, kinds=BRANCHES
    )
    at = {"subject": int(np.flatnonzero(data["subject"].values)[-1]), "last": -1}
    return {f"{b}_{p}": torch.from_numpy(data[b].values[:, at[p]].copy()) for b in BRANCHES for p in PLACES}


def _averaged(values: Sequence[Tensor], layers: int) -> tuple[Tensor, Tensor, Tensor]:
    if not values:
        nothing = torch.full((layers,), torch.nan, dtype=torch.float64)
        return nothing, nothing, nothing
    return mean_interval(torch.stack(list(values)))
