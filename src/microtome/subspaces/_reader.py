"""What of a site's space is read: the row space of the matrix behind it, and the null space that nothing reads."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import parse
from microtome.errors import SiteError, error
from microtome.model import Model
from microtome.subspaces._subspace import Subspace, site_of

READ = ("mlp.post", "attn.z")
"""Sites that one matrix alone reads: W_out, and W_O of the head."""


def has_reader(site: str) -> bool:
    """Whether one matrix alone reads a site."""
    return parse(site).name in READ


def reader(model: Model, site: str) -> Float[Tensor, "rank d"]:
    """An orthonormal basis of the row space of the matrix that reads a site: what of it reaches the stream.

    Raises:
        SiteError: several matrices, or none, read the site.
    """
    found = site_of(model, site)
    if found.name not in READ or found.layer is None:
        allowed, do = ", ".join(READ), 'name the neurons or a head of one layer, such as "12.mlp.post"'
        raise error(SiteError, f'"{site}" is not read by one matrix', got=found.name, allowed=allowed, do=do)
    weights = model.layers[found.layer]
    if found.name == "mlp.post":
        matrix = weights.W_out
    else:
        head = (parse(site).units.resolve(model.anatomy.units(found)) or [0])[0]
        matrix = weights.W_O[head]
    matrix = matrix.detach().double().cpu()
    if matrix.dim() != 2:
        raise error(SiteError, f'"{site}" is read by several matrices', got="experts", do="choose a dense layer")
    directions, size, _ = torch.linalg.svd(matrix, full_matrices=False)
    eps = float(torch.finfo(model.dtype).eps)  # the weights are known to no more digits
    return directions[:, size > size.max() * eps * max(matrix.shape)].T


def divided(subspace: Subspace, rows: Float[Tensor, "rank d"]) -> dict[str, Float[Tensor, "_ d"]]:
    """Orthonormal bases of the parts of a subspace: in a row space, given by an orthonormal basis, and outside it.

    They are the images of the subspace under the two projections; either may have fewer dimensions than it.
    """
    inside = (subspace.basis @ rows.T) @ rows
    return {"row": _spanned(inside), "null": _spanned(subspace.basis - inside)}


def _spanned(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "_ d"]:
    """An orthonormal basis of the span of parts of unit vectors; what is left of one by rounding counts as nothing."""
    if not len(vectors):
        return vectors
    _, size, directions = torch.linalg.svd(vectors, full_matrices=False)
    return directions[size > 1e-6]


def row_share(subspace: Subspace, rows: Float[Tensor, "rank d"]) -> float:
    """How much of a subspace lies in a row space: the mean squared length of its basis vectors' parts there."""
    return float((subspace.basis @ rows.T).square().sum() / max(subspace.rank, 1))
