"""Weights by address, to read and to write: the field's names in the field's orientation, or a parameter's own path.

    12.W_out          [neuron, d_model]         12.W_out[431]   one neuron's row
    3.W_O[2]          [head, d_head, d_model]   head 2 of layer 3
    W_U, 5.b_out, model.layers.3.input_layernorm.weight

Units are heads of W_Q, W_K, W_V, W_O and their biases, and neurons of W_gate, W_in, W_out and theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import parse_indices
from microtome.errors import SiteError, error, nearest
from microtome.run import LoadedModel

HEADS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
NEURONS = {"W_gate": -1, "W_in": -1, "W_out": -2, "b_gate": -1, "b_in": -1}
OF_LAYERS = (*HEADS, *NEURONS, "b_O", "b_out")
OF_MODEL = ("W_E", "W_U", "b_U")
_ADDRESS = re.compile(r"(?:(?P<layer>\d+)\.)?(?P<name>[Wb]_[A-Za-z]+)(?:\[(?P<units>[^\]]+)\])?$")


@dataclass(frozen=True, eq=False)
class Weight:
    """A part of a model's parameters that can be read and written.

    Attributes:
        address: as it was given.
        view: a view of the parameter.
        axis: that of the units.
        units: their numbers; all where it is None.
    """

    address: str
    view: Tensor
    axis: int = 0
    units: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read."""
        shape = list(self.view.shape)
        if self.units is not None:
            shape[self.axis] = len(self.units)
        return tuple(shape)

    def read(self) -> Tensor:
        """A copy of the values."""
        with torch.no_grad():
            whole = self.view.detach()
            return whole.clone() if self.units is None else whole.index_select(self.axis, self.units)

    def write(self, values: Tensor) -> None:
        """Put values in their place, rounded to the type of the parameter."""
        with torch.no_grad():
            values = values.to(self.view)
            if self.units is None:
                self.view.copy_(values)
            else:
                self.view.index_copy_(self.axis, self.units, values)


def weight_at(model: LoadedModel, address: str) -> Weight:
    """The weight at an address.

    Raises:
        SiteError: there is none, it is no plain matrix that the model holds, or it has no such units.
    """
    match = _ADDRESS.match(address)
    if match is None:
        return Weight(address, _own(model, address, _parameter(model, address)))
    name, layer, units = match["name"], match["layer"], match["units"]
    if name not in (OF_MODEL if layer is None else OF_LAYERS):
        raise _unknown(address)
    owner: Any = model if layer is None else _layer(model, int(layer), address)
    view = getattr(owner, name)
    if view is None:
        raise error(SiteError, f"{model.anatomy.name} has no {address}", do="name a weight that it has")
    view = _own(model, address, view)
    if units is None:
        return Weight(address, view)
    axis = 0 if name in HEADS else NEURONS.get(name)
    if axis is None or (name in NEURONS and view.dim() > (2 if name[0] == "W" else 1)):
        whole = name if layer is None else f"{layer}.{name}"
        raise error(SiteError, f'"{address}" names units of a weight that has none', do=f'write "{whole}"')
    size = int(view.shape[axis])
    chosen = parse_indices(units, "units").resolve(size)
    if chosen is None:
        what = f'there is no weight "{address}"'
        raise error(SiteError, what, got=f"[{units}]", allowed=f"0 to {size - 1}", do="choose units that there are")
    return Weight(address, view, axis % view.dim(), torch.tensor(chosen, device=view.device))


def _layer(model: LoadedModel, layer: int, address: str) -> Any:
    n = model.anatomy.n_layers
    if layer >= n:
        raise error(SiteError, f'there is no weight "{address}"', allowed=f"layers 0 to {n - 1}", do="choose a layer")
    return model.layers[layer]


def _unknown(address: str) -> SiteError:
    names = [*OF_MODEL, *(f"3.{name}" for name in OF_LAYERS)]
    return error(SiteError, f'there is no weight "{address}"{nearest(address, names)}', allowed=", ".join(names),
                 do="write it so, or give the path of a parameter")  # fmt: skip


def _parameter(model: LoadedModel, path: str) -> Tensor:
    try:
        return model.hf.get_parameter(path)
    except AttributeError:
        raise _unknown(path) from None


def _own(model: LoadedModel, address: str, view: Tensor) -> Tensor:
    """A view, if what is written to it is written to the model.

    Raises:
        SiteError: it is a copy: of a quantised, offloaded, adapted or unevenly strided projection.
    """
    held = {p.untyped_storage().data_ptr() for p in model.hf.parameters() if not p.is_meta}
    if view.is_meta or not view.is_floating_point() or view.untyped_storage().data_ptr() not in held:
        raise error(SiteError, f"{address} of {model.anatomy.name} cannot be written",
                    got="a weight that is computed or unpacked each time it is used (quantised, offloaded, adapted or "
                    "interleaved)", do="merge or dequantise it first, or give the path of a parameter")  # fmt: skip
    return view
