"""Hook points: for every site of a model, the module and the side of it where the site is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from microtome.anatomy._discover import LayerParts, Norm, Parts
from microtome.anatomy._end import MIXED, UNKNOWN, End
from microtome.anatomy._kernels import hiding_kernel
from microtome.anatomy._mixture import mixture_of
from microtome.anatomy._roles import attends, in_features, out_features, uses_interface
from microtome.anatomy._sites import SITES, Site
from microtome.shown import shown

ROWS = 2
"""Rows of the probe."""
Side = Literal["input", "output", "inplace", "norm", "attention", "router", "experts", "neurons", "result", "logits"]


@shown
@dataclass(frozen=True)
class Split:
    """A part of a fused last axis: seen as (groups, chunks, width), chunks `low` to `high` of every group."""

    groups: int
    chunks: int
    width: int
    low: int
    high: int

    def view(self, x: Tensor, axis: int = -1) -> Tensor:
        """The part as [..., groups, high - low, width], a view."""
        x = x.unflatten(axis, (self.groups, self.chunks, self.width))
        return x.narrow(axis - 1 if axis < 0 else axis + 1, self.low, self.high - self.low)


@shown
@dataclass(frozen=True)
class HookPoint:
    """Where a site is.

    Attributes:
        module: path of the module whose input or output holds the tensor.
        side: which tensor of it, and how an edit is written back.
        split: the part of a fused last axis.
        heads: the last axis holds this many heads; for keys and values, how many the model has.
        sizes: axes of another length than the sizes of the model.
        lanes: the axis of the tensor that counts the lanes of a stream of several; the site holds them side by side.
        scale: the site's value is this many times the tensor.
        norm: for `side="norm"`, the norm whose divisor is the value.
        beside: path of another module, whose output the value has too.
        clone: the model changes this tensor later, so a reader needs its own copy.
        plus: path of a parameter [d_model] that the site's value has besides.
        call: of a module that runs more than once in a forward, which call, from 0, and how many there are.
    """

    module: str
    side: Side
    split: Split | None = None
    heads: int | None = None
    scale: float = 1.0
    norm: Norm | None = None
    clone: bool = False
    sizes: tuple[tuple[str, int], ...] = ()
    lanes: int | None = None
    beside: str | None = None
    call: tuple[int, int] | None = None
    plus: str | None = None


def fused_splits(parts: Parts, size: int, n_heads: int, n_kv: int) -> dict[str, Split]:
    """Where q, k and v lie in the output of a fused projection of `size` features."""
    layout = parts.family.fused_qkv
    if layout == "per_head":
        width = size // (3 * n_heads)
        return {name: Split(n_heads, 3, width, i, i + 1) for i, name in enumerate("qkv")}
    if layout == "quarters":
        width, n = size // (3 * n_heads), n_heads // 4
        return {name: Split(4, 3 * n, width, i * n, (i + 1) * n) for i, name in enumerate("qvk")}
    width = size // (n_heads + 2 * n_kv)
    if layout == "grouped":
        group = n_heads // n_kv
        bounds = {"q": (0, group), "k": (group, group + 1), "v": (group + 1, group + 2)}
        return {name: Split(n_kv, group + 2, width, low, high) for name, (low, high) in bounds.items()}
    bounds = {"q": (0, n_heads), "k": (n_heads, n_heads + n_kv), "v": (n_heads + n_kv, n_heads + 2 * n_kv)}
    return {name: Split(1, n_heads + 2 * n_kv, width, low, high) for name, (low, high) in bounds.items()}


def neurons_of(model: nn.Module, config: Any, layers: tuple[LayerParts, ...]) -> int:
    """How many neurons an MLP has, of the first layer that has one."""
    for layer in layers:
        if layer.down is not None:
            return in_features(model.get_submodule(layer.down))
    known = ("moe_intermediate_size", "intermediate_size")
    return next((int(n) for name in known if isinstance(n := getattr(config, name, None), int)), 0)


class HookPoints:
    """Collects the hook points of one model, and the reasons for what it lacks."""

    def __init__(self, model: Any, parts: Parts, config: Any, stream: Sequence[int] = ()) -> None:
        self.model, self.parts, self.config = model, parts, config
        attentions = [layer.attn for layer in parts.layers if layer.attn is not None]
        self.interface = bool(attentions) and uses_interface(model.get_submodule(attentions[0]))
        # A stream [row, pos, width] may also have lanes, before the rows or before the width.
        self.lanes = None if len(stream) < 4 else 0 if stream[1] == ROWS else 2
        wide = stream[-1] * (1 if self.lanes is None else stream[self.lanes]) if stream else 0
        self.wide: tuple[tuple[str, int], ...] = (("d_model", wide),) if wide else ()
        self.hook_points: dict[Site, HookPoint] = {}
        self.missing: dict[Site, str] = {}

    def norm(self, site: Site, norm: Norm | None, why: str) -> None:
        """What a norm divides by; or why there is none."""
        if norm is None:
            self.missing[site] = why
        else:
            self.hook_points[site] = HookPoint(norm.path, "norm", norm=replace(norm, times=1.0), call=norm.call)

    def end(self, end: End) -> None:
        """The end of the stream: its norm, what the head reads of it, and the logits."""
        self.norm(Site("final.scale"), end.norm, end.why)
        head = self.model.get_submodule(self.parts.unembedding)
        point = HookPoint(self.parts.unembedding, "input", sizes=(("d_model", in_features(head)),))
        if end.norm is not None and end.own_transform:
            point = HookPoint(end.norm.path, "output", call=end.norm.call)
        self.hook_points[Site("final")] = point
        self.hook_points[Site("logits")] = HookPoint("", "logits", sizes=(("vocab", out_features(head)),))

    def residual(self, i: int, layer: LayerParts) -> None:
        """The stream before, between and after the branches of a layer."""
        self.hook_points[Site("resid_pre", i)] = self.stream(layer.block, "input")
        self.hook_points[Site("resid_post", i)] = self.stream(layer.block, "output")
        site = Site("resid_mid", i)
        if self.parts.form == "parallel":
            self.missing[site] = "both branches read resid_pre (parallel block)"
        elif len([x for x in (layer.attn_writes, layer.mixer, layer.mlp or layer.down) if x is not None]) < 2:
            self.missing[site] = "the block has one branch"
        elif layer.mid is not None:
            self.hook_points[site] = self.stream(layer.mid, "inplace")
        elif self.parts.form == "post_norm" and layer.attn_post_norm is not None:
            self.hook_points[site] = self.stream(layer.attn_post_norm, "output")
        else:
            reads = layer.mlp_norm.path if layer.mlp_norm else layer.mlp
            if reads is None:
                self.missing[site] = "no module reads it"
            else:
                self.hook_points[site] = HookPoint(reads, "inplace")

    def stream(self, path: str, side: Side) -> HookPoint:
        """The stream at a module."""
        return HookPoint(path, side, sizes=self.wide, lanes=self.lanes)

    def attention(self, i: int, layer: LayerParts) -> None:
        """The sites of attention."""
        if layer.attn is None or layer.o is None:
            block = self.model.get_submodule(layer.block)
            unknown = any("attention" in type(m).__name__.lower() and attends(m) for m in block.modules())
            why = "its attention has no known form" if unknown else "the block has no attention"
            why += "" if layer.mixer is None else ": see mixer.in and mixer_out"
            names = (name for name in SITES if name.startswith("attn"))
            self.missing.update({Site(name, i): why for name in names})
            return
        n_heads, n_kv_heads = layer.n_heads, layer.n_kv_heads
        self.norm(Site("attn.scale", i), layer.attn_norm, MIXED if "attn.scale" in layer.mixed else UNKNOWN)
        self.hook_points[Site("attn.in", i)] = HookPoint(layer.attn, "input")
        # In latent attention queries and keys are wider than values; some layers may have other heads than others.
        o = self.model.get_submodule(layer.o)
        v = None if layer.v is None else self.model.get_submodule(layer.v)
        sizes: tuple[tuple[str, int], ...] = (("head", n_heads), ("kv_head", n_kv_heads))
        mixed = (*sizes, ("d_head", in_features(o) // n_heads))
        asked = (*sizes, ("d_head", layer.d_head))
        given = mixed if v is None else (*sizes, ("d_head", out_features(v) // n_kv_heads))
        self.hook_points[Site("attn.q", i)] = HookPoint(layer.attn, "attention", sizes=asked)
        self.hook_points[Site("attn.k", i)] = HookPoint(layer.attn, "attention", heads=n_kv_heads, sizes=asked)
        self.hook_points[Site("attn.v", i)] = HookPoint(layer.attn, "attention", heads=n_kv_heads, sizes=given)
        kernel = hiding_kernel(self.model.config) if self.interface else None
        for slot in ("scores", "pattern"):
            site = Site(f"attn.{slot}", i)
            if kernel is None:
                self.hook_points[site] = HookPoint(layer.attn, "attention", sizes=sizes)
            else:
                self.missing[site] = f"the masks of the attention kernel {kernel} cannot be read, open it under sdpa"
        self.hook_points[Site("attn.z", i)] = HookPoint(layer.o, "input", heads=n_heads, sizes=mixed)
        self.hook_points[Site("attn.result", i)] = HookPoint(layer.o, "result", heads=n_heads, sizes=sizes)
        if layer.attn_writes is None:
            why = "the block has no attention that adds to the stream: its mixer reads what it writes"
            self.missing[Site("attn_out", i)] = why
        else:
            point = HookPoint(layer.attn_writes, "output", scale=layer.attn_by, plus=layer.attn_plus)
            self.hook_points[Site("attn_out", i)] = point

    def mixer(self, i: int, layer: LayerParts) -> None:
        """The sites of a mixer that is no attention."""
        if layer.mixer is not None:
            self.hook_points[Site("mixer.in", i)] = HookPoint(layer.mixer, "input")
            writes = layer.mixer_writes or layer.mixer
            point = HookPoint(writes, "output", scale=layer.mixer_by, plus=layer.mixer_plus)
            self.hook_points[Site("mixer_out", i)] = point
        else:
            why = "the block has no mixer but attention: see attn.in and attn_out"
            self.missing.update({Site(name, i): why for name in ("mixer.in", "mixer_out")})

    def mlp(self, i: int, layer: LayerParts) -> None:
        """The sites of an MLP or a mixture."""
        writes = layer.mlp_writes or layer.down or layer.mlp
        if writes is None:
            names = (name for name in SITES if name.startswith("mlp"))
            self.missing.update({Site(name, i): "the block has no MLP that adds to the stream" for name in names})
            return
        self.norm(Site("mlp.scale", i), layer.mlp_norm, MIXED if "mlp.scale" in layer.mixed else UNKNOWN)
        reads = layer.mlp or layer.up
        if layer.mlp_beside is not None and layer.mlp_norm is not None:  # two modules read what the norm gives
            self.hook_points[Site("mlp.in", i)] = HookPoint(layer.mlp_norm.path, "output")
        elif reads is not None:
            self.hook_points[Site("mlp.in", i)] = HookPoint(reads, "input")
        if layer.experts is not None and layer.mlp is not None:
            self.experts(i, layer, layer.mlp, layer.experts)
        elif layer.down is not None:
            self.neurons(i, layer, layer.down)
            for name in ("mlp.router", "mlp.experts", "mlp.experts.post"):
                self.missing[Site(name, i)] = "the layer is not a mixture of experts"
        else:
            inner = ("mlp.gate", "mlp.up", "mlp.pre", "mlp.post", "mlp.router", "mlp.experts", "mlp.experts.post")
            self.missing.update({Site(name, i): "the parts of the MLP have no known form" for name in inner})
        clone = self.parts.family.sums_in_place and self.parts.form == "parallel"
        point = HookPoint(
            writes, "output", scale=layer.mlp_by, clone=clone, beside=layer.mlp_beside, plus=layer.mlp_plus
        )
        self.hook_points[Site("mlp_out", i)] = point

    def experts(self, i: int, layer: LayerParts, mlp: str, experts: str) -> None:
        """The sites inside a mixture."""
        names = ("mlp.router", "mlp.experts", "mlp.experts.post")
        why = "the layer is a mixture: see mlp.router and mlp.experts.post"
        self.missing.update({Site(name, i): why for name in ("mlp.gate", "mlp.up", "mlp.pre", "mlp.post")})
        found = mixture_of(self.model, self.config, mlp, layer.router, experts)
        if isinstance(found, str):
            self.missing.update({Site(name, i): found for name in names})
            return
        choices, stacked = ("expert", found.n_choices), (("stacked", found.top_k),) if found.stacked else ()
        if not found.stacked:
            self.hook_points[Site("mlp.router", i)] = HookPoint(experts, "router", sizes=(choices,))
        elif layer.router is not None:
            self.hook_points[Site("mlp.router", i)] = HookPoint(layer.router, "output", sizes=(choices,))
        sizes = (("rank", found.top_k), *stacked)
        self.hook_points[Site("mlp.experts", i)] = HookPoint(experts, "experts", sizes=sizes)
        sizes = (("expert", found.n_experts), ("neuron", found.n_neurons), *stacked)
        if found.n_neurons:
            self.hook_points[Site("mlp.experts.post", i)] = HookPoint(experts, "neurons", sizes=sizes)
        else:
            self.missing[Site("mlp.experts.post", i)] = "the weights of the experts have no known form"

    def neurons(self, i: int, layer: LayerParts, down: str) -> None:
        """The sites inside an MLP."""
        up = layer.up
        width = in_features(self.model.get_submodule(down))
        sizes = (("neuron", width),)
        self.hook_points[Site("mlp.post", i)] = HookPoint(down, "input", sizes=sizes)
        if layer.gate_up is not None:
            for k, name in enumerate(("mlp.gate", "mlp.up")):
                split = Split(1, 2, width, k, k + 1)
                self.hook_points[Site(name, i)] = HookPoint(layer.gate_up, "output", split=split, sizes=sizes)
        elif layer.gate is not None and up is not None:
            self.hook_points[Site("mlp.gate", i)] = HookPoint(layer.gate, "output", sizes=sizes)
            self.hook_points[Site("mlp.up", i)] = HookPoint(up, "output", sizes=sizes)
        elif up is not None:
            self.hook_points[Site("mlp.pre", i)] = HookPoint(up, "output", sizes=sizes)
            for name in ("mlp.gate", "mlp.up"):
                self.missing[Site(name, i)] = "the MLP is not gated: see mlp.pre"
            return
        self.missing[Site("mlp.pre", i)] = "the MLP is gated: see mlp.gate and mlp.up"
