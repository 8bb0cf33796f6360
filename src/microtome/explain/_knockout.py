"""Attention knock-out: how the answer suffers when some positions can no longer attend to others, by layer.

Formula:  in the window of layers w(l) = max(0, l - w//2) .. min(L, l + ceil(w/2)) - 1, those of them that attend, every
          head's score from q in the query span to k in the key span becomes -inf before the softmax;
          effect(l) = m(cut in w(l)) - m(whole), m the probability or log-probability of the answer.
          Control: as many keys, drawn at random among those that the queries can read and that are not cut, `controls`
          times; nothing where there are not enough.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Annotated

import torch

from microtome.context import current
from microtome.edit import KnockOut
from microtome.errors import PromptError, error
from microtome.explain._answers import own_answer
from microtome.explain._pairs import Place
from microtome.explain._spans import at, one_prompt, one_row, span_of, windows_of
from microtome.method import (
    AnswerToken,
    Argument,
    Column,
    Found,
    PromptText,
    Source,
    Span,
    question,
    run_sweep,
    span_from_text,
)
from microtome.metric import LogProbability
from microtome.model import Model

START = "none: the run without a cut, the baseline of the changes"
UNITS = {"probability": "probability", "log_probability": "nats", "relative": "share"}


def _changed(name: str, meaning: str) -> tuple[Column, Column]:
    control = f"{name}_control"
    return (
        Column(name, UNITS[name], f"change of the {meaning} due to the cut", control, dims=("layer",)),
        Column(control, UNITS[name], f"mean change of the {meaning} when as many random keys are cut", dims=("layer",)),
    )


@question(
    "attention_knockout",
    command="knockout",
    title="attention knock-out",
    question="In which layers must some positions attend to others for the model to give its answer?",
    columns=(
        *_changed("probability", "probability of the answer"),
        *_changed("log_probability", "log-probability of the answer"),
        *_changed("relative", "probability of the answer, relative to its value without the cut,"),
        Column("clean", "probability", "probability of the answer without a cut", START, (0, 1), dims=()),
        Column("clean_log", "nats", "log-probability of the answer without a cut", START, dims=()),
    ),
    source=Source(
        "Geva et al.", "Dissecting Recall of Factual Associations in Auto-Regressive Language Models", 2023,
        "2304.14767", "section 5", departs="adds a control of other keys, and absolute changes beside the relative one",
    ),
    cost="one forward and a sweep of (1 + controls) x L cells",
    check="tests/laws/test_knockout.py",
    call='mt.explain.attention_knockout(model, "The Colosseum is in the city of", keys="The Colosseum")',
    reading="Each layer is the middle of the window that is cut: below 0, the answer needs the attention that was cut.",
    needs=("attn.scores",),
)  # fmt: skip
def attention_knockout(
    model: Model,
    prompt: PromptText,
    *,
    queries: Annotated[Span, Argument("positions that can no longer attend to keys", from_text=span_from_text)] = -1,
    keys: Annotated[Span, Argument("positions that the queries can no longer attend to", from_text=span_from_text)],
    answer: AnswerToken = None,
    window: Annotated[int, Argument("how many layers to cut at once", "layers", least=1)] = 9,
    controls: Annotated[int, Argument("how many random sets of other keys to cut as a control", "sets", least=0)] = 8,
) -> Found:
    """In which layers some positions must attend to others for the model to give its answer.

    Where no layer of a window has attention, there is NaN.

    Raises:
        PromptError: a span is not in the prompt, or queries cannot read the keys anyway.
        SiteError: the model's attention scores are not seen.
        BudgetError: not even one cell fits.
    """
    tokens, text, n = one_row(model.to_batch(prompt).tokens), one_prompt(model, prompt), model.anatomy.n_layers
    asked, cut = span_of(model, text, queries, "queries"), span_of(model, text, keys, "keys")
    if model.anatomy.causal and cut[0] >= asked[1]:
        raise error(
            PromptError, "the queries cannot read the keys anyway", got=f"queries {asked}, keys {cut}",
            allowed="keys before the last query", do="name queries that come later",
        )  # fmt: skip
    token, attrs = own_answer(model, tokens, answer)
    sets = [list(range(*cut)), *_other_keys(model, asked, cut, len(tokens), controls)]
    windows = windows_of(model, "attn.scores", window)
    cells = [
        KnockOut(f"{w}.attn.scores{at(*asked)}", keys=",".join(map(str, s))) for s in sets for w in windows.values()
    ]
    swept = run_sweep(model, tokens.unsqueeze(0), cells, LogProbability(token), stage="cutting attention").whole()
    attrs |= {"metric": "probability of the answer", "controls": len(sets) - 1}
    attrs |= {"queries": model.to_text(tokens[slice(*asked)]), "keys": model.to_text(tokens[slice(*cut)])}
    base, values = float(swept.base[0]), torch.full((len(sets), n), torch.nan, dtype=torch.float64)
    values[:, list(windows)] = swept.values.double().reshape(len(sets), -1)
    whole = torch.tensor(base, dtype=torch.float64).exp()
    changes = {
        "probability": values.exp() - whole, "log_probability": values - base, "relative": values.exp() / whole - 1,
    }  # fmt: skip
    return Found(
        {name: x[0] for name, x in changes.items()} | {"clean": float(whole), "clean_log": base},
        each={f"{name}_control": x[1:] for name, x in changes.items()},
        coords={"layer": list(range(n))},
        attrs=attrs,
    )


def _other_keys(model: Model, asked: Place, cut: Place, length: int, controls: int) -> list[list[int]]:
    """Random sets of as many keys as are cut, no two alike, among those that the first query can read but itself."""
    last = asked[0] if model.anatomy.causal else length
    free = [k for k in range(last) if not cut[0] <= k < cut[1] and not asked[0] <= k < asked[1]]
    size = cut[1] - cut[0]
    if len(free) < size:
        return []
    if comb(len(free), size) <= controls:
        return [list(s) for s in combinations(free, size)]
    generator = torch.Generator().manual_seed(current().seed)
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < controls:
        drawn.add(tuple(sorted(free[i] for i in torch.randperm(len(free), generator=generator)[:size])))
    return [list(s) for s in sorted(drawn)]
