"""The proof of a map: identities that hold if, and only if, every site is what it is named.

    1 inert       logits with every site watched equal plain logits, bit for bit, and each site is seen once a forward
    2 residual    resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out (or the block's own form)
    3 heads       the heads' results and the bias sum to what attention writes
    4 neurons     activations times W_out (or expert outputs) and the bias sum to what the MLP writes
    5 attention   pattern @ v = z, rows of the pattern sum to one, and a causal model sees nothing behind it
    6 unembed     norm(last resid_post) = final, and final through W_U gives the logits
    7 weights     every weight view, norms included, maps what was read to what was seen

Each is checked in every layer and at every position of one probe batch, to a tolerance relative to the largest value
compared there; a sum, relative to what it adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from microtome.anatomy import Address, Site, parse
from microtome.errors import MicrotomeError, ModelUnsupported, ProofError, error
from microtome.run import LoadedModel, Run, run_forward
from microtome.run.hook import HookSet
from microtome.shown import shown

# In float64 too the norms of transformers, and its plain softmax, compute in float32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@shown
@dataclass(frozen=True)
class IdentityCheck:
    """One identity at one place: its gap relative to the largest value at a position, or why it does not apply."""

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
        self.checks: list[IdentityCheck] = []

    def at(self, name: str, layer: int | None = None) -> Tensor:
        return self.run[str(Site(name, layer))]

    def has(self, name: str, layer: int) -> bool:
        return Site(name, layer) in self.a.hook_points

    def same(
        self,
        identity: str,
        where: str,
        got: Tensor,
        expected: Tensor,
        factor: float = 1.0,
        axes: tuple[int, ...] = (-1,),
    ) -> None:
        """Compare each position separately: one huge activation must not make the others' gaps look small."""
        if got.shape != expected.shape:
            note = f"got shape {list(got.shape)}, expected {list(expected.shape)}"
            self.checks.append(IdentityCheck(identity, where, "fails", float("inf"), self.tolerance, note))
            return
        size = expected.float().abs().amax(axes, keepdim=True).clamp(min=1e-6)
        self.judge(identity, where, (got.float() - expected.float()).abs() / size, factor)

    def adds(self, where: str, after: Tensor, before: Tensor, branch: Tensor) -> None:
        """Compare what was added with the branch itself, beyond what rounding the sum leaves of it."""
        rounding = torch.finfo(after.dtype).eps * after.float().abs()
        gap = (after.double() - before.double() - branch.double()).abs().float() - rounding
        size = branch.float().abs().amax(-1, keepdim=True).clamp(min=1e-6)
        self.judge("2 residual", where, gap.clamp(min=0) / size)

    def judge(self, identity: str, where: str, gaps: Tensor, factor: float = 1.0) -> None:
        gap, allowed = float(gaps.max()), self.tolerance * factor
        self.checks.append(IdentityCheck(identity, where, "holds" if gap <= allowed else "fails", gap, allowed))

    def attempt(self, identity: str, where: str, step: Callable[[], None]) -> None:
        """Take a step of the proof; what it raises is a check that fails."""
        try:
            step()
        except Exception as problem:  # noqa: BLE001 (shapes and parts that no family had before)
            self.checks.append(IdentityCheck(identity, where, "fails", float("inf"), self.tolerance, _said(problem)))

    def skip(self, identity: str, where: str, why: str) -> None:
        self.checks.append(IdentityCheck(identity, where, "does not apply", 0.0, self.tolerance, why))

    def module(self, path: str | None) -> Callable[[Tensor], Tensor]:
        return (lambda x: x) if path is None else self.model.hf.get_submodule(path)

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
        self.same("5 attention", "causal", changed[:, :-1], self.plain[:, :-1])

    def residual(self, i: int) -> None:
        pre, post = self.at("resid_pre", i), self.at("resid_post", i)
        attn, mlp = self.at("attn_out", i), self.at("mlp_out", i)
        layer, where = self.parts.layers[i], f"{i}.resid_post"
        if self.parts.form == "parallel":
            self.adds(where, post, pre, attn + mlp)
            return
        mid = self.at("resid_mid", i)
        if self.parts.form == "sequential":
            self.adds(f"{i}.resid_mid", mid, pre, attn)
            self.adds(where, post, mid, mlp)
            return
        self.same("2 residual", f"{i}.resid_mid", mid, self.module(layer.attn_post_norm)(pre + attn))
        self.same("2 residual", where, post, self.module(layer.mlp_post_norm)(mid + mlp))

    def written(self, raw: Tensor, path: str | None, i: int, name: str) -> Tensor:
        path = path if self.parts.form == "sequential" else None
        return self.module(path)(raw) * self.a.hook_points[Site(name, i)].scale

    def heads(self, i: int) -> None:
        result = self.at("attn.result", i)
        seen = torch.einsum("bphd,hdm->bphm", self.at("attn.z", i), self.model.layers[i].W_O)
        self.same("3 heads", f"{i}.W_O", result, seen)
        total, bias = result.sum(2), self.model.layers[i].b_O
        total = total if bias is None else total + bias
        expected = self.written(total, self.parts.layers[i].attn_post_norm, i, "attn_out")
        self.same("3 heads", f"{i}.attn.result", self.at("attn_out", i), expected)

    def neurons(self, i: int) -> None:
        layer, weights = self.parts.layers[i], self.model.layers[i]
        if layer.experts is not None:
            total = self.at("mlp.experts", i).sum(2)
            shared = getattr(self.model.hf.get_submodule(layer.mlp or ""), "shared_experts", None)
            total = total if shared is None else total + shared(self.at("mlp.in", i))
        else:
            total = self.at("mlp.post", i) @ weights.W_out
            total = total if weights.b_out is None else total + weights.b_out
        expected = self.written(total, layer.mlp_post_norm, i, "mlp_out")
        where = f"{i}.mlp.experts" if layer.experts else f"{i}.mlp.post"
        self.same("4 neurons", where, self.at("mlp_out", i), expected)

    def attention(self, i: int) -> None:
        missing = [s for s in ("q", "k", "v", "scores", "pattern") if parse(f"{i}.attn.{s}") not in self.run.captured]
        if missing:
            self.skip("5 attention", f"{i}.attn", f"not seen in this family: {', '.join(missing)}")
            return
        pattern, v = self.at("attn.pattern", i), self.at("attn.v", i)
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v)
        self.same("5 attention", f"{i}.attn.z", self.at("attn.z", i), z, factor=3.0, axes=(-2, -1))
        sums = pattern.float().sum(-1)
        if hasattr(self.model.hf.get_submodule(self.parts.layers[i].attn), "sinks"):
            self.same("5 attention", f"{i}.attn.pattern", sums.clamp(max=1.0), sums)
        else:
            self.same("5 attention", f"{i}.attn.pattern", sums, torch.ones_like(sums))

    def unembed(self) -> None:
        a, final = self.a, self.at("final")
        last = self.at("resid_post", a.n_layers - 1)
        norm = self.model.final_norm
        trunk = self.parts.layers[0].block.rpartition(".")[0].rpartition(".")[0]
        if norm is None:
            self.skip("6 unembed", "final", "the head has a transform of its own, or no norm precedes it")
        elif final.shape[-1] != last.shape[-1]:
            self.skip("6 unembed", "final", f"{trunk} projects the stream to another width before the unembedding")
        else:
            self.same("6 unembed", "final", final, norm.apply(last))
        logits = final @ self.model.W_U
        logits = logits if self.model.b_U is None else logits + self.model.b_U
        logits = logits * a.logit_scale
        if a.logit_softcap is not None:
            logits = torch.tanh(logits / a.logit_softcap) * a.logit_softcap
        self.same("6 unembed", "logits", self.run.logits, logits)

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
            self.same("7 weights", f"{i}.{name}", self.at(name, i), x if norm is None else norm.apply(x))

    def mlp_weights(self, i: int) -> None:
        weights, where = self.model.layers[i], f"{i}.mlp"
        if self.parts.layers[i].experts is not None:
            self.skip("7 weights", where, "the layer is a mixture: experts are checked by identity 4")
            return
        x = self.at("mlp.in", i)
        views = {"mlp.gate": ("W_gate", "b_gate"), "mlp.up": ("W_in", "b_in"), "mlp.pre": ("W_in", "b_in")}
        for name, (matrix, offset) in views.items():
            if self.has(name, i):
                expected = x @ getattr(weights, matrix)
                bias = getattr(weights, offset)
                self.same("7 weights", f"{i}.{matrix}", self.at(name, i), expected if bias is None else expected + bias)
        act = self.parts.layers[i].act
        if act is None:
            self.skip("7 weights", where, "the activation is not a module of its own")
            return
        gated = self.has("mlp.gate", i)
        post = self.module(act)(self.at("mlp.gate" if gated else "mlp.pre", i))
        self.same("7 weights", f"{i}.mlp.post", self.at("mlp.post", i), post * self.at("mlp.up", i) if gated else post)

    def attn_weights(self, i: int) -> None:
        layer, weights, x = self.parts.layers[i], self.model.layers[i], self.at("attn.in", i)
        if layer.qkv is None and layer.v is None:
            self.skip("7 weights", f"{i}.attn", "latent attention: keys and values have no weights of their own")
            return
        module: Any = self.model.hf.get_submodule(layer.attn)
        config = self.model.hf.config.get_text_config()
        clip = getattr(config, "clip_qkv", None) or getattr(getattr(config, "attn_config", None), "clip_qkv", None)
        normed = any("norm" in name for name, _ in module.named_children())
        for name, matrix, bias in (("v", "W_V", "b_V"), ("q", "W_Q", "b_Q"), ("k", "W_K", "b_K")):
            where = f"{i}.{matrix}"
            if f"{i}.attn.{name}" not in self.run:
                self.skip("7 weights", where, "not seen in this family")
                continue
            seen = self.at(f"attn.{name}", i)
            expected = torch.einsum("bpd,hdk->bphk", x, getattr(weights, matrix))
            offset = getattr(weights, bias)
            expected = expected if offset is None else expected + offset
            expected = expected if clip is None else expected.clamp(-clip, clip)
            expected = expected.repeat_interleave(seen.shape[2] // expected.shape[2], dim=2)
            if name == "v":
                self.same("7 weights", where, seen, expected)
            elif normed:
                self.skip("7 weights", where, "queries and keys are normalised before use")
            else:
                self.aligned(where, seen[:, 0], expected[:, 0])

    def aligned(self, where: str, seen: Tensor, expected: Tensor) -> None:
        """At position 0 a rotation is the identity, so that queries and keys are the projection times one factor."""
        factor = (seen * expected).sum() / expected.pow(2).sum().clamp(min=1e-12)  # projections may be zero
        self.same("7 weights", where, seen, expected * factor)


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
