"""The identities of a map: each compares what was seen at a site with what other sites and weights make of it.

A gap is relative to the sizes of what was summed there, |x| @ |W| for a product, and never to the result, which may
truly be nothing. A check names what it vouches for: the sites and weights that a map is left without where it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import NormWeights, Site, at_least_float32, norm_of, rounds_inputs
from microtome.model._sized import ROUNDED_TO, Sized, normed, product, ratio
from microtome.run import LoadedModel, Run
from microtome.run.hook import HookSet
from microtome.shown import shown

# Of norms and softmaxes. In float64 too the norms of transformers, and its plain softmax, compute in float32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Of products, whose size grows with their width faster than they do: a weight that is off by 1e-3 must be seen.
PRODUCT = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


BRANCHES = ("attn_out", "mixer_out", "mlp_out")
MIXTURE = ("mlp.experts", "mlp.experts.post", "mlp.router")


@shown
@dataclass(frozen=True)
class IdentityCheck:
    """One identity at one place: its largest gap relative to what was summed there, or why it does not apply.

    Attributes:
        identity: which of the seven.
        where: the site or weight that is checked.
        status: what came of it.
        gap: the largest difference, relative to what was summed there.
        tolerance: the largest that is allowed.
        note: why it does not apply, or what went wrong.
        vouches: the sites and weights that the map is left without where this fails.
    """

    identity: str
    where: str
    status: Literal["holds", "fails", "does not apply"]
    gap: float
    tolerance: float
    note: str = ""
    vouches: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Of one that fails: in one line, with its numbers."""
        note = f": {self.note.rstrip('.')}" if self.note else ""
        return f'it fails "{self.identity}" at {self.where} (gap {self.gap:.3g}, allowed {self.tolerance:.3g}){note}'


LEFT_OUT: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("2 residual", "resid_post"): ("attn_out", "mlp_out", "resid_mid", "sum"),
    ("3 heads", "W_O"): ("attn.result", "W_O"),
    ("3 heads", "attn.result"): ("attn.result",),
    ("4 neurons", "mlp_out"): ("mlp.post", "W_out", *MIXTURE),
    ("4 neurons", "mlp.post"): ("mlp.post", "W_out"),
    ("4 neurons", "mlp.experts"): MIXTURE,
    ("4 neurons", "mlp.experts.post"): ("mlp.experts.post", "W_gate", "W_in", "W_out"),
    ("5 attention", "attn.z"): ("attn.v", "attn.scores", "attn.pattern"),
    ("5 attention", "attn.pattern"): ("attn.scores", "attn.pattern"),
    ("6 unembed", "final"): ("final.scale", "final_norm"),
    ("6 unembed", "logits"): ("W_U",),
    ("7 weights", "attn.in"): ("attn.scale", "attn_norm"),
    ("7 weights", "mlp.in"): ("mlp.scale", "mlp_norm"),
    ("7 weights", "mlp.post"): ("mlp.gate", "mlp.up", "mlp.pre"),
    ("7 weights", "mlp"): ("mlp.gate", "mlp.up", "mlp.pre", "W_gate", "W_in"),
    ("7 weights", "attn"): ("W_Q", "W_K", "W_V"),
}
"""What a map is left without where an identity fails at a place; else the place itself."""
WITH = {
    "attn_out": ("attn.result",), "attn.q": ("attn.k", "attn.v"), "mlp.experts": ("mlp.router", "mlp.experts.post"),
}  # fmt: skip
"""What falls with a site: heads write what their branch writes; some of the queries show one product of many; routers
and neurons of experts are known by what these sum to."""


def named(layer: int | None, *names: str) -> tuple[str, ...]:
    """Names of one layer, or of the model."""
    return names if layer is None else tuple(f"{layer}.{name}" for name in names)


def vouched(identity: str, where: str) -> tuple[str, ...]:
    """What an identity vouches for at a place."""
    layer, _, name = where.partition(".")
    if not layer.isdecimal():
        return LEFT_OUT.get((identity, where), (where,))
    return named(int(layer), *LEFT_OUT.get((identity, name), (name,)))


