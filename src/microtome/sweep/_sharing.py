"""What the cells of a sweep can share in a model: tried once, on a few cells, against a forward for each.

    layers and positions   rows join at the layer where they first act; keys and values before it are the base run's
    layers only            likewise, but every row runs on all positions
    nothing                a forward for every cell

A model shares what gives the logits of literal forwards. That fails in many ways that no map shows: a trunk that
reshapes by the shape of its tokens, a layer that needs what an earlier one left, further inputs of one row for each
token, an MLP that mixes positions. Each is revealed by edits of the stream in the middle and the last layers, at the
last position and a middle one, and by edits inside of these layers, where the metric reads two columns.

Cost:   once a model, a forward of seven short rows, one of one row, and three passes over half of the layers for these
        rows; more where the widest way does not hold.
Check:  every family with tokens against literal runs, and against the wider way; tests/laws/test_sweep_sharing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from microtome.anatomy import Site, at_least_float32, probe
from microtome.edit import KnockOut, Scale, SiteEdit
from microtome.run import Batch, LoadedModel
from microtome.run.hook import lock_of
from microtome.sweep._literal import literal_logits, unreached_layers
from microtome.sweep._pass import Base, BatchedPass, Row, base_of, rows_of

T = TypeVar("T")
CLOSE = 1e-3
"""How far logits may lie from literal ones, relative to their spread: beyond rounding in float32."""
ROUNDINGS = 16
"""Likewise, in units of the rounding of the model's numbers, where these are coarser."""
LOGITS = 64
"""How many tokens of the vocabulary have their logits compared."""
WRITTEN = ("attn.z", "attn_out", "mixer_out", "mlp.post", "mlp_out")


@dataclass(frozen=True)
class Sharing:
    """What cells share.

    Attributes:
        layers: whether the layers before a cell's first are the base run's.
        positions: whether the positions before its first are.
        narrow: whether the last MLP gives the same on nothing but the columns that are read.
        unreached: layers that a forward passes by; known only where nothing is shared.
    """

    layers: bool
    positions: bool
    narrow: bool
    unreached: frozenset[int] = frozenset()

    def describe(self, model: LoadedModel) -> str:
        """What is shared, in words, and why not more."""
        if not self.layers:
            return "nothing, as its layers give something else in a batch that grows"
        if not self.positions:
            why = "a prefix of positions cannot be cut" if model.anatomy.causal else "attention sees both ways"
            return f"layers only, as {why}"
        return "layers and positions"


_KNOWN: WeakKeyDictionary[nn.Module, Sharing] = WeakKeyDictionary()


def sharing_of(model: LoadedModel) -> Sharing:
    """The most that cells can share in a model, tried at its first sweep."""
    known = _KNOWN.get(model.hf)
    if known is None:
        faults: list[Exception] = []
        known = _tried(model, faults)
        if not (faults and lock_of(model.hf).active_edits):  # a fault may come of the edits, which the model outlives
            _KNOWN[model.hf] = known
    return known


def _tried(model: LoadedModel, faults: list[Exception]) -> Sharing:
    a = model.anatomy
    # Other mixers than attention keep states of another kind than keys and values.
    cuts = a.causal and all(layer.attn is not None and layer.mixer is None for layer in a.parts.layers)
    trial = _without_fault(lambda: _Trial(model), faults)
    if trial is not None:
        for positions, narrow in product((True, False) if cuts else (False,), (True, False)):
            way = Sharing(True, positions, narrow)
            if _without_fault(partial(trial.holds, way), faults):
                return way
    tokens = probe(model.hf)[:1, : a.n_ctx]
    return Sharing(False, False, False, unreached_layers(model, tokens))


def _without_fault(step: Callable[[], T], faults: list[Exception]) -> T | None:
    """What a step gives; None where the model cannot do it, for whatever reason but memory, which is noted."""
    try:
        return step()
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # noqa: BLE001 (whatever a model makes of a batch that grows inside it)
        faults.append(fault)
        return None


