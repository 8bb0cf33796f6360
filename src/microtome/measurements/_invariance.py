"""Whether a layer tells texts apart by what is left of them when tokens are dropped.

Formula:  of each row two views: its first token, and of the others a share 1 - drop, drawn at random, in their order;
          z_i, z'_i the means of resid_post over the tokens of either view of row i but the first, less the mean of all;
          infonce = ln N + mean over i of ln (exp(s_ii) / sum_j exp(s_ij)), s_ij = cos(z_i, z'_j) / temperature, of
          both directions the mean: a lower bound of what one view says of the other, in nats, at most ln N;
          lidar = exp(entropy of the eigenvalues of W^(-1/2) B W^(-1/2)), W the covariance of the views of a row about
          their mean, plus delta times its mean eigenvalue, B that of the means of rows: how many directions tell rows
          apart beyond what dropping changes; at most N - 1;
          dime = mean over orders p of S(K o K'_p) - S(K o K'), S the entropy of the eigenvalues over their sum, K and
          K' the matrices exp(-|z_i - z_j|^2 / (2 w^2)) of either view, o the product entry by entry, K'_p the second
          with its rows and columns in order p, w^2 the median of |z_i - z_j|^2 over rows of either view: how much of
          which rows are near each other the views share, in nats; 0 of a view that says nothing;
          controls: the same with the second view taken from the next row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.measurements._geometry import entropy
from microtome.method import Argument, Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import ExampleMeans

TEMPERATURE = 0.1
DELTA = 1e-4
ORDERS = 8
"""In how many orders dime takes the second view."""
VIEWS = ("one", "other")


@measure(
    "invariance",
    of="layer",
    on=Text(sequences=32, width=128),
    atlas="full",
    title="texts told apart with tokens dropped",
    question="Does a layer tell a text from others when some of its tokens are dropped?",
    columns=(
        Column(
            "infonce", "nats", "lower bound of what the mean of a row with tokens dropped says of the row",
            "infonce_unpaired", interval=False,
        ),
        Column("infonce_unpaired", "nats", "the same of views of different rows", interval=False),
        Column(
            "lidar", "dimensions", "directions that tell rows apart beyond what dropping tokens changes",
            "lidar_unpaired", (0, None), interval=False,
        ),
        Column(
            "lidar_unpaired", "dimensions", "the same of views of different rows", range=(0, None), interval=False,
        ),
        Column(
            "dime", "nats", "how much of which rows are near each other two views share: the entropy of both with one "
            "in another order, less that of both in theirs", "dime_unpaired", interval=False,
        ),
        Column("dime_unpaired", "nats", "the same of views of different rows", interval=False),
    ),
    source=(
        Source(
            "Skean et al.", "Layer by Layer: Uncovering Hidden Representations in Language Models", 2025, "2502.02013",
            "section 3, augmentation invariance", departs="tokens are dropped, at 0.15; 32 rows",
        ),
        Source(
            "Thilak et al.", "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures", 2023,
            "2312.04000", departs="two views; the ridge is relative to the mean eigenvalue",
        ),
        Source(
            "Skean et al.", "DiME: Maximizing Mutual Information by a Difference of Matrix-Based Entropies", 2023,
            "2301.08164", departs="Gaussian kernels as wide as the median distance of two rows; 8 orders",
        ),
    ),
    cost="two forwards over the first sequences of the text, without logits; 16 d_model bytes per row and layer",
    check="tests/laws/test_geometry.py",
)  # fmt: skip
class Invariance(Statistic):
    """How well rows are told apart by means over their tokens, of which some were dropped, layer by layer."""

    def __init__(
        self,
        drop: Annotated[float, Argument("share of a row's tokens that a view drops", "share", 0, 0.9)] = 0.15,
        temperature: Annotated[float, Argument("by which cosines are divided", "1", 1e-3, 100)] = TEMPERATURE,
    ) -> None:
        """Drop this share, and divide cosines by this."""
        self.drop, self.temperature = drop, temperature

    def start(self, model: Model, layer: int | None) -> Kept:
        """The mean of every row in every layer, of both views."""
        a = model.anatomy
        return {view: ExampleMeans((a.n_layers, a.size(Site("resid_post", 0), "d_model"))) for view in VIEWS}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in one batch, as two views that are run without logits."""
        there = torch.ones(len(seen.examples), dtype=torch.bool) if seen.mask is None else seen.mask.any(1)
        for number, view in enumerate(VIEWS):
            places = kept_tokens(seen.tokens.shape, seen.examples, self.drop, current().seed + number * 2**20)
            tokens = seen.tokens.gather(1, places.to(seen.tokens.device))
            rows: list[Tensor] = []

            def see(site: Site, x: Tensor, rows: list[Tensor] = rows) -> None:
                rows.append(at_least_float32(x)[:, 1:].double().mean(1))

            seen.model.run(tokens, observe={"*.resid_post": see}, logits=False)
            kept[view].update(torch.stack(rows, dim=1), seen.examples, there)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """All numbers of every layer, and their controls."""
        one, other = (kept[view].result().total.transpose(0, 1) for view in VIEWS)  # [layer, row, d_model]
        found: dict[str, list[Tensor]] = {}
        for a, b in zip(one, other, strict=True):
            for end, second in (("", b), ("_unpaired", b.roll(1, 0))):
                found.setdefault(f"infonce{end}", []).append(info_nce(a, second, self.temperature))
                found.setdefault(f"lidar{end}", []).append(lidar(a, second))
                found.setdefault(f"dime{end}", []).append(dime(a, second, seed=current().seed))
        return {name: torch.stack(values) for name, values in found.items()}


