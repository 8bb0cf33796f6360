"""Find the parts of a causal language model in its module tree.

Names are matched against what the families of `transformers` use; sizes are read off the weights, not the
configuration. Nothing here is trusted: `open()` proves the map on a probe input before anybody may use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from microtome.anatomy._family import Family, family_of
from microtome.errors import ModelUnsupported, error
from microtome.shown import shown

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "moe")
Q, K, V = ("q_proj", "query", "q_b_proj"), ("k_proj", "key"), ("v_proj", "value")
QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv")
O = ("o_proj", "out_proj", "c_proj", "dense", "output.dense")  # noqa: E741 - the field's letter
GATE = ("gate_proj", "w1", "linear_gate")
UP = ("up_proj", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "intermediate.dense", "linear_in")
GATE_UP = ("gate_up_proj",)
DOWN = ("down_proj", "w2", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "output.dense", "linear_out")
ROUTER = ("router", "gate")
FIRST_NORM = ("input_layernorm", "ln_1", "self_attn_layer_norm", "norm_1", "ln_attn", "attention_norm", "norm1")
SECOND_NORM = (
    "pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm", "norm_2", "ln_mlp", "ffn_norm",
)  # fmt: skip
AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "output.LayerNorm")
FINAL_NORM = ("norm", "final_layernorm", "ln_f", "norm_f", "final_layer_norm", "final_norm")

Form = Literal["sequential", "parallel", "post_norm"]


@shown
@dataclass(frozen=True)
class Norm:
    """A normalisation ``gain * (x - centre(x)) / scale(x) + bias``, found by trying it on a random vector.

    `scale` is ``sqrt(mean(x**2) + eps)``, of the centred x where `centred`; `gain` is the weight plus `offset`. Where a
    model has a place for a norm but none in it, the norm is the identity: its `scale` is one.
    """

    path: str
    centred: bool
    offset: float
    eps: float
    identity: bool = False


@dataclass(frozen=True)
class LayerParts:
    """Module paths of one block; None where the block has no such part."""

    block: str
    attn: str
    q: str | None
    k: str | None
    v: str | None
    qkv: str | None
    o: str
    mlp: str | None
    gate: str | None
    up: str | None
    gate_up: str | None
    down: str | None
    act: str | None
    router: str | None
    experts: str | None
    attn_norm: Norm | None
    mlp_norm: Norm | None
    attn_post_norm: str | None
    mlp_post_norm: str | None


@dataclass(frozen=True)
class Parts:
    """Module paths of a whole model."""

    layers: tuple[LayerParts, ...]
    embedding: str
    unembedding: str
    final_norm: Norm | None
    form: Form
    family: Family


def child(module: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    """The first of `names` (dotted) that exists below a module, with the module it names."""
    for name in names:
        found: Any = module
        for step in name.split("."):
            found = getattr(found, step, None)
        if isinstance(found, nn.Module):
            return name, found
    return None


def _path(module: nn.Module, prefix: str, names: tuple[str, ...]) -> str | None:
    found = child(module, names)
    return None if found is None else f"{prefix}.{found[0]}"


def _blocks(model: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and child(module[0], ATTENTION)
    ]
    if not found:
        raise error(
            ModelUnsupported,
            f"{type(model).__name__} has no list of {n_layers} blocks with attention inside",
            allowed="decoder or encoder language models whose blocks hold one of " + ", ".join(ATTENTION),
            do="open a transformer language model",
        )
    return found[0]


def norm_of(module: nn.Module, path: str, d_model: int) -> Norm | None:
    """Describe a norm by trying it: which of rms or layer norm, and whether its gain is the weight or one more."""
    weight = getattr(module, "weight", None)
    like = weight if isinstance(weight, Tensor) else None
    device = like.device if like is not None else None
    generator = torch.Generator().manual_seed(0)
    # The norms of queries and keys are as wide as a head, and some have a gain for each head.
    shape = (d_model,) if like is None else tuple(like.shape)
    x = (torch.randn(4, *shape, generator=generator) * 3 + 1).to(device=device)
    x = x.to(like.dtype) if like is not None else x
    with torch.no_grad():
        got: Tensor = module(x)
    if like is None and torch.equal(got, x):
        return Norm(path, False, 0.0, 0.0, identity=True)
    bias = getattr(module, "bias", None)
    declared = next(
        (float(v) for n in ("variance_epsilon", "eps") if isinstance(v := getattr(module, n, None), float)), None
    )
    eps = 0.0 if declared is None else declared
    for centred in (False, True):
        for offset in (0.0, 1.0):
            y = x.float() - x.float().mean(-1, keepdim=True) * centred
            y = y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            y = y * (like.float() + offset) if like is not None else y
            y = y + bias.float() if isinstance(bias, Tensor) else y
            if torch.allclose(y, got.float(), rtol=1e-2 if x.dtype != torch.float32 else 1e-4, atol=1e-2):
                return Norm(path, centred, offset, _measured_eps(module, x, centred) if declared is None else declared)
    return None


def _measured_eps(module: nn.Module, x: Tensor, centred: bool) -> float:
    """What a norm adds to the variance, where it does not declare it: measured on an input that is hardly larger."""
    like = x.double() * 1e-3
    with torch.no_grad():
        shrunk, grown = (module((like * factor).to(x.dtype)).double() for factor in (1.0, 1e6))
        zero = module(torch.zeros_like(x)).double()  # the bias
    size = (like - like.mean(-1, keepdim=True) * centred).pow(2).mean(-1)
    ratio = ((grown - zero).norm(dim=-1) / (shrunk - zero).norm(dim=-1)).pow(2)
    return max(float(f"{float((size * (ratio - 1)).median()):.1e}"), 0.0)


def _norm(block: nn.Module, prefix: str, names: tuple[str, ...], d_model: int) -> Norm | None:
    found = child(block, names)
    return None if found is None else norm_of(found[1], f"{prefix}.{found[0]}", d_model)


def _attention(block: nn.Module, prefix: str) -> dict[str, str | None]:
    name, attn = child(block, ATTENTION) or ("", block)
    path = f"{prefix}.{name}"
    o = _path(attn, path, O) or (f"{path}.attention.out_proj" if child(attn, ("attention.out_proj",)) else None)
    inner = child(attn, ("attention", "self"))
    if inner is not None and (child(inner[1], Q) or child(inner[1], QKV)):
        path, attn = f"{path}.{inner[0]}", inner[1]
    fused = _path(attn, path, QKV) if not child(attn, Q) else None
    return {
        "attn": path, "q": _path(attn, path, Q), "k": _path(attn, path, K), "v": _path(attn, path, V),
        "qkv": fused, "o": o,
    }  # fmt: skip


def _activation(holder: nn.Module, path: str) -> str | None:
    for name in ("act_fn", "activation_fn", "act", "gelu_impl", "intermediate.intermediate_act_fn"):
        if child(holder, (name,)) is not None:
            return f"{path}.{name}"
    return None


def _mlp(block: nn.Module, prefix: str) -> dict[str, str | None]:
    found = child(block, MLP)
    path, holder = (f"{prefix}.{found[0]}", found[1]) if found else (prefix, block)
    none = dict.fromkeys(("gate", "up", "gate_up", "down", "act", "router", "experts"))
    if child(holder, ("experts",)):
        return none | {"mlp": path, "router": _path(holder, path, ROUTER), "experts": f"{path}.experts"}
    gate, fused = _path(holder, path, GATE), _path(holder, path, GATE_UP)
    return none | {
        "mlp": path if found else None, "gate": gate, "gate_up": fused, "up": _path(holder, path, UP),
        "down": _path(holder, path, DOWN), "act": _activation(holder, path),
    }  # fmt: skip


def _form(config: Any, block: nn.Module) -> Form:
    if getattr(config, "do_layer_norm_before", True) is False or child(block, ("attention.output.LayerNorm",)):
        return "post_norm"
    falcon = getattr(config, "new_decoder_architecture", False) or getattr(config, "parallel_attn", False)
    if getattr(config, "use_parallel_residual", False) or falcon:
        return "parallel"
    return "sequential" if child(block, SECOND_NORM) or child(block, AFTER_MLP) else "parallel"


def _block(block: nn.Module, path: str, form: Form, d_model: int) -> LayerParts:
    first, second = FIRST_NORM, SECOND_NORM
    after_attention: str | None = None
    after_mlp = _path(block, path, AFTER_MLP)
    if form == "post_norm":
        after_attention = _path(block, path, ("attention.output.LayerNorm", "self_attn_layer_norm"))
        after_mlp = _path(block, path, ("output.LayerNorm", "final_layer_norm"))
        first = second = ()
    elif after_mlp is not None:
        if child(block, ("post_self_attn_layernorm",)):
            after_attention = f"{path}.post_self_attn_layernorm"
        else:
            after_attention = _path(block, path, ("post_attention_layernorm",))
            second = ("pre_feedforward_layernorm",)
    mlp_norm = _norm(block, path, second, d_model)
    attn_norm = _norm(block, path, first, d_model)
    if form == "parallel" and mlp_norm is None:
        mlp_norm = attn_norm
    parts = _attention(block, path) | _mlp(block, path)
    if parts["o"] is None or (parts["down"] is None and parts["experts"] is None):
        part = "attention's output projection" if parts["o"] is None else "the MLP's output projection"
        raise error(
            ModelUnsupported,
            f"cannot find {part} in {path} ({type(block).__name__})",
            got=", ".join(name for name, _ in block.named_modules() if name),
            allowed=", ".join(O if parts["o"] is None else DOWN),
            do="rename the module, or open a model of a known family",
        )
    return LayerParts(
        block=path,
        attn_norm=attn_norm,
        mlp_norm=mlp_norm,
        attn_post_norm=after_attention,
        mlp_post_norm=after_mlp,
        **parts,  # pyright: ignore[reportArgumentType]
    )


def discover(model: Any) -> Parts:
    """Find the parts of a loaded `PreTrainedModel`.

    Raises:
        ModelUnsupported: the module tree has no blocks, no embedding, or no unembedding that can be found.
    """
    config = model.config.get_text_config()
    blocks_path, blocks = _blocks(model, config.num_hidden_layers)
    names = {id(module): path for path, module in model.named_modules()}
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    if unembedding is None:
        raise error(
            ModelUnsupported,
            f"{type(model).__name__} has no unembedding: it is not a language model",
            do="open a causal or masked language model",
        )
    form = _form(config, blocks[0])
    trunk_path = blocks_path.rpartition(".")[0]
    trunk = model.get_submodule(trunk_path)
    found = child(trunk, FINAL_NORM)
    d_model = _width(blocks[0])
    final = None if found is None else norm_of(found[1], f"{trunk_path}.{found[0]}", d_model)
    return Parts(
        layers=tuple(_block(block, f"{blocks_path}.{i}", form, d_model) for i, block in enumerate(blocks)),
        embedding=names[id(embedding)],
        unembedding=names[id(unembedding)],
        final_norm=final,
        form=form,
        family=family_of(config.model_type),
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether a projection, or the one inside an adapter, stores its weight as [in, out], as GPT-2's does."""
    inner: Any = module
    while isinstance(getattr(inner, "base_layer", None), nn.Module):
        inner = inner.base_layer
    module = inner
    return type(module).__name__ == "Conv1D"


def _width(block: nn.Module) -> int:
    o = _attention(block, "")["o"]
    if o is None:
        raise error(ModelUnsupported, f"cannot find attention's output projection in {type(block).__name__}")
    module: Any = block.get_submodule(o.removeprefix("."))
    return int(module.weight.shape[1 if is_conv1d(module) else 0])
