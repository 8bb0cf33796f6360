"""Circuits: many edges at once, so that a whole circuit is one row of a batch.

In a row every receiver reads the stream in which each edge that is not kept gives something else than its sender
writes. What is kept is path-dependent: it is what the sender writes in this very row.

Formula:  x_v = stream_v(row) + sum over u -> v not kept of (other_u - write_u(row)), for v = q, k, v of each query
          head, each MLP, and the logits; written as changes from the clean run,
          x_v = stream_v(clean) + sum_kept (write_u(row) - write_u(clean)) + sum_not kept (other_u - write_u(clean)).
          A head writes z W_O; behind a norm its share of what the norm gives, z W_O gain / divisor of this run, so that
          the shares of all heads add up in every run.
          Rows begin at a circuit that has been run: only what their edges change, and what can reach the logits, is
          computed.
Cost:     a row with all layers changed takes about two forwards: each input of a head is a stream of its own.
Check:    all edges give the clean logits and none those of the other run; equal to plain hooks on a model with keys
          and values for every head; tests/laws/test_circuit_rows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.context import current
from microtome.errors import EditError, error
from microtome.metric import Metric, TokenSubsetMetric, in_ids
from microtome.run import LoadedModel, Run, free_memory, run_forward
from microtome.run.hook import lock_of
from microtome.shown import shown
from microtome.sweep._branches import Branches, Layer, reads_own_weights
from microtome.sweep._edges import require_edges
from microtome.sweep._numbering import Numbering
from microtome.sweep._standing import standing_in_circuits

Edges = Bool[Tensor, "sender receiver"]
Writes = Float[Tensor, "prompt sender pos d_model"]
ROWS = 64
"""The most rows that are run at once."""
ROOM = 2**30
"""Bytes that they may hold at most where the settings name no budget."""


def written(model: LoadedModel, run: Run) -> Writes:
    """[prompt, sender, pos, d_model] What the embedding, every head and every MLP wrote to the stream in a run.

    A head's is without the bias of W_O; behind a norm it is the head's share of what the norm gives.

    Args:
        model: whose run it is.
        run: that captured ``embed``, ``*.attn.z`` and ``*.mlp_out``.

    Raises:
        SiteError: a norm behind the heads has no known form.
    """
    found = [at_least_float32(run["embed"]).unsqueeze(1)]
    for i in range(model.anatomy.n_layers):
        found.append(of_heads(model, i, at_least_float32(run[f"{i}.attn.z"]).transpose(1, 2)))
        found.append(at_least_float32(run[f"{i}.mlp_out"]).unsqueeze(1))
    return torch.cat(found, dim=1)


def of_heads(
    model: LoadedModel, layer: int, z: Float[Tensor, "row head pos d_head"], heads: Tensor | None = None
) -> Float[Tensor, "row head pos d_model"]:
    """What heads write, all of the layer or some."""
    weights = model.layers[layer]
    matrix = at_least_float32(weights.W_O if heads is None else weights.W_O[heads]).detach()
    rows, _, length, _ = z.shape
    raw = torch.bmm(z.transpose(0, 1).flatten(1, 2).to(matrix.dtype), matrix).unflatten(1, (rows, length))
    raw, by = raw.transpose(0, 1), model.anatomy.parts.layers[layer].attn_by
    norm = weights.attn_post_norm
    if norm is None:
        return raw * by
    whole = raw.sum(1)
    whole = whole if weights.b_O is None else whole + weights.b_O.detach()
    return norm.centre(raw) / norm.scale(whole).to(raw.dtype)[:, None, :, None] * norm.gain * by


@shown
@dataclass(frozen=True, eq=False)
class CircuitState:
    """A circuit that was run on every prompt, from which others go on.

    Attributes:
        kept: [sender, receiver] the edges that are in it.
        change: [prompt, sender, pos, d_model] what each sender writes more than in the clean run.
        known: [sender] whether that is so: of senders that do not reach the logits it is not.
        values: [prompt, ...] the metric.
    """

    kept: Edges
    change: Writes
    known: Bool[Tensor, " sender"]
    values: Shaped[Tensor, " prompt *of"]


@dataclass
class _Rows:
    """What is known of the rows under way: senders whose writes changed, by number, and by how much."""

    prompts: Int[Tensor, " row"]
    kept: Bool[Tensor, "one sender receiver"]
    changed: Bool[Tensor, "one sender"]
    active: Int[Tensor, " active"]
    more: Float[Tensor, "row active pos d_model"]
    filled: int = 0


@dataclass(frozen=True, eq=False)
class Ran:
    """Rows that have been run: the metric of each, and what their senders write more than in the state before."""

    values: Shaped[Tensor, " row *of"]
    active: Int[Tensor, " active"]
    more: Float[Tensor, "row active pos d_model"]


@shown
class Circuits:
    """Prompts of one length on which circuits are run, each as a row of a batch.

    Attributes:
        numbering: which number each sender and receiver has.
        edges: [sender, receiver] all that there are.
        clean: the state with all edges.
        other: [prompt, sender, pos, d_model] what edges that are not kept give.
        away: the same less what their senders write in the clean run.
        own_weights: whether inputs of heads are projected by the weights of each, which is tried first.

    >>> engine = mt.sweep.Circuits(model, clean, corrupt, LogitDifference(answer=paris, foil=rome))
    >>> engine.measure(engine.edges & (scores > 0.1))
    """

    def __init__(
        self,
        model: LoadedModel,
        clean: Int[Tensor, "prompt pos"],
        other: Tensor,
        metric: Metric,
        *,
        embeddings: Float[Tensor, "prompt part pos d_model"] | None = None,
    ) -> None:
        """Run the clean prompts, and keep what senders write.

        Args:
            model: the model.
            clean: prompts of one length.
            other: tokens [prompt, pos] of as many corrupt prompts; or [prompt or 1, sender, pos or 1, d_model], what
                edges that are not kept give instead of what their senders write.
            metric: what is read of prompt i in each row of it.
            embeddings: what each part of the embedding gives in the other run more than in the clean one, if it has
                several: they are the first senders then.

        Raises:
            SiteError: the stream of the model is not a sum over its parts.
            EditError: the other prompts do not fit, or an edit of `editing`, all of which hold in every row, cannot.
        """
        a = model.anatomy
        require_edges(a)
        standing = standing_in_circuits(lock_of(model.hf).active_edits)
        metric = in_ids(metric, model)
        self.model, self.metric, self.tokens = model, metric, clean
        self.numbering = Numbering.of(a, 1 if embeddings is None else embeddings.shape[1])
        self.edges = self.numbering.edges.to(model.device)
        self._branches = Branches(model, standing)
        streams = ["resid_pre"] if a.parts.form == "parallel" else ["resid_pre", "resid_mid"]
        sites = ["embed", "*.attn.z", "*.mlp_out", *(f"*.{name}" for name in streams)]
        with torch.no_grad():
            run = run_forward(model, clean, [*sites, f"{a.n_layers - 1}.resid_post"], logits=True)
            own = written(model, run)
        self._streams = {str(address): x for address, x in run.captured.items() if "resid" in str(address)}
        if embeddings is not None:
            own = torch.cat([own[:, :1], own.new_zeros(embeddings.shape).to(own)[:, 1:], own[:, 1:]], dim=1)
        self._own = own
        self.other = self._others(other, embeddings)
        self.away = self.other - own
        length = int(clean.shape[1])
        columns = [metric.columns(i, length) for i in range(len(clean))]
        self._read = torch.tensor([[c % length for c in of] for of in columns], device=model.device)
        subset = isinstance(metric, TokenSubsetMetric) and a.causal
        ids, self._over = metric.token_subset() if subset else (None, metric)  # pyright: ignore
        self._ids = None if ids is None else torch.tensor(ids, device=model.device)
        numbers = torch.arange(len(clean), device=model.device)
        values = metric.read(run.logits[numbers.unsqueeze(1), self._read], numbers)
        known = torch.ones(own.shape[1], dtype=torch.bool, device=model.device)
        self._none = own.new_zeros(1, 1, 1, 1).expand_as(own)
        self.clean = CircuitState(self.edges, self._none, known, values)
        self.own_weights = reads_own_weights(model, clean)

    def _others(self, other: Tensor, embeddings: Tensor | None) -> Writes:
        own = self._own
        if other.dim() == 2 and not other.is_floating_point():
            if other.shape != self.tokens.shape:
                raise error(EditError, "the other prompts do not fit the clean ones", got=str(list(other.shape)),
                            allowed=str(list(self.tokens.shape)), do="give as many tokens of each")  # fmt: skip
            with torch.no_grad():
                found = written(self.model, run_forward(self.model, other, _WRITTEN, logits=False))
            found = found if embeddings is None else torch.cat([own[:, : self.numbering.embeds], found[:, 1:]], dim=1)
        elif other.dim() != 4 or any(n not in (1, m) for n, m in zip(other.shape, own.shape, strict=True)):
            raise error(
                EditError,
                "what edges give instead must be [prompt, sender, pos, d_model]",
                got=str(list(other.shape)),
                allowed=str(list(own.shape)),
                do="give it for every sender",
            )
        else:
            found = other.to(own).expand_as(own).clone()
        if embeddings is not None:
            found[:, : embeddings.shape[1]] = own[:, : embeddings.shape[1]] + embeddings.to(own)
        return found

    @property
    def own(self) -> Writes:
        """[prompt, sender, pos, d_model] What every sender writes in the clean run."""
        return self._own

    def stream(self, receiver: int) -> Float[Tensor, "prompt pos d_model"]:
        """The stream that a receiver reads in the clean run."""
        n, streams = self.numbering, self._streams
        if receiver == n.receivers - 1:
            return at_least_float32(streams[f"{n.n_layers - 1}.resid_post"])
        layer, place = divmod(receiver, 3 * n.n_heads + 1)
        mid = place == 3 * n.n_heads and not n.parallel
        return at_least_float32(streams[f"{layer}.resid_mid" if mid else f"{layer}.resid_pre"])

    def giving(self, other: Float[Tensor, "prompt sender pos d_model"]) -> Circuits:
        """The same prompts, where edges that are not kept give this: [prompt or 1, sender, pos or 1, d_model]."""
        found = copy(self)
        found.other = found._others(other, None)
        found.away = found.other - found._own
        return found

    def room(self) -> int:
        """Bytes that rows which are run at once may hold: the budget of the settings, or half of what is free."""
        budget = current().budget
        return min(ROOM, free_memory(self.model.device) // 2) if budget is None else budget

    def bytes_of_row(self, active: int) -> int:
        """What a row holds in which so many senders change."""
        a, length = self.model.anatomy, int(self.tokens.shape[1])
        return 4 * length * (a.d_model * (active + 8 * a.n_heads) + 3 * a.d_mlp + 3 * a.n_heads * length)

    def measure(
        self,
        kept: Bool[Tensor, "*row sender receiver"],
        prompts: Int[Tensor, " number"] | None = None,
        *,
        start: CircuitState | None = None,
        progress: Callable[[int, int], None] | None = None,
        budget: int | None = None,
    ) -> Shaped[Tensor, " row *of"]:
        """The metric of every row: one circuit on one prompt.

        Args:
            kept: the edges of each row's circuit; one [sender, receiver] is run on every prompt.
            prompts: the number of each row's prompt; all of them by default, each with each circuit, circuit by
                circuit.
            start: a circuit that has been run, from which rows differ little.
            progress: called with (done, all) rows.
            budget: bytes that the rows which are run at once may hold; by default as `room` says.

        Returns:
            [row, ...]; without `prompts` [circuit, prompt, ...], or [prompt, ...] of a single one.
        """
        start, one = self.clean if start is None else start, kept.dim() == 2
        kept = (kept.unsqueeze(0) if one else kept).to(self.model.device) & self.edges
        n, whole = len(self.tokens), prompts is None
        which = torch.arange(len(kept), device=kept.device)
        if prompts is None:
            prompts = torch.arange(n, device=kept.device).repeat(len(kept))
            which = which.repeat_interleave(n)
        budget = self.room() if budget is None else budget
        step = max(1, min(ROWS, budget // self.bytes_of_row(self.numbering.senders)))
        step = min(step, n) if whole and n >= ROWS // 4 else step  # rows of one circuit share its mask
        found: list[Tensor] = []
        for first in range(0, len(prompts), step):
            part, mine = which[first : first + step], prompts[first : first + step]
            masks = kept[part[:1]] if bool((part == part[0]).all()) else kept[part]
            found.append(self.run(mine, masks, start).values)
            if progress is not None:
                progress(min(first + step, len(prompts)), len(prompts))
        values = torch.cat(found) if found else self.clean.values[:0]
        values = values.unflatten(0, (len(kept), n)) if whole else values
        return values[0] if one and whole else values

    def state(self, kept: Edges, start: CircuitState | None = None) -> CircuitState:
        """A circuit run on every prompt, to go on from."""
        start, kept = self.clean if start is None else start, kept.to(self.model.device) & self.edges
        ran = self.run(torch.arange(len(self.tokens), device=kept.device), kept.unsqueeze(0), start)
        return self.accept(start, ran, kept)

    def accept(self, start: CircuitState, ran: Ran, kept: Edges, rows: Tensor | None = None) -> CircuitState:
        """The state after rows, one of each prompt, that have been run from another state."""
        known = self.numbering.needed(kept.unsqueeze(0))[0]
        more, values = (x if rows is None else x[rows] for x in (ran.more, ran.values))
        change = start.change.clone()
        change[:, ran.active] += more
        return CircuitState(kept, change, known, values)

    def run(
        self,
        prompts: Int[Tensor, " row"],
        kept: Bool[Tensor, "one sender receiver"],
        start: CircuitState,
        extra: tuple[int, Float[Tensor, "row pos d_model"]] | None = None,
    ) -> Ran:
        """Run rows from a state.

        Args:
            prompts: the number of each row's prompt.
            kept: the edges of every row, or of all of them.
            start: where they begin.
            extra: a receiver and what it reads besides in each row: edges that go are given so, `kept` being the
                start's.
        """
        with torch.no_grad():
            return _Run(self, prompts, kept, start, extra).run()

    def removing(self, start: CircuitState, receiver: int, senders: Sequence[int]) -> tuple[Ran, int]:
        """Rows of every prompt in which the first, the first two, ... edges from senders into a receiver are gone.

        Returns:
            What was run, rows [sender, prompt] in one axis, and how many prompts there are.
        """
        n = len(self.tokens)
        gone = (self.away[:, list(senders)] - start.change[:, list(senders)]).cumsum(
            1
        )  # [prompt, sender, pos, d_model]
        prompts = torch.arange(n, device=gone.device).repeat(len(senders))
        extra = receiver, gone.transpose(0, 1).flatten(0, 1)
        return self.run(prompts, start.kept.unsqueeze(0), start, extra), n


_WRITTEN = ("embed", "*.attn.z", "*.mlp_out")


class _Run:
    """Rows under way through the layers."""

    def __init__(
        self, engine: Circuits, prompts: Tensor, kept: Tensor, start: CircuitState, extra: tuple[int, Tensor] | None
    ) -> None:
        self.engine, self.model, self.start, self.extra = engine, engine.model, start, extra
        self.n = numbering = engine.numbering
        self.flips = (start.kept.unsqueeze(0).float() - kept.float()) if extra is None else None
        flipped = torch.zeros(len(kept), numbering.receivers, dtype=torch.bool, device=kept.device)
        if extra is not None:
            flipped[:, extra[0]] = True
        elif self.flips is not None:
            flipped = (self.flips != 0).any(1)
        needed = numbering.needed(kept)
        changed = numbering.changed(kept, flipped, needed, start.known)
        active = changed.any(0).nonzero().flatten()
        width, d = int(engine.tokens.shape[1]), self.model.anatomy.d_model
        more = engine.own.new_zeros(len(prompts), len(active), width, d)
        self.rows = _Rows(prompts, kept, changed, active, more)
        self.plain = bool((start.kept == engine.edges).all())
        self.gone = engine.away if start is engine.clean or extra is not None else engine.away - start.change

    def run(self) -> Ran:
        """Values and changes of the rows."""
        rows, engine, n = self.rows, self.engine, self.n
        layers = [bool(rows.changed[:, n.heads(i).start : n.mlp(i) + 1].any()) for i in range(n.n_layers)]
        read = engine._read[rows.prompts]  # pyright: ignore[reportPrivateUsage]
        over, ids = engine._over, engine._ids  # pyright: ignore[reportPrivateUsage]
        logits = engine._branches.run(engine.tokens[:1], layers, self._layer, self._end, read, ids)  # pyright: ignore
        return Ran(over.read(logits, rows.prompts), rows.active, rows.more)

    def _layer(self, layer: Layer) -> None:
        """Heads and MLP of a layer, for the rows that need them."""
        i, rows, n = layer.index, self.rows, self.n
        if bool((heads := rows.changed[:, n.heads(i)]).any()):
            self._heads(layer, heads)
        mlp = n.mlp(i)
        mine = rows.changed[:, mlp].expand(len(rows.prompts)).nonzero().flatten()
        if len(mine):
            x = self._read(mine, [n.mlp_in(i)])[:, 0]
            norm = self.model.layers[i].mlp_norm
            x = x.to(self.model.dtype)
            out = at_least_float32(layer.mlp(x if norm is None else norm.module(x)))
            self._wrote(mine, torch.tensor([mlp], device=mine.device), out.unsqueeze(1))

    def _heads(self, layer: Layer, changed: Bool[Tensor, "one head"]) -> None:
        i, rows, h = layer.index, self.rows, self.n.n_heads
        mine = changed.any(1).expand(len(rows.prompts)).nonzero().flatten()
        some = changed.any(0).nonzero().flatten()
        first = self.n.inputs(i).start
        columns = [first + slot * h + int(head) for slot in range(3) for head in some]
        x = self._read(mine, columns).unflatten(1, (3, len(some))).to(self.model.dtype)
        norm = self.model.layers[i].attn_norm
        x = x if norm is None else norm.module(x)
        z = at_least_float32(layer.heads(x, some.tolist(), own=self.engine.own_weights))  # pyright: ignore
        self._wrote(mine, some + self.n.heads(i).start, of_heads(self.model, i, z, some))

    def _wrote(self, mine: Tensor, senders: Tensor, new: Float[Tensor, "some sender pos d_model"]) -> None:
        """Keep what senders write in rows more than in the start, where they were to be computed."""
        rows, e = self.rows, self.engine
        of = rows.prompts[mine].unsqueeze(1), senders.unsqueeze(0)
        more = new - e.own[of] - self.start.change[of]
        wanted = rows.changed.expand(len(rows.prompts), -1)[mine][:, senders]
        stop = rows.filled + len(senders)
        rows.more[mine, rows.filled : stop] = more * wanted[..., None, None]
        rows.filled = stop

    def _read(self, mine: Int[Tensor, " some"], receivers: Sequence[int]) -> Float[Tensor, "some receiver pos d_model"]:
        """What receivers of one branch read in rows."""
        rows, e, start = self.rows, self.engine, self.start
        before, columns = self.n.before(receivers[0]), torch.tensor(receivers, device=mine.device)
        which = rows.prompts[mine]
        base = e.stream(receivers[0])
        if self.plain:
            x = base[which].unsqueeze(1).expand(-1, len(columns), -1, -1).clone()
        else:
            kept = start.kept[:before, columns].to(e.own.dtype).T
            out = (e.edges & ~start.kept)[:before, columns].to(e.own.dtype).T
            x = torch.stack([self._of_start(p, base[p], kept, out) for p in range(len(base))])[which]
        if rows.filled:
            senders = rows.active[: rows.filled]
            kept = rows.kept if len(rows.kept) == 1 else rows.kept[mine]
            by = kept[:, senders][:, :, columns].transpose(1, 2).to(x.dtype)
            x += torch.matmul(by, rows.more[mine, : rows.filled].flatten(2)).view_as(x)
        if self.flips is not None:
            self._flip(x, mine, which, before, columns)
        elif self.extra is not None and self.extra[0] in receivers:
            x[:, receivers.index(self.extra[0])] += self.extra[1][mine]
        return x

    def _of_start(self, prompt: int, stream: Tensor, kept: Tensor, out: Tensor) -> Tensor:
        """[receiver, pos, d_model] What receivers read of a prompt in the start."""
        e, before = self.engine, kept.shape[1]
        change = self.start.change[prompt, :before].flatten(1)
        gone = e.away[prompt, :before].flatten(1)
        return stream + (kept @ change + out @ gone).view(len(kept), *stream.shape)

    def _flip(self, x: Tensor, mine: Tensor, which: Tensor, before: int, columns: Tensor) -> None:
        """Add what edges give that are not kept any more, and take away what those gave that are kept again."""
        flips = self.flips
        assert flips is not None
        some = flips[:, :before][:, :, columns].transpose(1, 2)  # [row or 1, receiver, sender]
        if not bool(some.any()):
            return
        for prompt in which.unique().tolist():
            here = (which == prompt).nonzero().flatten()
            gone = self.gone[prompt, :before]
            by = some if len(some) == 1 else some[mine[here]]
            x[here] += torch.matmul(by.to(x.dtype), gone.flatten(1)).view(len(by), *x.shape[1:])

    def _end(self) -> Float[Tensor, "row pos d_model"]:
        """What the logits read."""
        every = torch.arange(len(self.rows.prompts), device=self.rows.prompts.device)
        return self._read(every, [self.n.receivers - 1])[:, 0].to(self.model.dtype)
