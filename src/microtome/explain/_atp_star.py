"""AtP*: attribution patching whose queries and keys go through the softmax, and whose gradients skip a layer in turn.

Formula:  QK fix. A node of queries or keys is scored by what it makes of the pattern A, not of its own gradient: with
          G = dm/dA of the start run and Delta_ts the change of the score of query t and key s,
          all queries (or all keys) of a cell:  sum_ts (A'_ts - A_ts) G_ts,  A' = softmax(scores + Delta);
          key s alone: for each query t one score changes, p' = p e^Delta / (1 - p + p e^Delta) for p = A_ts, and the
          other weights of that query become A_tj (1 - p') / (1 - p): no pattern is formed again.
          GradDrop. score = sign . (sum over l of |score_l|) / (L - 1), of the stream / L; score_l by gradients that do
          not go through what layer l adds; the l of the node's own layer is left out, as its score is 0. The sign is
          that of the undropped score, and of sum_l score_l where that is 0.
Cost:     two forwards, one backward, and for every layer one backward of the layers before it.
Check:    the closed form is the softmax formed again; exact where the model is linear; a saturated head and an exact
          cancellation, which AtP misses and this finds; tests/laws/test_atp_star.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.edit import Freeze, forbidden
from microtome.errors import SiteError, error
from microtome.explain._first_order import first_order, of_start
from microtome.explain._layout import Layout, every_position, layout, named_sites
from microtome.explain._pairs import Pairs
from microtome.model import Model
from microtome.run import Run

FIXED = ("attn.q", "attn.k")
INSIDE = ("attn_out", "mixer_out", "mlp_out", "attn.q", "attn.k", "attn.v", "attn.z", "attn.pattern", "mlp.post")
"""Sites inside what a layer adds: no gradient reaches them where that layer is dropped."""
STRAIGHT = 1e-3
"""How far scores may be from a constant times queries times keys, as a share."""


def star_scores(
    model: Model, pairs: Pairs, direction: str, rules: Freeze | None, sites: Sequence[str]
) -> tuple[Float[Tensor, "row 2"], dict[str, Float[Tensor, "row layer _"]]]:
    """Ends, and scores of every site over layers by positions or by units, NaN in layers without it.

    Raises:
        SiteError: no layer has a site, or attention scores are not a product of queries and keys.
    """
    layouts = {site: layout(model, site, every_position(pairs.lengths[0])) for site in named_sites(model, sites)}
    n = model.anatomy.n_layers
    qk = sorted({layer for part in layouts.values() if part.site in FIXED for layer in part.layers})
    wanted = {part.capture for part in layouts.values()} | {"*.resid_pre", f"{n - 1}.resid_post"}
    formed = [f"{i}.{name}" for i in qk for name in ("attn.q", "attn.k", "attn.scores", "attn.pattern")]
    start, goal, ends = of_start(
        model, pairs, direction, rules, sorted(wanted | set(formed)),
        sorted({part.capture for part in layouts.values()} | {f"{i}.{name}" for i in qk for name in FIXED}),
    )  # fmt: skip
    attention = {i: Attention.of(start.run, goal, i) for i in qk}
    scores = {site: _Score(part, start.run, goal, attention) for site, part in layouts.items()}
    plain = {site: score(start.at) for site, score in scores.items()}
    total = {site: torch.zeros_like(x) for site, x in plain.items()}
    signed = {site: torch.zeros_like(x) for site, x in plain.items()}
    counted = {site: torch.zeros(n, dtype=torch.float64, device=x.device) for site, x in plain.items()}
    for dropped, gradient in _dropped(model, start.run, start.at, sorted(_read(layouts, qk))):
        for site, score in scores.items():
            own = score(gradient)
            there = torch.ones(n, dtype=torch.float64, device=own.device)
            if layouts[site].site in INSIDE:
                there[dropped] = 0
            total[site] += own.abs() * there.unsqueeze(-1)
            signed[site] += own * there.unsqueeze(-1)
            counted[site] += there
    found: dict[str, Tensor] = {}
    for site, own in plain.items():
        mean = total[site] / counted[site].unsqueeze(-1) if n > 1 else own.abs()
        found[site] = (torch.where(own == 0, signed[site], own).sign() * mean).cpu()
    return ends, found


def _read(layouts: Mapping[str, Layout], qk: Sequence[int]) -> set[str]:
    """What gradients are needed at."""
    plain = {f"{i}.{part.site}" for part in layouts.values() if part.site not in FIXED for i in part.layers}
    return plain | {f"{i}.attn.pattern" for i in qk}


def _dropped(
    model: Model, run: Run, gradient: Mapping[str, Tensor], read: Sequence[str]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each layer, and all gradients without those that go through what it adds."""
    n = model.anatomy.n_layers
    for layer in range(n):
        behind = gradient[f"{layer + 1}.resid_pre" if layer + 1 < n else f"{layer}.resid_post"]
        found = {name: x for name, x in gradient.items() if int(name.partition(".")[0]) > layer}
        own = [name for name in read if int(name.partition(".")[0]) == layer]
        # The stream beside the branches carries all of it; what the branches add, nothing.
        found |= {name: behind if ".resid_" in name else torch.zeros_like(gradient[name]) for name in own}
        earlier = [name for name in read if int(name.partition(".")[0]) < layer]
        if earlier:
            back = run.pull_back(behind.unsqueeze(0), f"{layer}.resid_pre", earlier)
            found |= {name: x[0] for name, x in back.items()}
        yield layer, found