class _Trial:
    """A few cells, with their literal logits at two columns of the probe's first row."""

    def __init__(self, model: LoadedModel) -> None:
        a = model.anatomy
        self.model, self.tokens = model, probe(model.hf)[:1, : a.n_ctx]
        self.length = int(self.tokens.shape[1])
        self.middle, last = self.length // 2, self.length - 1
        self.read = torch.tensor([[self.middle, last]], device=model.device)
        # Encoders may have a transform of their own before the unembedding, which sweeps leave whole.
        vocab = a.size(Site("logits"), "vocab")
        self.ids = torch.arange(0, vocab, max(1, vocab // LOGITS), device=model.device) if a.causal else None
        half, end = a.n_layers // 2, a.n_layers - 1
        layers = sorted({half, min(half + 1, end), end})  # two neighbours: one may use what the other left
        places = [(half, self.middle), (half, last), (layers[1 % len(layers)], self.middle)]
        places += [(end, self.middle), (end, last)]
        stream = [[Scale(f"{layer}.resid_pre@{at}", factor=-1.0)] for layer, at in dict.fromkeys(places)]
        inside = self._inside(layers)
        self.cells: list[Sequence[SiteEdit]] = [*stream, inside] if inside else [*stream]
        self.batch = Batch(self.tokens, (self.length,), (0,))
        rows = rows_of(model, self.batch, self.cells, [0] * len(self.cells))
        # Edits inside of layers are tried separately, as they switch off some of what the others try.
        self.passes = [part for part in (rows[: len(stream)], rows[len(stream) :]) if part]
        self.literal = self._literal()

    def _inside(self, layers: Sequence[int]) -> list[SiteEdit]:
        """Edits of what is written inside of some layers, and of attention from the last position to the one before."""
        here = self.model.anatomy.hook_points
        sites = [site for layer in layers for name in WRITTEN if (site := Site(name, layer)) in here]
        found: list[SiteEdit] = [Scale(f"{site}@{self.middle}", factor=0.5) for site in sites]
        last, keys = self.length - 1, str(self.length - 2)
        scores = [site for layer in layers if (site := Site("attn.scores", layer)) in here]
        return found + [KnockOut(f"{site}@{last}", keys=keys) for site in scores if last > 0]

    def _literal(self) -> Tensor:
        """Literal logits [row, read, id] of all cells, and of a last row without edits, in one forward."""
        edits = [replace(edit, rows=(row,)) for row, cell in enumerate(self.cells) for edit in cell]
        logits = literal_logits(self.model, self.tokens.expand(len(self.cells) + 1, -1), edits)[:, self.read[0]]
        return logits if self.ids is None else logits[..., self.ids]

    def holds(self, way: Sharing) -> bool:
        """Whether a way of sharing gives the literal logits."""
        positions = way.positions
        base = base_of(self.model, self.batch, [0], self.read, self.ids, (), positions)
        tried = [(self.middle, rows) for rows in self.passes] if positions else []
        tried += [(0, rows) for rows in (self.passes[:1] if positions else self.passes)]
        return self._close(base.logits, self.literal[-1:]) and all(
            self._close(self._shared(base, rows, first, way.narrow), self.literal[[row.place for row in rows]])
            for first, rows in tried
        )

    def _shared(self, base: Base, rows: list[Row], first: int, narrow: bool) -> Tensor:
        batched_pass = BatchedPass(self.model, base, rows, first, narrow=narrow)
        logits = batched_pass.run()
        return logits[sorted(range(len(rows)), key=lambda i: batched_pass.rows[i].place)]

    def _close(self, got: Tensor, literal: Tensor) -> bool:
        """Whether the logits of every row are the literal ones, in the mean over tokens: routers make rare jumps."""
        if got.shape != literal.shape:
            return False
        allowed = max(CLOSE, ROUNDINGS * torch.finfo(self.model.dtype).eps)
        gaps = at_least_float32(got) - at_least_float32(literal)
        return bool((gaps.square().flatten(1).mean(1).sqrt() <= allowed * at_least_float32(literal).std()).all())
