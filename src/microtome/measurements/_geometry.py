"""The shape of the stream: how many directions a text takes in it, how it bends, and how far it points one way.

Formula:  X the stream after a layer at the T tokens of a row but the first, u_t = x_t / |x_t|;
          p_i = eigenvalues of X X^T over their sum;  prompt_entropy = -sum p_i ln p_i (the matrix-based von Neumann
          entropy), of alpha other than 1 Renyi's, ln(sum p_i^alpha) / (1 - alpha);
          prompt_rank = exp(prompt_entropy);  top_component = max p_i;
          curvature = mean over t of the angle between x_(t+1) - x_t and x_(t+2) - x_(t+1);
          row_similarity = mean over t of cos(x_t, mean of the row's u);
          self_similarity = mean cosine of tokens of a row that are the same token;
          rank_one_residual = |X - 1 mean(X)| / |X|, Frobenius norms;
          step_length = |x - x before the layer| / |x before|;
          anisotropy = mean cosine of any two tokens of the text = (|sum u|^2 - N) / (N (N - 1));
          text_entropy = the entropy of the means of the rows, in place of tokens;
          unit_correlation = mean over dimensions of the correlation, over tokens, of a dimension before and after the
          layer; unit_correlation_rotated, its control, in 64 directions of a basis drawn at random.
          Each of the first four, and of rank_one_residual, is there three times: of all tokens but the first; `_first`,
          with the first; `_even`, without the first and without the 3 dimensions whose entries are largest in the row.
          All but unit_correlation and `_even` are the same in any orthonormal basis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.errors import DataError, error
from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import ExampleMeans, Moments

LARGEST = 3
DIRECTIONS = 64
"""How many directions of the random basis are looked at."""
FIRST = "the same with the first token of each row"
EVEN = "the same without the dimensions whose entries are largest in a row"
ENTROPY = "Entropy of a row"
POINTS = "How far the stream points one way"


def _thrice(name: str, unit: str, meaning: str, limits: tuple[float | None, float | None], chart: str) -> list[Column]:
    """A column of the tokens without the first, beside those with it and without the largest dimensions."""
    return [
        Column(name, unit, meaning, f"{name}_first", limits, title="without first tokens", chart=chart),
        Column(f"{name}_first", unit, FIRST, f"{name}_even", limits, title="with them", chart=chart),
        Column(f"{name}_even", unit, EVEN, range=limits, title="without the largest dimensions", chart=chart),
    ]


@measure(
    "geometry",
    of="layer",
    on=Text(sequences=16, width=128),
    sites=("resid_pre", "resid_post"),
    title="geometry of the stream",
    question="How many directions do the tokens of a text take after each layer, and how far do they point one way?",
    columns=(
        *_thrice("prompt_entropy", "nats", "entropy of the eigenvalues of a row's Gram matrix", (0, None), ENTROPY),
        *_thrice("prompt_rank", "dimensions", "exponential of the entropy", (1, None), "Effective rank of a row"),
        *_thrice("top_component", "share", "share of the largest eigenvalue", (0, 1), "Share of the first component"),
        *_thrice("curvature", "radians", "mean angle between successive steps of a row", (0, math.pi), "Curvature"),
        *_thrice("rank_one_residual", "ratio", "norm of a row's tokens less their mean, over their norm", (0, 1),
                 "Residual of a row beside its mean"),
        Column("row_similarity", "cosine", "mean cosine of a token with the mean direction of its row", "anisotropy",
               (-1, 1), title="with the row", chart=POINTS),
        Column("self_similarity", "cosine", "mean cosine of the same token at two places of a row", "anisotropy",
               (-1, 1), title="with itself elsewhere", chart=POINTS),
        Column("anisotropy", "cosine", "mean cosine of any two tokens of the text", "none: what the others are above",
               (-1, 1), interval=False, title="any two tokens", chart=POINTS),
        Column("text_entropy", "nats", "entropy of the eigenvalues of the Gram matrix of the means of rows",
               "none: compare other layers; at most ln of the number of rows", (0, None), interval=False),
        Column("step_length", "ratio", "norm of what the layer adds, over that of what it reads",
               "none: a size, to compare with other layers", (0, None)),
        Column("unit_correlation", "correlation", "of a dimension before and after the layer, mean over dimensions",
               "unit_correlation_rotated", (-1, 1), interval=False),
        Column("unit_correlation_rotated", "correlation", "the same in a random orthonormal basis", range=(-1, 1),
               interval=False),
    ),
    source=(
        Source("Skean et al.", "Layer by Layer: Uncovering Hidden Representations in Language Models", 2025,
               "2502.02013", "section 3", departs="first tokens and the largest dimensions in and out"),
        Source("Ethayarajh", "How Contextual are Contextualized Word Representations? Comparing the Geometry of BERT, "
               "ELMo, and GPT-2 Embeddings", 2019, "1909.00512", "section 3",
               departs="self-similarity is of the same token in one row, so that nothing is kept by word"),
        Source("Fernando and Guitchounts", "Transformer Dynamics: A neuroscientific approach to interpretability of "
               "large language models", 2025, "2502.12131", departs="the basis drawn at random is the control"),
        Source("Dong, Cordonnier and Loukas", "Attention is Not All You Need: Pure Attention Loses Rank Doubly "
               "Exponentially with Depth", 2021, "2103.03404", "section 2",
               departs="Frobenius norms; the mean of the tokens is the best approximation in them"),
    ),
    cost="three Gram matrices with their eigenvalues per row and layer, and d_model^2 operations per token",
    check="tests/laws/test_geometry.py",
)  # fmt: skip
class Geometry(Statistic):
    """Entropy, effective rank, curvature, similarity and residual of the stream after each layer, and its continuity.

    A row needs three tokens behind its first: rows with fewer count nothing.
    """

    def __init__(
        self,
        alpha: Annotated[float, Argument("order of the entropy; 1 is von Neumann's", "1", 0.01, 100)] = 1.0,
        largest: Annotated[
            int, Argument("how many of a row's largest dimensions `_even` leaves out", "dimensions", 0)
        ] = LARGEST,
    ) -> None:
        """Use this order, and leave out so many dimensions."""
        self.alpha, self.largest = alpha, largest
        self._turned: dict[int, Tensor] = {}

    def start(self, model: Model, layer: int | None) -> Kept:
        """Means by row; moments of directions, of dimensions in both bases, and of means of rows."""
        size = model.anatomy.size(Site("resid_post", layer), "d_model")
        names = ("before", "after", "both")
        bases = {name: Moments(size) for name in names}
        bases |= {f"{name}_rotated": Moments(min(size, DIRECTIONS)) for name in names}
        return {"directions": Moments(size), "rows": ExampleMeans(size), **bases}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch, row by row."""
        pre, post = (at_least_float32(seen[name]).double() for name in ("resid_pre", "resid_post"))
        later = seen.later
        some = later.sum(1) >= 3
        later = later & some.unsqueeze(1)
        step = (post - pre).norm(dim=-1) / pre.norm(dim=-1).clamp(min=1e-30)
        _means(kept, "step_length").update(step.unsqueeze(-1), seen.examples, later)
        kept["rows"].update(post, seen.examples, later)
        kept["directions"].update(_unit(post), later)
        for basis, turn in (("", None), ("_rotated", self._basis(post))):
            a, b = (x if turn is None else x @ turn for x in (pre, post))
            for name, x in (("before", a), ("after", b), ("both", a + b)):
                kept[name + basis].update(x, later)
        by_row: dict[str, list[Tensor]] = {}
        for row in some.nonzero().squeeze(1).tolist():
            mask = later[row].to(post.device)
            for name, value in self._of_row(post[row], mask, seen.tokens[row]).items():
                by_row.setdefault(name, []).append(value)
        for name, values in by_row.items():
            there = torch.stack(values)
            known = there.isfinite()
            _means(kept, name).update(there.nan_to_num(0.0).unsqueeze(-1), seen.examples[some], known)

    def _basis(self, like: Tensor) -> Float[Tensor, "d direction"]:
        """Orthonormal directions drawn by the seed of the settings."""
        size = like.shape[-1]
        if size not in self._turned:
            generator = torch.Generator().manual_seed(current().seed)
            drawn = torch.randn(size, min(size, DIRECTIONS), generator=generator, dtype=torch.float64)
            self._turned[size] = torch.linalg.qr(drawn)[0]
        return self._turned[size].to(like.device)

    def _of_row(self, x: Float[Tensor, "pos d"], mask: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The numbers of one row, of which `mask` says what counts."""
        own = x[mask]
        first = torch.cat([x[:1], own])  # what stands before the text is its first token
        n = min(self.largest, x.shape[1] - 1)
        largest = first.abs().amax(0).topk(n).indices
        even = own.clone()
        even[:, largest] = 0.0
        grams: list[Tensor | None] = [None, None, None]
        if len(first) <= x.shape[1]:  # one product serves all three: the others are parts of it
            whole = first @ first.T
            grams = [whole[1:, 1:], whole, whole[1:, 1:] - own[:, largest] @ own[:, largest].T]
        found: dict[str, Tensor] = {}
        for end, part, gram in zip(("", "_first", "_even"), (own, first, even), grams, strict=True):
            found |= {name + end: value for name, value in shape_of(part, self.alpha, gram).items()}
        u = _unit(own)
        found["row_similarity"] = (u @ _unit(u.mean(0))).mean()
        alike = tokens[mask.to(tokens.device)]
        same = (alike.unsqueeze(0) == alike.unsqueeze(1)).fill_diagonal_(False).to(u.device)
        found["self_similarity"] = (u @ u.T)[same].mean()  # NaN in a row without repeated tokens
        return found

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The means by row, and what is made of the moments.

        Raises:
            DataError: no row is long enough.
        """
        found = {name: x.mean[0] for name, x in kept.items() if isinstance(x, ExampleMeans) and name != "rows"}
        if not kept["directions"].count:
            what = "the geometry of a stream needs rows with three tokens behind their first"
            raise error(DataError, what, do="give longer texts")
        directions = kept["directions"].result()
        n = directions.count
        found["anisotropy"] = (n * directions.mean.square().sum() - 1) / (n - 1)
        rows = kept["rows"].result().each
        found["text_entropy"] = entropy(torch.linalg.eigvalsh(rows @ rows.T), self.alpha)
        for basis in ("", "_rotated"):
            before, after, both = (kept[name + basis].result().variance for name in ("before", "after", "both"))
            correlation = (both - before - after) / 2 / (before * after).sqrt()
            found[f"unit_correlation{basis}"] = correlation.nanmean().clamp(-1, 1)
        return found


def _means(kept: Kept, name: str) -> ExampleMeans:
    return kept.setdefault(name, ExampleMeans(1))


def _unit(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)


def shape_of(
    x: Float[Tensor, "pos d"], alpha: float = 1.0, gram: Float[Tensor, "n n"] | None = None
) -> dict[str, Float[Tensor, ""]]:
    """Entropy, effective rank, first component, curvature and residual of vectors [pos, d] in their order.

    Their Gram matrix is computed where it is not given.
    """
    if gram is None:  # either has the same eigenvalues but for zeros
        gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    bits = entropy(values, alpha)
    steps = _unit(x[1:] - x[:-1])
    angle = (steps[1:] * steps[:-1]).sum(-1).clamp(-1, 1).arccos()
    size = x.norm().clamp(min=1e-30)
    return {
        "prompt_entropy": bits, "prompt_rank": bits.exp(), "curvature": angle.mean(),
        "top_component": values.max() / values.sum().clamp(min=1e-60),
        "rank_one_residual": ((x - x.mean(0)).norm() / size).clamp(max=1),
    }  # fmt: skip


def entropy(values: Float[Tensor, " n"], alpha: float = 1.0) -> Float[Tensor, ""]:
    """The entropy, in nats, of eigenvalues that are divided by their sum: von Neumann's, or Renyi's of order alpha."""
    p = values.double().clamp(min=0)
    p = p / p.sum().clamp(min=1e-60)
    if alpha == 1:
        return torch.special.entr(p).sum().clamp(min=0)
    there = p > p.max() * len(p) * 1e-15  # rounding, which a small order would make much of
    return (p[there].pow(alpha).sum().log() / (1 - alpha)).clamp(min=0)
