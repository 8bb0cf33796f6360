"""The anatomy of a model: its sizes, and for every site the hook point by which it is read and written.

A hook point is data: a module, the side of it, and the part of the tensor. `microtome.run` makes hooks of hook points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from microtome.anatomy._discover import LayerParts, Norm, Parts, discover, is_conv1d
from microtome.anatomy._family import number
from microtome.anatomy._kernels import hiding_kernel
from microtome.anatomy._rotary import RotarySwitch, switch_of
from microtome.anatomy._sites import SITES, Address, Site
from microtome.errors import SiteError, error
from microtome.shown import brief, shown

Side = Literal["input", "output", "inplace", "norm", "attention", "router", "experts", "result", "logits"]


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
        scale: the site's value is this many times the tensor.
        norm: for `side="norm"`, the norm whose divisor is the value.
        clone: the model changes this tensor later, so a reader needs its own copy.
    """

    module: str
    side: Side
    split: Split | None = None
    heads: int | None = None
    scale: float = 1.0
    norm: Norm | None = None
    clone: bool = False
    sizes: tuple[tuple[str, int], ...] = ()


@shown
@dataclass(frozen=True)
class Anatomy:
    """Sizes, parts and sites of one model. `missing` gives why a site is absent, by layer or for all (None).

    `rotary_switch` is where rows of a batch would change each other, if they would.
    """

    name: str
    model_type: str
    attention: Literal["interface", "inline"]
    causal: bool
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    first_position: int
    n_experts: int
    gated: bool
    parts: Parts
    hook_points: Mapping[Site, HookPoint]
    missing: Mapping[Site, str]
    logit_scale: float
    logit_softcap: float | None
    rotary_switch: RotarySwitch | None = None

    def _facts(self) -> dict[str, str]:
        """Its form and sizes, and which sites it has and lacks."""
        experts = f", {self.n_experts} experts" if self.n_experts else ""
        lacks = dict.fromkeys(site.name for site in self.missing)
        return {
            "name": brief(self.name),
            "model_type": self.model_type,
            "layers": f"{self.n_layers} of form {self.parts.form}, d_model {self.d_model}",
            "heads": f"{self.n_heads}, {self.n_kv_heads} key/value heads of {self.d_head}",
            "neurons": f"{self.d_mlp}, {'gated' if self.gated else 'plain'}{experts}",
            "vocabulary": str(self.d_vocab),
            "context": str(self.n_ctx),
            "causal": str(self.causal),
            "sites": f"{len(self.hook_points)}, {len({site.name for site in self.hook_points})} names",
            "missing": ", ".join(lacks),
        }

    def order(self, site: Site) -> tuple[int, int]:
        """A key that sorts sites as a forward reaches them within each layer, the model's own sites first."""
        return (-1 if site.layer is None else site.layer, list(SITES).index(site.name))

    def units(self, site: Site) -> int:
        """How many units `[units]` of a site can select from."""
        return 1 if site.spec.unit == "batch" else self.size(site, site.spec.unit)

    def size(self, site: Site, axis: str) -> int:
        """The length of one of a site's own axes: all but the batch and the positions."""
        sizes = {
            "head": self.n_heads, "kv_head": self.n_kv_heads, "d_head": self.d_head, "d_model": self.d_model,
            "neuron": self.d_mlp, "vocab": self.d_vocab, "expert": self.n_experts,
        }  # fmt: skip
        return dict(self.hook_points[site].sizes).get(axis) or sizes[axis]

    def sites(self, address: Address) -> list[Site]:
        """The sites that an address selects, in model order.

        Raises:
            SiteError: a layer or unit is out of range, or the model has no such site; names those that exist.
        """
        where = f'"{address}" in {self.name}'
        if address.layers is None:
            found = [Site(address.name)]
        else:
            layers = address.layers.resolve(self.n_layers)
            if layers is None:
                raise error(
                    SiteError,
                    f"no layers {address.layers} for {where}",
                    allowed=f"layers 0 to {self.n_layers - 1}",
                    do=f'for the last layer write "{self.n_layers - 1}.{address.name}" or "-1.{address.name}"',
                )
            found = [Site(address.name, layer) for layer in layers]
        present = [site for site in found if site in self.hook_points]
        absent = [site for site in found if site not in self.hook_points]
        explicit = address.layers is not None and not address.layers.is_all
        if absent and (explicit or not present):
            near = sorted({s.name for s in self.hook_points if s.layer == absent[0].layer}, key=list(SITES).index)
            reason = self.missing.get(absent[0], "it does not apply to this model")
            raise SiteError(f"no site {absent[0]} in {self.name}: {reason}. Its sites there: {', '.join(near)}.")
        size = min(self.units(site) for site in present)
        if address.spec.unit == "batch" and not address.units.is_all:
            raise error(SiteError, f"{where} has no units to choose from", do=f'drop "[{address.units}]"')
        if not address.units.is_all and address.units.resolve(size) is None:
            raise error(
                SiteError,
                f"no units [{address.units}] for {where}",
                allowed=f"{address.spec.unit} 0 to {size - 1}",
                do=f"choose {address.spec.unit} indices below {size}",
            )
        return present

    def describe(self) -> str:
        """A few lines of text: sizes, form, and what is missing and why."""
        kind = "gated" if self.gated else "plain"
        experts = f", {self.n_experts} experts" if self.n_experts else ""
        lines = [
            f"{self.name} ({self.model_type}): {self.n_layers} layers, {self.parts.form}, d_model {self.d_model}",
            f"attention: {self.n_heads} heads, {self.n_kv_heads} key/value heads of {self.d_head}, {self.attention}",
            f"MLP: {self.d_mlp} neurons, {kind}{experts}; vocabulary {self.d_vocab}; context {self.n_ctx}",
        ]
        if self.parts.family.note:
            lines.append(self.parts.family.note)
        reasons: dict[tuple[str, str], list[int]] = {}
        for site, why in self.missing.items():
            reasons.setdefault((site.name, why), []).append(-1 if site.layer is None else site.layer)
        for (name, why), layers in reasons.items():
            some = "" if len(layers) == self.n_layers or layers == [-1] else f" in layers {layers}"
            lines.append(f"no {name}{some}: {why}")
        return "\n".join(lines)


