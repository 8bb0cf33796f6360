"""Find the parts of a causal language model in its module tree.

Names are matched against what the families of `transformers` use; sizes are read off the weights, not the
configuration. Nothing here is trusted: `open()` proves the map on a probe input before anybody may use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from microtome.anatomy._family import Family, family_of, number
from microtome.anatomy._flow import Flow
from microtome.anatomy._roles import (
    ATTENTION,
    attention_of,
    child,
    heads_of,
    in_features,
    mixer_of,
    mlp_of,
    out_features,
)
from microtome.anatomy._stored import present
from microtome.errors import ModelUnsupported, error
from microtome.shown import shown

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
    model has a place for a norm but none in it, the norm is the identity: its `scale` is one. What is read behind it is
    `times` what it gives, gain and bias included. Where it runs more than once in a forward, `call` says which of these
    calls is meant, from 0, and how many there are.
    """

    path: str
    centred: bool
    offset: float
    eps: float
    identity: bool = False
    times: float = 1.0
    call: tuple[int, int] | None = None


@dataclass(frozen=True)
class LayerParts:
    """Module paths of one block; None where the block has no such part.

    What a branch adds to the stream is what the module at `*_writes` gives, times `*_by`, and the parameter at `*_plus`
    where there is one. Attention has `n_heads` heads of queries, each `d_head` wide, and `n_kv_heads` of keys and
    values. What `down` gives may be multiplied by a gate: by an activation of what another module gives, both in
    `write_gate`. Branches may be added to what a norm at `mid_base` or `post_base` makes of the stream; where more is
    added behind the last of them, what was there before that is what the module at `until` reads. The module at `mid`
    reads the stream between two branches, its lanes where it has some; `mixed` names sites of norms that do not exist:
    what is read there is mixed from lanes.
    """

    block: str
    mixer: str | None
    attn: str | None
    q: str | None
    k: str | None
    v: str | None
    qkv: str | None
    o: str | None
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
    attn_writes: str | None
    mixer_writes: str | None
    mlp_writes: str | None
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    attn_by: float = 1.0
    mixer_by: float = 1.0
    mlp_by: float = 1.0
    mlp_beside: str | None = None
    attn_plus: str | None = None
    mixer_plus: str | None = None
    mlp_plus: str | None = None
    write_gate: tuple[str, str] | None = None
    mid_base: str | None = None
    post_base: str | None = None
    until: str | None = None
    mid: str | None = None
    mixed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """Module paths of a whole model."""

    layers: tuple[LayerParts, ...]
    embedding: str
    unembedding: str
    final_norm: Norm | None
    form: Form
    family: Family


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


def _chain_of_blocks(model: nn.Module, flow: Flow) -> tuple[str, nn.ModuleList]:
    """The last list of modules of which each read the stream that the one before it wrote.

    Raises:
        ModelUnsupported: there is none.
    """
    found: list[tuple[int, str, nn.ModuleList]] = []
    order = {call.path: n for n, call in enumerate(flow.calls)}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        calls = [flow.first(f"{path}.{i}") for i in range(len(module))]
        streams = [(c.read, c.wrote) for c in calls if c is not None and c.read is not None and c.wrote is not None]
        same = all(x.value.shape == y.value.shape for x, y in streams)
        chained = all(before[1].key == after[0].key for before, after in pairwise(streams))
        within = any(path.startswith(other + ".") for _, other, _ in found)
        if len(streams) == len(module) and same and chained and not within:
            found.append((order[f"{path}.{len(module) - 1}"], path, module))
    weights = {path: sum(p.numel() for p in module.parameters()) for _, path, module in found}
    large = [each for each in found if weights[each[1]] * 4 >= max(weights.values())]
    if not large:
        raise error(
            ModelUnsupported,
            f"{type(model).__name__} has no list of blocks, each of which reads what the one before it writes",
            do="open a language model that is a stack of blocks",
        )
    return max(large, key=lambda each: each[0])[1:]


def norm_of(module: nn.Module, path: str, d_model: int) -> Norm | None:
    """Describe a norm by trying it: which of rms or layer norm, and whether its gain is the weight or one more.

    None for what is no such norm, or nothing that could be tried.
    """
    try:
        return _norm_of(module, path, d_model)
    except Exception:  # noqa: BLE001 (whatever a module makes of a tensor that it does not expect)
        return None


def _norm_of(module: nn.Module, path: str, d_model: int) -> Norm | None:
    weight = present(module, getattr(module, "weight", None))
    like = weight if isinstance(weight, Tensor) else None
    device = like.device if like is not None else None
    generator = torch.Generator().manual_seed(0)
    # The norms of queries and keys are as wide as a head, and some have a gain for each head.
    shape = (d_model,) if like is None else tuple(like.shape)
    x = (torch.randn(4, *shape, generator=generator) * 3 + 1).to(device=device)
    x = x.to(like.dtype) if like is not None else x
    with torch.no_grad():
        got: Tensor = module.forward(x)  # past hooks: those of edits know no such call
    if like is None and torch.equal(got, x):
        return Norm(path, False, 0.0, 0.0, identity=True)
    bias = present(module, getattr(module, "bias", None))
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
        shrunk, grown = (module.forward((like * factor).to(x.dtype)).double() for factor in (1.0, 1e6))
        zero = module.forward(torch.zeros_like(x)).double()  # the bias
    size = (like - like.mean(-1, keepdim=True) * centred).pow(2).mean(-1)
    ratio = ((grown - zero).norm(dim=-1) / (shrunk - zero).norm(dim=-1)).pow(2)
    return max(float(f"{float((size * (ratio - 1)).median()):.1e}"), 0.0)