class Attention:
    """Scores and pattern of one layer of the start run, and what the goal's queries or keys change in the scores.

    Attributes:
        logits: [row, head, q_pos, k_pos] log of the pattern, in float64; minus infinity where a mask forbids.
        by_query, by_key: change of the scores with the goal's queries, with its keys.
    """

    def __init__(self, scores: Tensor, pattern: Tensor, by_query: Tensor, by_key: Tensor) -> None:
        """Bring the scores into logarithms of the pattern; what is missing to 1 goes to a sink."""
        allowed = ~forbidden(scores)
        logits = scores.double().masked_fill(~allowed, -torch.inf)
        whole = logits.logsumexp(-1, keepdim=True)
        kept = pattern.double().sum(-1, keepdim=True)
        self.log_sink = torch.where(kept < 1 - 1e-4, torch.log1p(-kept), -torch.inf)
        self.logits = logits - whole + torch.where(kept < 1 - 1e-4, kept.log(), kept.new_zeros(()))
        self.by_query = by_query.masked_fill(~allowed, 0.0)
        self.by_key = by_key.masked_fill(~allowed, 0.0)

    @classmethod
    def of(cls, start: Run, goal: Run, layer: int) -> Attention:
        """Of two runs.

        Raises:
            SiteError: scores are not a constant times queries times keys.
        """
        names = {name: f"{layer}.attn.{name}" for name in ("q", "k", "scores", "pattern")}
        scores, pattern = start[names["scores"]].detach(), start[names["pattern"]].detach()
        q, k = (start[names[name]].detach().double().transpose(1, 2) for name in "qk")
        other = {name: goal[names[name]].detach().double().transpose(1, 2) for name in "qk"}
        times = q.shape[1] // k.shape[1]
        k, changed = (x.repeat_interleave(times, dim=1) for x in (k, other["k"]))
        scale = _scale(start, names, k, ~forbidden(scores))
        by_query = scale * (other["q"] - q) @ k.transpose(-1, -2)
        return cls(scores, pattern, by_query, scale * q @ (changed - k).transpose(-1, -2))

    def softmax(self, change: Float[Tensor, "row head q_pos k_pos"]) -> Float[Tensor, "row head q_pos k_pos"]:
        """The pattern with changed scores."""
        logits = torch.cat([self.logits + change, self.log_sink], dim=-1)
        return logits.softmax(-1)[..., :-1]

    def queries(self, slope: Tensor) -> Float[Tensor, "row head q_pos"]:
        """First-order effect of the goal's query at each position, its pattern formed again."""
        return ((self.softmax(self.by_query) - self.logits.exp()) * slope.double()).sum(-1)

    def keys_together(self, slope: Tensor) -> Float[Tensor, "row head"]:
        """That of all keys of a head, their pattern formed again."""
        return ((self.softmax(self.by_key) - self.logits.exp()) * slope.double()).sum((-1, -2))

    def keys(self, slope: Tensor) -> Float[Tensor, "row head k_pos"]:
        """That of each key alone, in closed form."""
        p, slope = self.logits.exp(), slope.double()
        others = _without_own(p) + self.log_sink.exp()  # 1 - p, with no difference of nearly equal numbers
        change = self.by_key.clamp(max=300.0)
        # p' - p = p (1 - p) (e^D - 1) / (1 - p + p e^D); the others lose in proportion to what they have.
        share = p * torch.expm1(change) / (others + p * change.exp()).clamp(min=1e-300)
        return (share * (others * slope - _without_own(p * slope))).sum(-2)