def in_one_line(problem: Exception) -> str:
    """An exception in one short line."""
    text = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    return text if len(text) <= 200 else text[:197] + "..."


class Prover:
    """Checks the identities of one model on what one run saw."""

    def __init__(self, model: LoadedModel, run: Run, plain: Tensor) -> None:
        self.model, self.run, self.plain = model, run, plain
        self.a, self.parts = model.anatomy, model.anatomy.parts
        self.tolerance = TOLERANCE.get(model.dtype, 5e-2)
        self.product = PRODUCT.get(model.dtype, 1e-2)
        self.checks: list[IdentityCheck] = []
        self.returns: int | None = None
        self.note = ""  # of the next check
        self.rounding: dict[str, bool] = {}

    def at(self, name: str, layer: int | None = None) -> Tensor:
        """What was seen at a site."""
        return self.run[str(Site(name, layer))]

    def has(self, name: str, layer: int) -> bool:
        """Whether the map has a site."""
        return Site(name, layer) in self.a.hook_points

    def same(self, identity: str, where: str, got: Tensor, expected: Sized, tolerance: float | None = None) -> None:
        """Compare element by element: one huge activation must not make the others' gaps look small."""
        tolerance = self.tolerance if tolerance is None else tolerance
        if got.shape != expected.value.shape:
            note = f"got shape {list(got.shape)}, expected {list(expected.value.shape)}"
            self.fail(identity, where, tolerance, note)
            return
        self.judge(identity, where, (at_least_float32(got) - expected.value).abs(), expected.size, tolerance)

    def multiplies(self, identity: str, where: str, got: Tensor, expected: Sized) -> None:
        """The same for products, which are held tighter."""
        self.same(identity, where, got, expected, self.product)

    def added(self, after: Tensor, before: Tensor, *branches: Tensor) -> float:
        """By how much what was added differs from the branches, beyond what rounding the sums leaves of them."""
        eps = torch.finfo(after.dtype).eps
        end, start, *added = (x.cpu().double() for x in (after, before, *branches))  # some devices have no float64
        size = sum((x.abs() for x in added), torch.zeros_like(end))
        gap = (end - start - sum(added)).abs() - eps * (start.abs() + size)
        return ratio(gap.clamp(min=0), size)

    def judge(self, identity: str, where: str, gaps: Tensor, sizes: Tensor, tolerance: float) -> None:
        """Conclude an identity from the gaps of its elements and the sizes of what was summed there."""
        self.conclude(identity, where, ratio(gaps, sizes), tolerance)

    def conclude(
        self, identity: str, where: str, gap: float, tolerance: float, vouches: tuple[str, ...] | None = None
    ) -> None:
        """Note whether an identity holds, and what it vouches for."""
        status = "holds" if gap <= tolerance else "fails"
        vouches = vouched(identity, where) if vouches is None else vouches
        note, self.note = self.note, ""
        self.checks.append(IdentityCheck(identity, where, status, gap, tolerance, note, vouches))

    def fail(self, identity: str, where: str, tolerance: float, note: str) -> None:
        """Note that an identity could not even be compared."""
        found = IdentityCheck(identity, where, "fails", float("inf"), tolerance, note, vouched(identity, where))
        self.checks.append(found)

    def attempt(self, identity: str, where: str, step: Callable[[], None]) -> None:
        """Take a step of the proof; what it raises is a check that fails."""
        try:
            step()
        except Exception as problem:  # noqa: BLE001 (shapes and parts that no family had before)
            self.fail(identity, where, self.tolerance, in_one_line(problem))

    def skip(self, identity: str, where: str, why: str) -> None:
        """Note that an identity does not apply."""
        found = IdentityCheck(identity, where, "does not apply", 0.0, self.tolerance, why, vouched(identity, where))
        self.checks.append(found)

    def module(self, path: str) -> Any:
        """A module of the model."""
        return self.model.hf.get_submodule(path)

    def behind(self, path: str | None, x: Sized) -> Sized:
        """What a norm behind a branch, or behind the sum of branch and stream, makes of x."""
        if path is None:
            return x
        module = self.module(path)
        value = at_least_float32(module(x.value.to(self.model.dtype)))
        norm = norm_of(self.module(path), path, self.a.d_model)
        if norm is None:  # of no known form, but never nothing
            return Sized(value, value.abs().amax(-1, keepdim=True).expand_as(value))
        return normed(NormWeights(module, norm), x, value)

    def read(self, norm: NormWeights | None, x: Tensor) -> Sized:
        """What is read of the stream x through a norm, or without one."""
        if norm is not None and isinstance(norm.gain, Tensor) and norm.gain.shape[-1] != x.shape[-1]:
            return Sized.of(x)
        return Sized.of(x) if norm is None else normed(norm, Sized.of(x), norm.apply(x))

    @property
    def quantised(self) -> bool:
        """Whether some projection of the first layer, or the unembedding, rounds what it reads."""
        layer = self.parts.layers[0]
        return any(self.rounds(p) for p in (layer.o, layer.down, layer.q, layer.qkv, self.parts.unembedding))

    def rounds(self, path: str | None) -> bool:
        """Whether a projection rounds what it reads to a few bits, so that no matrix does exactly what it does."""
        if path is not None and path not in self.rounding:
            self.rounding[path] = rounds_inputs(self.module(path))
        return path is not None and self.rounding[path]

    def acted(self, path: str | None, made: Sized, x: Tensor, matrix: Tensor, tolerance: float | None = None) -> Sized:
        """x times the matrix [in, out] of a projection; one step of 8 bits of x is allowed where it rounds."""
        if not self.rounds(path):
            return made
        step = at_least_float32(x).abs().max() / ROUNDED_TO
        off = step * at_least_float32(matrix).abs().sum(0) / (self.product if tolerance is None else tolerance)
        self.note = f"beyond one step of 1/{ROUNDED_TO} of the largest input, to which the quantised layer rounds"
        return Sized(made.value, made.size + off)

    def written(self, identity: str, where: str, i: int, name: str, raw: Sized, path: str | None) -> None:
        """What a branch writes is what its parts sum to, behind a norm where it has one of its own."""
        tolerance = self.held_to(path)
        path = path if self.parts.form == "sequential" else None
        if path is not None and norm_of(self.module(path), path, self.a.d_model) is None:
            self.skip("2 residual", f"{i}.sum", f"what {name} is made of passes through {path}, which is no known norm")
        expected = self.behind(path, raw) * self.a.hook_points[Site(name, i)].scale
        self.same(identity, where, self.at(name, i), expected, tolerance)

    def held_to(self, norm: str | None) -> float:
        """The tolerance of what a branch writes: that of a product, unless a norm of its own follows."""
        return self.product if norm is None or self.parts.form != "sequential" else self.tolerance

    def heads(self, i: int) -> None:
        """Heads, through W_O, sum to what attention writes."""
        z, weights = at_least_float32(self.at("attn.z", i)), at_least_float32(self.model.layers[i].W_O)
        seen = Sized(*(torch.einsum("bphd,hdm->bphm", x, w) for x, w in ((z, weights), (z.abs(), weights.abs()))))
        result = self.at("attn.result", i)
        self.multiplies("3 heads", f"{i}.W_O", result, seen)
        if not self.has("attn_out", i):
            return
        total = Sized(at_least_float32(result), seen.size).sum(2) + self.model.layers[i].b_O
        layer = self.parts.layers[i]
        path = layer.attn_post_norm
        total = self.acted(layer.o, total, z, weights.flatten(0, 1), self.held_to(path))
        self.written("3 heads", f"{i}.attn.result", i, "attn_out", total, path)

    def attention(self, i: int) -> None:
        """The pattern mixes the values to z, and its rows sum to one."""
        missing = [s for s in ("q", "k", "v", "scores", "pattern") if not self.has(f"attn.{s}", i)]
        if missing:
            self.skip("5 attention", f"{i}.attn", f"not seen in this family: {', '.join(missing)}")
            return
        v = at_least_float32(self.at("attn.v", i))
        pattern = self.at("attn.pattern", i).to(v.dtype)
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
        mix = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        size = torch.einsum("bhqk,bkhd->bqhd", pattern * self.softened(i, pattern), v.abs())
        mixed, tolerance = Sized(mix, size), 3 * self.tolerance
        self.same("5 attention", f"{i}.attn.z", self.at("attn.z", i), mixed, tolerance)
        if self.checks[-1].status == "fails" and i in self.mixes:
            # What a kernel gives may be gated, scaled or normalised before it enters W_O: then the pattern is right.
            direct = self.checks.pop()
            self.same("5 attention", f"{i}.attn.z", self.mixes[i].reshape(mix.shape), mixed, tolerance)
            changed = self.checks[-1]
            if changed.gap <= tolerance:
                why = f"attn.z is pattern @ v changed by a gate, a scale or a norm (by {direct.gap:.2g})"
                self.skip("5 attention", f"{i}.attn.mix", why)
            else:
                self.checks[-1] = direct
        sums = pattern.sum(-1)
        sinks = hasattr(self.module(self.parts.layers[i].attn or ""), "sinks")
        whole = sums.clamp(max=1.0) if sinks else torch.ones_like(sums)
        self.same("5 attention", f"{i}.attn.pattern", sums, Sized.of(whole))

    def softened(self, i: int, pattern: Tensor) -> Tensor:
        """By how much more than itself each weight of a pattern may be off, for the rounding of its score.

        A softmax passes on the rounding of scores, a few units in the last place of |q| . |k|, as it is; and what the
        others of its row lose, it gains.
        """
        q, k = at_least_float32(self.at("attn.q", i)), at_least_float32(self.at("attn.k", i))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores, size = (torch.einsum("bqhd,bkhd->bhqk", *x) for x in ((q, k), (q.abs(), k.abs())))
        live = pattern > 0
        seen, made = self.at("attn.scores", i)[live].to(scores.dtype), scores[live]
        power = made.pow(2).sum()
        factor = ((seen * made).sum() / power).abs() if power > 0 else power  # what scores are scaled by
        rounding = 4 * torch.finfo(self.model.dtype).eps * factor * size / (3 * self.tolerance)
        return 1 + rounding + (pattern * rounding).sum(-1, keepdim=True)

    @cached_property
    def mixes(self) -> dict[int, Tensor]:
        """[batch, pos, head, d_head] by layer: what the attention kernel gives, in one more forward."""
        found: dict[int, Tensor] = {}
        hooks = HookSet(self.model.hf, self.a.attention, self.a.n_heads)
        for i, layer in enumerate(self.parts.layers):
            if layer.attn is not None:
                hooks.attention(layer.attn).add("mix", lambda x, i=i: found.update({i: at_least_float32(x)}), False)
        with torch.no_grad(), hooks:
            self.model.hf(input_ids=self.run.tokens)
        return found

    def sized(self, logits: Tensor) -> Sized:
        """Logits with the size of what was summed to them, or where that is not known, of the largest of them."""
        logits = at_least_float32(logits)
        try:
            size = self.logits.size
            assert size.shape == logits.shape
        except Exception:  # noqa: BLE001 (a head of no known form, which its own check says)
            size = logits.abs().amax(-1, keepdim=True).expand_as(logits)
        return Sized(logits, size)

    @property
    def own_transform(self) -> bool:
        """Whether the head makes something else of `final` before the unembedding reads it."""
        point = self.a.hook_points.get(Site("final"))
        return point is not None and point.module != self.parts.unembedding

    @cached_property
    def logits(self) -> Sized:
        """The logits that `final` gives."""
        a = self.a
        assert not self.own_transform
        made = product(self.at("final"), self.model.W_U, self.model.b_U) * a.logit_scale
        if a.logit_softcap is None:
            return made
        return Sized(torch.tanh(made.value / a.logit_softcap) * a.logit_softcap, made.size)

    def unembed(self, last: Tensor | None = None) -> None:
        """The norm of the last stream, or of what is mixed from its lanes, is `final`, and that gives the logits."""
        final, last = self.at("final"), self.at("resid_post", self.a.n_layers - 1) if last is None else last
        norm = self.model.final_norm
        trunk = self.parts.layers[0].block.rpartition(".")[0].rpartition(".")[0]
        if norm is None:
            self.skip("6 unembed", "final", "the head has a transform of its own, or no norm precedes it")
        elif final.shape[-1] != last.shape[-1]:
            self.skip("6 unembed", "final", f"{trunk} projects the stream to another width before the unembedding")
        else:
            self.same("6 unembed", "final", final, self.read(norm, last))
            self.same("6 unembed", "final.scale", self.at("final.scale"), Sized.of(norm.scale(last)))
        if self.own_transform:
            self.skip("6 unembed", "W_U", "the head has a transform of its own between `final` and the unembedding")
            return
        scaled = final * self.a.logit_scale
        made = self.acted(self.parts.unembedding, self.logits, scaled, self.model.W_U)
        self.multiplies("6 unembed", "logits", self.run.logits, made)

    def attn_weights(self, i: int) -> None:
        """Weight views map what attention reads to queries, keys and values."""
        layer, weights, x = self.parts.layers[i], self.model.layers[i], self.at("attn.in", i)
        if layer.qkv is None and layer.v is None:
            self.skip("7 weights", f"{i}.attn", "latent attention: keys and values have no weights of their own")
            return
        module: Any = self.model.hf.get_submodule(layer.attn)
        config = self.model.hf.config.get_text_config()
        clip = getattr(config, "clip_qkv", None) or getattr(getattr(config, "attn_config", None), "clip_qkv", None)
        has_norms = any("norm" in name for name, _ in module.named_children())
        for name, matrix, bias in (("v", "W_V", "b_V"), ("q", "W_Q", "b_Q"), ("k", "W_K", "b_K")):
            where = f"{i}.{matrix}"
            if f"{i}.attn.{name}" not in self.run:
                self.skip("7 weights", where, "not seen in this family")
                continue
            seen, view = self.at(f"attn.{name}", i), getattr(weights, matrix)
            flat, offset = view.transpose(0, 1).flatten(1), getattr(weights, bias)
            made = product(x, flat, None if offset is None else offset.flatten())
            made = self.acted(layer.qkv or getattr(layer, name), made, x, flat)
            value = made.value if clip is None else made.value.clamp(-clip, clip)
            expected = Sized(*(y.unflatten(-1, (view.shape[0], -1)) for y in (value, made.size)))
            expected = expected.repeated(seen.shape[2] // view.shape[0])
            if name == "v":
                self.multiplies("7 weights", where, seen, expected)
            elif has_norms:
                self.skip("7 weights", where, "queries and keys are normalised before use")
            else:
                self.turned(where, at_least_float32(seen), expected)

    def turned(self, where: str, seen: Tensor, expected: Sized) -> None:
        """Queries or keys are the projection times one factor, turned by a rotation that position 0 is without.

        A rotation keeps lengths, so that those are compared at every position, and the vectors themselves at the first.
        """
        lengths, made = seen.norm(dim=-1), expected.value.norm(dim=-1)
        power = made.pow(2).sum()
        factor = float((lengths * made).sum() / power) if power > 0 else 1.0
        factor = 1.0 if abs(factor - 1) < 5e-3 else factor  # no model scales by so little: the view is off
        expected = expected * factor
        gaps = (seen - expected.value).abs()[:, 0], (lengths - expected.value.norm(dim=-1)).abs()
        sizes = expected.size[:, 0], expected.size.norm(dim=-1)
        gap, size = (torch.cat([x.flatten() for x in each]) for each in (gaps, sizes))
        self.judge("7 weights", where, gap, size, self.product)
