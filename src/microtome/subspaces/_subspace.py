"""A subspace of a site: an orthonormal basis, whose part of the activation another run can give."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.anatomy import ALL, Address, Site, parse
from microtome.edit import Patch, Source, unshared
from microtome.errors import ArgumentError, DataError, SiteError, error
from microtome.files import atomic
from microtome.model import Model
from microtome.shown import in_notebooks
from microtome.subspaces._dictionary import Dictionary

TOLERANCE = 1e-6
SHOWN = 12
"""Attributes that are shown."""


@in_notebooks
@dataclass(frozen=True, eq=False)
class Subspace:
    """A subspace of what a site holds at one position, by an orthonormal basis.

    Attributes:
        site: address of the site in one layer, such as "12.resid_post"; of sites with heads with one of them,
            "12.attn.z[3]".
        basis: [rank, d] orthonormal rows, float64; rank 0 is the zero space.
        method: how it was found.
        model: name of the model that it is of.
        fingerprint: of that model's weights.
        attrs: how it was found, as plain values.
        codes: features of a dictionary with an encoder, whose codes are swapped in place of the projection on the
            basis, which is then the span of their directions.

    Raises:
        ArgumentError: the basis is not orthonormal to 1e-6.
    """

    site: str
    basis: Float[Tensor, "rank d"]
    method: str
    model: str
    fingerprint: str
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    codes: Dictionary | None = None

    def __post_init__(self) -> None:
        basis = self.basis.detach().double().cpu()
        eye = torch.eye(len(basis), dtype=torch.float64)
        gap = float((basis @ basis.T - eye).abs().max()) if len(basis) else 0.0
        if not gap <= TOLERANCE:
            raise error(
                ArgumentError, "the basis of a subspace is not orthonormal", got=f"|Q Qᵀ - 1| up to {gap:.2g}",
                allowed=f"{TOLERANCE:g}", do="make one with Subspace.of, which takes any vectors",
            )  # fmt: skip
        object.__setattr__(self, "basis", basis)

    @classmethod
    def of(cls, model: Model, site: str, vectors: Tensor, method: str = "given", **attrs: Any) -> Subspace:
        """The span of vectors [n, d] or [d], which need be neither orthonormal nor independent.

        Raises:
            SiteError: the site is not one place of one layer.
            ArgumentError: the vectors are not as wide as the site, or not finite.
        """
        rows = vectors.detach().double().cpu().reshape(-1, vectors.shape[-1])
        width = width_of(model, site)
        if rows.shape[-1] != width:
            got, do = f"vectors of {rows.shape[-1]}", "give vectors of the site's own width"
            raise error(ArgumentError, f"the vectors are not as wide as {site}", got=got, allowed=str(width), do=do)
        if not bool(rows.isfinite().all()):
            raise error(ArgumentError, "the vectors of a subspace are not finite", do="leave out what is NaN")
        if len(rows):
            eps = torch.finfo(vectors.dtype if vectors.is_floating_point() else rows.dtype).eps
            _, size, directions = torch.linalg.svd(rows, full_matrices=False)
            rows = directions[size > size.max() * eps * max(rows.shape)]
        known = model.provenance
        return cls(str(parse(site)), rows, method, known["model"], known["fingerprint"], attrs)

    @property
    def rank(self) -> int:
        """Its dimension."""
        return self.basis.shape[0]

    @property
    def width(self) -> int:
        """The dimension of the space that it lies in."""
        return self.basis.shape[1]

    def _facts(self) -> dict[str, str]:
        said = {"site": self.site, "rank": f"{self.rank} of {self.width}", "method": self.method, "model": self.model}
        plain = {name: str(value) for name, value in self.attrs.items() if isinstance(value, int | float | str)}
        return said | dict(list(plain.items())[:SHOWN])

    def __repr__(self) -> str:
        return f"Subspace({self.method}: {self.rank} of {self.width} dimensions of {self.site}, {self.model})"

    def part(self, x: Float[Tensor, "*at d"]) -> Float[Tensor, "*at d"]:
        """What of x lies in it: x Qᵀ Q for the basis Q."""
        q = self.basis.to(device=x.device, dtype=x.dtype)
        return (x @ q.T) @ q

    def moved(self, base: Float[Tensor, "*at d"], source: Float[Tensor, "*at d"]) -> Float[Tensor, "*at d"]:
        """What is added to the base where the source's part replaces its own: (source - base) Qᵀ Q, or of its codes."""
        return self.part(source - base) if self.codes is None else self.codes.moved(base, source)

    def overlap(self, other: Subspace) -> float:
        """The mean squared cosine of the principal angles with another subspace: 1 where one lies in the other.

        Raises:
            ArgumentError: they lie in spaces of different widths, or one has no dimension.
        """
        if self.width != other.width or not self.rank or not other.rank:
            got = f"{self.rank} of {self.width} and {other.rank} of {other.width}"
            raise error(ArgumentError, "these subspaces cannot be compared", got=got, do="take two of one site")
        return float((self.basis @ other.basis.T).square().sum() / min(self.rank, other.rank))

    def require(self, model: Model) -> None:
        """Refuse a model that it is not of.

        Raises:
            ArgumentError: the weights are others.
        """
        known = model.provenance
        if known["fingerprint"] != self.fingerprint:
            raise error(
                ArgumentError, f"the subspace of {self.site} is of another model",
                got=f"{self.model} ({self.fingerprint})", allowed=f"{known['model']} ({known['fingerprint']})",
                do="find one in this model",
            )  # fmt: skip

    def patch(
        self, source: Source | Mapping[str, Tensor], positions: str = "", rows: tuple[int, ...] | None = None
    ) -> Patch:
        """The edit that takes this part of the activation from another run: x + (source - x) Qᵀ Q.

        Args:
            source: a run of the same model that captured the whole site, or a mapping from the site to its values.
            positions: where, as in an address: "@-1", "@3-5"; everywhere by default.
            rows: of the batch; all by default.

        Raises:
            ArgumentError: the run is of another model, or what is swapped are codes, which are no projection.
        """
        if self.codes is not None:
            what, do = f"codes of {self.site} are swapped by no patch", "use moved(base, source), or no encoder"
            raise error(ArgumentError, what, got=repr(self.codes), allowed="a projection", do=do)
        own = getattr(source, "provenance", {}).get("fingerprint", self.fingerprint)
        if own != self.fingerprint:
            raise error(
                ArgumentError, f"the source is a run of another model than the subspace of {self.site}", got=own,
                allowed=f"{self.model} ({self.fingerprint})", do="run the source in the model that it was found in",
            )  # fmt: skip
        # The zero space is the span of a vector of zeros.
        basis = self.basis if self.rank else self.basis.new_zeros(1, self.width)
        return Patch(f"{self.site}{positions}", source=source, basis=basis, rows=rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file: the basis and what reads codes, with the rest as JSON in its metadata.

        Raises:
            OutputError: the file cannot be written.
        """
        said = {n: getattr(self, n) for n in ("site", "method", "model", "fingerprint")} | {"attrs": dict(self.attrs)}
        held = {"basis": self.basis}
        if self.codes is not None:
            held |= {f"codes.{name}": x for name, x in self.codes.tensors().items()}
            said["codes"] = {"k": self.codes.k, "features": self.codes.features}
        with atomic(path, "the subspace to") as partial:
            save_file(unshared(held), partial, metadata={"subspace": json.dumps(said)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model | None = None) -> Subspace:
        """Read one that `save` wrote.

        Args:
            path: of the file.
            model: to use it with, which must be the one that it is of.

        Raises:
            DataError: the file is missing, damaged, or holds no subspace.
            ArgumentError: it is of another model than the one given.
        """
        try:
            with safe_open(str(path), "pt") as file:
                said = (file.metadata() or {}).get("subspace")
                if said is None:
                    raise ValueError("a file without a subspace")
                plain = json.loads(said)
                if "codes" in plain:
                    names = [name for name in list(file.keys()) if name.startswith("codes.")]
                    tensors = {name.removeprefix("codes."): file.get_tensor(name) for name in names}
                    features = tuple(plain["codes"]["features"])
                    plain["codes"] = Dictionary(**tensors, k=plain["codes"]["k"], features=features)
                found = cls(basis=file.get_tensor("basis"), **plain)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as problem:
            raise error(
                DataError, f"cannot read a subspace from {path}", got=str(problem), do="save it again"
            ) from problem
        if model is not None:
            found.require(model)
        return found


def site_of(model: Model, site: str) -> Site:
    """The one site that an address names, in one layer and without positions.

    Raises:
        SiteError: it names several sites or units, or positions, or what has no vector at a position.
    """
    address = parse(site)
    dims = address.spec.dims
    if len(dims) < 3 or dims[1] != "pos" or "rank" in dims:
        do = "name a site of the stream, of a branch, of neurons, or of one head"
        raise error(SiteError, f'"{site}" has no vector at a position', got=", ".join(dims), do=do)
    found = model.anatomy.sites(address)
    if len(found) != 1 or address.positions != ALL:
        do = 'name one site of one layer, such as "12.resid_post"'
        raise error(SiteError, f'"{site}" is not one place of one layer', allowed="no * and no positions", do=do)
    if len(dims) == 4 and not _one_unit(address, model.anatomy.units(found[0])):
        do = f'name one {dims[2]}, such as "{found[0]}[0]"'
        raise error(SiteError, f'"{site}" has several vectors at a position', got=", ".join(dims), do=do)
    if len(dims) == 3 and not address.units.is_all:
        do = f'write "{found[0]}", and give a basis of some coordinates'
        raise error(SiteError, f'"{site}" is a part of a vector', got=f"[{address.units}]", do=do)
    return found[0]


def _one_unit(address: Address, size: int) -> bool:
    chosen = address.units.resolve(size)
    return chosen is not None and len(chosen) == 1


def width_of(model: Model, site: str) -> int:
    """How wide the vectors of a site are.

    Raises:
        SiteError: it has no one vector at a position.
    """
    return model.anatomy.size(site_of(model, site), parse(site).spec.dims[-1])