def _without_own(x: Float[Tensor, " *of k_pos"]) -> Float[Tensor, " *of k_pos"]:
    """For each key the sum over all others."""
    before, behind = x.cumsum(-1).roll(1, -1), x.flip(-1).cumsum(-1).roll(1, -1).flip(-1)
    before[..., 0] = 0
    behind[..., -1] = 0
    return before + behind


def _scale(run: Run, names: Mapping[str, str], k: Tensor, allowed: Tensor) -> float:
    """The constant of scores = constant . q . k, from their gradient.

    Raises:
        SiteError: there is none.
    """
    rows = allowed.to(run[names["scores"]].dtype).unsqueeze(0)
    slope = run.vjp(rows, names["scores"], names["q"])[0].double().transpose(1, 2)
    straight = allowed.double() @ k
    scale = float((slope * straight).sum() / straight.pow(2).sum().clamp(min=1e-300))
    gap = float((slope - scale * straight).norm() / slope.norm().clamp(min=1e-300))
    if gap > STRAIGHT:
        raise error(
            SiteError, f"{names['scores']} are no constant times queries times keys",
            got=f"a gradient {gap:.1%} away from the keys, as under a cap on the scores",
            do="leave queries and keys out of sites=, or use another method",
        )  # fmt: skip
    return scale


class _Score:
    """Scores of one site, as a function of gradients."""

    def __init__(self, part: Layout, start: Run, goal: Run, attention: Mapping[int, Attention]) -> None:
        self.part, self.attention = part, attention
        names = {i: f"{i}.{part.site}" for i in part.layers}
        self.change: dict[int, Tensor] = {
            i: at_least_float32(goal[name].detach()) - at_least_float32(start[name].detach())
            for i, name in names.items()
        }

    def __call__(self, gradient: Mapping[str, Tensor]) -> Float[Tensor, "row layer _"]:
        """[row, layer, place or unit]"""
        own = self._fixed if self.part.site in FIXED else self._plain
        return self.part.spread(torch.cat([own(gradient, i) for i in self.part.layers], dim=1))

    def _plain(self, gradient: Mapping[str, Tensor], layer: int) -> Float[Tensor, "row cell"]:
        return first_order(self.change[layer], gradient[f"{layer}.{self.part.site}"], self.part)

    def _fixed(self, gradient: Mapping[str, Tensor], layer: int) -> Float[Tensor, "row cell"]:
        attention, slope = self.attention[layer], gradient[f"{layer}.attn.pattern"]
        by_position = self.part.dims[1] == "pos"
        if self.part.site == "attn.q":
            return attention.queries(slope).sum(1 if by_position else -1)
        if by_position:
            return attention.keys(slope).sum(1)
        by_head = attention.keys_together(slope)
        groups = self.change[layer].shape[2]
        return by_head.unflatten(1, (groups, -1)).sum(-1)
