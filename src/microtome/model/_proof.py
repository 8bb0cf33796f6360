"""The proof of a map: identities that hold if, and only if, every site is what it is named.

    1 inert       logits with every site watched equal plain logits, bit for bit, and each site is seen once a forward
    2 residual    resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out (or the block's own form)
    3 heads       the heads' results and the bias sum to what attention writes
    4 neurons     activations times W_out (or expert outputs) and the bias sum to what the MLP writes
    5 attention   pattern @ v = z, and rows of the pattern sum to one
    6 unembed     the last resid_post determines the logits; norm(last resid_post) = final; final @ W_U gives the
                  logits, or final determines them where the head has a transform of its own
    7 weights     every weight view, norms included, maps what was read to what was seen

Each is checked in every layer, at every position and in every element of one probe batch. A site or weight whose
identity fails is left out of the map, with that reason; only a residual stream that is not proven refuses a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from microtome.anatomy import (
    SHORTEST,
    Address,
    Anatomy,
    Site,
    at_least_float32,
    parse,
    probe,
    rounds_together,
    thresholds,
)
from microtome.errors import MicrotomeError, ModelUnsupported, ProofError, error
from microtome.model._branches import Branches
from microtome.model._cutoff import prove_cutoff
from microtome.model._identities import WITH, IdentityCheck, Prover, in_one_line
from microtome.model._lanes import Lanes
from microtome.model._mixture import Mixtures, with_factors
from microtome.model._neurons import Neurons
from microtome.model._sized import Sized
from microtome.run import Batch, LoadedModel, Run, run_forward
from microtome.run.hook import HookSet, install

PADS = 4
"""The most pads of the probe: what is left of a row still goes beyond the short windows of the configuration."""
LOOKS_AHEAD = 1e-3
"""What a later token changes, relative to what was summed to a logit, beyond all rounding."""
NEVER_AHEAD = 1e-6
"""The same where a model is not declared to look back alone: nothing at all, but for the last bits."""
STREAM = ("resid_pre", "resid_post")
NEVER = "never seen in a forward"
PASSED = "a forward over tokens alone passes the block by, and the stream with it"
SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


def _untried(model: LoadedModel, length: int) -> list[IdentityCheck]:
    """That a prompt longer than the probe may be treated otherwise, where the configuration says so."""
    longer = {name: n for name, n in thresholds(model.hf.config.get_text_config()).items() if length <= n < 10**6}
    if not longer:
        return []
    note = f"the probe has {length} tokens, and {', '.join(f'{name} is {n:,}' for name, n in longer.items())}"
    return [IdentityCheck("1 inert", "long prompts", "does not apply", 0.0, 0.0, note)]


def prove(model: LoadedModel) -> tuple[list[IdentityCheck], Anatomy]:
    """Check the seven identities of a model on the tokens of `probe`, or as many of them as it takes.

    Returns:
        A check for every identity and place; what raises an exception fails, with the exception for its note. And the
        map without what failed, of a model that looks back alone, and is padded, as the probe showed.

    Raises:
        ModelUnsupported: the model does not run on token ids alone.
    """
    a = model.anatomy
    tokens = probe(model.hf)[:, : a.n_ctx]
    with torch.no_grad():
        plain = _plain(model, tokens)
        watched = _Watched(model, tokens, plain)
        run, checks = watched.run(), watched.checks
        if run is None:
            return checks, without(a, checks)
        try:
            # What could not be watched has its own check already: the identities are those of what was.
            model.anatomy = without(watched.resized(a), checks)
            rows, model.anatomy = _tried_rows(model, run, plain)
            if not model.anatomy.causal:  # some remember that a prompt was short
                watched.refuse_random()
            prover = Prover(model, run, plain)
            mixtures = Mixtures(prover)
            _identities(prover, mixtures, Lanes(prover))
            checks = checks + rows + prover.checks + _untried(model, tokens.shape[1])
            model.anatomy = replace(model.anatomy, unproven=dict(model.anatomy.unproven) | _no_sums(prover))
            returns = model.anatomy.returns if prover.returns is None else prover.returns
            return checks, replace(without(with_factors(model.anatomy, mixtures.factors), checks), returns=returns)
        finally:
            model.anatomy = a


def _identities(prover: Prover, mixtures: Mixtures, lanes: Lanes) -> None:
    """Check what every layer, and the end of the stream, must be."""
    a, branches, neurons = prover.a, Branches(prover), Neurons(prover)
    prover.attempt("6 unembed", "resid_post", lambda: _determines(prover, Site("resid_post", a.n_layers - 1)))
    for i, layer in enumerate(a.parts.layers):
        steps: dict[tuple[str, str], Callable[[int], None]] = {}
        steps["2 residual", "resid_post"] = lanes.residual if lanes else branches.add
        if Site("attn.result", i) in a.hook_points:
            steps["3 heads", "attn.result"] = prover.heads
        if Site("mlp_out", i) in a.hook_points:
            mixture = Site("mlp.experts", i) in a.hook_points
            steps["4 neurons", "mlp_out"] = mixtures.prove if mixture else neurons.write
        if layer.attn is not None:
            steps["5 attention", "attn.z"] = prover.attention
        steps["7 weights", "attn.in"] = lanes.reads if lanes else branches.read
        if Site("mlp_out", i) in a.hook_points:
            steps["7 weights", "mlp"] = neurons.read
            steps["7 weights", "mlp.gate"] = partial(prove_cutoff, prover)
        if layer.attn is not None:
            steps["7 weights", "attn"] = prover.attn_weights
        for (identity, name), step in steps.items():
            prover.attempt(identity, f"{i}.{name}", lambda step=step, i=i: step(i))
    last = lanes.read_by(a.parts.final_norm) if lanes else None
    prover.attempt("6 unembed", "logits", lambda: prover.unembed(last))
    if prover.own_transform:
        prover.attempt("6 unembed", "final", lambda: _determines(prover, Site("final")))


class _Watched:
    """The probe with every site watched: a run of all that can be, and checks of what cannot."""

    def __init__(self, model: LoadedModel, tokens: Tensor, plain: Tensor) -> None:
        self.model, self.tokens, self.plain = model, tokens, plain
        self.checks: list[IdentityCheck] = []
        self.widths: dict[Site, int] = {}

    def run(self) -> Run | None:
        """A run in which nothing that is watched changes the logits; None where there is none."""
        sites = [Address(s.name, s.layers) for s in (parse(str(s)) for s in self.model.anatomy.hook_points)]
        sites = [site for site in sites if site.name != "logits"]
        found = self._tried(sites)
        if isinstance(found, Run) and self._equal(found):
            self._conclude(found)
            return found
        # Watching something stops or changes the model: leave out the names that do by themselves.
        kept: list[Address] = []
        for name in dict.fromkeys(site.name for site in sites):
            own = [site for site in sites if site.name == name]
            alone = self._tried(own)
            if isinstance(alone, Run) and self._equal(alone):
                kept += own
                continue
            note = in_one_line(alone) if isinstance(alone, Exception) else "watching it changes the logits"
            gap = float((alone.logits - self.plain).abs().max()) if isinstance(alone, Run) else float("inf")
            self.checks.append(IdentityCheck("1 inert", str(own[0]), "fails", gap, 0.0, note, tuple(map(str, own))))
        if len(kept) < len(sites):
            found = self._tried(kept)
        if isinstance(found, Run) and not self._equal(found):
            self.refuse_random()
        if isinstance(found, Run):
            self._conclude(found)
            return found
        self._fails(in_one_line(found))
        return None

    def refuse_random(self) -> None:
        """Refuse a model that changes its answer between two equal runs.

        Raises:
            ModelUnsupported: it does.
        """
        if not torch.equal(_plain(self.model, self.tokens), self.plain):
            raise error(
                ModelUnsupported,
                f"{self.model.anatomy.name} changes its answer between two equal runs",
                got="parts that are random, or that remember earlier prompts",
                allowed="the same logits for the same tokens",
                do="turn these parts off in its configuration",
            )

    def _tried(self, sites: list[Address]) -> Run | Exception:
        """A run that keeps some sites and counts how often each is seen, or what it raised."""
        self.seen: Counter[str] = Counter()
        count = {str(site): lambda site, x, name=str(site): self.seen.update([name]) for site in sites}
        try:
            return run_forward(self.model, self.tokens, sites, strict=False, observe=count)
        except (MicrotomeError, torch.OutOfMemoryError):
            raise
        except Exception as problem:  # noqa: BLE001 (whatever a module of an unknown family makes of being watched)
            return problem

    def _equal(self, run: Run) -> bool:
        return torch.equal(run.logits, self.plain)

    def _conclude(self, run: Run) -> None:
        """Whether the logits are the plain ones, and which sites were not seen exactly once."""
        gap = float((run.logits - self.plain).abs().max())
        status = "holds" if self._equal(run) else "fails"
        self.checks.append(IdentityCheck("1 inert", "logits", status, gap, 0.0, "", STREAM))
        for site, times in self.seen.items():
            if times > 1:
                note = f"seen {times} times a forward"
                self.checks.append(IdentityCheck("1 inert", site, "fails", float("inf"), 0.0, note, (site,)))
        for site in self.model.anatomy.hook_points:
            note = "" if site.name == "logits" or self._left_out(site) else self._misshapen(run, site)
            if note:
                self.checks.append(IdentityCheck("1 inert", str(site), "fails", float("inf"), 0.0, note, (str(site),)))

    def _misshapen(self, run: Run, site: Site) -> str:
        """What is wrong with the shape of a site in a run; nothing where it is as its axes say."""
        if str(site) not in run:
            return PASSED if site.layer is not None and self._passed(run, site.layer) else NEVER
        lengths = {"batch": run.tokens.shape[0]} | dict.fromkeys(("pos", "q_pos", "k_pos"), run.tokens.shape[1])
        axes = site.spec.dims
        wanted = [lengths[axis] if axis in lengths else self.model.anatomy.size(site, axis) for axis in axes]
        got = list(run[str(site)].shape)
        if got != wanted and (axes[-1] == "d_head" or site.name == "attn.in") and got[:-1] == wanted[:-1]:
            # Queries and keys of projections that are not known; what is read of more than the stream.
            self.widths[site] = got[-1]
            return ""
        if got == wanted:
            return ""
        note = f"its shape is {got} where {wanted} is expected"
        if got[:2] == wanted[1::-1] and axes[:2] == ("batch", "pos"):
            return f"{note}, so that positions come before rows"
        other = axes[1:2] == ("pos",) and len(got) == len(wanted) and got[0] == wanted[0] and got[1] != wanted[1]
        return f"{note}, {got[1]} positions for {wanted[1]} tokens" if other else note

    def _passed(self, run: Run, layer: int) -> bool:
        """Whether the stream that enters the next block that runs is the very one that left the last before a layer."""
        seen = [i for i in range(self.model.anatomy.n_layers) if f"{i}.resid_pre" in run and f"{i}.resid_post" in run]
        before, after = [i for i in seen if i < layer], [i for i in seen if i > layer]
        if layer in seen or not before or not after:
            return False
        return torch.equal(run[f"{before[-1]}.resid_post"], run[f"{after[0]}.resid_pre"])

    def resized(self, anatomy: Anatomy) -> Anatomy:
        """A map with the widths that were seen."""
        points = dict(anatomy.hook_points)
        for site, width in self.widths.items():
            axis = site.spec.dims[-1]
            kept = tuple(size for size in points[site].sizes if size[0] != axis)
            points[site] = replace(points[site], sizes=(*kept, (axis, width)))
        return replace(anatomy, hook_points=points)

    def _left_out(self, site: Site) -> bool:
        return any(str(site) in check.vouches for check in self.checks)

    def _fails(self, note: str) -> None:
        self.checks.append(IdentityCheck("1 inert", "all sites", "fails", float("inf"), 0.0, note, STREAM))


def _determines(prover: Prover, last: Site) -> None:
    """The stream behind the last block gives the logits, whatever the tokens: it alone, of all that was computed."""
    model, run = prover.model, prover.run
    hooks = HookSet(model.hf, prover.a.attention, prover.a.n_heads)
    shape = (int(run.tokens.shape[0]), int(run.tokens.shape[1]))
    point = prover.a.hook_points[last]
    install(hooks, model.hf, last, point, lambda x: run[str(last)].clone(), lambda: shape, edits=True)
    kinds: list[int] = []

    def returned(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kinds.append(len(cast("tuple[Any, ...]", output)) if isinstance(output, tuple | list) else 0)

    for layer in prover.a.parts.layers:
        hooks.after(layer.block, returned)
    with hooks:
        again = model.hf(input_ids=run.tokens.flip(0)).logits
    prover.returns = kinds[0] if len(set(kinds)) == 1 else None
    prover.multiplies("6 unembed", last.name, again, prover.sized(prover.plain))


def _tried_rows(model: LoadedModel, run: Run, plain: Tensor) -> tuple[list[IdentityCheck], Anatomy]:
    """The same as `_rows`; a model that breaks on such rows is padded on no side."""
    try:
        return _rows(model, run, plain)
    except (MicrotomeError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # noqa: BLE001 (whatever a module of an unknown family makes of shorter or padded rows)
        note = in_one_line(problem)
        found = IdentityCheck("1 inert", "shorter and padded rows", "fails", float("inf"), 0.0, note)
        return [found], replace(model.anatomy, padding=())


def _rows(model: LoadedModel, run: Run, plain: Tensor) -> tuple[list[IdentityCheck], Anatomy]:
    """Whether the tokens behind others change the logits of these, and padding on either side those of a row."""
    a, tokens = model.anatomy, run.tokens
    width = tokens.shape[1]
    if a.rotary_switch is not None:  # which refuses rows on both sides of its length
        width = min(width, a.rotary_switch.length)
        tokens, plain = tokens[:, :width], _plain(model, tokens[:, :width])
    if width < 3:
        return [], a
    prover = Prover(model, run, plain)
    if prover.quantised:
        prover.multiplies("1 inert", "rows", run_forward(model, tokens[-1:]).logits, prover.sized(plain)[-1:])
        found = prover.checks.pop()
        if found.status == "fails" or rounds_together(model.hf):
            note = "its layers round what they read by the largest of all rows and positions"
            found = replace(found, status="does not apply", note=note, vouches=())
            why = f"{note} (off by {found.gap:.2g} on the probe)"
            return [found], replace(a, padding=(), rows_interact=why)
    whole, short = prover.sized(plain), width - min(width // 3, PADS)
    if width > SHORTEST:  # equal keys tie in a choice of the best, and the length of a row may decide between them
        again = torch.cat([tokens[:, : width // 2], tokens[:, : width - width // 2].flip(1)], dim=1)
        logits = at_least_float32(_plain(model, again))
        more = Sized(logits, whole.size.mean((0, 1)).expand_as(logits))  # of what is summed, about as for the others
        whole = Sized(*(torch.cat(both) for both in ((whole.value, more.value), (whole.size, more.size))))
        tokens = torch.cat([tokens, again])
    whole, logits = whole[:, :short], run_forward(model, tokens[:, :short]).logits
    prover.multiplies("5 attention", "causal", logits, whole)
    causal = replace(prover.checks.pop(), status="holds", vouches=())
    if causal.gap > (bound := LOOKS_AHEAD if a.causal else NEVER_AHEAD):
        behind = torch.cat([tokens[:, :short], tokens[:, short:].flip(0)], dim=1)
        prover.multiplies("5 attention", "causal", run_forward(model, behind).logits[:, :short], whole)
        if prover.checks.pop().gap > bound:
            causal = replace(causal, status="does not apply", gap=0.0, note="attention looks both ways")
        else:
            note = f"how long a row is changes its logits (by {causal.gap:.2g}), what follows does not"
            causal = replace(causal, gap=0.0, note=note)
    alone = Sized(at_least_float32(logits), whole.size)
    padded = _padded(prover, tokens, short, alone)
    sides = tuple(side for side, check in zip(SIDES, padded, strict=True) if check.status == "holds")
    return [causal, *padded], replace(a, causal=causal.status == "holds", padding=sides)


def _padded(prover: Prover, tokens: Tensor, short: int, alone: Sized) -> list[IdentityCheck]:
    """Whether rows, shortened, give the logits that they give alone behind and before many pads."""
    pads = min(2 * tokens.shape[1] + 1, prover.a.n_ctx - short)  # many, and no multiple of a block
    rows, fill = tokens[:, :short], tokens.flip(0).repeat(1, 3)[:, :pads]
    both = torch.cat([torch.cat([fill, rows], dim=1), torch.cat([rows, fill], dim=1)])
    n = len(rows)
    logits = run_forward(prover.model, Batch(both, (short,) * 2 * n, (*(pads,) * n, *(0,) * n))).logits
    for side, seen in zip(SIDES, (logits[:n, pads:], logits[n:, :short]), strict=True):
        # Through all layers: libraries sum long and short rows in other orders, which sharp attention enlarges.
        prover.same("1 inert", f"padding on the {side}", seen, alone, 5 * prover.product)
    found, prover.checks = [replace(check, vouches=()) for check in prover.checks], []
    if prover.quantised:  # which is how they are, and no fault of the map: such rows are refused all the same
        note = "quantised layers round padded rows otherwise"
        found = [replace(c, status="does not apply", note=note) if c.status == "fails" else c for c in found]
    return found


def without(anatomy: Anatomy, checks: Sequence[IdentityCheck]) -> Anatomy:
    """A map without the sites and weights whose identities fail, each with the reason."""
    missing, unproven = dict(anatomy.missing), dict(anatomy.unproven)
    gone: dict[str, str] = {}
    for check in checks:
        reason = check.reason if check.status == "fails" else check.note
        noted = check.where.endswith((".attn.mix", ".sum", "_norm", "W_U"))
        names = check.vouches if check.status == "fails" or noted else ()
        for name in names:
            gone.setdefault(name, reason)
            layer, _, site = name.partition(".")
            for other in WITH.get(site, ()):
                gone.setdefault(f"{layer}.{other}", f"{site} is missing there, since {reason}")
    hook_points = dict(anatomy.hook_points)
    for site in anatomy.hook_points:
        if str(site) in gone:
            missing[site] = gone.pop(str(site))
            del hook_points[site]
    return replace(anatomy, hook_points=hook_points, missing=missing, unproven=unproven | gone)


def unproven_stream(checks: Sequence[IdentityCheck]) -> IdentityCheck | None:
    """The first identity that fails of the residual stream itself, without which there is no map."""
    failed = (c for c in checks if c.status == "fails" and c.note not in (NEVER, PASSED))
    return next((c for c in failed if any(v.split(".")[-1] in STREAM for v in c.vouches)), None)


def require_stream(model: LoadedModel, checks: Sequence[IdentityCheck]) -> None:
    """Refuse a model whose residual stream is not proven.

    Raises:
        ProofError: names the identity, the place, the gap and what to do.
    """
    broken = unproven_stream(checks)
    if broken is not None:
        raise ProofError(
            f"the residual stream of {model.anatomy.name} ({model.anatomy.model_type}) is not proven: "
            f"{broken.reason}. To do: look with `microtome check`, or open it with prove=False to look inside."
        )


def _plain(model: LoadedModel, tokens: Tensor) -> Tensor:
    """Logits of the unwatched model.

    Raises:
        ModelUnsupported: it does not run on token ids alone.
    """
    try:
        with HookSet(model.hf, model.anatomy.attention, model.anatomy.n_heads):
            logits = model.hf(input_ids=tokens).logits
    except (MicrotomeError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # whatever a module of an unknown family raises
        usual = model.dtype == torch.float32
        kind = "" if usual else f" in {str(model.dtype).removeprefix('torch.')}"  # not every kernel takes every type
        raise error(
            ModelUnsupported,
            f"{model.anatomy.name} cannot run {tokens.shape[1]} tokens{kind} even without hooks",
            got=in_one_line(problem),
            do="open a language model that runs on only token ids" if usual else "open it in float32",
        ) from problem
    if logits.shape[:-1] != tokens.shape:
        what = f"the logits of {model.anatomy.name} are not one vector a token"
        allowed = f"{list(tokens.shape)} and a vocabulary"
        raise error(ModelUnsupported, what, got=str(list(logits.shape)), allowed=allowed, do="open a language model")
    return logits


def require_proven(model: LoadedModel, checks: Sequence[IdentityCheck]) -> None:
    """Refuse a model of which any identity fails.

    Raises:
        ProofError: names the identity, the place, the gap and what to declare.
    """
    failed = [c for c in checks if c.status == "fails"]
    if failed:
        more = f" {len(failed) - 1} more checks fail." if len(failed) > 1 else ""
        raise ProofError(
            f"the map of {model.anatomy.name} ({model.anatomy.model_type}) is not proven: {failed[0].reason}.{more} "
            f"To do: open it without strict=True, and it has what is proven; or look with `microtome check`."
        )


def _no_sums(prover: Prover) -> dict[str, str]:
    """Why the stream is not exactly the sum of what heads and neurons write, by layer where it is not."""
    why = "its quantised layers round what they read, so that what they write is a sum of parts to a rounding only"
    layers = enumerate(prover.parts.layers)
    return {f"{i}.sum": why for i, layer in layers if prover.rounds(layer.o) or prover.rounds(layer.down)}
