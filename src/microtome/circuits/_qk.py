"""Attention scores as sums over singular pairs: what the queries of a head read, and what its keys offer.

Formula:  with the divisors of norms held at their values, queries and keys as used are q = M_q x_q + c_q and
          k = M_k x_k + c_k of the streams x at their positions; projection, gains and rotation are in M, biases in c.
          With (x, 1) in the place of x,
          score = b + a q . k = b + a sum_i s_i (u_i . x_q)(v_i . x_k),    M_q^T M_k = sum_i s_i u_i v_i^T (SVD);
          a is what the model scales by, b what it adds by position alone (ALiBi).
          The signal is the fewest terms, all of the sign of the sum and the largest first, whose sum is at least
          `share` of all terms together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.edit import Freeze, Zero
from microtome.errors import SiteError, error
from microtome.model import Model
from microtome.run import Run

HELD = Freeze(norms=True, patterns=True, activations=False)
"""How a run is made whose scores are split."""
READ = ("*.resid_pre", "*.attn.q", "*.attn.k", "*.attn.scores", "*.attn.pattern")
"""What it must capture."""
SHARE = 0.9
CLOSE = 1e-3
"""How far scores may lie from products of queries and keys, and these from linear maps, relative to their sizes."""


@dataclass(frozen=True, eq=False)
class Terms:
    """The score of a head at one query and one key as a sum.

    Attributes:
        values: [term] what each singular pair adds.
        query, key: [term, d_model_and_one] what each term reads of the stream at the query and at the key, 1 behind it.
        bias: what position alone adds.
    """

    values: Float[Tensor, " term"]
    query: Float[Tensor, "term d_model_and_one"]
    key: Float[Tensor, "term d_model_and_one"]
    bias: float


def fewest(values: Float[Tensor, " term"], share: float) -> Int[Tensor, " kept"]:
    """The fewest terms, largest first, whose sum is at least a share of the sum of all; of its sign alone."""
    total = float(values.sum())
    along = values if total >= 0 else -values
    order = along.argsort(descending=True, stable=True)
    reached = along[order].cumsum(0) >= share * abs(total) - 1e-12 * float(values.abs().sum())
    return order[: int(reached.nonzero()[0]) + 1]


def largest(values: Float[Tensor, "draw term"], n: int) -> Float[Tensor, " draw"]:
    """The sum of the n largest terms of each of several sums, by the sign of its whole."""
    sign = torch.where(values.sum(1) >= 0, 1.0, -1.0).to(values)
    return sign * (values * sign.unsqueeze(1)).topk(n, dim=1).values.sum(1)


def agreement(values: Float[Tensor, "*of term"]) -> Float[Tensor, "*of"]:
    """The size of each sum over the sum of the sizes of its terms: 1 where all have one sign, 0 where they cancel."""
    return values.sum(-1).abs() / values.abs().sum(-1).clamp(min=1e-300)


class Attention:
    """The scores of one prompt's run, made with `HELD` and gradients, that captured `READ`."""

    def __init__(self, model: Model, run: Run) -> None:
        self.model, self.run = model, run
        self.reads, self.factored, self.scaled = cache(self._reads), cache(self._factored), cache(self._scaled)
        self.scores, self.sink = cache(self._scores), cache(self._sink)

    @cached_property
    def _position(self) -> dict[int, Tensor]:
        """[head, q_pos, k_pos] by layer: what scores are where queries are zero."""
        with torch.no_grad():
            run = self.model.run(self.run.tokens, capture="*.attn.scores", edits=[Zero("*.attn.q"), HELD], logits=False)
        return {i: run[f"{i}.attn.scores"][0].double().cpu() for i in range(self.model.anatomy.n_layers)}

    def _scores(self, layer: int) -> Float[Tensor, "head q_pos k_pos"]:
        """As the softmax reads them, what a mask forbids at minus infinity."""
        scores = self.run[f"{layer}.attn.scores"][0].detach()
        return scores.double().masked_fill(scores <= torch.finfo(scores.dtype).min / 64, -torch.inf).cpu()

    def used(self, name: str, layer: int) -> Float[Tensor, "pos unit d_head"]:
        """Queries or keys as used."""
        return self.run[f"{layer}.attn.{name}"][0].detach().double().cpu()

    def stream(self, layer: int, position: int) -> Float[Tensor, " d_model_and_one"]:
        """What attention of a layer reads at a position, with 1 behind it."""
        x = self.run[f"{layer}.resid_pre"][0, position].detach().double().cpu()
        return torch.cat([x, x.new_ones(1)])

    def kv_head(self, layer: int, head: int) -> int:
        """The number of the keys that a head reads."""
        heads, keys = (self.run[f"{layer}.attn.{name}"].shape[2] for name in ("q", "k"))
        return head // (heads // keys)

    def _scaled(self, layer: int) -> tuple[float, Float[Tensor, "head q_pos k_pos"]]:
        """a and b of a layer.

        Raises:
            SiteError: its scores are no multiple of the products of queries and keys.
        """
        q, k = self.used("q", layer), self.used("k", layer)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        made, size = (torch.einsum("qhd,khd->hqk", *x) for x in ((q, k), (q.abs(), k.abs())))
        scores, bias = self.scores(layer), self._position[layer]
        seen = scores.isfinite()
        rest, made, size = (scores - bias)[seen], made[seen], size[seen]
        a = float((rest * made).sum() / made.square().sum().clamp(min=1e-300))
        gap = float(((rest - a * made).abs() / (abs(a) * size + bias[seen].abs()).clamp(min=1e-30)).max())
        if gap > self._close:
            raise error(
                SiteError, f"the attention scores of layer {layer} of {self.model.anatomy.name} are no multiple of "
                "queries times keys, so that they are no sum over directions", got=f"{gap:.2g} of their size is left",
                allowed=f"{self._close:g}", do="ask a model without a soft cap on its scores",
            )  # fmt: skip
        return a, bias.masked_fill(~seen, 0.0)

    @cached_property
    def _close(self) -> float:
        return max(CLOSE, 16 * torch.finfo(self.model.dtype).eps)

    def _reads(self, name: str, layer: int, unit: int) -> Float[Tensor, "pos d_head d_model_and_one"]:
        """M and c of the queries or keys of one unit, at every position.

        Raises:
            SiteError: they are no linear map of the stream.
        """
        site, stream = f"{layer}.attn.{name}", f"{layer}.resid_pre"
        x = self.run[site].detach()
        width = torch.arange(x.shape[-1], device=x.device)
        rows = x.new_zeros(len(width), *x.shape)
        rows[width, 0, :, unit, width] = 1
        matrix = at_least_float32(self.run.vjp(rows, site, stream)[:, 0]).double().cpu().transpose(0, 1)
        used = self.used(name, layer)[:, unit]
        rest = used - torch.einsum("tdm,tm->td", matrix, self.run[stream][0].detach().double().cpu())
        left = float(rest.norm() / used.norm().clamp(min=1e-30))
        if left > self._close and not self._has_biases(layer):
            what = "queries" if name == "q" else "keys"
            raise error(
                SiteError, f"the {what} of layer {layer} of {self.model.anatomy.name} are no linear map of the stream",
                got=f"{left:.2g} of their size is left, and there are no biases", allowed=f"{self._close:g}",
                do="ask a model that does not clip them",
            )  # fmt: skip
        return torch.cat([matrix, rest.unsqueeze(-1)], dim=-1)

    def _has_biases(self, layer: int) -> bool:
        """Whether something may be added to what attention reads, or to its queries and keys."""
        parts, norm = self.model.anatomy.parts.layers[layer], self.model.layers[layer].attn_norm
        inside = [] if parts.attn is None else self.model.hf.get_submodule(parts.attn).named_parameters()
        return (norm is not None and norm.bias is not None) or any("bias" in name for name, _ in inside)

    def _factored(self, name: str, layer: int, unit: int, position: int) -> tuple[Tensor, Tensor]:
        """The transpose of (M, c) at a position as orthonormal columns times a small matrix."""
        return torch.linalg.qr(self.reads(name, layer, unit)[position].T)

    def terms(self, layer: int, head: int, q: int, k: int) -> Terms:
        """The score of a head at a query and a key."""
        a, bias = self.scaled(layer)
        (left, r_q), (right, r_k) = (
            self.factored("q", layer, head, q), self.factored("k", layer, self.kv_head(layer, head), k)
        )  # fmt: skip
        u, s, vh = torch.linalg.svd(r_q @ r_k.T)
        u, v = left @ u, right @ vh.T
        by_q, by_k = self.stream(layer, q) @ u, self.stream(layer, k) @ v
        strength = a * s
        return Terms(
            strength * by_q * by_k, (strength * by_k).unsqueeze(1) * u.T, (strength * by_q).unsqueeze(1) * v.T,
            float(bias[head, q, k]),
        )  # fmt: skip

    def random_terms(
        self, layer: int, head: int, q: int, k: int, draws: int, generator: torch.Generator
    ) -> Float[Tensor, "draw term"]:
        """What random orthonormal directions of the head add in the place of singular pairs; they sum to the same."""
        a, _ = self.scaled(layer)
        own_q = self.used("q", layer)[q, head]
        own_k = self.used("k", layer)[k, self.kv_head(layer, head)]
        drawn = torch.randn(draws, len(own_q), len(own_q), generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q
        return a * (own_q @ basis) * (own_k @ basis)

    def without(self, layer: int, head: int, q: int, k: int, less: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """The attention of a head from q to k where its score there is less by so much."""
        return torch.sigmoid(self.odds(layer, head, q, k) - less)

    def odds(self, layer: int, head: int, q: int, k: int) -> Tensor:
        """The logarithm of the attention to k over that to all else, a sink included."""
        scores = self.scores(layer)[head, q]
        others = torch.cat([scores[:k], scores[k + 1 :], self.sink(layer)[head, q : q + 1]])
        return scores[k] - others.logsumexp(0)

    def _sink(self, layer: int) -> Float[Tensor, "head q_pos"]:
        """The score of a learned sink that takes part in the softmax, from what it leaves; minus infinity without."""
        scores, pattern = self.scores(layer), self.run[f"{layer}.attn.pattern"][0].detach().double().cpu()
        gone = 1 - pattern.sum(-1)
        there = gone > self._close
        return torch.where(there, gone.clamp(min=1e-30).log() - (-gone).log1p() + scores.logsumexp(-1), -torch.inf)
