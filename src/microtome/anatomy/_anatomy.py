"""The anatomy of a model: its sizes, and for every site the hook point by which it is read and written.

A hook point is data: a module, the side of it, and the part of the tensor. `microtome.run` makes hooks of hook points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from microtome.anatomy._discover import Parts, discover
from microtome.anatomy._end import End, end_of
from microtome.anatomy._family import number
from microtome.anatomy._flow import Flow
from microtome.anatomy._forms import learned
from microtome.anatomy._hook_points import HookPoint, HookPoints, neurons_of
from microtome.anatomy._roles import in_features, out_features
from microtome.anatomy._rotary import RotarySwitch, switch_of
from microtome.anatomy._sites import SITES, Address, Site
from microtome.anatomy._stored import stored
from microtome.errors import SiteError, error
from microtome.shown import brief, shown


@shown
@dataclass(frozen=True)
class Anatomy:
    """Sizes, parts and sites of one model.

    Attributes:
        missing: why a site is absent, by layer or for all (None).
        unproven: why a weight is, by its name with its layer, such as "3.W_Q".
        causal: whether attention looks back alone, as the probe showed.
        stored: how weights are stored that are no plain matrices; adapters are in `model.provenance`.
        rows_interact: why the rows and positions of a batch change each other by rounding; empty if they do not.
        padding: the sides on which rows can be padded without being changed.
        rotary_switch: where rows of a batch would change each other, if they would.
        returns: how many things a block returns in a tuple; 0 where it returns the stream itself.
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
    returns: int = 0
    padding: tuple[Literal["left", "right"], ...] = ("left", "right")
    unproven: Mapping[str, str] = field(default_factory=dict[str, str])
    stored: str = ""
    rows_interact: str = ""

    def _facts(self) -> dict[str, str]:
        """Its form and sizes, and which sites it has and lacks."""
        experts = f", {self.n_experts} experts" if self.n_experts else ""
        mixes = any(layer.mixer is not None for layer in self.parts.layers)
        lacks = dict.fromkeys(site.name for site in self.missing if mixes or not site.name.startswith("mixer"))
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
        } | ({"weights": self.stored} if self.stored else {})

    def instead(self, hidden: Tensor) -> Any:
        """What a block returns that gives this stream."""
        return (hidden, *(None,) * (self.returns - 1)) if self.returns else hidden

    @property
    def why_no_sum(self) -> str | None:
        """Why the stream is not the sum of what branches write: attention, other mixers, MLPs; None where it is."""
        if self.parts.form == "post_norm":
            return "norms on the residual stream itself"
        for i, layer in enumerate(self.parts.layers):
            branches = {"attn_out": layer.attn, "mixer_out": layer.mixer, "mlp_out": layer.mlp or layer.down}
            for name, module in branches.items():
                if module is not None and Site(name, i) not in self.hook_points:
                    return f"no {name} in layer {i}: {self.missing.get(Site(name, i))}"
            if (why := self.unproven.get(f"{i}.sum")) is not None:
                return f"something else in layer {i}: {why}"
        return None

    @property
    def why_other_branches(self) -> str | None:
        """Why the branches of some layer are not attention and an MLP; None where those of every layer are."""
        for i, layer in enumerate(self.parts.layers):
            if layer.mixer is not None:
                return f"a mixer that is no attention in layer {i}"
            for name in ("attn_out", "mlp_out"):
                if Site(name, i) not in self.hook_points:
                    return f"no {name} in layer {i}: {self.missing.get(Site(name, i))}"
        return None

    @property
    def why_no_heads(self) -> str | None:
        """Why what some attention writes is not the sum of its heads; None where it is, in every layer that attends."""
        for i, layer in enumerate(self.parts.layers):
            if layer.attn is not None and Site("attn.z", i) not in self.hook_points:
                return f"no attn.z in layer {i}: {self.missing.get(Site('attn.z', i))}"
            if layer.attn is not None and (why := self.unproven.get(f"{i}.W_O")) is not None:
                return f"no W_O in layer {i}: {why}"
        return None

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
            raise error(SiteError, f"no site {absent[0]} in {self.name}: {reason}. Its sites there: {', '.join(near)}",
                        do="name one of these")  # fmt: skip
        if address.units.is_all:
            return present
        size = min(self.units(site) for site in present)
        if address.spec.unit == "batch":
            raise error(SiteError, f"{where} has no units to choose from", do=f'drop "[{address.units}]"')
        if address.units.resolve(size) is None:
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
        if self.stored:
            lines.append(f"weights: {self.stored}")
        if self.parts.family.note:
            lines.append(self.parts.family.note)
        return "\n".join([*lines, *self._lacking()])

    def _lacking(self) -> list[str]:
        """What is missing, and why: a line for all sites that are missing in the same layers for the same reason."""
        mixes = any(layer.mixer is not None for layer in self.parts.layers)
        layers: dict[tuple[str, str], list[int]] = {}
        for site, why in self.missing.items():
            if mixes or not site.name.startswith("mixer"):
                why = _PLACE.sub("", why)  # the numbers differ from layer to layer
                layers.setdefault((site.name, why), []).append(-1 if site.layer is None else site.layer)
        names: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for (name, why), own in layers.items():
            names.setdefault((why, tuple(own)), []).append(name)
        lines: list[str] = []
        for (why, own), some in names.items():
            whole = len(own) == self.n_layers or own == (-1,)
            where = "" if whole else f" in layer {own[0]}" if len(own) == 1 else f" in layers {_ranges(own)}"
            lines.append(f"no {', '.join(some)}{where}: {why}")
        return lines


