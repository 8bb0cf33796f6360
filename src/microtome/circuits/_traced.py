"""Scores of all edges by signals: from the metric back to the embedding, along what attention and MLPs read.

Formula:  g is what the metric reads of a stream: its gradient behind the last layer, divisors of norms held. Going
          back, an MLP reads J^T g, J its derivative here, and the values of a head read pattern^T g W_O W_V;
          a query and a key of a head matter where the head would lose, of what it adds along g, at least `LEAST` of
          the gap between the two runs if it did not look there; there L is what it loses where the signal of the
          score (`_qk`) is taken out, S the signal, and its queries read (L / S) dS/dx_q, its keys (L / S) dS/dx_k;
          g of the layer before is the sum of g and of what all of them read;
          score(u -> v) = (other_u - write_u) . what v reads, summed over positions: how the metric changes where the
          edge gives the other run's values, as far as signals say.
Source:   Franco, Crovella, "Sparse Attention Decomposition Applied to Circuit Tracing", 2024 (arXiv 2410.00340).
          Departs: values and MLPs are traced too, to first order; writers count by their change from the other run;
          what a signal is worth is what the head loses without it, and edges are ranked by that.
Cost:     a forward and two backwards a prompt, four products a layer, and a small SVD a query and key that matter.
Check:    the planted induction head; on frozen patterns it is the gradient; tests/laws/test_signals.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.circuits._qk import HELD, READ, SHARE, Attention, fewest
from microtome.context import current
from microtome.explain import Pairs
from microtome.model import Model
from microtome.sweep import Circuits

LEAST = 0.005
"""Share of the gap between the two runs that a head must lose if it did not look at a key, for that to matter."""


@dataclass(frozen=True, eq=False)
class Traced:
    """Scores of all edges.

    Attributes:
        scores: [pair, sender, receiver].
        sizes: how many terms each signal has, of all that were traced.
    """

    scores: Float[Tensor, "pair sender receiver"]
    sizes: list[int] = field(default_factory=list[int])


def signal_scores(
    model: Model,
    pairs: Pairs,
    groups: Sequence[tuple[list[int], Circuits]],
    gap: float,
    share: float = SHARE,
    least: float = LEAST,
) -> Traced:
    """Scores of every edge in every pair.

    Args:
        model: the model.
        pairs: what is traced.
        groups: the numbers of the pairs of each engine, and the engine.
        gap: of the metric, between the clean and the other run.
        share: of a score that its signal must reach.
        least: share of the gap that a head must lose if it did not look at a key.

    Raises:
        SiteError: attention scores are no sum over directions.
    """
    edges, report, done = groups[0][1].edges.cpu(), current().counting("tracing signals"), 0
    found = Traced(torch.full((len(pairs), *edges.shape), torch.nan, dtype=torch.float64))
    for numbers, engine in groups:
        for row, i in enumerate(numbers):
            back = Back(model, pairs.take([i]), share, least * gap)
            read = torch.cat(back.reads()).flatten(1)
            away = engine.away[row].double().cpu().flatten(1)
            found.scores[i] = (away @ read.T).masked_fill(~edges, torch.nan)
            found.sizes.extend(back.sizes)
            done += 1
            report(done, len(pairs))
    return found


class Back:
    """One prompt, from what is read of it back to its embedding.

    Attributes:
        sizes: how many terms each signal has.
    """

    def __init__(self, model: Model, pair: Pairs, share: float, least: float) -> None:
        """Run the clean prompt; `least` is what a head must lose if it did not look at a key."""
        self.model, self.share, self.least, self.sizes = model, share, least, list[int]()
        self.parallel, self.layers = model.anatomy.parts.form == "parallel", model.anatomy.n_layers
        streams = () if self.parallel else ("*.resid_mid",)
        last = f"{self.layers - 1}.resid_post"
        wanted = [*READ, *streams, "*.attn.v", "*.attn.z", "*.attn_out", "*.mlp_out", last]
        self.run = model.run(pair.tokens[0][:1], capture=wanted, edits=[HELD], grad=True)
        self.slope = self.run.grad(pair.read(self.run).sum())[last].detach()
        self.attention = Attention(model, self.run)

    def reads(self) -> list[Float[Tensor, "_ pos d_model"]]:
        """What each receiver reads: of each layer the q, k and v of all heads and its MLP, then the logits."""
        slope, found = self.slope, [self.slope.double().cpu()]
        for i in reversed(range(self.layers)):
            stream = f"{i}.resid_pre" if self.parallel else f"{i}.resid_mid"
            mlp = self.run.vjp(slope.unsqueeze(0), f"{i}.mlp_out", stream)[0]
            behind = slope if self.parallel else slope + mlp
            heads = self.heads(i, behind)
            slope = slope + mlp + heads.sum((0, 1)).to(slope)
            found = [*heads, mlp.double().cpu(), *found]
        return found

    def heads(self, i: int, slope: Float[Tensor, "one pos d_model"]) -> Float[Tensor, "three head pos d_model"]:
        """What the queries, keys and values of the heads of a layer read, of what the metric reads behind them."""
        run = self.run
        by_z = run.vjp(slope.unsqueeze(0), f"{i}.attn_out", f"{i}.attn.z")[0, 0]  # [pos, head, d_head]
        pattern, v = run[f"{i}.attn.pattern"][0].detach().to(by_z), run[f"{i}.attn.v"].detach()
        heads, times = by_z.shape[1], by_z.shape[1] // v.shape[2]
        by_v = torch.einsum("hqk,qhd->khd", pattern, by_z)
        rows = v.new_zeros(heads, *v.shape)
        for h in range(heads):
            rows[h, 0, :, h // times] = by_v[:, h].to(v)
        values = run.vjp(rows, f"{i}.attn.v", f"{i}.resid_pre")[:, 0].double().cpu()
        own = v[0].repeat_interleave(times, dim=1).to(by_z)
        worth = torch.einsum("khd,qhd->hqk", own, by_z).double().cpu()
        found = torch.stack([torch.zeros_like(values), torch.zeros_like(values), values])
        for h, q, k, gain in self._that_matter(i, worth):
            terms = self.attention.terms(i, h, q, k)
            kept = fewest(terms.values, self.share)
            signal = terms.values[kept].sum()
            odds = self.attention.odds(i, h, q, k)
            loss = gain * (torch.sigmoid(odds - signal) - torch.sigmoid(odds))
            self.sizes.append(len(kept))
            if bool(signal != 0):
                found[0, h, q] -= loss / signal * terms.query[kept, :-1].sum(0)
                found[1, h, k] -= loss / signal * terms.key[kept, :-1].sum(0)
        return found

    def _that_matter(self, i: int, worth: Float[Tensor, "head q_pos k_pos"]) -> Iterator[tuple[int, int, int, Tensor]]:
        """Head, query and key where something is lost without this attention, and the worth of the key over the others.

        worth [head, q_pos, k_pos] is what a head would add along what is read if it looked at one key alone.
        """
        scores, sink = self.attention.scores(i), self.attention.sink(i)
        length = scores.shape[-1]
        alone = torch.eye(length, dtype=torch.bool)
        for q in range(length):
            row = scores[:, q].unsqueeze(1).expand(-1, length, -1).masked_fill(alone, -torch.inf)  # [head, key, other]
            row = torch.cat([row, sink[:, q, None, None].expand(-1, length, 1)], dim=-1)
            others = row.logsumexp(-1)
            shares = (row - others.unsqueeze(-1)).exp().nan_to_num(0.0)[..., :-1]
            over = worth[:, q] - torch.einsum("hkj,hj->hk", shares, worth[:, q])
            size = (torch.sigmoid(scores[:, q] - others).nan_to_num(0.0) * over).abs()
            for h, k in ((size >= self.least) & others.isfinite()).nonzero().tolist():
                yield h, q, k, over[h, k]
