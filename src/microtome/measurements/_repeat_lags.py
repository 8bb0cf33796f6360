"""Attention around the earlier occurrence of a token, and the model of free recall that has the same shape.

Formula:  tokens r_0..r_{T-1} r_0..r_{T-1}, A the pattern of a head, q over the second half:
          lag_attention[l] = mean A[q, q - T + l],  l = -5 .. 5: lag 0 is the earlier occurrence, 1 what followed it;
          lag_elsewhere the same around q - T/2, where nothing is repeated.
          The retrieved-context model (CMR): item i has a context c_i of its own, all at right angles; context drifts
              t_i = rho t_{i-1} + beta_enc c_i,   rho such that |t_i| = 1,
          item i is bound to t_{i-1}; when it comes again, the context of recall s moves to
              s_i = rho' s_{i-1} + beta_rec u_i,  u_i = ((1 - gamma) c_i + gamma t_{i-1}) / |.|,
          and item j is as active as t_{j-1} . s_i. In the steady state that is a curve of j - i alone (`cmr_curve`),
          times a scale. It is fitted by least squares to lag_attention minus the mean of lag_elsewhere;
          cmr_distance = |curve - fit| / |curve|: 0 for a head that recalls like CMR, 1 for one in which it explains
          nothing. beta_enc = beta_rec = 1, gamma = 0 is a pure induction head.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.method import Column, Kept, RepeatedTokens, Seen, Source, Statistic, measure
from microtome.model import Model
from microtome.stream import ExampleMeans

LAGS = tuple(range(-5, 6))
LEAST_BETA = 0.05
"""The slowest drift that is fitted: slower ones give curves without a shape over eleven lags."""
STEPS = 60
"""Of the iteration for rho', whose error is halved by each."""
COARSE, FINE, LEVELS = 21, 5, 9
"""Points of the first grid along each parameter, of the finer ones, and how often the grid is refined."""


def _parameter(name: str, meaning: str, low: float) -> Column:
    return Column(name, "1", meaning, "none: a parameter of the fit, of use where cmr_distance is small", (low, 1),
                  interval=False)  # fmt: skip


