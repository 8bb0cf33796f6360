"""The matrices of some branches, under masks, and as they were behind the block whatever happens in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microtome.anatomy import Site, adapters, is_plain, parse
from microtome.errors import ModelUnsupported, SiteError, error
from microtome.model import Model

BRANCHES = {"attn_out": "attn", "mlp_out": "mlp"}
"""The sites that name a branch, and its name."""
NAMES = {"attn": ("W_Q", "W_K", "W_V", "W_O"), "mlp": ("W_gate", "W_in", "W_out")}

Masks = Mapping[str, Tensor]
Put = Callable[[Masks | None], None]


@dataclass(frozen=True, eq=False)
class Matrices:
    """Matrices of a model.

    Attributes:
        model: whose they are.
        held: by path.
        branches: the branches that they are of, as (layer, name).
    """

    model: Model
    held: Mapping[str, nn.Parameter]
    branches: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, model: Model, sites: str | Sequence[str]) -> Matrices:
        """All matrices of the branches that write to some sites: no biases, no gains of norms.

        Raises:
            SiteError: a site is not written by one branch, or does not exist.
            ModelUnsupported: their weights are quantised or elsewhere.
        """
        found: dict[Site, None] = {}
        for text in [sites] if isinstance(sites, str) else sites:
            address = parse(text)
            if address.name not in BRANCHES or not address.units.is_all:
                raise error(SiteError, f'"{text}" names no branch whose weights can be masked',
                            allowed="attn_out and mlp_out of layers, such as 0-3.mlp_out", do="name one")  # fmt: skip
            found |= dict.fromkeys(model.anatomy.sites(address))
        branches = tuple((site.layer, BRANCHES[site.name]) for site in found if site.layer is not None)
        held: dict[str, nn.Parameter] = {}
        for layer, branch in branches:
            for path, p in model.layers[layer].parameters(branch).items():
                if p.dim() > 1 and all(p is not other for other in held.values()):
                    held[path] = p
        odd = next((path for path, p in held.items() if not is_plain(p) or p.is_meta), None)
        odd = next(adapters(model.hf), odd)
        if odd is not None or not held:
            what = f"the weights of {model.anatomy.name} cannot be masked"
            do = "open it unquantised, without adapters, on one device"
            raise error(ModelUnsupported, what, got=odd or "no matrices", do=do)
        return cls(model, held, branches)

    @contextmanager
    def under(self) -> Iterator[Put]:
        """In this block a function puts the weights under masks, or back; behind it they are as before, to the bit."""
        whole = {path: p.detach().clone() for path, p in self.held.items()}

        def put(masks: Masks | None) -> None:
            with torch.no_grad():
                for path, p in self.held.items():
                    p.copy_(whole[path] if masks is None else whole[path] * masks[path].to(p))

        with self.model.editing():  # no other thread may run it meanwhile
            try:
                yield put
            finally:
                put(None)

    @contextmanager
    def with_gradients(self) -> Iterator[list[nn.Parameter]]:
        """The matrices, which take gradients in this block."""
        every = list(self.held.values())
        before = [p.requires_grad for p in every]
        try:
            for p in every:
                p.requires_grad_(True)
            yield every
        finally:
            for p, flag in zip(every, before, strict=True):
                p.requires_grad_(flag)

    def shares(self, masks: Masks) -> tuple[list[str], Float[Tensor, " matrix"]]:
        """The names of the matrices as the field has them, and what share of each a mask keeps."""
        names, found = list[str](), list[float]()
        with self.under() as put, torch.no_grad():
            for path, p in self.held.items():
                p.copy_(masks[path].to(p))
            for layer, branch in self.branches:
                for name in NAMES[branch]:
                    try:
                        matrix: Tensor | None = getattr(self.model.layers[layer], name)
                    except SiteError:
                        continue
                    if matrix is not None:
                        names.append(f"{layer}.{name}")
                        found.append(float((matrix != 0).double().mean()))
            put(None)
        return names, torch.tensor(found, dtype=torch.float64)


def random_like(masks: Masks, generator: torch.Generator) -> dict[str, Tensor]:
    """Masks that keep as much of every matrix, at random places."""
    found: dict[str, Tensor] = {}
    for path, mask in masks.items():
        order = torch.rand(mask.numel(), generator=generator)
        kept = int(mask.sum())
        own = torch.zeros(mask.numel(), dtype=torch.bool)
        own[order.argsort()[:kept]] = True
        found[path] = own.view(mask.shape).to(mask.device)
    return found
