"""A fitted lens as a value: affine maps of the stream, or of heads, whose results the unembedding reads.

Formula:  stream  y = x + A_l x + b_l;   heads  y = x + U_lh V_lh x + b_lh;   logits = unembed(final_norm(y)).
          With A = U = 0 and b = 0 it is the logit lens. Places: l = -1 is the embedding, l the stream after layer l.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.edit import unshared
from microtome.errors import ArgumentError, DataError, error
from microtome.files import atomic
from microtome.model import Model
from microtome.shown import brief, shown

FORM = 1
LensKind = Literal["tuned", "bias", "heads"]


@shown
@dataclass(frozen=True, eq=False)
class Lens:
    """A lens that was fitted to one model.

    Attributes:
        kind: "tuned", a matrix and a bias for each place of the stream; "bias", a bias alone; "heads", a matrix of low
            rank and a bias for each head.
        ahead: which token it predicts: 1 the next one, as the model does, 2 the one after.
        layers: the places that it has maps for; -1 is the embedding.
        maps: by name, with a first axis of places: `matrix` [place, d_model, d_model] and `bias` [place, d_model]; of
            heads `left` [place, head, d_model, rank], `right` [place, head, rank, d_model] and `bias`.
        kl: over (layer) or (layer, head): the divergence on held-out text, beside that of the logit lens.
        attrs: of which model it is, on what it was fitted and how.

    >>> lens = mt.explain.fit_lens(model, "wiki.txt", tokens=200_000)
    >>> lens.save("lens.safetensors")
    >>> mt.explain.lens(model, "The capital of France is", kind="tuned", lens="lens.safetensors")
    """

    kind: LensKind
    ahead: int
    layers: tuple[int, ...]
    maps: Mapping[str, Tensor]
    kl: xr.Dataset = field(default_factory=xr.Dataset)
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def _facts(self) -> dict[str, str]:
        """What it reads, of which model, and what it was fitted on."""
        held = {name: brief(x) for name, x in self.maps.items()}
        said = {name: brief(self.attrs[name]) for name in ("model", "tokens", "text") if name in self.attrs}
        places = f"{len(self.layers)}, from {self.layers[0]} to {self.layers[-1]}"
        return {"kind": self.kind, "ahead": str(self.ahead), "layers": places} | held | said

    def require(self, model: Model) -> Lens:
        """The same lens where the model is.

        Raises:
            DataError: it was fitted to another model, or to other weights of it.
        """
        own, its = model.provenance, self.attrs.get("fingerprint")
        if its != own["fingerprint"]:
            raise error(
                DataError, "the lens is of another model", got=f"{self.attrs.get('model')} ({its})",
                allowed=f"{own['model']} ({own['fingerprint']})", do="open its model, or fit a lens to this one",
            )  # fmt: skip
        return replace(self, maps={name: x.to(model.device) for name, x in self.maps.items()})

    def place(self, layer: int) -> int:
        """The index of a layer's map.

        Raises:
            ArgumentError: it has none.
        """
        if layer not in self.layers:
            allowed = ", ".join(map(str, self.layers))
            raise error(ArgumentError, f"the lens has no map for layer {layer}", allowed=allowed, do="fit one")
        return self.layers.index(layer)

    def apply(
        self, layer: int, x: Float[Tensor, "*at d_model"], head: int | None = None
    ) -> Float[Tensor, "*at d_model"]:
        """What the unembedding is to read in place of x [..., d_model], the stream after a layer or what a head wrote.

        Raises:
            ArgumentError: there is no map for this layer, or a head is named where the maps are of the stream.
        """
        if (head is None) == (self.kind == "heads"):
            got = f"head={head}"
            raise error(ArgumentError, f"a lens of the kind {self.kind}", got=got, do="name a head of heads alone")
        i = self.place(layer)
        if head is not None:
            low = x @ self.maps["right"][i, head].to(x.dtype).T
            return x + low @ self.maps["left"][i, head].to(x.dtype).T + self.maps["bias"][i, head].to(x.dtype)
        y = x + self.maps["bias"][i].to(x.dtype)
        return y if self.kind == "bias" else y + x @ self.maps["matrix"][i].to(x.dtype).T

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file; what stood there is replaced when the new one is whole.

        Raises:
            OutputError: the file cannot be written.
        """
        held = {f"map.{name}": x for name, x in self.maps.items()}
        held |= {
            f"kl.{name}": torch.from_numpy(np.ascontiguousarray(x.values)) for name, x in self.kl.data_vars.items()
        }
        dims = {str(name): list(map(str, x.dims)) for name, x in self.kl.data_vars.items()}
        rest = {
            "form": FORM, "kind": self.kind, "ahead": self.ahead, "layers": list(self.layers), "dims": dims,
            "attrs": dict(self.attrs),
        }  # fmt: skip
        with atomic(path, "a lens to") as partial:
            save_file(unshared(held), partial, metadata={"lens": json.dumps(rest)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model | None = None) -> Lens:
        """Read what `save` wrote; with a model, only a lens of that one.

        Raises:
            DataError: the file is missing or damaged, holds no lens, or one of another model.
        """
        try:
            with safe_open(os.fspath(path), "pt") as file:
                metadata = file.metadata() or {}
                if "lens" not in metadata:
                    raise ValueError("a file without a lens")
                rest: dict[str, Any] = json.loads(metadata["lens"])
                if rest["form"] != FORM:
                    raise ValueError(f"a lens of form {rest['form']}, while this version reads form {FORM}")
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            maps = {name.removeprefix("map."): x for name, x in held.items() if name.startswith("map.")}
            kl = {name: (rest["dims"][name], held[f"kl.{name}"].numpy()) for name in rest["dims"]}
            found = cls(
                rest["kind"], rest["ahead"], tuple(rest["layers"]), maps, _over(kl, rest["layers"]), rest["attrs"]
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as problem:
            do = "give a file that Lens.save wrote"
            raise error(DataError, f"cannot read a lens from {path}", got=str(problem), do=do) from problem
        return found if model is None else found.require(model)


def _over(values: Mapping[str, tuple[list[str], np.ndarray]], layers: list[int]) -> xr.Dataset:
    return xr.Dataset(dict(values), coords={"layer": layers})


def no_maps(kind: LensKind, places: int, heads: int, width: int, rank: int, seed: int) -> dict[str, Tensor]:
    """Maps that change nothing: the logit lens. Of heads, `right` is random, so that `left` has a gradient."""
    if kind == "heads":
        noise = torch.randn(places, heads, rank, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
        left, bias = torch.zeros(places, heads, width, rank), torch.zeros(places, heads, width)
        return {"left": left, "right": noise, "bias": bias}
    bias = torch.zeros(places, width)
    return {"bias": bias} if kind == "bias" else {"matrix": torch.zeros(places, width, width), "bias": bias}
