"""Weights by the field's names and orientation, as views of the model's own parameters.

    W_E  [vocab, d_model]           W_U  [d_model, vocab]
    W_Q  [head, d_model, d_head]    W_K, W_V  [kv_head, d_model, d_head]    W_O  [head, d_head, d_model]
    W_gate, W_in  [d_model, neuron]    W_out  [neuron, d_model]
    b_Q [head, d_head], b_K, b_V [kv_head, d_head], b_O [d_model], b_gate, b_in [neuron], b_out [d_model], b_U [vocab]

An activation times a weight is the next activation: ``x @ W_in``. In a mixture, W_gate, W_in and W_out have a leading
expert axis. A view is never a copy, with two exceptions: queries of grouped fused projections (Falcon's newer
architecture) are not evenly strided, so their W_Q is a copy; and a projection with parts inside, such as a LoRA
adapter, has the weight and bias that it acts with now, read off what it makes of unit vectors (one product of two
matrices each time; tests/laws/test_engine_adapters.py).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microtome.anatomy._anatomy import Anatomy
from microtome.anatomy._discover import Norm, norm_of
from microtome.anatomy._hook_points import Split, fused_splits
from microtome.anatomy._mixture import Experts
from microtome.anatomy._roles import is_conv1d
from microtome.anatomy._stored import PLAIN, dequantised, packed, present, runs_on, sizes
from microtome.errors import SiteError, error
from microtome.shown import brief, shown


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in its own type if that is wider: what sums, norms and dot products are taken in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


UNIT_ROWS = 1024
"""How many unit vectors are sent through a projection at once."""


def weight_of(module: Any) -> Tensor:
    """Weight [out, in] with which a projection acts."""
    weight = None if packed(module) is None else dequantised(module)
    if weight is not None:
        return weight
    if not _computes(module):
        weight = present(module, module.weight)
        return weight.T if is_conv1d(module) else weight
    n_in, zeros = weight_shape(module)[1], _zeros(module)
    zero, found = _made_of(module, zeros), []
    for first in range(0, n_in, UNIT_ROWS):
        rows = torch.arange(first, min(first + UNIT_ROWS, n_in), device=zeros.device)
        units = zeros.expand(len(rows), n_in).scatter(1, rows.unsqueeze(1), 1.0)
        found.append(_made_of(module, units) - zero)
    return torch.cat(found).T


def bias_of(module: Any) -> Tensor | None:
    """Bias [out] with which a projection acts, or None."""
    bias: Any = getattr(module, "bias", None)
    bias = bias() if callable(bias) else present(module, bias)
    if packed(module) is not None or not _has_parts(module):
        return bias.detach() if isinstance(bias, Tensor) and callable(module.bias) else bias
    made = _made_of(module, _zeros(module))[0]
    return made if isinstance(bias, Tensor) or bool(made.any()) else None


def weight_shape(module: Any) -> tuple[int, int]:
    """Output and input size of a projection."""
    return sizes(module)


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _computes(module: Any) -> bool:
    """Whether what a projection acts with is no plain matrix that it holds."""
    return _has_parts(module) or packed(module) is not None


def _zeros(module: Any) -> Tensor:
    """[1, in] what a projection can read, of the type and on the device of what it holds."""
    held = next((t for t in (*module.parameters(), *module.buffers()) if t.dtype in PLAIN), None)
    device = None if held is None else runs_on(module) if held.is_meta else held.device
    return torch.zeros(1, weight_shape(module)[1], dtype=None if held is None else held.dtype, device=device)


def _made_of(module: Any, x: Tensor) -> Tensor:
    """What a projection makes of x in evaluation: its own forward, so that no hook of the module sees it."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            return module.forward(x)
    finally:
        for part in training:
            part.training = True


def rounds_inputs(module: Any) -> bool:
    """Whether a quantised projection rounds what it reads too, so that no matrix does what it does: by trying it."""
    if all(packed(part) is None for part in module.modules()):
        return False
    zeros = _zeros(module)
    x = torch.randn(4, zeros.shape[1], generator=torch.Generator().manual_seed(0)).to(zeros)
    matrix, bias = at_least_float32(weight_of(module)).T, bias_of(module)
    made = at_least_float32(x) @ matrix + (0.0 if bias is None else bias)
    gap = (at_least_float32(_made_of(module, x)) - made).abs() / (at_least_float32(x).abs() @ matrix.abs())
    return float(gap.max()) > max(1e-4, torch.finfo(zeros.dtype).eps / 4)