def out_features(module: nn.Module) -> int:
    """Output size of a projection, whichever way round its weight is stored."""
    weight: Any = module.weight
    return int(weight.shape[1 if is_conv1d(module) else 0])


def in_features(module: nn.Module) -> int:
    """Input size of a projection, whichever way round its weight is stored."""
    weight: Any = module.weight
    return int(weight.shape[0 if is_conv1d(module) else 1])


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


def _kv_heads(model: nn.Module, config: Any, layer: LayerParts, n_heads: int) -> int:
    if getattr(config, "new_decoder_architecture", False):
        return int(config.num_kv_heads)
    if (shared := getattr(config, "multi_query", None)) is not None:  # Falcon and GPTBigCode
        return 1 if shared else n_heads
    if layer.k is not None and layer.q is not None:
        d_head = out_features(model.get_submodule(layer.q)) // n_heads
        return out_features(model.get_submodule(layer.k)) // d_head
    return int(getattr(config, "num_key_value_heads", None) or n_heads)


def _neurons(model: nn.Module, config: Any, layers: tuple[LayerParts, ...]) -> int:
    for layer in layers:
        if layer.down is not None:
            return in_features(model.get_submodule(layer.down))
    return int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)


class _Taps:
    """Collects the hook points of one model, and the reasons for what it lacks."""

    def __init__(self, model: Any, parts: Parts, n_heads: int, n_kv_heads: int, branch_scale: float) -> None:
        self.model, self.parts, self.branch_scale = model, parts, branch_scale
        self.interface = uses_interface(model.get_submodule(parts.layers[0].attn))
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.hook_points: dict[Site, HookPoint] = {}
        self.missing: dict[Site, str] = {}

    def norm(self, site: Site, norm: Norm | None) -> None:
        if norm is None:
            self.missing[site] = "there is no norm of a known form"
        else:
            self.hook_points[site] = HookPoint(norm.path, "norm", norm=norm)

    def residual(self, i: int, layer: LayerParts) -> None:
        self.hook_points[Site("resid_pre", i)] = HookPoint(layer.block, "input")
        self.hook_points[Site("resid_post", i)] = HookPoint(layer.block, "output")
        site = Site("resid_mid", i)
        if self.parts.form == "parallel":
            self.missing[site] = "both branches read resid_pre (parallel block)"
        elif self.parts.form == "post_norm" and layer.attn_post_norm is not None:
            self.hook_points[site] = HookPoint(layer.attn_post_norm, "output")
        else:
            reads = layer.mlp_norm.path if layer.mlp_norm else layer.mlp
            if reads is None:
                self.missing[site] = "no module reads it"
            else:
                self.hook_points[site] = HookPoint(reads, "inplace")

    def attention(self, i: int, layer: LayerParts) -> None:
        self.norm(Site("attn.scale", i), layer.attn_norm)
        self.hook_points[Site("attn.in", i)] = HookPoint(layer.attn, "input")
        # In latent attention queries and keys are wider than values.
        width = out_features(self.model.get_submodule(layer.q)) // self.n_heads if layer.q is not None else 0
        sizes = (("d_head", width),) if width else ()
        self.hook_points[Site("attn.q", i)] = HookPoint(layer.attn, "attention", sizes=sizes)
        self.hook_points[Site("attn.k", i)] = HookPoint(layer.attn, "attention", heads=self.n_kv_heads, sizes=sizes)
        self.hook_points[Site("attn.v", i)] = HookPoint(layer.attn, "attention", heads=self.n_kv_heads)
        kernel = hiding_kernel(self.model.config) if self.interface else None
        for slot in ("scores", "pattern"):
            site = Site(f"attn.{slot}", i)
            if kernel is None:
                self.hook_points[site] = HookPoint(layer.attn, "attention")
            else:
                self.missing[site] = f"the masks of the attention kernel {kernel} cannot be read, open it under sdpa"
        self.hook_points[Site("attn.z", i)] = HookPoint(layer.o, "input", heads=self.n_heads)
        self.hook_points[Site("attn.result", i)] = HookPoint(layer.o, "result", heads=self.n_heads)
        after = layer.attn_post_norm if self.parts.form == "sequential" else None
        self.hook_points[Site("attn_out", i)] = HookPoint(after or layer.o, "output", scale=self.branch_scale)

    def mlp(self, i: int, layer: LayerParts) -> None:
        self.norm(Site("mlp.scale", i), layer.mlp_norm)
        reads = layer.mlp or layer.up
        if reads is not None:
            self.hook_points[Site("mlp.in", i)] = HookPoint(reads, "input")
        if layer.experts is not None and layer.router is not None and layer.mlp is not None:
            self.hook_points[Site("mlp.router", i)] = HookPoint(layer.router, "router")
            router: Any = self.model.get_submodule(layer.router)
            self.hook_points[Site("mlp.experts", i)] = HookPoint(
                layer.experts, "experts", sizes=(("rank", int(router.top_k)),)
            )
            for name in ("mlp.gate", "mlp.up", "mlp.pre", "mlp.post"):
                self.missing[Site(name, i)] = "the layer is a mixture: see mlp.router and mlp.experts"
        else:
            self.neurons(i, layer)
            for name in ("mlp.router", "mlp.experts"):
                self.missing[Site(name, i)] = "the layer is not a mixture of experts"
        writes = layer.down or layer.mlp
        after = layer.mlp_post_norm if self.parts.form == "sequential" else None
        if writes is not None:
            clone = self.parts.family.sums_in_place and self.parts.form == "parallel"
            self.hook_points[Site("mlp_out", i)] = HookPoint(
                after or writes, "output", scale=self.branch_scale, clone=clone
            )

    def neurons(self, i: int, layer: LayerParts) -> None:
        down, up = layer.down, layer.up
        assert down is not None
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