def kept_tokens(shape: torch.Size, examples: Int[Tensor, " row"], drop: float, seed: int) -> Int[Tensor, "row kept"]:
    """[row, kept] The places that a view keeps, rising: the first and a share of the others, by row and seed alone."""
    rows, width = shape
    n = max(1, round((width - 1) * (1 - drop)))
    places = torch.zeros(rows, n + 1, dtype=torch.int64)
    for row, example in enumerate(examples.tolist()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + example)
        places[row, 1:] = 1 + torch.randperm(width - 1, generator=generator)[:n].sort().values
    return places


def info_nce(
    x: Float[Tensor, "row d"], y: Float[Tensor, "row d"], temperature: float = TEMPERATURE
) -> Float[Tensor, ""]:
    """The InfoNCE bound, in nats, of two views [row, d] of the same rows; see this file's head."""
    centre = torch.cat([x, y]).mean(0)
    a, b = (torch.nn.functional.normalize(v - centre, dim=1) for v in (x, y))
    scores = a @ b.T / temperature
    own = scores.diagonal()
    away = [(own - scores.logsumexp(dim)).mean() for dim in (0, 1)]
    return torch.log(torch.tensor(float(len(x)), dtype=x.dtype, device=x.device)) + sum(away) / 2


def lidar(x: Float[Tensor, "row d"], y: Float[Tensor, "row d"], delta: float = DELTA) -> Float[Tensor, ""]:
    """The LiDAR rank of two views [row, d] of the same rows; see this file's head."""
    both = torch.stack([x, y], dim=1)
    means = both.mean(1)
    between = means - means.mean(0)
    within = (both - means.unsqueeze(1)).flatten(0, 1)
    _, _, basis = torch.linalg.svd(torch.cat([between, within]), full_matrices=False)  # what lies outside is 0
    b, w = between @ basis.T, within @ basis.T
    inner = w.T @ w / len(w)
    inner = inner + torch.eye(len(inner), dtype=x.dtype, device=x.device) * inner.trace() / len(inner) * delta
    values, vectors = torch.linalg.eigh(inner)
    whitened = b @ (vectors / values.clamp(min=1e-30).sqrt())
    return entropy(torch.linalg.svdvals(whitened).square()).exp()


def dime(
    x: Float[Tensor, "row d"], y: Float[Tensor, "row e"], width: float | None = None, *, seed: int = 0
) -> Float[Tensor, ""]:
    """The difference of matrix-based entropies of two views [row, d] of the same rows; see this file's head.

    The width of the kernels is that of the median distance unless it is given.
    """
    near = [torch.cdist(v, v).square() for v in (x, y)]
    if width is None:
        apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        width = float(torch.stack([d[apart] for d in near]).median().sqrt())
    one, other = (torch.exp(-d / (2 * max(width, 1e-30) ** 2)) for d in near)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(x), generator=generator).to(x.device) for _ in range(ORDERS)]
    mixed = torch.stack([entropy(torch.linalg.eigvalsh(one * other[p][:, p])) for p in drawn]).mean()
    return mixed - entropy(torch.linalg.eigvalsh(one * other))
