"""Dictionaries: directions of a site, each a feature, with or without an encoder that says how much of it there is.

Formula:  with an encoder E [feature, d] and directions D [feature, d], the codes are
          c(x) = act((x - centre) Eᵀ + bias), act = ReLU, the k largest of ReLU (TopK), or z where z > threshold
          (JumpReLU); swapping the features S: x' = base + sum_{f in S} (c_f(source) - c_f(base)) D_f. What the
          dictionary does not rebuild of the base, its error, stays.
          Without an encoder the codes are c(x) = x Dᵀ / |D|, and swapping S is swapping the span of its directions:
          x' = base + (source - base) P, which replaces their coefficients of least squares.
          Features are chosen by the largest F of an analysis of variance of their codes by answer, or by the largest
          weights of a multinomial logistic regression of the answer on their codes, each code in units of its spread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from microtome.errors import ArgumentError, DataError, error
from microtome.shown import in_notebooks

NAMES = {"directions": "W_dec", "encoder": "W_enc", "bias": "b_enc", "centre": "centre", "threshold": "threshold",
         "k": "k"}  # fmt: skip
"""The tensors of a file, by what they are here."""


@in_notebooks
@dataclass(frozen=True, eq=False)
class Dictionary:
    """Features of a site, or some of them.

    Attributes:
        directions: [feature, d] what each feature writes, float64.
        encoder: [code, d] what its code is read by; None where the directions read too.
        bias: [code] added to what is read.
        centre: [d] subtracted before it is read.
        threshold: [code] below which a code is 0 (JumpReLU).
        k: how many codes are not 0 (TopK); 0 where any number is not.
        features: the number of each feature in the dictionary; of TopK the others' codes are read too.

    Raises:
        ArgumentError: the shapes do not fit, or something is not finite.
    """

    directions: Float[Tensor, "feature d"]
    encoder: Float[Tensor, "code d"] | None = None
    bias: Float[Tensor, " code"] | None = None
    centre: Float[Tensor, " d"] | None = None
    threshold: Float[Tensor, " code"] | None = None
    k: int = 0
    features: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, x in self.tensors().items():
            object.__setattr__(self, name, x.detach().double().cpu())
        n, d = self.directions.shape
        codes = len(self.encoder) if self.k and self.encoder is not None else n
        shapes = {"encoder": (codes, d), "bias": (codes,), "centre": (d,), "threshold": (codes,)}
        for name, x in self.tensors().items():
            if name in shapes and tuple(x.shape) != shapes[name]:
                got, do = f"{NAMES[name]} {list(x.shape)}", "give W_dec [feature, d] and W_enc [d, feature]"
                what = "the parts of this dictionary do not fit together"
                raise error(ArgumentError, what, got=got, allowed=f"{list(shapes[name])}", do=do)
            if not bool(x.isfinite().all()):
                raise error(
                    ArgumentError, f"{NAMES[name]} of this dictionary is not finite", do="leave out what is NaN"
                )
        if self.encoder is None and (self.k or len(self.tensors()) > 1):
            raise error(ArgumentError, "a dictionary without an encoder has directions alone", do="give W_enc too")
        if not 0 <= self.k <= codes:
            raise error(
                ArgumentError, "a dictionary keeps a number of codes", got=f"k={self.k}", allowed=f"0 to {codes}"
            )
        if not self.features:
            object.__setattr__(self, "features", tuple(range(n)))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in held.items() if isinstance(x, Tensor)}

    def __len__(self) -> int:
        return len(self.directions)

    def __repr__(self) -> str:
        how = "directions alone" if self.encoder is None else "TopK" if self.k else "an encoder"
        return f"Dictionary({len(self)} features of width {self.directions.shape[1]}, {how})"

    @classmethod
    def read(cls, given: Any) -> Dictionary:
        """A dictionary from what was given: one, directions [feature, d], tensors by name, or a safetensors file.

        Args:
            given: names are W_dec [feature, d], W_enc [d, feature], b_enc [feature], centre [d] (what is subtracted
                before W_enc; of many it is b_dec), threshold [feature], k (a number). A file of one tensor holds
                directions under any name.

        Raises:
            ArgumentError: it is no dictionary, or its parts do not fit.
            DataError: the file cannot be read.
        """
        if isinstance(given, Dictionary):
            return given
        held: Any = _file(given) if isinstance(given, str | os.PathLike) else given
        if isinstance(held, Mapping) and len(held) == 1:
            held = next(iter(held.values()))
        if isinstance(held, Tensor) and held.dim() == 2:
            return cls(held)
        if not isinstance(held, Mapping) or not isinstance(held.get("W_dec"), Tensor) or held["W_dec"].dim() != 2:
            got = ", ".join(map(str, held)) if isinstance(held, Mapping) else f"{type(held).__name__}"
            allowed, do = ", ".join(NAMES.values()), "give directions [feature, d], or W_dec and W_enc"
            raise error(ArgumentError, "this is no dictionary", got=got, allowed=allowed, do=do)
        parts: dict[str, Any] = {own: held[name] for own, name in NAMES.items() if held.get(name) is not None}
        parts["k"] = int(parts.get("k", 0))
        if "encoder" in parts:
            parts["encoder"] = parts["encoder"].T
        return cls(**parts)

    def codes(self, x: Float[Tensor, "*at d"]) -> Float[Tensor, "*at feature"]:
        """How much of each feature there is in x."""
        if self.encoder is None:
            return x @ _unit(self.directions).to(x).T
        z = (x if self.centre is None else x - self.centre.to(x)) @ self.encoder.to(x).T
        z = z if self.bias is None else z + self.bias.to(x)
        if self.threshold is not None:
            z = z * (z > self.threshold.to(x))
        z = z.relu()
        if self.k:
            top = z.topk(self.k, dim=-1)
            z = torch.zeros_like(z).scatter(-1, top.indices, top.values)
        return z[..., list(self.features)] if self.k else z

    def moved(self, base: Float[Tensor, "*at d"], source: Float[Tensor, "*at d"]) -> Float[Tensor, "*at d"]:
        """What is added to the base where its codes are replaced by the source's."""
        return (self.codes(source) - self.codes(base)) @ self.directions.to(base)

    def only(self, chosen: Sequence[int]) -> Dictionary:
        """The same with some of its features alone."""
        which = list(chosen)
        parts: dict[str, Any] = {"directions": self.directions[which]}
        if not self.k:  # of TopK the others decide which codes are not 0
            own = self.tensors()
            parts |= {name: own[name][which] for name in ("encoder", "bias", "threshold") if name in own}
        return replace(self, **parts, features=tuple(self.features[i] for i in which))


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _file(path: Any) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with safe_open(os.fspath(path), "pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError, ValueError) as problem:
        do = "give a safetensors file with W_dec, or one tensor of directions"
        raise error(DataError, f"cannot read a dictionary from {path}", got=str(problem), do=do) from problem