@measure(
    "repeat_lags",
    of="head",
    on=RepeatedTokens(),
    sites="attn.pattern",
    title="attention around the repeat",
    question="How does each head attend around the earlier occurrence of a token, and is it like human free recall?",
    columns=(
        Column(
            "lag_attention", "share",
            "attention to keys -5 to 5 tokens from the earlier occurrence of the token, on repeated random tokens",
            "lag_elsewhere", (0, 1), extra=("lag",),
        ),
        Column("lag_elsewhere", "share", "the same around a place half a period away", range=(0, 1), extra=("lag",)),
        _parameter("cmr_beta_enc", "how fast context drifts at the first occurrence, by the fitted CMR model", 0),
        _parameter("cmr_beta_rec", "how far a repeated token moves the context of recall", 0),
        _parameter("cmr_gamma", "how much of the context of its first occurrence a repeated token brings back", 0),
        Column(
            "cmr_distance", "1", "error of the fitted CMR model relative to the curve",
            "cmr_distance_elsewhere", (0, 1), interval=False,
        ),
        Column(
            "cmr_distance_elsewhere", "1", "the same for the curve half a period away", range=(0, 1), interval=False
        ),
    ),
    source=(
        Source(
            "Ji-An et al.", "Linking In-context Learning in Transformers to Human Episodic Memory", 2024, "2405.14992",
            departs="the curve is fitted in its steady state with a free scale and no softmax, above its control, and"
            " the distance is relative to the curve; these choices are ours",
        ),
        Source(
            "Polyn, Norman and Kahana",
            "A Context Maintenance and Retrieval Model of Organizational Processes in Free Recall", 2009,
            departs="contexts of items are at right angles, and lists have no ends",
        ),
    ),
    cost="one forward over repeated tokens, shared with the measure induction; a fit of milliseconds a head",
    check="tests/laws/test_head_map.py",
    atlas="full",
)  # fmt: skip
class RepeatLags(Statistic):
    """Attention by lag around the earlier occurrence of a token, and the fitted retrieved-context model."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """The curve of every head, and its control."""
        return {name: ExampleMeans((model.anatomy.n_heads, len(LAGS))) for name in ("lag_attention", "lag_elsewhere")}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch of repeats."""
        for name, curve in lag_curves(seen["attn.pattern"], seen.look.period, seen.lead).items():
            kept[name].update(curve, seen.examples)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The curves and the parameters of the fit."""
        curves = {name: kept[name].mean for name in kept}
        base = curves["lag_elsewhere"].mean(-1, keepdim=True)
        found = curves | {f"cmr_{name}": x for name, x in fit_cmr(curves["lag_attention"] - base).items()}
        found["cmr_distance_elsewhere"] = fit_cmr(curves["lag_elsewhere"] - base)["distance"]
        return found


def lag_curves(
    pattern: Float[Tensor, "batch head q_pos k_pos"], period: int, lead: int = 0
) -> dict[str, Float[Tensor, "batch head lag"]]:
    """The curves [batch, head, lag] of patterns on tokens that repeat after `period`, behind `lead` tokens."""
    a = pattern.double()

    def around(place: int) -> Float[Tensor, "batch head lag"]:
        found: list[Tensor] = []
        for lag in LAGS:
            offset = place - lag
            first = max(lead, lead + period - offset)  # the first key, of the first query of the second half
            found.append(a.diagonal(-offset, dim1=2, dim2=3)[..., first:].mean(-1))
        return torch.stack(found, dim=-1)

    return {"lag_attention": around(period), "lag_elsewhere": around(period // 2)}


def cmr_curve(
    beta_enc: Float[Tensor, "*of"], beta_rec: Float[Tensor, "*of"], gamma: Float[Tensor, "*of"]
) -> Float[Tensor, "*of lag"]:
    """How active the items at lags -5 .. 5 are in the retrieved-context model, in its steady state.

    Formula:  with e = sqrt(1 - beta_enc^2), Z = |(1 - gamma, gamma)|, F = (1 - gamma) beta_enc / Z, B = gamma / Z:
              t_{i+m-1} . u_i = F e^(m-1) [m >= 1] + B e^|m|,   u_i . u_{i-d} = C e^(d-1),  C = (F + B e) B,
              rho' = sqrt(1 + beta_rec^2 (x^2 - 1)) - beta_rec x,  x = s_{i-1} . u_i = beta_rec C / (1 - rho' e),
              curve[l] = beta_rec sum_{k >= 0} rho'^k t_{i+l-1} . u_{i-k}, summed in closed form.
    Check:    equals a simulation with vectors; tests/laws/test_head_map.py.
    """
    keep = (1 - beta_enc**2).clamp(min=0).sqrt()
    size = ((1 - gamma) ** 2 + gamma**2).sqrt()
    ahead, both = (1 - gamma) * beta_enc / size, gamma / size
    common = (ahead + both * keep) * both
    rho = (1 - beta_rec**2).clamp(min=0).sqrt()
    for _ in range(STEPS):  # half of each step, so that it settles
        x = beta_rec * common / (1 - rho * keep)
        rho = 0.5 * rho + 0.5 * ((1 + beta_rec**2 * (x**2 - 1)).clamp(min=0).sqrt() - beta_rec * x).clamp(min=0)
    rest = 1 / (1 - rho * keep)
    found: list[Tensor] = []
    for lag in LAGS:
        if lag >= 1:
            found.append((ahead * keep ** (lag - 1) + both * keep**lag) * rest)
            continue
        n = -lag
        behind = sum((rho**k * both * keep ** (n - k) for k in range(n + 1)), torch.zeros_like(rho))
        found.append(behind + rho ** (n + 1) * (ahead + both * keep) * rest)
    return beta_rec.unsqueeze(-1) * torch.stack(found, dim=-1)


def fit_cmr(curve: Float[Tensor, "*unit lag"]) -> dict[str, Float[Tensor, "*unit"]]:
    """The parameters of the retrieved-context model whose curve, times a scale, is nearest to each curve.

    Args:
        curve: [..., lag] attention at lags -5 .. 5 above its baseline.

    Returns:
        `beta_enc`, `beta_rec`, `gamma`, and `distance`: |curve - fit| / |curve|, from 0 to 1; NaN of a curve of zeros.
        A grid of 21 points along each parameter, refined 9 times: parameters are found to about 1e-3.
    """
    rows = curve.double().reshape(-1, len(LAGS))
    size = rows.norm(dim=1)
    unit = rows / size.clamp(min=torch.finfo(rows.dtype).tiny).unsqueeze(1)
    low, grid, curves = (x.to(rows.device) for x in _coarse())
    best = grid[(unit @ curves.T).argmax(1)]
    step = (1 - low) / (COARSE - 1)
    around = torch.linspace(-1, 1, FINE, dtype=rows.dtype, device=rows.device)
    around = torch.cartesian_prod(around, around, around)
    likeness = torch.zeros_like(size)
    for _ in range(LEVELS):
        points = torch.maximum(best.unsqueeze(1) + around * step, low).clamp(max=1)
        found = torch.einsum("nl,npl->np", unit, _unit(points))
        likeness, at = found.max(1)
        best = points.gather(1, at.reshape(-1, 1, 1).expand(-1, 1, 3)).squeeze(1)
        step = step * 0.6
    distance = (1 - likeness.clamp(0, 1) ** 2).sqrt()
    names = {**dict(zip(("beta_enc", "beta_rec", "gamma"), best.unbind(1), strict=True)), "distance": distance}
    return {name: torch.where(size > 0, x, torch.nan).reshape(curve.shape[:-1]) for name, x in names.items()}


@cache
def _coarse() -> tuple[Float[Tensor, " 3"], Float[Tensor, "point 3"], Float[Tensor, "point lag"]]:
    """The smallest parameters, the first grid, and its curves."""
    low = torch.tensor([LEAST_BETA, LEAST_BETA, 0.0], dtype=torch.float64)
    steps = torch.linspace(0, 1, COARSE, dtype=torch.float64)
    grid = low + (1 - low) * torch.cartesian_prod(steps, steps, steps)
    return low, grid, _unit(grid)


def _unit(parameters: Float[Tensor, "*of 3"]) -> Float[Tensor, "*of lag"]:
    """Curves of unit length."""
    made = cmr_curve(*parameters.unbind(-1))
    return made / made.norm(dim=-1, keepdim=True)
