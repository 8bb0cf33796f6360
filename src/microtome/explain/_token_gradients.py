"""Integrated gradients of the tokens of a prompt, from a baseline embedding.

Formula:  score(t) = (e_t - b_t) . sum_k w_k dm/de_t at b + t_k (e - b), e the embeddings of the prompt, b those of the
          baseline (the mean of many tokens', one token everywhere, or zeros), t_k and w_k the points and weights of
          Gauss and Legendre, in intervals that are halved where they leave most (see `_quadrature`).
          gap = |m(e) - m(b) - sum_t score(t)| / |m(e) - m(b)|; points are added until it is at most `tolerance` or
          they are `most`.
          deletion(t) = m(e) - m(e with b_t in place of e_t), exactly.
Trap:     a norm makes the model see the direction of embeddings and not their size, so that from a baseline of zeros
          all of the change lies at the very beginning of the way, where no number of points finds it: the gap says so.
Cost:     a forward and a backward a point, in batches; a sweep of as many cells as tokens.
Check:    complete; exact on a linear network; tests/laws/test_token_gradients.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.edit import Set
from microtome.errors import PromptError, error
from microtome.explain._one_prompt import SMALLEST_GAP, asked, beside, reading
from microtome.explain._quadrature import integrate
from microtome.method import AnswerToken, Argument, Column, Found, PromptText, Source, question, run_sweep
from microtome.metric import Metric
from microtome.model import Model

ZERO, MEAN = "zero", "mean"
DRAWN = 256
"""Tokens whose mean embedding is the baseline."""
TOGETHER = 16
"""Points that are run together."""


@question(
    "integrated_gradients",
    command="integrate",
    title="integrated gradients",
    question="How much did each token of a prompt add to the answer, along the way from a baseline?",
    columns=(
        Column("score", "logits", "what this token adds to the metric on the way from the baseline to the prompt",
               "gradient", dims=("pos",)),
        Column("gradient", "logits", "the same from the gradient at the prompt alone, which does not add up",
               dims=("pos",)),
        Column("deletion", "logits", "how much the metric falls when this token alone is the baseline's, exactly",
               "none: the truth that scores stand beside", dims=("pos",)),
        Column("whole", "logits", "metric of the prompt minus that of the baseline", "none: what the scores sum to",
               dims=()),
        Column("gap", "share", "what the scores leave of it, as a share", "gap_gradient", (0, None), dims=()),
        Column("gap_gradient", "share", "what the gradient at the prompt leaves of it", range=(0, None), dims=()),
        Column("points", "points", "at how many points gradients were taken", "none: a count", (1, None), dims=()),
        Column("rank_correlation", "correlation", "between scores and deletions", "rank_correlation_gradient", (-1, 1),
               dims=()),
        Column("rank_correlation_gradient", "correlation", "the same for the gradient at the prompt", range=(-1, 1),
               dims=()),
    ),
    source=Source(
        "Sundararajan, Taly, Yan", "Axiomatic Attribution for Deep Networks", 2017, "1703.01365",
        departs="intervals are halved where they leave most of the gap; the gap that is left is given",
    ),
    cost="one forward and one backward a point, and points until the gap is closed; a sweep of one cell a token",
    check="tests/laws/test_token_gradients.py",
    call='mt.explain.integrated_gradients(model, "The capital of France is")',
    reading="Each score is what this token adds to the answer; all of them add up to the whole, up to the gap.",
)  # fmt: skip
def integrated_gradients(
    model: Model,
    prompt: PromptText,
    *,
    answer: AnswerToken = None,
    foil: Annotated[str | int | None, Argument("a token whose logit is subtracted")] = None,
    baseline: Annotated[
        str | int,
        Argument('"mean" for the mean embedding of many tokens, "zero" for zeros, or a token in place of every other'),
    ] = MEAN,
    points: Annotated[int, Argument("points of each interval", "points", least=1)] = 8,
    most: Annotated[int, Argument("points at most, in all intervals", "points", least=1)] = 512,
    tolerance: Annotated[float, Argument("gap at which to stop", "share", least=0)] = 0.01,
) -> Found:
    """Attribute an answer to the tokens of a prompt by integrating gradients from a baseline.

    Raises:
        PromptError: there are several prompts, the answer or the baseline is not one token of the vocabulary, the foil
            is the answer, or the baseline is answered like the prompt.
    """
    tokens, read, attrs = asked(model, prompt, answer, foil)
    metric, unit = reading(read)
    here = model.run(tokens.unsqueeze(0), capture="embed", logits=False)["embed"]
    there = _baseline(model, tokens, baseline, here)
    way = _Way(model, tokens, metric, there, here)
    ends = way.read([0.0, 1.0])
    whole = float(ends[1] - ends[0])
    if abs(whole) < SMALLEST_GAP:
        raise error(
            PromptError, "the baseline gives the same metric as the prompt, so that there is nothing to attribute",
            got=f"{float(ends[0]):.4g}", do="choose another baseline=",
        )  # fmt: skip
    found = integrate(way.read, way.scores, points=min(points, most), most=most, tolerance=tolerance * abs(whole))
    score = found.scores
    gradient = way.scores([1.0], [1.0])
    cells = [Set(f"embed@{p}", value=there[0, p]) for p in range(len(tokens))]
    swept = run_sweep(model, tokens.unsqueeze(0), cells, metric, stage="deleting tokens")
    deletion = -swept.effects.double()
    values: dict[str, Any] = {"score": score, "gradient": gradient, "deletion": deletion, "whole": whole}
    values["points"] = found.points
    for end, own in (("", score), ("_gradient", gradient)):
        values[f"gap{end}"] = abs(whole - float(own.sum())) / abs(whole)
        values[f"rank_correlation{end}"] = beside(own, deletion)
    named = baseline in (ZERO, MEAN)
    attrs |= {"baseline": baseline if named else model.to_words([model.to_id(baseline)])[0]}
    return Found(
        values, coords={"token": ("pos", model.to_words(tokens))}, attrs=attrs,
        units=dict.fromkeys(("score", "gradient", "deletion", "whole"), unit),
    )  # fmt: skip


def _baseline(model: Model, tokens: Tensor, baseline: str | int, here: Tensor) -> Float[Tensor, "1 pos d_model"]:
    """What enters the first layer for the baseline: zeros, one token at every position, or the mean of many.

    Raises:
        PromptError: it is not one token of the vocabulary.
    """
    if baseline == ZERO:
        return torch.zeros_like(here)
    if baseline == MEAN:
        rng = torch.Generator().manual_seed(current().seed)
        ids = torch.randperm(model.anatomy.d_vocab, generator=rng)[:DRAWN].to(tokens.device)
    else:
        ids = tokens.new_tensor([model.to_id(baseline)])
    rows = ids.unsqueeze(1).expand(-1, len(tokens))
    return model.run(rows, capture="embed", logits=False)["embed"].mean(0, keepdim=True)


class _Way:
    """The straight way from the baseline to the prompt, in embeddings."""

    def __init__(self, model: Model, tokens: Tensor, metric: Metric, there: Tensor, here: Tensor) -> None:
        self.model, self.tokens, self.metric, self.there, self.here = model, tokens, metric, there, here
        self.columns = metric.columns(0, len(tokens))

    def _rows(self, at: Sequence[float], *, grad: bool) -> tuple[Any, Float[Tensor, " point"]]:
        share = torch.tensor(at, dtype=self.here.dtype, device=self.here.device).reshape(-1, 1, 1)
        edit = Set("embed", value=self.there + share * (self.here - self.there))
        rows = self.tokens.expand(len(at), -1)
        run = self.model.run(rows, capture="embed", edits=[edit], grad=grad)
        numbers = torch.zeros(len(at), dtype=torch.long, device=rows.device)
        return run, self.metric.read(run.logits[:, self.columns], numbers).reshape(len(at))

    def read(self, at: Sequence[float]) -> Float[Tensor, " point"]:
        """The metric at some points."""
        with torch.no_grad():
            return self._rows(at, grad=False)[1].double().cpu()

    def scores(self, at: Sequence[float], weights: Sequence[float]) -> Float[Tensor, " pos"]:
        """The way of each token times the weighted sum of the gradients at some points."""
        total = torch.zeros_like(self.here[0], dtype=torch.float64)
        for first in range(0, len(at), TOGETHER):
            run, values = self._rows(at[first : first + TOGETHER], grad=True)
            weight = torch.tensor(weights[first : first + TOGETHER], dtype=torch.float64, device=total.device)
            total += (run.grad(values.sum())["embed"].double() * weight.reshape(-1, 1, 1)).sum(0)
        return ((self.here - self.there)[0].double() * total).sum(-1).cpu()