_PLACE = re.compile(r" at [\w.]+ \(gap [^)]*\)")


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order as ranges: 0-2, 4."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or n != numbers[i + 1] - 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def anatomy_of(model: Any, name: str, flow: Flow | None = None) -> Anatomy:
    """Discover the parts of a loaded `PreTrainedModel` and define a hook point for every site.

    Args:
        model: the model.
        name: what it is called.
        flow: what one forward passed between its modules, where their names do not say what they are.

    Raises:
        ModelUnsupported: the module tree is not that of a transformer language model.
    """
    parts = discover(model, flow)
    end = End(parts.final_norm)
    if flow is not None:
        end = end_of(model, parts, flow)
        parts = replace(learned(model, parts, flow), final_norm=end.norm)
    config = model.config.get_text_config()
    points = HookPoints(model, parts, config, () if flow is None else _stream(parts, flow))
    points.hook_points[Site("embed")] = points.stream(parts.layers[0].block, "input")
    for i, layer in enumerate(parts.layers):
        points.residual(i, layer)
        points.attention(i, layer)
        points.mixer(i, layer)
        points.mlp(i, layer)
    points.end(end)
    start = _first_position(model)
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    longest = next((n for n in lengths if isinstance(n, int) and n > 0), 2048)
    family = parts.family
    multiply, divide = number(config, family.logit_multiply), number(config, family.logit_divide)
    return Anatomy(
        name=name,
        model_type=config.model_type,
        attention="interface" if points.interface else "inline",
        causal=_looks_back(model, parts, config),
        n_layers=len(parts.layers),
        d_vocab=out_features(model.get_input_embeddings()),
        n_ctx=int(longest) - start,
        first_position=start,
        gated=any(layer.gate or layer.gate_up or layer.experts for layer in parts.layers),
        parts=parts,
        hook_points=points.hook_points,
        missing=points.missing,
        logit_scale=(multiply or 1.0) / (divide or 1.0) if end.scale is None else end.scale,
        logit_softcap=number(config, family.logit_softcap) if end.cap is None else end.cap,
        rotary_switch=switch_of(config),
        returns=0 if points.interface else 2,
        stored=stored(model),
        n_experts=max(dict(p.sizes).get("expert", 0) for s, p in points.hook_points.items() if s.name != "mlp.router"),
        **_sizes(model, parts, config),
    )


def _sizes(model: Any, parts: Parts, config: Any) -> dict[str, Any]:
    """How many heads, neurons and experts the first layers that have them have, and how wide the stream is."""
    first = next((layer for layer in parts.layers if layer.attn is not None), None)
    n_heads, n_kv_heads = (0, 0) if first is None else (first.n_heads, first.n_kv_heads)
    o = None if first is None else model.get_submodule(first.o)
    width = in_features(model.get_input_embeddings()) if o is None else out_features(o)
    return {
        "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_model": width,
        "d_head": 0 if o is None else in_features(o) // n_heads,
        "d_mlp": neurons_of(model, config, parts.layers),
    }  # fmt: skip


def _stream(parts: Parts, flow: Flow) -> tuple[int, ...]:
    """The shape of the stream where it enters the first block."""
    seen = flow.first(parts.layers[0].block)
    return () if seen is None or seen.read is None else tuple(seen.read.value.shape)


def _first_position(model: nn.Module) -> int:
    """The index of the first token's position: RoBERTa and its line keep those up to the padding's for the padding."""
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _looks_back(model: nn.Module, parts: Parts, config: Any) -> bool:
    """Whether attention sees nothing behind it, as far as it is declared; the proof tries it."""
    attn = parts.layers[0].attn
    declared = getattr(model.get_submodule(attn), "is_causal", None) if attn is not None else True
    if declared is not None:
        return bool(declared)
    # Blocks of the encoders' form may be a decoder's; OPT's norm follows its branches too, and it is always one.
    encoder = parts.form == "post_norm" and getattr(config, "do_layer_norm_before", None) is None
    return bool(getattr(config, "is_decoder", False)) if encoder else True
