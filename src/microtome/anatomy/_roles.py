"""Which modules of a block are its attention, its MLP, or another mixer of positions.

By the names that families use, else by what the modules are: attention has projections of queries and takes a softmax.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import takewhile
from string import ascii_uppercase
from typing import Any

from torch import nn

from microtome.anatomy._stored import sizes

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention")
MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "moe", "feedforward")
Q = ("q_proj", "query", "q_b_proj", "query_proj", "project_q", "Wq")
K, V = ("k_proj", "key", "key_proj", "project_k", "Wk"), ("v_proj", "value", "value_proj", "project_v", "Wv")
QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv")
O = ("o_proj", "out_proj", "c_proj", "dense", "output.dense", "wo", "Wo", "attention_out")  # noqa: E741 - the field's letter
GATE = ("gate_proj", "w1", "linear_gate")
UP = ("up_proj", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "intermediate.dense", "linear_in", "Wi")
GATE_UP = ("gate_up_proj",)
DOWN = ("down_proj", "w2", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "output.dense", "linear_out", "Wo")
ROUTER = ("router", "gate")
SHARED = ("shared_mlp", "shared_expert", "shared_experts")
_SOFTMAX = {"softmax", "Softmax", "scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"}
_OTHERS = re.compile("cross|encoder_attn|adapter|altup|laurel|per_layer|embed|_hc$|hyper")
"""Names of parts that read something else than the stream, or that change what is there."""
_MLP_KIND = re.compile("mlp|feedforward|feed_forward|ffn|moe|mixtureofexperts|sparsemoe", re.IGNORECASE)


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


def _projection(module: nn.Module, prefix: str, names: tuple[str, ...]) -> str | None:
    """The path of a projection: of the single module inside of it, where it has no sizes of its own."""
    path, inner = _path(module, prefix, names), (child(module, names) or ("", module))[1]
    while path is not None and not _says_sizes(inner) and len(own := dict(inner.named_children())) == 1:
        ((name, inner),) = own.items()
        path = f"{path}.{name}"
    return path


def _says_sizes(module: nn.Module) -> bool:
    """Whether a module is a matrix of known sizes."""
    try:
        return bool(sizes(module))
    except TypeError:
        return False


def attention_of(block: nn.Module, prefix: str) -> dict[str, str | None]:
    """The modules of a block's attention: by the usual names, else the first that projects queries and attends."""
    none: dict[str, str | None] = dict.fromkeys(("attn", "q", "k", "v", "qkv", "o"))
    name, attn = child(block, ATTENTION) or ("", None)
    if attn is None or not _projects(attn):
        found = ((path, m) for path, m in block.named_modules() if path and _projects(m) and attends(m))
        name, attn = next(found, ("", None)) if attn is None or not attends(attn) else (name, attn)
    if attn is None or not attends(attn) or isinstance(attn, nn.ModuleList):
        return none
    path = f"{prefix}.{name}"
    o = _projection(attn, path, O) or (f"{path}.attention.out_proj" if child(attn, ("attention.out_proj",)) else None)
    inner = child(attn, ("attention", "self"))
    if inner is not None and _projects(inner[1]):
        path, attn = f"{path}.{inner[0]}", inner[1]
    fused = _projection(attn, path, QKV) if not child(attn, Q) else None
    return {
        "attn": path, "q": _projection(attn, path, Q), "k": _projection(attn, path, K), "v": _projection(attn, path, V),
        "qkv": fused, "o": o,
    }  # fmt: skip


def _projects(module: nn.Module) -> bool:
    """Whether a module has projections of queries."""
    return child(module, Q) is not None or child(module, QKV) is not None


def attends(module: nn.Module) -> bool:
    """Whether a softmax over positions is taken anywhere inside a module, or the attention interface is asked."""
    return any(_SOFTMAX & _names_in(type(part)) for part in module.modules())


@cache
def _names_in(kind: type) -> frozenset[str]:
    """All names that the methods of a class of `transformers`, or of the model's own code, use."""
    found: set[str] = set()
    for own in kind.__mro__:
        if own.__module__.startswith("torch."):
            continue
        for value in vars(own).values():
            code = getattr(getattr(value, "__wrapped__", value), "__code__", None)
            found.update(() if code is None else code.co_names)
    return frozenset(found)


