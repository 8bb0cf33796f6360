"""The proof of a map: identities that hold if, and only if, every site is what it is named.

    1 inert       logits with every site watched equal plain logits, bit for bit, and each site is seen once a forward
    2 residual    resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out (or the block's own form)
    3 heads       the heads' results and the bias sum to what attention writes
    4 neurons     activations times W_out (or expert outputs) and the bias sum to what the MLP writes
    5 attention   pattern @ v = z, rows of the pattern sum to one, and a causal model sees nothing behind it
    6 unembed     norm(last resid_post) = final, and final through W_U gives the logits
    7 weights     every weight view, norms included, maps what was read to what was seen

Each is checked in every layer, at every position and in every element of one probe batch. A gap is relative to the
sizes of what was summed there, |x| @ |W| for a product, and never to the result, which may truly be nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import Address, NormWeights, Site, at_least_float32, norm_of, parse
from microtome.errors import MicrotomeError, ModelUnsupported, ProofError, error
from microtome.model._sized import Sized, normed, product, ratio
from microtome.run import LoadedModel, Run, run_forward
from microtome.run.hook import HookSet
from microtome.shown import shown

# Of norms and softmaxes. In float64 too the norms of transformers, and its plain softmax, compute in float32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Of products, whose size grows with their width faster than they do: a weight that is off by 1e-3 must be seen.
PRODUCT = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@shown
@dataclass(frozen=True)
class IdentityCheck:
    """One identity at one place: its largest gap relative to what was summed there, or why it does not apply."""

    identity: str
    where: str
    status: Literal["holds", "fails", "does not apply"]
    gap: float
    tolerance: float
    note: str = ""


class _Prover:
    def __init__(self, model: LoadedModel, run: Run, plain: Tensor) -> None:
        self.model, self.run, self.plain = model, run, plain
        self.a, self.parts = model.anatomy, model.anatomy.parts
        self.tolerance = TOLERANCE.get(model.dtype, 5e-2)
        self.product = PRODUCT.get(model.dtype, 1e-2)
        self.checks: list[IdentityCheck] = []

    def at(self, name: str, layer: int | None = None) -> Tensor:
        return self.run[str(Site(name, layer))]

    def has(self, name: str, layer: int) -> bool:
        return Site(name, layer) in self.a.hook_points

    def same(self, identity: str, where: str, got: Tensor, expected: Sized, tolerance: float | None = None) -> None:
        """Compare element by element: one huge activation must not make the others' gaps look small."""
        tolerance = self.tolerance if tolerance is None else tolerance
        if got.shape != expected.value.shape:
            note = f"got shape {list(got.shape)}, expected {list(expected.value.shape)}"
            self.checks.append(IdentityCheck(identity, where, "fails", float("inf"), tolerance, note))
            return
        self.judge(identity, where, (at_least_float32(got) - expected.value).abs(), expected.size, tolerance)

    def multiplies(self, identity: str, where: str, got: Tensor, expected: Sized) -> None:
        """The same for products, which are held tighter."""
        self.same(identity, where, got, expected, self.product)

    def adds(self, where: str, after: Tensor, before: Tensor, *branches: Tensor) -> None:
        """Compare what was added with the branches themselves, beyond what rounding the sums leaves of them."""
        eps = torch.finfo(after.dtype).eps
        end, start, *added = (x.cpu().double() for x in (after, before, *branches))  # some devices have no float64
        size = sum((x.abs() for x in added), torch.zeros_like(end))
        gap = (end - start - sum(added)).abs() - eps * (start.abs() + size)
        self.judge("2 residual", where, gap.clamp(min=0), size, self.tolerance)

    def judge(self, identity: str, where: str, gaps: Tensor, sizes: Tensor, tolerance: float) -> None:
        gap = ratio(gaps, sizes)
        self.checks.append(IdentityCheck(identity, where, "holds" if gap <= tolerance else "fails", gap, tolerance))

    def attempt(self, identity: str, where: str, step: Callable[[], None]) -> None:
        """Take a step of the proof; what it raises is a check that fails."""
        try:
            step()
        except Exception as problem:  # noqa: BLE001 (shapes and parts that no family had before)
            self.checks.append(IdentityCheck(identity, where, "fails", float("inf"), self.tolerance, _said(problem)))

    def skip(self, identity: str, where: str, why: str) -> None:
        self.checks.append(IdentityCheck(identity, where, "does not apply", 0.0, self.tolerance, why))

    def module(self, path: str) -> Any:
        return self.model.hf.get_submodule(path)

    def behind(self, path: str | None, x: Sized) -> Sized:
        """What a norm behind a branch, or behind the sum of branch and stream, makes of x."""
        if path is None:
            return x
        module = self.module(path)
        value = at_least_float32(module(x.value.to(self.model.dtype)))
        norm = norm_of(module, path, self.a.d_model)
        if norm is None:  # of no known form, but never nothing
            return Sized(value, value.abs().amax(-1, keepdim=True).expand_as(value))
        return normed(NormWeights(module, norm), x, value)

    def read(self, norm: NormWeights | None, x: Tensor) -> Sized:
        """What is read of the stream x through a norm, or without one."""
        return Sized.of(x) if norm is None else normed(norm, Sized.of(x), norm.apply(x))

    def runs_once(self, seen: Mapping[str, int]) -> None:
        """A module that runs several times a forward is several sites by one name."""
        for site, times in seen.items():
            if times > 1:
                self.checks.append(
                    IdentityCheck("1 inert", site, "fails", float("inf"), 0.0, f"seen {times} times a forward")
                )

    def inert(self) -> None:
        equal = torch.equal(self.run.logits, self.plain)
        gap = float((self.run.logits - self.plain).abs().max())
        self.checks.append(IdentityCheck("1 inert", "logits", "holds" if equal else "fails", gap, 0.0))

    def causal(self, tokens: Tensor) -> None:
        """Another last token changes no logits before it."""
        if not self.a.causal or tokens.shape[1] == 1:
            why = "there is one position" if self.a.causal else "attention looks both ways"
            self.skip("5 attention", "causal", why)
            return
        other = tokens.clone()
        other[:, -1] = tokens[:, 0]
        with HookSet(self.model.hf, self.a.attention, self.a.n_heads):
            changed = self.model.hf(input_ids=other).logits
        before = Sized(at_least_float32(self.plain)[:, :-1], self.logits.size[:, :-1])
        self.multiplies("5 attention", "causal", changed[:, :-1], before)

    def residual(self, i: int) -> None:
        pre, post = self.at("resid_pre", i), self.at("resid_post", i)
        attn, mlp = self.at("attn_out", i), self.at("mlp_out", i)
        layer, where = self.parts.layers[i], f"{i}.resid_post"
        if self.parts.form == "parallel":
            self.adds(where, post, pre, attn, mlp)
            return
        mid = self.at("resid_mid", i)
        if self.parts.form == "sequential":
            self.adds(f"{i}.resid_mid", mid, pre, attn)
            self.adds(where, post, mid, mlp)
            return
        after = self.behind(layer.attn_post_norm, Sized.of(pre) + Sized.of(attn))
        self.same("2 residual", f"{i}.resid_mid", mid, after)
        self.same("2 residual", where, post, self.behind(layer.mlp_post_norm, Sized.of(mid) + Sized.of(mlp)))

    def written(self, identity: str, where: str, i: int, name: str, raw: Sized, path: str | None) -> None:
        """What a branch writes is what its parts sum to, behind a norm where it has one of its own."""
        path = path if self.parts.form == "sequential" else None
        tolerance = self.product if path is None else self.tolerance
        expected = self.behind(path, raw) * self.a.hook_points[Site(name, i)].scale
        self.same(identity, where, self.at(name, i), expected, tolerance)

    def heads(self, i: int) -> None:
        z, weights = at_least_float32(self.at("attn.z", i)), at_least_float32(self.model.layers[i].W_O)
        seen = Sized(*(torch.einsum("bphd,hdm->bphm", x, w) for x, w in ((z, weights), (z.abs(), weights.abs()))))
        result = self.at("attn.result", i)
        self.multiplies("3 heads", f"{i}.W_O", result, seen)
        total = Sized(at_least_float32(result), seen.size).sum(2) + self.model.layers[i].b_O
        path = self.parts.layers[i].attn_post_norm
        self.written("3 heads", f"{i}.attn.result", i, "attn_out", total, path)

    def neurons(self, i: int) -> None:
        layer, weights = self.parts.layers[i], self.model.layers[i]
        if layer.experts is None:
            total = product(self.at("mlp.post", i), weights.W_out, weights.b_out)
            self.written("4 neurons", f"{i}.mlp.post", i, "mlp_out", total, layer.mlp_post_norm)
            return
        # What an expert summed is not seen: the size of its output is the largest value at a position.
        parts = [self.at("mlp.experts", i)]
        shared = getattr(self.module(layer.mlp or ""), "shared_experts", None)
        parts += [] if shared is None else [shared(self.at("mlp.in", i)).unsqueeze(2)]
        each = at_least_float32(torch.cat(parts, dim=2))
        total = Sized(each, each.abs().amax(-1, keepdim=True).expand_as(each)).sum(2)
        self.written("4 neurons", f"{i}.mlp.experts", i, "mlp_out", total, layer.mlp_post_norm)

    def attention(self, i: int) -> None:
        missing = [s for s in ("q", "k", "v", "scores", "pattern") if parse(f"{i}.attn.{s}") not in self.run.captured]
        if missing:
            self.skip("5 attention", f"{i}.attn", f"not seen in this family: {', '.join(missing)}")
            return
        v = at_least_float32(self.at("attn.v", i))
        pattern = self.at("attn.pattern", i).to(v.dtype)
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        size = torch.einsum("bhqk,bkhd->bqhd", pattern * self.softened(i, pattern), v.abs())
        self.same("5 attention", f"{i}.attn.z", self.at("attn.z", i), Sized(z, size), 3 * self.tolerance)
        sums = pattern.sum(-1)
        sinks = hasattr(self.module(self.parts.layers[i].attn), "sinks")
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
    def logits(self) -> Sized:
        """The logits that `final` gives."""
        a = self.a
        made = product(self.at("final"), self.model.W_U, self.model.b_U) * a.logit_scale
        if a.logit_softcap is None:
            return made
        return Sized(torch.tanh(made.value / a.logit_softcap) * a.logit_softcap, made.size)

    def unembed(self) -> None:
        final, last = self.at("final"), self.at("resid_post", self.a.n_layers - 1)
        norm = self.model.final_norm
        trunk = self.parts.layers[0].block.rpartition(".")[0].rpartition(".")[0]
        if norm is None:
            self.skip("6 unembed", "final", "the head has a transform of its own, or no norm precedes it")
        elif final.shape[-1] != last.shape[-1]:
            self.skip("6 unembed", "final", f"{trunk} projects the stream to another width before the unembedding")
        else:
            self.same("6 unembed", "final", final, self.read(norm, last))
        self.multiplies("6 unembed", "logits", self.run.logits, self.logits)

    def reads(self, i: int) -> None:
        """What a branch reads is the norm of the stream before it."""
        weights = self.model.layers[i]
        before = self.at("resid_mid", i) if self.has("resid_mid", i) else self.at("resid_pre", i)
        if self.parts.form == "parallel":
            before = self.at("resid_pre", i)
        for name, norm, x in (
            ("attn.in", weights.attn_norm, self.at("resid_pre", i)),
            ("mlp.in", weights.mlp_norm, before),
        ):
            self.same("7 weights", f"{i}.{name}", self.at(name, i), self.read(norm, x))

    def mlp_weights(self, i: int) -> None:
        weights, where = self.model.layers[i], f"{i}.mlp"
        if self.parts.layers[i].experts is not None:
            self.skip("7 weights", where, "the layer is a mixture: experts are checked by identity 4")
            return
        x = self.at("mlp.in", i)
        views = {"mlp.gate": ("W_gate", "b_gate"), "mlp.up": ("W_in", "b_in"), "mlp.pre": ("W_in", "b_in")}
        for name, (matrix, offset) in views.items():
            if self.has(name, i):
                expected = product(x, getattr(weights, matrix), getattr(weights, offset))
                self.multiplies("7 weights", f"{i}.{matrix}", self.at(name, i), expected)
        act = self.parts.layers[i].act
        if act is None:
            self.skip("7 weights", where, "the activation is not a module of its own")
            return
        gated = self.has("mlp.gate", i)
        read = self.at("mlp.gate" if gated else "mlp.pre", i)
        value, size = at_least_float32(self.module(act)(read)), at_least_float32(read).abs()
        made = Sized(
            value, size + value.abs()
        )  # smooth activations are differences of about the size of what they read
        if gated:
            up = at_least_float32(self.at("mlp.up", i))
            made = Sized(made.value * up, made.size * up.abs())
        self.same("7 weights", f"{i}.mlp.post", self.at("mlp.post", i), made)

    def attn_weights(self, i: int) -> None:
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