def anatomy_of(model: Any, name: str) -> Anatomy:
    """Discover the parts of a loaded `PreTrainedModel` and define a hook point for every site.

    Raises:
        ModelUnsupported: the module tree is not that of a transformer language model.
    """
    parts = discover(model)
    config = model.config.get_text_config()
    first = parts.layers[0]
    n_heads = int(config.num_attention_heads)
    o = model.get_submodule(first.o)
    family = parts.family
    multiply, divide = number(config, family.logit_multiply), number(config, family.logit_divide)
    n_kv_heads = _kv_heads(model, config, first, n_heads)
    hook_points = _Taps(model, parts, n_heads, n_kv_heads, number(config, family.branch_scale) or 1.0)
    hook_points.hook_points[Site("embed")] = HookPoint(first.block, "input")
    for i, layer in enumerate(parts.layers):
        hook_points.residual(i, layer)
        hook_points.attention(i, layer)
        hook_points.mlp(i, layer)
    hook_points.norm(Site("final.scale"), parts.final_norm)
    read = in_features(model.get_submodule(parts.unembedding))
    hook_points.hook_points[Site("final")] = HookPoint(parts.unembedding, "input", sizes=(("d_model", read),))
    written = out_features(model.get_submodule(parts.unembedding))
    hook_points.hook_points[Site("logits")] = HookPoint("", "logits", sizes=(("vocab", written),))
    experts = next((layer.router for layer in parts.layers if layer.router), None)
    router: Any = model.get_submodule(experts) if experts else None
    start = _first_position(model)
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 2048
    return Anatomy(
        name=name,
        model_type=config.model_type,
        attention="interface" if hook_points.interface else "inline",
        causal=_looks_back(model.get_submodule(first.attn), parts, config),
        n_layers=len(parts.layers),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_model=out_features(o),
        d_head=in_features(o) // n_heads,
        d_mlp=_neurons(model, config, parts.layers),
        d_vocab=int(model.get_input_embeddings().weight.shape[0]),
        n_ctx=int(longest) - start,
        first_position=start,
        n_experts=int(router.weight.shape[0]) if router is not None else 0,
        gated=any(layer.gate or layer.gate_up or layer.experts for layer in parts.layers),
        parts=parts,
        hook_points=hook_points.hook_points,
        missing=hook_points.missing,
        logit_scale=(multiply or 1.0) / (divide or 1.0),
        logit_softcap=number(config, family.logit_softcap),
        rotary_switch=switch_of(config),
    )


def _first_position(model: nn.Module) -> int:
    """The index of the first token's position: RoBERTa and its line keep those up to the padding's for the padding."""
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _looks_back(attn: nn.Module, parts: Parts, config: Any) -> bool:
    """Whether attention sees nothing behind it; the proof tries it."""
    declared = getattr(attn, "is_causal", None)
    if declared is not None:
        return bool(declared)
    # Blocks of the encoders' form may be a decoder's; OPT's norm follows its branches too, and it is always one.
    encoder = parts.form == "post_norm" and getattr(config, "do_layer_norm_before", None) is None
    return bool(getattr(config, "is_decoder", False)) if encoder else True


def uses_interface(attn: nn.Module) -> bool:
    """Whether the attention module's forward goes through the attention interface of `transformers`."""
    forward = getattr(type(attn), "forward")  # noqa: B009 - a plain attribute would be bound by the type checker
    code = getattr(getattr(forward, "__wrapped__", forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