def uses_interface(attn: nn.Module) -> bool:
    """Whether the attention module's forward goes through the attention interface of `transformers`."""
    forward = getattr(type(attn), "forward")  # noqa: B009 - a plain attribute would be bound by the type checker
    code = getattr(getattr(forward, "__wrapped__", forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def mixer_of(block: nn.Module, prefix: str, taken: Iterable[str | None]) -> str | None:
    """The part of a block that has weights and is neither attention, nor an MLP, nor a norm."""
    others = [path for path in taken if path is not None]
    for name, module in block.named_children():
        path = f"{prefix}.{name}"
        known = any(other == path or other.startswith(path + ".") for other in others)
        weights = any(p.dim() > 1 for p in module.parameters())
        if not known and weights and not _is_mlp(module, block) and not _OTHERS.search(name):
            return path
    return None


def _is_mlp(module: nn.Module, block: nn.Module) -> bool:
    """Whether a part of a block is an MLP by the name of its class, without what that shares with the block's."""
    name = type(module).__name__
    same = takewhile(lambda pair: pair[0] == pair[1], zip(name, type(block).__name__, strict=False))
    shared = "".join(letter for letter, _ in same).rstrip(ascii_uppercase)
    return _MLP_KIND.search(name.removeprefix(shared)) is not None


def _activation(holder: nn.Module, path: str) -> str | None:
    for name in ("act_fn", "activation_fn", "act", "gelu_impl", "intermediate.intermediate_act_fn"):
        if child(holder, (name,)) is not None:
            return f"{path}.{name}"
    return None


def mlp_of(block: nn.Module, prefix: str) -> dict[str, str | None]:
    """The modules of a block's MLP: by the usual names, else by the kind of module."""
    found = child(block, MLP) or next(((name, m) for name, m in block.named_children() if _is_mlp(m, block)), None)
    path, holder = (f"{prefix}.{found[0]}", found[1]) if found else (prefix, block)
    none = dict.fromkeys(("gate", "up", "gate_up", "down", "act", "router", "experts", "mlp_beside"))
    where = next(((at, m) for at, m in ((path, holder), (prefix, block)) if child(m, ("experts",))), None)
    if where is not None:  # inside the MLP, or beside it
        mixture = {"mlp": path, "router": _path(where[1], where[0], ROUTER), "experts": f"{where[0]}.experts"}
        return none | mixture | {"mlp_beside": _path(block, prefix, SHARED)}
    if found is None and child(block, DOWN) is None:
        return none | {"mlp": None}
    gate, fused = _projection(holder, path, GATE), _projection(holder, path, GATE_UP)
    return none | {
        "mlp": path if found else None, "gate": gate, "gate_up": fused, "up": _projection(holder, path, UP),
        "down": _projection(holder, path, DOWN), "act": _activation(holder, path),
    }  # fmt: skip


def is_conv1d(module: nn.Module) -> bool:
    """Whether a projection, or the one inside an adapter, stores its weight as [in, out], as GPT-2's does."""
    inner: Any = module
    while isinstance(getattr(inner, "base_layer", None), nn.Module):
        inner = inner.base_layer
    module = inner
    return type(module).__name__ == "Conv1D"


def out_features(module: nn.Module) -> int:
    """Output size of a projection, whichever way its weight is stored."""
    return int(sizes(module)[0])


def in_features(module: nn.Module) -> int:
    """Input size of a projection, whichever way its weight is stored."""
    return int(sizes(module)[1])


def _number(of: object, *names: str) -> int:
    """The first of some attributes that is a whole number, or 0."""
    for name in names:
        try:
            value = getattr(of, name, None)
        except Exception:  # noqa: BLE001 (some configurations refuse what differs from layer to layer)
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def heads_of(block: nn.Module, prefix: str, parts: Mapping[str, str | None], config: Any) -> tuple[int, int, int]:
    """How many heads of queries, and of keys and values, attention has in a block, and how wide its queries are.

    Widths are read off the projections; where queries come with a gate of their size, half of it is theirs.
    """
    if parts["attn"] is None or parts["o"] is None:
        return 0, 0, 0
    inside = {name: block.get_submodule(path[len(prefix) + 1 :]) for name, path in parts.items() if path is not None}
    attn, read = inside["attn"], in_features(inside["o"])
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    d_head, n_heads = _number(attn, "head_dim"), _number(attn, *names) or _number(config, *names)
    if "q" in inside and d_head and (not n_heads or out_features(inside["q"]) % (n_heads * d_head)):
        asked = out_features(inside["q"]) // d_head
        n_heads = asked // 2 if asked * d_head == 2 * read else asked
    n_heads = n_heads if n_heads and read % n_heads == 0 else 1
    if "q" not in inside:
        return n_heads, _fused_kv_heads(config, n_heads), read // n_heads
    d_query = out_features(inside["q"]) // n_heads
    d_query = d_head if d_head and d_query == 2 * d_head else d_query
    keys = out_features(inside["k"]) if "k" in inside else 0
    n_kv = keys // d_query if keys and keys % d_query == 0 else _number(config, "num_key_value_heads") or n_heads
    return n_heads, n_kv, d_query


def _fused_kv_heads(config: Any, n_heads: int) -> int:
    """How many heads of keys and values a fused projection gives."""
    if getattr(config, "new_decoder_architecture", False):
        return int(config.num_kv_heads)
    if (shared := getattr(config, "multi_query", None)) is not None:  # Falcon and GPTBigCode
        return 1 if shared else n_heads
    return _number(config, "num_key_value_heads") or n_heads
