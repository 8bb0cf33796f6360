"""Whether a text is like the ones a model is used on: scores of rows from its neurons and its logits, and their AUROC.

Formula:  for each row, means over its tokens; x the stream before the final norm, F the normalised state that the
          unembedding reads, y the logits. Every score is higher for what is inside.
          energy    logsumexp y
          scale     logsumexp of the unembedding of F exp(r), r = sum of |F| / sum of |F| above its 85th percentile
          vra       logsumexp of the unembedding of F' : 0 where |F| is below its 10th percentile on the calibration
                    rows, with its sign and at most its 95th percentile above, plus 0.1 of the median between
          nac       mean over neurons of the last MLP of min(density, r) / r, where the state of a neuron is
                    sigmoid(s a / std), a its activation, s the derivative with respect to it of the cross-entropy
                    of the next token's prediction to the uniform one, std that of s a on the calibration rows; the
                    density is a histogram of 50 bins over the calibration rows, r its mean over the bins
          controls  probability = mean of the largest probability; entropy = minus the mean entropy
          auroc = share of pairs, one row inside and one outside, of which the one inside scores higher, ties half.
          The first half of the rows inside calibrates vra and nac; the other half is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import at_least_float32, parse
from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.method import Text
from microtome.model import Model
from microtome.stream import TokenBatch

SCORES = ("nac", "vra", "scale", "energy", "probability", "entropy")
PERCENTILE = 0.85
LOW, HIGH, LIFT = 0.10, 0.95, 0.1
BINS = 50
DRAWS = 1000


def auroc(inside: Float[Tensor, " row"], outside: Float[Tensor, " other"]) -> float:
    """Share of pairs of which the one inside scores higher, ties half (Mann and Whitney's U)."""
    from scipy.stats import rankdata

    ranks = rankdata(torch.cat([inside, outside]).numpy())
    n, m = len(inside), len(outside)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def out_of_distribution(
    model: Model,
    inside: Any,
    outside: Any,
    *,
    scores: Sequence[str] = SCORES,
    tokens: int = 4_000,
    length: int = 64,
    rows: int = 8,
) -> xr.Dataset:
    """How well scores of a row tell a text that is like what a model is used on from one that is not.

    Formula:  see this file's head.
    Source:   Liu et al., "Neuron Activation Coverage", 2023 (arXiv 2306.02879), nac; Xu et al., "VRA", 2023 (arXiv
              2302.11716), vra; Xu et al., "Scaling for Training Time and Post-hoc Out-of-distribution Detection
              Enhancement", 2023 (arXiv 2310.00227), scale; Liu et al., "Energy-based Out-of-distribution Detection",
              2020 (arXiv 2010.03759), energy. Departs: means over the tokens of a row; the state that the unembedding
              reads in place of pooled features, by its sizes as it has both signs; the state of a neuron is set
              against its own spread; percentiles and bins are constants of ours.
    Cost:     a forward over both texts, three unembeddings, and for nac a gradient through the end of the model.
    Check:    two halves of one text give an AUROC of 0.5, coverage lies in 0 .. 1; tests/laws/test_outside.py.

    Args:
        model: an open causal model, whose stream can be read as logits.
        inside: the text that it is used on; whatever a measure reads.
        outside: the other text.
        scores: which to compute.
        tokens: of either text to read.
        length: tokens of a row.
        rows: rows of a batch.

    Returns:
        A dataset: `auroc` [score] with its 95 % bootstrap interval over rows as `auroc_lo` and `auroc_hi`; `inside`
        [score, row] and `outside` [score, other], the scores of the rows.

    Raises:
        ArgumentError: there is no such score.
        DataError: there are fewer than 16 rows inside or 8 outside.
        SiteError: the stream cannot be read as logits, or, for nac, the last block has no neurons.
        ModelUnsupported: the model does not predict the next token.
    """
    wanted = tuple(dict.fromkeys(scores))
    wrong = [name for name in wanted if name not in SCORES]
    if wrong or not wanted:
        got, allowed = ", ".join(wrong) or "none", ", ".join(SCORES)
        raise error(ArgumentError, "no such score", got=got, allowed=allowed, do="name one")
    model.require_next_token()
    model.require_readable()
    texts = [Text(text, tokens=tokens, length=length, rows=rows).batches(model) for text in (inside, outside)]
    counts = [sum(len(batch.tokens) for batch in text.parts) for text in texts]
    for count, least, name in zip(counts, (16, 8), ("inside", "outside"), strict=True):
        if count < least:
            raise error(DataError, f"the text {name} has too few rows", got=count, allowed=f"{least} or more",
                        do="give more text, or a smaller length")  # fmt: skip
    parts = [list(text.parts) for text in texts]
    half = _split(parts[0], counts[0] // 2)
    ends = _Ends(model, wanted, half[0])
    found = [torch.cat([ends.scores(batch) for batch in some], dim=1) for some in (half[1], parts[1])]
    values = [(auroc(a, b), *_interval(a, b)) for a, b in zip(*found, strict=True)]
    about = {"unit": "share", "meaning": "pairs of rows of which the one inside scores higher"}
    variables: dict[str, Any] = {
        f"auroc{end}": ("score", [one[i] for one in values], about) for i, end in enumerate(("", "_lo", "_hi"))
    }
    for name, dim, x in zip(("inside", "outside"), ("row", "other"), found, strict=True):
        variables[name] = (("score", dim), x.numpy(), {"unit": "1", "meaning": f"score of each row {name}"})
    sources = " against ".join(text.source for text in texts)
    told = {"method": "out_of_distribution", "text": sources, "seed": current().seed}
    return xr.Dataset(variables, coords={"score": list(wanted)}).assign_attrs(dict(model.provenance) | told)


def _split(batches: Sequence[TokenBatch], first: int) -> tuple[list[TokenBatch], list[TokenBatch]]:
    """The first rows, and the others."""
    found: tuple[list[TokenBatch], list[TokenBatch]] = ([], [])
    for batch in batches:
        cut = max(0, min(first, len(batch.tokens)))
        first -= cut
        for some, rows in zip(found, (slice(0, cut), slice(cut, None)), strict=True):
            if len(batch.tokens[rows]):
                fields = (batch.tokens, batch.start, batch.document, batch.position, batch.group)
                some.append(TokenBatch(*(x[rows] for x in fields), lead=batch.lead))
    return found


def _interval(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    """The 95 % bootstrap interval of the AUROC over rows."""
    from scipy.stats import rankdata

    rng = np.random.default_rng(current().seed)
    drawn = [x.numpy()[rng.integers(len(x), size=(DRAWS, len(x)))] for x in (inside, outside)]
    n, m = len(inside), len(outside)
    sums = rankdata(np.concatenate(drawn, axis=1), axis=1)[:, :n].sum(1)
    low, high = np.quantile((sums - n * (n + 1) / 2) / (n * m), [0.025, 0.975])
    return float(low), float(high)


@dataclass(eq=False)
class _Limits:
    """What vra and nac know of the calibration rows."""

    low: Tensor
    high: Tensor
    middle: Tensor
    spread: Tensor
    density: Tensor


class _Ends:
    """The end of a model with what its calibration rows are like: scores of the rows of batches."""

    def __init__(self, model: Model, wanted: Sequence[str], rows: Sequence[TokenBatch]) -> None:
        self.model, self.wanted = model, wanted
        self.site = f"{model.anatomy.n_layers - 1}.mlp.post"
        if "nac" in wanted:
            model.anatomy.sites(parse(self.site))
        self.limits = self._calibrate(rows)

    def _calibrate(self, rows: Sequence[TokenBatch]) -> _Limits:
        nothing = torch.zeros(0)
        low = high = middle = spread = density = nothing
        if "vra" in self.wanted:
            states = torch.cat([self._state(batch).flatten(0, 1).abs() for batch in rows])
            low, middle, high = (torch.quantile(states[:4096].flatten()[: 2**23], q) for q in (LOW, 0.5, HIGH))
        if "nac" in self.wanted:
            pushes = torch.cat([self._push(batch).flatten(0, 1) for batch in rows])
            spread = pushes.std(0).clamp(min=torch.finfo(torch.float32).tiny)
            density = _histogram(torch.sigmoid(pushes / spread))
        return _Limits(low, high, middle, spread, density)

    def scores(self, batch: TokenBatch) -> Float[Tensor, "score row"]:
        """The scores of every row of a batch."""
        state = self._state(batch)
        logits = self._read(state)
        made = {
            "energy": lambda: logits.logsumexp(-1), "probability": lambda: logits.softmax(-1).amax(-1),
            "entropy": lambda: -torch.distributions.Categorical(logits=logits).entropy(),
            "scale": lambda: self._read(scaled(state)).logsumexp(-1),
            "vra": lambda: self._read(self._rectified(state)).logsumexp(-1),
            "nac": lambda: coverage(torch.sigmoid(self._push(batch) / self.limits.spread), self.limits.density),
        }  # fmt: skip
        mask = torch.ones(batch.tokens.shape) if batch.text is None else batch.text.float()
        with torch.no_grad():
            each = torch.stack([made[name]().cpu() for name in self.wanted])
        return ((each * mask).sum(-1) / mask.sum(-1)).double()

    def _state(self, batch: TokenBatch) -> Float[Tensor, "row pos d_model"]:
        """What the unembedding reads."""
        return at_least_float32(self.model.run(batch.tokens, capture="final", logits=False)["final"]).detach()

    def _read(self, state: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos vocab"]:
        """The logits that a state gives."""
        model, a = self.model, self.model.anatomy
        logits = state @ at_least_float32(model.W_U)
        logits = (logits if model.b_U is None else logits + model.b_U) * a.logit_scale
        return logits if a.logit_softcap is None else torch.tanh(logits / a.logit_softcap) * a.logit_softcap

    def _rectified(self, state: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        size, held = state.abs(), self.limits
        lifted = torch.where(size > held.high, held.high, size + LIFT * held.middle)
        return state.sign() * torch.where(size < held.low, 0.0, lifted)

    def _push(self, batch: TokenBatch) -> Float[Tensor, "row pos neuron"]:
        """Activation of the last MLP times the derivative of the cross-entropy to the uniform prediction, by token.

        What a neuron of the last MLP adds at a token acts on that token alone, so that one gradient serves all.
        """
        layer = self.model.anatomy.n_layers - 1
        before = f"{layer}.resid_pre"
        given = self.model.run(batch.tokens, capture=before, logits=False)[before].detach()
        with torch.enable_grad():
            run = self.model.run(batch.tokens, capture=self.site, start_at=layer, given=given, grad=True)
            logits = run.logits.float()
            slope = run.grad((logits.logsumexp(-1) - logits.mean(-1)).sum())[self.site]
        return at_least_float32(slope * run[self.site]).detach()


def scaled(state: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at d_model"]:
    """A state times the exponential of the sum of its sizes over the sum of those above their 85th percentile."""
    size = state.abs()
    top = size.topk(max(1, round((1 - PERCENTILE) * size.shape[-1])), dim=-1).values
    return state * (size.sum(-1) / top.sum(-1).clamp(min=1e-30)).exp().unsqueeze(-1)


def _histogram(states: Float[Tensor, "token neuron"]) -> Float[Tensor, "neuron bin"]:
    """The share of states, in 0 .. 1, in each of 50 bins."""
    place = (states * BINS).long().clamp(max=BINS - 1).T
    found = torch.zeros(place.shape[0], BINS, device=states.device)
    return found.scatter_add(1, place, torch.ones_like(place, dtype=found.dtype)) / place.shape[1]


def coverage(states: Float[Tensor, "row pos neuron"], density: Float[Tensor, "neuron bin"]) -> Float[Tensor, "row pos"]:
    """Mean over neurons of min(density, r) / r at their states, with r the mean of the density over bins."""
    full = density.mean(1, keepdim=True)
    covered = torch.minimum(density, full) / full
    place = (states * BINS).long().clamp(max=BINS - 1)
    flat = place.flatten(0, 1).T
    return covered.gather(1, flat).mean(0).reshape(states.shape[:2])
