"""How alike the layers of a model see a text, and into which stages of depth they fall.

Formula:  K the Gram matrix x_i . x_j of a layer's stream at the n tokens of a row but the first;  K' = K U-centred: its
          diagonal 0, less row sums / (n - 2) and column sums / (n - 2), plus the sum of all / ((n - 1)(n - 2));
          hsic(k, l) = mean over rows of sum_ij K'_k,ij K'_l,ij / (n (n - 3)), an unbiased |cov(x_k, x_l)|^2;
          cka = hsic(k, l) / sqrt(hsic(k, k) hsic(l, l)), in -1..1: linear CKA, row by row;
          control: the same with the tokens of layer l in another order, which is 0 but for chance;
          stage: the layers cut into so many runs of neighbours that the sum over runs of (1 - cka), over all pairs in a
          run, divided by its length, is smallest.
          Nothing grows with the text but L^2 numbers a row; the same in any orthonormal basis of either layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import ExampleMeans

LEAST = 4
"""Tokens of a row below which there is no unbiased estimate."""


@measure(
    "layer_similarity",
    of="layer",
    on=Text(sequences=16, width=128),
    atlas=False,
    title="similarity of layers",
    question="Which layers see a text alike, and into which stages of depth do they fall?",
    columns=(
        Column(
            "cka", "1", "linear CKA of the stream after the layer with that after each layer", "cka_shuffled", (-1, 1),
            extra=("other",), interval=False,
        ),
        Column(
            "cka_shuffled", "1", "the same with the other layer's tokens in another order", range=(-1, 1),
            extra=("other",), interval=False, drawn=False,
        ),
        Column("stage", "index", "stage of depth that the layer is in, from 0", "none: an index", interval=False),
    ),
    source=(
        Source(
            "Kornblith et al.", "Similarity of Neural Network Representations Revisited", 2019, "1905.00414",
            "section 3", departs="the unbiased estimate, row by row; each row's first token is left out",
        ),
        Source(
            "Nguyen, Raghu and Kornblith", "Do Wide and Deep Networks Learn the Same Things? Uncovering How Neural "
            "Network Representations Vary with Width and Depth", 2021, "2010.15327", "section 3, minibatch CKA",
        ),
        Source(
            "Lin et al.", "Multi-Layer Visual Feature Fusion in Multimodal LLMs: Methods, Analysis, and Best Practices",
            2025, "2503.06063", "stages by similarity of layers", departs="stages are runs of neighbours, as many as "
            "are asked for",
        ),
    ),
    cost="one forward over the first sequences of the text; a Gram matrix per row and layer",
    check="tests/laws/test_similarity.py",
)  # fmt: skip
class LayerSimilarity(Statistic):
    """Linear CKA between the streams after all layers, and stages of depth."""

    def __init__(
        self, stages: Annotated[int, Argument("into how many stages of depth to cut the layers", "stages", least=1)] = 3
    ) -> None:
        """Cut into so many."""
        self.stages = stages

    def start(self, model: Model, layer: int | None) -> Kept:
        """Products of all pairs of layers, row by row."""
        layers = model.anatomy.n_layers
        return {name: ExampleMeans((layers, layers)) for name in ("hsic", "hsic_shuffled")}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch, run without logits."""
        later = seen.later
        rows: list[list[Tensor]] = [[] for _ in range(len(later))]

        def see(site: Site, x: Tensor) -> None:
            for row, mask in enumerate(later):
                if int(mask.sum()) >= LEAST:
                    rows[row].append(centred_gram(x[row][mask.to(x.device)]))

        seen.model.run(seen.tokens, observe={"*.resid_post": see}, logits=False)
        generator = torch.Generator().manual_seed(current().seed)
        for row, grams in enumerate(rows):
            if grams:
                k = torch.stack(grams)
                order = torch.randperm(k.shape[1], generator=generator).to(k.device)
                for name, other in (("hsic", k), ("hsic_shuffled", k[:, order][:, :, order])):
                    kept[name].update(hsic(k, other).unsqueeze(0), seen.examples[row : row + 1])

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """CKA of all pairs, and the stage of each layer.

        Raises:
            DataError: no row is long enough.
        """
        if not kept["hsic"].examples:
            what = f"the similarity of layers needs rows with {LEAST} tokens behind their first"
            raise error(DataError, what, do="give longer texts")
        products = kept["hsic"].mean
        size = products.diagonal().clamp(min=0).sqrt()
        scale = torch.outer(size, size)
        cka = (products / scale).clamp(-1, 1)
        shuffled = (kept["hsic_shuffled"].mean / scale).clamp(-1, 1)
        return {"cka": cka, "cka_shuffled": shuffled, "stage": depth_stages(cka, min(self.stages, len(cka)))}


def centred_gram(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """The U-centred Gram matrix [n, n] of vectors x [n, d], in float64; n is 4 or more."""
    x = at_least_float32(x).double()
    x = x - x.mean(0)  # changes nothing, and keeps digits where the mean is large
    n = len(x)
    k = (x @ x.T).fill_diagonal_(0.0)
    rows = k.sum(0) / (n - 2)
    k = k - rows.unsqueeze(0) - rows.unsqueeze(1) + k.sum() / ((n - 1) * (n - 2))
    return k.fill_diagonal_(0.0)


def hsic(k: Float[Tensor, "x n n"], other: Float[Tensor, "y n n"]) -> Float[Tensor, "x y"]:
    """Sums of products [x, y] of U-centred Gram matrices [x, n, n] and [y, n, n], over n (n - 3)."""
    n = k.shape[-1]
    return k.flatten(1) @ other.flatten(1).T / (n * (n - 3))


def depth_stages(
    similarity: Float[Tensor, "layer layer"] | Sequence[Sequence[float]], stages: int
) -> Int[Tensor, " n"]:
    """[layer] The stage of each layer, from 0: the layers cut into runs of neighbours that are alike.

    Formula:  runs minimise sum over runs of 1 / length * sum over pairs of the run of (1 - similarity); by dynamic
              programming, exact; of equal cuts the one with the earliest borders.
    Cost:     stages x layers^2 operations.
    Check:    the blocks of a map of blocks are found; tests/laws/test_similarity.py.

    Raises:
        ArgumentError: there are more stages than layers, or fewer than 1.
    """
    far = 1 - torch.as_tensor(similarity).double().nan_to_num(0.0)
    n = len(far)
    if not 1 <= stages <= n:
        raise error(ArgumentError, "stages must be from 1 to the number of layers", got=stages, allowed=f"1 to {n}")
    total = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    total[1:, 1:] = far.cpu().cumsum(0).cumsum(1)

    def cost(i: int, j: int) -> float:
        """Of the run i .. j - 1."""
        return float(total[j, j] - total[i, j] - total[j, i] + total[i, i]) / (j - i)

    best: list[tuple[float, list[int]]] = [(cost(0, j), [0]) if j else (0.0, []) for j in range(n + 1)]
    for _ in range(1, stages):
        better: list[tuple[float, list[int]]] = [(torch.inf, [])] * (n + 1)
        for j in range(1, n + 1):
            for i in range(1, j):
                value = best[i][0] + cost(i, j)
                if best[i][1] and value < better[j][0] - 1e-12:
                    better[j] = (value, [*best[i][1], i])
        best = better
    found = torch.zeros(n, dtype=torch.int64)
    for border in best[n][1][1:]:
        found[border:] += 1
    return found
