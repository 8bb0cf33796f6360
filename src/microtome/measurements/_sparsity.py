"""How few neurons a token needs: sparsity of MLPs at a stated error, and of the stream's dimensions.

Formula:  m_n = |a_n| |w_n|, what neuron n adds, w_n a row of W_out;  y = sum_n a_n w_n;
          cett(t) = mean over tokens of |sum of a_n w_n over m_n <= t| / |y|,  active(t) = mean share of m_n > t,
          at t = 2^-12 .. 2^7; active_at(c) between these, along straight lines: the share of neurons at an error of c.
          Control of cett: as many neurons drawn at random, whose squared error is on average
          q^2 |y|^2 + q (1 - q) sum_n m_n^2, with q the share that is dropped.
          zeros = share of activations that are 0.
          stream_dims = the fewest dimensions of resid_post that hold 90 % of its sum of sizes, over d_model;
          stream_overlap = how many of them the token before has too, over how many either has; controls: the same
          after a random rotation of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.context import current
from microtome.method import Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import Moments

THRESHOLDS = 2.0 ** torch.arange(-12, 8, dtype=torch.float64)
BUDGETS = (0.01, 0.05, 0.1, 0.2, 0.4)
MASS = 0.9
LAW = Source(
    "Luo et al.", "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity", 2024, "2411.02335",
    "CETT and PPL-p%", departs="thresholds are powers of 2, with straight lines between",
)  # fmt: skip
LAZY = Source("Li et al.", "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers", 2022,
              "2210.06313", "exact zeros and the k largest")  # fmt: skip


def errors(
    post: Float[Tensor, "token neuron"], W_out: Float[Tensor, "neuron d_model"]
) -> tuple[Float[Tensor, "token threshold"], Float[Tensor, "token threshold"], Float[Tensor, "token threshold"]]:
    """What dropping the neurons that add at most each threshold costs, [token, threshold].

    Returns:
        The error, the error of dropping as many at random, and the share that is kept.
    """
    norms = W_out.norm(dim=1)
    size, whole = post.abs() * norms, post @ W_out
    y = whole.norm(dim=1).double().clamp(min=torch.finfo(torch.float32).tiny)
    squares = size.double().square().sum(1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in THRESHOLDS.tolist():
        small = size <= t
        kept = 1 - small.double().mean(1)
        drop = 1 - kept
        random = (drop.square() + drop * kept * squares / y.square()).sqrt()
        lost = torch.where(small, post, 0.0) @ W_out
        found.append((lost.norm(dim=1).double() / y, random, kept))
    a, b, c = (torch.stack(every, dim=1) for every in zip(*found, strict=True))
    return a, b, c


def at_budget(cett: Float[Tensor, " threshold"], active: Float[Tensor, " threshold"]) -> Float[Tensor, " budget"]:
    """[budget] The share of neurons at each error, along straight lines from (0, 1) through the thresholds."""
    x = np.concatenate([[0.0], np.maximum.accumulate(cett.numpy())])
    return torch.from_numpy(np.interp(BUDGETS, x, np.concatenate([[1.0], active.numpy()])))


def largest(x: Float[Tensor, "*at dim"]) -> Bool[Tensor, "*at dim"]:
    """The fewest dimensions that hold 90 % of the sum of the sizes of x [..., dim]."""
    size = x.abs().double()
    order = size.argsort(dim=-1, descending=True, stable=True)
    sums = size.gather(-1, order).cumsum(-1)
    before = sums - size.gather(-1, order)
    return torch.zeros_like(size, dtype=torch.bool).scatter(-1, order, before < MASS * sums[..., -1:])


def _curve(name: str, unit: str, meaning: str, control: str = "", dim: str = "threshold") -> Column:
    return Column(name, unit, meaning, control, (0, 1 if unit == "share" else None), extra=(dim,), interval=False)


def _dims(name: str, meaning: str) -> tuple[Column, Column]:
    return (
        Column(name, "share", meaning, f"{name}_rotated", (0, 1), interval=False),
        Column(f"{name}_rotated", "share", "the same after a random rotation of the stream", range=(0, 1),
               interval=False),
    )  # fmt: skip


@measure(
    "sparsity",
    of="layer",
    on=Text(sequences=8, width=128),
    sites=("mlp.post", "resid_post"),
    needs=("W_out",),
    atlas="full",
    title="sparsity of MLPs",
    question="How few neurons does each token need at a stated error of the MLP, and how few dimensions of the stream?",
    columns=(
        _curve("cett", "ratio", "mean error of the MLP's output without the neurons that add least, relative to it: "
               "those that add at most 2^-12 .. 2^7", "cett_random"),
        _curve("cett_random", "ratio", "the same without as many neurons drawn at random"),
        _curve("active", "share", "share of neurons that add more than each threshold",
               "none: compare at the same cett"),
        _curve("active_at", "share", "share of neurons kept at a cett of 0.01, 0.05, 0.1, 0.2 and 0.4",
               "none: 1 minus the budget where every neuron adds the same in the same direction", "budget"),
        Column("zeros", "share", "share of activations that are 0", "none: 0 but for activations with a flat part",
               (0, 1), interval=False),
        *_dims("stream_dims", "fewest dimensions that hold 90 % of the sum of sizes of the stream after the layer"),
        *_dims("stream_overlap", "dimensions that are among them at this token and at the one before, over those of "
               "either"),
    ),
    source=(
        LAW, LAZY,
        Source("Chen et al.", "Mixture of Hidden-Dimensions Transformer", 2024, "2412.05644",
               where="sparsity of dimensions", departs="90 % of a token's L1 norm; the control by rotation is ours"),
    ),
    cost="20 more output projections per layer over the first sequences: about 5 forwards",
    check="tests/laws/test_sparsity.py, tests/planted/test_neurons.py",
)  # fmt: skip
class Sparsity(Statistic):
    """Error and share of active neurons by threshold, exact zeros, and how many dimensions the stream uses."""

    def prepare(self, model: Model, layers: Sequence[int | None]) -> None:
        """The output weights; one random rotation is drawn when the stream is seen, which may have several lanes."""
        self._weights = {i: at_least_float32(model.layers[i or 0].W_out) for i in layers}
        self._turn = torch.empty(0, 0)
        self._seed = current().seed

    def start(self, model: Model, layer: int | None) -> Kept:
        """Means by threshold, and of the rest."""
        n = len(THRESHOLDS)
        kept: Kept = {name: Moments(n) for name in ("cett", "cett_random", "active")}
        rest = ("zeros", "stream_dims", "stream_dims_rotated", "stream_overlap", "stream_overlap_rotated")
        return kept | {name: Moments(1) for name in rest}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in the tokens that count; overlaps where the token before counts too."""
        post, stream = at_least_float32(seen["mlp.post"]), at_least_float32(seen["resid_post"])
        mask = torch.ones(post.shape[:2], dtype=torch.bool) if seen.mask is None else seen.mask
        if not bool(mask.any()):
            return
        some = post[mask.to(post.device)]
        for name, x in zip(("cett", "cett_random", "active"), errors(some, self._weights[seen.layer]), strict=True):
            kept[name].update(x)
        kept["zeros"].update((some == 0).double().mean(1, keepdim=True))
        if len(self._turn) != (d := stream.shape[-1]):
            rng = torch.Generator().manual_seed(self._seed)
            self._turn = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q
        for ending, x in (("", stream), ("_rotated", stream @ self._turn.to(stream))):
            used = largest(x)
            kept[f"stream_dims{ending}"].update(used.double().mean(-1, keepdim=True), mask)
            both, either = used[:, 1:] & used[:, :-1], used[:, 1:] | used[:, :-1]
            overlap = both.double().sum(-1, keepdim=True) / either.double().sum(-1, keepdim=True).clamp(min=1)
            kept[f"stream_overlap{ending}"].update(overlap, mask[:, 1:] & mask[:, :-1])

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """Curves by threshold, shares at the budgets, and the rest."""
        nothing = torch.full((1,), torch.nan, dtype=torch.float64)
        found = {name: held.result().mean if held.count else nothing for name, held in kept.items()}
        whole = {name: x if name in ("cett", "cett_random", "active") else x[0] for name, x in found.items()}
        return whole | {"active_at": at_budget(found["cett"], found["active"])}