def prove(model: LoadedModel) -> list[IdentityCheck]:
    """Check the seven identities of a model on a probe batch of two rows of eight tokens, or as many as it takes.

    Returns:
        A check for every identity and place; what raises an exception fails, with the exception for its note.

    Raises:
        ModelUnsupported: the model does not run on token ids alone.
    """
    a = model.anatomy
    tokens = (torch.arange(16) * 7919 % (a.d_vocab - a.d_vocab // 4) + a.d_vocab // 4).reshape(2, 8)
    tokens = tokens[:, : a.n_ctx].to(model.device)
    with torch.no_grad():
        plain = _plain(model, tokens)
        sites = [Address(s.name, s.layers) for s in (parse(str(s)) for s in a.hook_points) if s.name != "logits"]
        seen: Counter[str] = Counter()
        count = {str(site): lambda site, x, name=str(site): seen.update([name]) for site in sites}
        try:
            run = run_forward(model, tokens, sites, strict=False, observe=count)
        except (MicrotomeError, torch.OutOfMemoryError):
            raise
        except Exception as problem:  # noqa: BLE001 (whatever a module of an unknown family makes of being watched)
            return [_broken(model, tokens, sites, problem)]
        prover = _Prover(model, run, plain)
        prover.attempt("1 inert", "logits", prover.inert)
        prover.runs_once(seen)
        prover.attempt("5 attention", "causal", lambda: prover.causal(tokens))
        for i in range(a.n_layers):
            prover.attempt("2 residual", f"{i}.resid_post", lambda i=i: prover.residual(i))
            prover.attempt("3 heads", f"{i}.attn.result", lambda i=i: prover.heads(i))
            prover.attempt("4 neurons", f"{i}.mlp_out", lambda i=i: prover.neurons(i))
            prover.attempt("5 attention", f"{i}.attn.z", lambda i=i: prover.attention(i))
            prover.attempt("7 weights", f"{i}.attn.in", lambda i=i: prover.reads(i))
            prover.attempt("7 weights", f"{i}.mlp", lambda i=i: prover.mlp_weights(i))
            prover.attempt("7 weights", f"{i}.attn", lambda i=i: prover.attn_weights(i))
        prover.attempt("6 unembed", "logits", prover.unembed)
    return prover.checks


def _plain(model: LoadedModel, tokens: Tensor) -> Tensor:
    """Logits of the unwatched model.

    Raises:
        ModelUnsupported: it does not run on token ids alone.
    """
    try:
        with HookSet(model.hf, model.anatomy.attention, model.anatomy.n_heads):
            return model.hf(input_ids=tokens).logits
    except (MicrotomeError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # whatever a module of an unknown family raises
        usual = model.dtype == torch.float32
        kind = "" if usual else f" in {str(model.dtype).removeprefix('torch.')}"  # not every kernel takes every type
        raise error(
            ModelUnsupported,
            f"{model.anatomy.name} cannot run {tokens.shape[1]} tokens{kind} even without hooks",
            got=_said(problem),
            do="open a language model that runs on only token ids" if usual else "open it in float32",
        ) from problem


def _broken(model: LoadedModel, tokens: Tensor, sites: list[Address], problem: Exception) -> IdentityCheck:
    """The check that fails because watching a site stops the model; finds which."""
    tolerance = TOLERANCE.get(model.dtype, 5e-2)
    for site in sites:
        try:
            run_forward(model, tokens, [site], strict=False)
        except Exception as own:  # noqa: BLE001 (as above)
            return IdentityCheck("1 inert", str(site), "fails", float("inf"), tolerance, _said(own))
    return IdentityCheck("1 inert", "all sites at once", "fails", float("inf"), tolerance, _said(problem))


def _said(problem: Exception) -> str:
    """An exception in one short line."""
    text = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    return text if len(text) <= 200 else text[:197] + "..."


def require_proven(model: LoadedModel, checks: list[IdentityCheck]) -> None:
    """Refuse a model whose proof fails.

    Raises:
        ProofError: names the identity, the place, the gap and what to declare.
    """
    failed = [c for c in checks if c.status == "fails"]
    if failed:
        c = failed[0]
        note = f" {c.note.rstrip('.')}." if c.note else ""
        more = f" {len(failed) - 1} more checks fail." if len(failed) > 1 else ""
        raise ProofError(
            f'the map of {model.anatomy.name} ({model.anatomy.model_type}) fails "{c.identity}" at {c.where}: '
            f"gap {c.gap:.3g}, allowed {c.tolerance:.3g}.{note}{more} "
            f"To do: declare how the family differs in a Family record, or look with `microtome check`."
        )