def _embedded(module: Any) -> Tensor:
    """[vocab, d_model] what an embedding gives for every token."""
    if not _computes(module):
        return present(module, module.weight)
    return _made_of(module, torch.arange(weight_shape(module)[0], device=_zeros(module).device))


def _shapes(of: object, names: tuple[str, ...]) -> dict[str, str]:
    """The shape and type of each of some weights, of those that there are."""
    found: dict[str, str] = {}
    for name in names:
        try:
            value = getattr(of, name)
        except SiteError:
            continue
        if value is not None:
            found[name] = brief(value)
    return found


@shown
class NormWeights:
    """Gain and bias of a norm, ``gain * centred(x) / scale + bias``, and the module that computes it."""

    def __init__(self, module: nn.Module, norm: Norm) -> None:
        self.module, self.norm = module, norm

    def _facts(self) -> dict[str, str]:
        """Its form, and the shapes of its weights."""
        form = "layer norm" if self.norm.centred else "identity" if self.norm.identity else "root mean square"
        return {"form": form, "module": self.norm.path, "eps": brief(self.norm.eps)} | _shapes(self, ("gain", "bias"))

    @property
    def gain(self) -> Float[Tensor, "*norm"] | float:
        """As the norm has it: [d_model], [d_head] or [head, d_head]; 1.0 for one without weights.

        A sum 1 + w is in float32 at least, as in the models.
        """
        weight, times = present(self.module, getattr(self.module, "weight", None)), self.norm.times
        if not isinstance(weight, Tensor):
            return times
        gain = at_least_float32(weight) + self.norm.offset if self.norm.offset else weight
        return gain if times == 1.0 else gain * times

    @property
    def bias(self) -> Float[Tensor, "*norm"] | None:
        """As the gain, or None."""
        bias = present(self.module, getattr(self.module, "bias", None))
        if not isinstance(bias, Tensor):
            return None
        return bias if self.norm.times == 1.0 else bias * self.norm.times

    def centre(self, x: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at d_model"]:
        """x [..., d_model], minus its mean where the norm is a layer norm."""
        return x - x.mean(-1, keepdim=True) if self.norm.centred else x

    def scale(self, x: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at"]:
        """What the norm divides by, [...] in float32, for x [..., d_model]."""
        if self.norm.identity:
            return x.new_ones(x.shape[:-1], dtype=torch.float32)
        return (self.centre(x.float()).pow(2).mean(-1) + self.norm.eps).sqrt()

    def apply(
        self, x: Float[Tensor, "*at d_model"], scale: Float[Tensor, "*at"] | None = None
    ) -> Float[Tensor, "*at d_model"]:
        """The norm of x [..., d_model], dividing by a given scale [...] instead of its own if there is one."""
        scale = self.scale(x) if scale is None else scale
        y = (self.centre(x) / scale.unsqueeze(-1).to(x.dtype) * self.gain).to(x.dtype)
        return y if self.bias is None else y + self.bias


def parameter_of(model: nn.Module, path: str) -> Tensor:
    """A parameter by its path, as it is loaded where accelerate offloaded it."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    return present(module, getattr(module, name))


@shown
class LayerWeights:
    """The weights of one layer, as views."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, index: int) -> None:
        self._model, self._anatomy, self.index = model, anatomy, index
        self._parts = anatomy.parts.layers[index]

    def _facts(self) -> dict[str, str]:
        """Whose they are, and the shape of each that there is."""
        names = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out")
        return {"layer": f"{self.index} of {self._anatomy.name}"} | _shapes(self, names)

    def _prove(self, name: str) -> None:
        """Refuse a weight whose identity failed.

        Raises:
            SiteError: it did.
        """
        why = self._anatomy.unproven.get(f"{self.index}.{name}")
        if why is not None:
            raise SiteError(f"no {name} in layer {self.index} of {self._anatomy.name}: {why}.")

    def _module(self, path: str | None, name: str) -> Any:
        self._prove(name)
        if path is None:
            raise SiteError(f"no {name} in layer {self.index} of {self._anatomy.name}: it has no such projection.")
        return self._model.get_submodule(path)

    def _qkv(self, name: str) -> tuple[Any, Split]:
        parts, a = self._parts, self._anatomy
        self._prove(f"W_{name.upper()}")
        n = parts.n_heads if name == "q" else parts.n_kv_heads
        if parts.qkv is not None:
            module = self._model.get_submodule(parts.qkv)
            return module, fused_splits(a.parts, weight_shape(module)[0], parts.n_heads, parts.n_kv_heads)[name]
        path = {"q": parts.q, "k": parts.k, "v": parts.v}[name]
        module = self._module(path, f"W_{name.upper()}")
        width = weight_shape(module)[0] // n
        if name == "q" and width == 2 * parts.d_head:  # each head's queries are followed by its gate
            return module, Split(n, 2, parts.d_head, 0, 1)
        return module, Split(1, n, width, 0, n)

    def parameters(self, branch: str) -> dict[str, nn.Parameter]:
        """The parameters of attention ("attn") or of the MLP ("mlp"), by path; none where there is no such branch."""
        parts = self._parts
        loose = (parts.gate, parts.up, parts.gate_up, parts.down)  # of an MLP that is no module of its own
        paths = (parts.attn,) if branch == "attn" else loose if parts.mlp is None else (parts.mlp,)
        modules = {path: self._model.get_submodule(path) for path in paths if path is not None}
        return {f"{path}.{name}": p for path, module in modules.items() for name, p in module.named_parameters()}

    def projection(self, name: str) -> tuple[str, Split]:
        """The module that gives "q", "k" or "v", by its path, and where they lie in what it gives.

        Raises:
            SiteError: there is no such projection, or its identity failed.
        """
        _, split = self._qkv(name)
        path = self._parts.qkv or {"q": self._parts.q, "k": self._parts.k, "v": self._parts.v}[name]
        assert path is not None
        return path, split

    def _heads(self, name: str) -> Tensor:
        module, split = self._qkv(name)
        view = split.view(weight_of(module), 0)
        flat = view.squeeze(0) if split.groups == 1 else view.flatten(0, 1)
        return flat.transpose(1, 2)

    def _head_bias(self, name: str) -> Tensor | None:
        module, split = self._qkv(name)
        bias = bias_of(module)
        return None if bias is None else split.view(bias, 0).flatten(0, 1)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """[head, d_model, d_head]"""
        return self._heads("q")

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """[kv_head, d_model, d_head]"""
        return self._heads("k")

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """[kv_head, d_model, d_head]"""
        return self._heads("v")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """[head, d_head, d_model]"""
        weight = weight_of(self._module(self._parts.o, "W_O"))
        return weight.T.unflatten(0, (self._parts.n_heads, -1))

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"] | None:
        """[head, d_head]"""
        return self._head_bias("q")

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"] | None:
        """[kv_head, d_head]"""
        return self._head_bias("k")

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"] | None:
        """[kv_head, d_head]"""
        return self._head_bias("v")

    @property
    def b_O(self) -> Float[Tensor, " d_model"] | None:
        """[d_model]"""
        bias = bias_of(self._module(self._parts.o, "W_O"))
        return self._besides(bias, self._parts.attn_plus, self._parts.attn_by)

    def _besides(self, bias: Tensor | None, path: str | None, by: float) -> Tensor | None:
        """The bias of what a branch writes, with the parameter that is added to the stream besides."""
        if path is None:
            return bias
        vector = parameter_of(self._model, path) / by
        return vector if bias is None else bias + vector

    def _expert(self, name: str) -> Tensor:
        found = getattr(Experts(self._module(self._parts.experts, name)), name)
        return self._module(None, name) if found is None else found

    def _half(self, k: int) -> tuple[Any, slice]:
        module = self._module(self._parts.gate_up, "W_gate")
        width = weight_shape(module)[0] // 2
        return module, slice(k * width, (k + 1) * width)

    @property
    def W_gate(self) -> Float[Tensor, "*expert d_model neuron"]:
        """[d_model, neuron]"""
        if self._parts.experts is not None:
            return self._expert("W_gate")
        if self._parts.gate_up is not None:
            module, half = self._half(0)
            return weight_of(module)[half].T
        return weight_of(self._module(self._parts.gate, "W_gate")).T

    @property
    def W_in(self) -> Float[Tensor, "*expert d_model neuron"]:
        """[d_model, neuron]"""
        if self._parts.experts is not None:
            return self._expert("W_in")
        if self._parts.gate_up is not None:
            module, half = self._half(1)
            return weight_of(module)[half].T
        return weight_of(self._module(self._parts.up, "W_in")).T

    @property
    def W_out(self) -> Float[Tensor, "*expert neuron d_model"]:
        """[neuron, d_model]"""
        if self._parts.experts is not None:
            return self._expert("W_out")
        return weight_of(self._module(self._parts.down, "W_out")).T

    def _mlp_bias(self, path: str | None, k: int) -> Tensor | None:
        if self._parts.experts is not None:
            return Experts(self._model.get_submodule(self._parts.experts)).bias("b_gate" if k == 0 else "b_in")
        if path is None and self._parts.gate_up is not None:
            module, half = self._half(k)
            bias = bias_of(module)
            return None if bias is None else bias[half]
        return None if path is None else bias_of(self._model.get_submodule(path))

    @property
    def b_gate(self) -> Float[Tensor, "*expert neuron"] | None:
        """[neuron]"""
        return self._mlp_bias(self._parts.gate, 0)

    @property
    def b_in(self) -> Float[Tensor, "*expert neuron"] | None:
        """[neuron]"""
        return self._mlp_bias(self._parts.up, 1)

    @property
    def b_out(self) -> Float[Tensor, "*expert d_model"] | None:
        """[d_model]"""
        if self._parts.experts is not None:
            return Experts(self._model.get_submodule(self._parts.experts)).bias("b_out")
        bias = None if self._parts.down is None else bias_of(self._model.get_submodule(self._parts.down))
        return self._besides(bias, self._parts.mlp_plus, self._parts.mlp_by)

    @property
    def attn_norm(self) -> NormWeights | None:
        """The norm that attention reads through."""
        self._prove("attn_norm")
        norm = self._parts.attn_norm
        return None if norm is None else NormWeights(self._model.get_submodule(norm.path), norm)

    @property
    def mlp_norm(self) -> NormWeights | None:
        """The norm that the MLP reads through."""
        self._prove("mlp_norm")
        norm = self._parts.mlp_norm
        return None if norm is None else NormWeights(self._model.get_submodule(norm.path), norm)

    def _behind(self, path: str | None) -> NormWeights | None:
        if path is None or self._anatomy.parts.form != "sequential":
            return None
        module = self._model.get_submodule(path)
        norm = norm_of(module, path, self._anatomy.d_model)
        if norm is None:
            raise error(SiteError, f"the norm {path} has no known form", do="use a model with RMS or layer norms")
        return NormWeights(module, norm)

    @property
    def attn_post_norm(self) -> NormWeights | None:
        """The norm between what attention writes and the stream, or None; a norm on the stream itself is none."""
        return self._behind(self._parts.attn_post_norm)

    @property
    def mlp_post_norm(self) -> NormWeights | None:
        """The norm between what the MLP writes and the stream, or None; a norm on the stream itself is none."""
        return self._behind(self._parts.mlp_post_norm)


@shown
class Weights:
    """The weights outside the layers, and the layers."""

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self._model, self._anatomy = model, anatomy
        self.layers: tuple[LayerWeights, ...] = tuple(LayerWeights(model, anatomy, i) for i in range(anatomy.n_layers))

    def _facts(self) -> dict[str, str]:
        """Whose they are, and their shapes."""
        return {"of": brief(self._anatomy.name), "layers": str(len(self.layers))} | _shapes(self, ("W_E", "W_U", "b_U"))

    @property
    def W_E(self) -> Float[Tensor, "vocab d_embed"]:
        """[vocab, d_model]"""
        return _embedded(self._model.get_input_embeddings())

    def _prove(self, name: str) -> None:
        why = self._anatomy.unproven.get(name)
        if why is not None:
            raise SiteError(f"no {name} in {self._anatomy.name}: {why}.")

    @property
    def W_U(self) -> Float[Tensor, "d_read vocab"]:
        """[d_model, vocab]"""
        self._prove("W_U")
        return weight_of(self._model.get_output_embeddings()).T

    @property
    def b_U(self) -> Float[Tensor, " vocab"] | None:
        """[vocab]"""
        return bias_of(self._model.get_output_embeddings())

    @property
    def final_norm(self) -> NormWeights | None:
        """The norm before the unembedding."""
        self._prove("final_norm")
        norm = self._anatomy.parts.final_norm
        return None if norm is None else NormWeights(self._model.get_submodule(norm.path), norm)