def _path(module: nn.Module, prefix: str, names: tuple[str, ...]) -> str | None:
    found = child(module, names)
    return None if found is None else f"{prefix}.{found[0]}"


def _norm(block: nn.Module, prefix: str, names: tuple[str, ...], d_model: int) -> Norm | None:
    found = child(block, names)
    if found is None or isinstance(found[1], nn.ModuleList):
        return None
    return norm_of(found[1], f"{prefix}.{found[0]}", d_model)


def _form(config: Any, block: nn.Module) -> Form:
    if getattr(config, "do_layer_norm_before", True) is False or child(block, ("attention.output.LayerNorm",)):
        return "post_norm"
    falcon = getattr(config, "new_decoder_architecture", False) or getattr(config, "parallel_attn", False)
    if getattr(config, "use_parallel_residual", False) or falcon:
        return "parallel"
    return "sequential" if child(block, SECOND_NORM) or child(block, AFTER_MLP) else "parallel"


def _norms(block: nn.Module, path: str, form: Form, d_model: int) -> dict[str, Any]:
    """The norms of a block by their names."""
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
    behind = {"attn_post_norm": after_attention, "mlp_post_norm": after_mlp}
    return {"attn_norm": attn_norm, "mlp_norm": mlp_norm} | behind


def _block(block: nn.Module, path: str, form: Form, d_model: int, config: Any, by: float) -> LayerParts:
    """The parts of a block by their names.

    Raises:
        ModelUnsupported: it has no branch that can be found.
    """
    parts = attention_of(block, path) | mlp_of(block, path)
    up, down = (
        None if (own := parts[n]) is None else block.get_submodule(own[len(path) + 1 :]) for n in ("up", "down")
    )
    if up is not None and down is not None and parts["gate"] is None and out_features(up) == 2 * in_features(down):
        parts |= {"gate_up": parts["up"], "up": None}
    if parts["o"] is None:
        parts |= dict.fromkeys(("attn", "q", "k", "v", "qkv", "o"))
    mixer = mixer_of(block, path, parts.values())
    if parts["o"] is None and parts["mlp"] is None and parts["down"] is None and mixer is None:
        raise error(
            ModelUnsupported,
            f"cannot find a branch in {path} ({type(block).__name__})",
            got=", ".join(name for name, _ in block.named_modules() if name),
            allowed="attention, an MLP, or another mixer",
            do="open a model of a known family",
        )
    norms = _norms(block, path, form, d_model)
    named: dict[str, Any] = norms | parts
    behind = (norms["attn_post_norm"], norms["mlp_post_norm"]) if form == "sequential" else (None, None)
    n_heads, n_kv_heads, d_head = heads_of(block, path, parts, config)
    return LayerParts(
        block=path,
        mixer=mixer,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        attn_writes=behind[0] or parts["o"],
        mixer_writes=mixer,
        mlp_writes=behind[1] or parts["down"] or parts["mlp"],
        attn_by=by,
        mixer_by=by,
        mlp_by=by,
        **named,
    )


def discover(model: Any, flow: Flow | None = None) -> Parts:
    """Find the parts of a loaded `PreTrainedModel`: by their names, or by what passed between them in a forward.

    Raises:
        ModelUnsupported: the module tree has no blocks, no embedding, or no unembedding that can be found.
    """
    config = model.config.get_text_config()
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise error(
            ModelUnsupported,
            f"{type(model).__name__} has no unembedding: it is not a language model",
            do="open a causal or masked language model",
        )
    if flow is None:
        blocks_path, blocks = _blocks(model, config.num_hidden_layers)
    else:
        blocks_path, blocks = _chain_of_blocks(model, flow)
    names = {id(module): path for path, module in model.named_modules()}
    family = family_of(config.model_type)
    form = _form(config, blocks[0])
    d_model = _width(blocks[0], model.get_input_embeddings())
    by = number(config, family.branch_scale) or 1.0
    layers = tuple(_block(block, f"{blocks_path}.{i}", form, d_model, config, by) for i, block in enumerate(blocks))
    trunk_path = blocks_path.rpartition(".")[0]
    found = child(model.get_submodule(trunk_path), FINAL_NORM)
    final = None if found is None else norm_of(found[1], f"{trunk_path}.{found[0]}", d_model)
    return Parts(
        layers=layers,
        embedding=names[id(model.get_input_embeddings())],
        unembedding=names[id(unembedding)],
        final_norm=final,
        form=form,
        family=family,
    )


def _width(block: nn.Module, embedding: nn.Module) -> int:
    """Of the stream: what attention's output projection gives, or else as wide as the embeddings."""
    o = attention_of(block, "")["o"]
    module: Any = embedding if o is None else block.get_submodule(o.removeprefix("."))
    if o is None or getattr(module, "weight", None) is None:
        return in_features(embedding)
    return out_features(module)
