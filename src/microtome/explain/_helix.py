"""Numbers as helices: whether the states of numbers lie on a helix, and whether its points can stand in for them.

Formula:  x_a, the state of number a after a layer, projected on the first `components` principal components of all; a
          linear fit of it on B(a) = [1, a, cos 2 pi a / T, sin 2 pi a / T for each period T], so of rank 1 + 2 |T|
          beside the mean, less what is 0 or told by the others at these numbers (the sine of T = 2 at integers).
          Everything is fitted without the numbers that it is judged on (`folds` parts in turn):
              r2 = 1 - sum_a |x_a - fit(a)|^2 / sum_a |x_a - mean of the others|^2.
          The fitted state is put in the place of the own one, in the run of a's prompt, and what is read is whether
          the model's first choice stays the same (`kept`).
          Beside it, of the same rank: Chebyshev polynomials of a; the own state cut to its first principal components,
          which is no function of a and bounds what any fit of this rank can keep.
          Controls: the helix fitted to numbers in a random order; and for `kept` the mean of the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.edit import Set
from microtome.errors import ArgumentError, PromptError, error
from microtome.explain._waves import RANGE, Prompts, in_order, integers, rows_of
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.metric import Rank
from microtome.model import Model

LAYER = ("layer",)
PERIODS = (2.0, 5.0, 10.0, 100.0)
FITS = ("helix", "polynomial", "shuffled", "components")


@question(
    "helix",
    command="helix",
    title="numbers as helices",
    question="Are the states of numbers points of a helix, and does the model take those points for the numbers?",
    columns=(
        Column("helix_r2", "share", "variance of states that the helix predicts for numbers it was not fitted to",
               "shuffled_r2", (None, 1), LAYER, title="helix"),
        Column("shuffled_r2", "share", "the same fitted to the numbers in a random order", range=(None, 1), dims=LAYER),
        Column("polynomial_r2", "share", "the same of polynomials of the same rank", "shuffled_r2", (None, 1), LAYER,
               title="polynomial"),
        Column("components_r2", "share", "variance of states in as many principal components",
               "none: the bound of any fit of this rank", (None, 1), LAYER, title="principal components"),
        Column("helix_kept", "share", "how often the first choice stays with the helix's state in place of the own",
               "mean_kept", (0, 1), LAYER, title="kept by the helix"),
        Column("mean_kept", "share", "the same with the mean of the other numbers' states", range=(0, 1), dims=LAYER),
        Column("shuffled_kept", "share", "the same with the state of a helix of shuffled numbers", "mean_kept", (0, 1),
               LAYER, title="kept by a helix of shuffled numbers"),
        Column("polynomial_kept", "share", "the same with the polynomial's state", "mean_kept", (0, 1), LAYER,
               title="kept by the polynomial"),
        Column("components_kept", "share", "the same with the own state cut to as many principal components",
               "mean_kept", (0, 1), LAYER, title="kept by principal components"),
    ),
    source=Source(
        "Kantamneni and Tegmark", "Language Models Use Trigonometry to Do Addition", 2025, "2502.00873",
        departs="fits are judged on numbers that they have not seen; polynomials are of the same rank; what is read is "
        "whether the first choice stays",
    ),
    cost="one forward of each prompt, and a sweep of 5 cells for each layer and prompt",
    check="tests/planted/test_waves.py",
    call='mt.explain.helix(model, "{100-199} + 5 =", "100-199", position=2)',
    reading="r2 says how well a curve predicts the states of numbers that it was not fitted to; kept, how often the "
    "model says the same with the predicted state in place of its own.",
    needs=("next token", "*.resid_post"),
)  # fmt: skip
def helix(
    model: Model,
    prompts: Prompts,
    numbers: Annotated[
        Sequence[int] | str,
        Argument('for each prompt, the number whose state is read, or their range, such as "100-199"', positional=True),
    ],
    *,
    position: Annotated[int, Argument("where the state is read, counted from the end if negative", "positions")] = -1,
    periods: Annotated[Sequence[float], Argument("periods of the helix")] = PERIODS,
    layers: Annotated[Sequence[int] | None, Argument("layers to read; all by default")] = None,
    components: Annotated[int, Argument("principal components that are kept first", "components", least=1)] = 100,
    folds: Annotated[int, Argument("parts that are left out in turn", "parts", least=2)] = 10,
) -> Found:
    """Fit a helix to the states of numbers, and put its points in their place.

    Raises:
        ArgumentError: not one integer for each prompt, or too few for the rank of the fit; a layer or period that is
            none.
        PromptError: a prompt does not reach the position.
    """  # fmt: skip
    rows, given = (
        rows_of(model, prompts),
        integers(
            list(map(int, in_order(numbers))) if isinstance(numbers, str) and RANGE.fullmatch(numbers) else numbers,
            "numbers",
        ),
    )
    _require_periods(periods)
    rank = _rank(torch.tensor(given, dtype=torch.float64), periods)
    if len(given) != len(rows) or len(set(given)) < 2 * (rank + 1):
        got = f"{len(rows)} prompts, {len(set(given))} different numbers of {len(given)}"
        allowed = f"one number a prompt, {2 * (rank + 1)} different ones or more"
        raise error(ArgumentError, "too few numbers for this helix", got=got, allowed=allowed, do="give more numbers")
    short = next((len(row) for row in rows if not -len(row) <= position < len(row)), None)
    if short is not None:
        raise error(PromptError, f"a prompt has no position {position}", got=f"{short} tokens", do="choose another")
    n = model.anatomy.n_layers
    chosen = list(range(n)) if layers is None else list(layers)
    if not chosen or any(not 0 <= i < n for i in chosen):
        raise error(
            ArgumentError, "no such layers", got=str(chosen), allowed=f"0 to {n - 1}", do="choose some of these"
        )
    names = [f"{i}.resid_post@{position}" for i in chosen]
    runs = [model.run(row, names) for row in rows]
    first = [int(run.logits[0, -1].argmax()) for run in runs]
    states = torch.stack([torch.stack([run[name][0, 0] for name in names]) for run in runs]).double()
    a = torch.tensor(given, dtype=torch.float64)
    made = {i: _fits(states[:, at], a, periods, components, folds) for at, i in enumerate(chosen)}
    kinds = (*FITS, "mean")
    cells: list[Set] = []
    for p in range(len(rows)):
        cells += [Set(f"{i}.resid_post@{position}", made[i][k][p]) for i in chosen for k in kinds]
    size = len(chosen) * len(kinds)
    numbered = [p for p in range(len(rows)) for _ in range(size)]
    swept = run_sweep(model, rows, cells, Rank(first), prompts=numbered, stage="helices")
    stays = (swept.whole().values == 0).double().reshape(len(rows), len(chosen), len(kinds)).cpu()
    each = {f"{kind}_kept": stays[:, :, k] for k, kind in enumerate(kinds)}
    fits = {kind: [_r2(states[:, at], made[i], kind) for at, i in enumerate(chosen)] for kind in FITS}
    values = {f"{kind}_r2": torch.tensor(x, dtype=torch.float64) for kind, x in fits.items()}
    attrs = {"numbers": len(rows), "rank": rank, "periods": ", ".join(f"{t:g}" for t in periods)}
    return Found(values, each=each, coords={"layer": chosen}, attrs=attrs)


def helix_basis(a: Float[Tensor, " number"], periods: Sequence[float]) -> Float[Tensor, "number of"]:
    """[1, a, cos 2 pi a / T, sin 2 pi a / T, ...], a in units of its largest."""
    waves = [f(2 * math.pi * a / t) for t in periods for f in (torch.cos, torch.sin)]
    return torch.stack([torch.ones_like(a), a / a.abs().max().clamp(min=1), *waves], dim=1)


def _require_periods(periods: Any) -> None:
    """Refuse periods that are none.

    Raises:
        ArgumentError: they are no numbers above 0, or there are none.
    """
    listed = list(periods) if isinstance(periods, Sequence) and not isinstance(periods, str) else [None]
    if not listed or any(not isinstance(t, int | float) or not 0 < t < math.inf for t in listed):
        allowed = "numbers above 0, such as (2, 10)"
        raise error(
            ArgumentError, "these are no periods of a helix", got=repr(periods), allowed=allowed, do="give some"
        )


def _rank(a: Float[Tensor, " number"], periods: Sequence[float]) -> int:
    """The dimensions of a helix of these numbers beside the mean: of integers, the sine of T = 2 is 0."""
    basis = helix_basis(a, periods)[:, 1:]
    return int(torch.linalg.matrix_rank(basis - basis.mean(0), rtol=1e-9)) if len(a) else 0


def _fits(
    x: Float[Tensor, "number d_model"], a: Tensor, periods: Sequence[float], components: int, folds: int
) -> dict[str, Float[Tensor, "number d_model"]]:
    """By kind of fit, the state of each number from a fit without it."""
    values, member = a.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(current().seed)
    part = (torch.randperm(len(values), generator=generator) % folds)[member]
    other = values[torch.randperm(len(values), generator=generator)][member]
    rank = _rank(values, periods)
    scaled = 2 * (a - a.min()) / (a.max() - a.min()) - 1
    chebyshev = torch.from_numpy(np.polynomial.chebyshev.chebvander(scaled.numpy(), rank))
    bases = {"helix": helix_basis(a, periods), "polynomial": chebyshev, "shuffled": helix_basis(other, periods)}
    found = {kind: torch.empty_like(x) for kind in (*FITS, "mean")}
    for fold in part.unique():
        test, train = part == fold, part != fold
        mean = x[train].mean(0)
        _, size, directions = torch.linalg.svd(x[train] - mean, full_matrices=False)
        directions = directions[size > 1e-9 * size.max()][:components]
        scores = (x[train] - mean) @ directions.T
        for kind, basis in bases.items():
            basis = basis.to(x.device)
            weights = torch.linalg.pinv(basis[train], rtol=1e-9) @ scores  # a wave that is 0 is 0 to rounding
            found[kind][test] = mean + basis[test] @ weights @ directions
        few = directions[:rank]
        found["components"][test] = mean + (x[test] - mean) @ few.T @ few
        found["mean"][test] = mean
    return found


def _r2(x: Tensor, made: dict[str, Tensor], kind: str) -> float:
    """1 minus the squared error of a fit in that of the mean."""
    rest = (x - made["mean"]).square().sum()
    return float(1 - (x - made[kind]).square().sum() / rest.clamp(min=1e-300))
