"""A circuit: edges of a model's graph, with their scores and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.circuits._differences import difference_of_means
from microtome.errors import ArgumentError, DataError, error
from microtome.explain import Graph, graph
from microtome.files import atomic
from microtome.model import Model
from microtome.shown import shown

if TYPE_CHECKING:
    import xarray as xr

MARK = "circuit"
EACH_ALONE = "each alone: where nothing differs, 5 % of them leave out 0,"
DRAWS = 2_000
"""Random circuits of which the overlap is taken."""


@shown
@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges of a model's graph, with scores and provenance.

    Attributes:
        senders: by name, as `mt.explain.graph` has them; parts of the embedding may stand in the place of `embed`.
        receivers: by name.
        edges: [sender, receiver] whether the model has this edge.
        kept: [sender, receiver] the edges of the circuit.
        scores: [sender, receiver] what it was chosen by, NaN where there is no edge or no score.
        attrs: where it comes from: model, fingerprint, method, task, seed.

    >>> circuit = mt.circuits.find(model, task, method="acdc", tau=0.02)
    >>> circuit.n_edges, circuit.nodes, circuit.overlap(other)
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    edges: Bool[Tensor, "sender receiver"]
    kept: Bool[Tensor, "sender receiver"]
    scores: Float[Tensor, "sender receiver"]
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        shape = (len(self.senders), len(self.receivers))
        for name in ("edges", "kept", "scores"):
            if tuple(getattr(self, name).shape) != shape:
                raise error(DataError, f"{name} of a circuit must be [sender, receiver]",
                            got=str(list(getattr(self, name).shape)), allowed=str(list(shape)),
                            do="give one for every pair")  # fmt: skip
        if bool((self.kept & ~self.edges).any()):
            u, v = (self.kept & ~self.edges).nonzero()[0].tolist()
            raise error(DataError, f"{self.senders[u]} -> {self.receivers[v]} is no edge of the model",
                        do="keep only what comes before the receiver")  # fmt: skip

    def _facts(self) -> dict[str, str]:
        """How large it is, and of what."""
        origin = {name: str(self.attrs[name]) for name in ("model", "method", "task", "metric") if name in self.attrs}
        return {"edges": f"{self.n_edges:,} of {int(self.edges.sum()):,}", "nodes": str(len(self.nodes))} | origin

    @property
    def n_edges(self) -> int:
        """How many edges it has."""
        return int(self.kept.sum())

    @property
    def share(self) -> float:
        """The share of the model's edges that it has."""
        return self.n_edges / int(self.edges.sum())

    @property
    def listed(self) -> list[tuple[str, str, float]]:
        """Its edges as (sender, receiver, score), those of the largest scores first."""
        places = self.kept.nonzero().tolist()
        found = [(self.senders[u], self.receivers[v], float(self.scores[u, v])) for u, v in places]
        return sorted(found, key=lambda edge: -abs(edge[2]) if edge[2] == edge[2] else 0.0)

    @property
    def nodes(self) -> list[str]:
        """The senders and receivers of its edges, a head or MLP once, as senders; the logits are `final`."""
        u, v = self.kept.any(1), self.kept.any(0)
        found = {self.senders[i] for i in u.nonzero().flatten().tolist()}
        found |= {node_of(self.receivers[i]) for i in v.nonzero().flatten().tolist()}
        return [name for name in [*self.senders, "final"] if name in found]

    def require(self, model: Model) -> None:
        """Refuse a model that it is not a circuit of.

        Raises:
            DataError: its fingerprint is another, or its graph has other nodes.
        """
        own = self.attrs.get("fingerprint")
        if own is not None and own != model.fingerprint:
            raise error(
                DataError, "this circuit is one of another model", got=f"{self.attrs.get('model')} ({own})",
                allowed=f"{model.anatomy.name} ({model.fingerprint})", do="open that model, or find the circuit again",
            )  # fmt: skip
        parts = graph(model)
        if self.receivers != parts.receivers or self.senders[-len(parts.senders) + 1 :] != parts.senders[1:]:
            raise error(DataError, "this circuit is one of another graph", got=f"{len(self.receivers)} receivers",
                        allowed=str(len(parts.receivers)), do="find the circuit again")  # fmt: skip

    def _same(self, other: Circuit) -> None:
        if self.senders != other.senders or self.receivers != other.receivers:
            raise error(
                DataError,
                "these circuits are of different graphs",
                got=f"{len(self.senders)} and {len(other.senders)} senders",
                do="compare circuits of one graph",
            )

    def __or__(self, other: Circuit) -> Circuit:
        """The edges of either."""
        return self._with(other, self.kept | other.kept, "or")

    def __and__(self, other: Circuit) -> Circuit:
        """The edges of both."""
        return self._with(other, self.kept & other.kept, "and")

    def __sub__(self, other: Circuit) -> Circuit:
        """The edges of the first alone."""
        return self._with(other, self.kept & ~other.kept, "without")

    def _with(self, other: Circuit, kept: Tensor, how: str) -> Circuit:
        self._same(other)
        names = [str(c.attrs.get("task", c.attrs.get("method", "circuit"))) for c in (self, other)]
        attrs = {k: v for k, v in self.attrs.items() if k in ("model", "fingerprint")}
        by = sorted({str(c.attrs["ablation"]) for c in (self, other) if "ablation" in c.attrs})
        attrs |= {"ablation": " and ".join(by)} if by else {}
        scores = torch.where(self.scores.isnan() | (other.kept & ~self.kept), other.scores, self.scores)
        return replace(self, kept=kept, scores=scores, attrs=attrs | {"method": f"{names[0]} {how} {names[1]}"})

    def pruned(self) -> Circuit:
        """Without edges that lead nowhere, and, where edges are resampled, those that no way leads to.

        A head or MLP that reads nothing of this circuit writes what it writes in the other run, whether its edges are
        kept or not; so where edges are replaced by another run's values ("resample"), this changes nothing. Where they
        give a mean or zero, such a node still writes something else than what replaces it: its edges stay, and only
        those go that lead nowhere, as its attribute `ablation` says.
        """
        unread = self.attrs.get("ablation", "resample") == "resample"
        return replace(self, kept=prune(self.kept, self.senders, self.receivers, unread=unread))

    def overlap(self, other: Circuit, *, draws: int = DRAWS, seed: int = 0) -> xr.Dataset:
        """How many edges and nodes two circuits share, beside as many that are drawn at random.

        Formula:  p is the share of draws whose overlap is at least the found one, (1 + #) / (1 + draws). Edges are
                  drawn again in each receiver's layer and kind (q, k, v, mlp.in, final) and each sender's kind
                  (embedding, head, MLP), so that two circuits which both prefer late MLPs do not overlap by that
                  alone; a stratum's overlap is hypergeometric.
                  `hypergeometric` is the p-value of edges drawn from all alike.
        Check:    two equal circuits, and independent ones; tests/laws/test_circuits.py.

        Args:
            other: a circuit of the same graph.
            draws: random overlaps.
            seed: of the draws.

        Returns:
            A dataset over `unit` ("edges", "nodes"): `shared`, `first`, `second`, `jaccard`, `expected`, `p`,
            `hypergeometric`.

        Raises:
            DataError: the circuits are of different graphs.
        """
        import xarray as xr

        self._same(other)
        rng = np.random.default_rng(seed)
        strata = strata_of(self.senders, self.receivers)[self.edges.numpy()]
        rows = [_overlap(self.kept[self.edges], other.kept[self.edges], strata, draws, rng)]
        names = [*self.senders, "final"]
        sets = [torch.tensor([name in own for name in names]) for own in (set(self.nodes), set(other.nodes))]
        kinds = np.array([_kind(name) for name in names])
        rows.append(_overlap(sets[0], sets[1], np.unique(kinds, return_inverse=True)[1], draws, rng))
        values = {name: ("unit", [row[name] for row in rows]) for name in rows[0]}
        attrs = {
            "title": "overlap of two circuits",
            "draws": draws,
            "seed": seed,
            "null": "as many edges of each receiver's layer and kind and sender's kind, drawn at random",
        }
        return xr.Dataset(values, coords={"unit": ["edges", "nodes"]}, attrs=attrs)

    def compare(
        self, other: Circuit, *, scores: Any = None, paired: bool = False, draws: int = DRAWS, seed: int = 0
    ) -> xr.Dataset:
        """What this circuit and another have in common, and where their edges and nodes are worth something else.

        Formula:  the overlap and its null as `overlap`; difference = score here minus score there; where scores of
                  pairs are given, of their means, with its 95 % interval: Welch's, or of the pairs' differences where
                  `paired`. The difference of a node is that of the sums over the edges out of it. Each interval is
                  of one edge or node by itself: of the many, 5 % leave out 0 where nothing differs.
        Source:   Merullo, Eickhoff, Pavlick, "Circuit Component Reuse Across Tasks in Transformer Language Models",
                  2024 (arXiv 2310.08744). Departs: edges as well as heads; the null draws within strata.
        Cost:     none of the model.
        Check:    equal circuits share all and differ by 0; tests/laws/test_circuit_comparison.py.

        Args:
            other: a circuit of the same graph; its model may have been changed since.
            scores: [pair, sender, receiver] of this circuit's pairs and of the other's, as two tensors.
            paired: whether pair i of one is pair i of the other, as before and after a change.
            draws: random overlaps.
            seed: of the draws.

        Returns:
            What `overlap` gives; `member` over `component`: 1 a node of this circuit alone, 2 of the other alone, 3 of
            both, 0 of neither; `edges` and `edges_other` over it; `difference` over (sender, receiver) and
            `node_difference` over `component`, each with `_lo` and `_hi` where scores of pairs are given.

        Raises:
            DataError: the circuits are of different graphs, or the scores do not fit them.

        >>> before.compare(after)["member"]
        """
        data = self.overlap(other, draws=draws, seed=seed)
        names = [*self.senders, "final"]
        sets = [np.array([name in own for name in names]) for own in (set(self.nodes), set(other.nodes))]
        values: dict[str, Any] = {"member": ("component", sets[0] + 2 * sets[1])}
        for name, c in (("edges", self), ("edges_other", other)):
            values[name] = ("component", c.touching().numpy())
        pair = ("sender", "receiver")
        if scores is None:
            less = self.scores - other.scores
            values |= {"difference": (pair, less.numpy()), "node_difference": ("component", _out_of(less).numpy())}
        else:
            first, second = (self._of_pairs(s) for s in scores)
            for name, dims, of in (("difference", pair, lambda x: x), ("node_difference", "component", _out_of)):
                found = difference_of_means(of(first), of(second), paired=paired)
                values |= {name + end: (dims, x.numpy()) for end, x in zip(("", "_lo", "_hi"), found, strict=True)}
        coords = {"component": names, "sender": list(self.senders), "receiver": list(self.receivers)}
        attrs = data.attrs | {"title": "comparison of two circuits"}
        if scores is not None:
            attrs["intervals"] = f"{EACH_ALONE} of {int(self.edges.sum())} edges and {len(names)} nodes"
        return data.assign(values).assign_coords(coords).assign_attrs(attrs)

    def touching(self) -> Int[Tensor, " node"]:
        """How many of its edges begin or end at each node: the senders, then `final`."""
        places = {name: i for i, name in enumerate(self.senders)}
        found = torch.cat([self.kept.sum(1), torch.zeros(1, dtype=torch.int64)])
        owner = torch.tensor([places.get(node_of(name), -1) for name in self.receivers]) % len(found)
        return found.index_add(0, owner, self.kept.sum(0))

    def _of_pairs(self, scores: Any) -> Tensor:
        found = torch.as_tensor(scores).double().cpu()
        if found.dim() != 3 or found.shape[1:] != self.edges.shape:
            raise error(DataError, "scores of pairs must be [pair, sender, receiver]", got=str(list(found.shape)),
                        allowed=f"[pair, {len(self.senders)}, {len(self.receivers)}]",
                        do="score both on this graph")  # fmt: skip
        return found

    def dataset(self) -> xr.Dataset:
        """Its edges and nodes as a result that `mt.view` draws.

        Returns:
            `score` and `kept` over (sender, receiver); `reads` and `writes` over (layer, head), how many edges of the
            circuit end and begin at each head; `mlp_reads` and `mlp_writes` over (layer).
        """
        import xarray as xr

        into = dict.fromkeys(self.senders, 0)
        for v, n in enumerate(self.kept.sum(0).tolist()):
            into[node_of(self.receivers[v])] = into.get(node_of(self.receivers[v]), 0) + n
        out = dict(zip(self.senders, self.kept.sum(1).tolist(), strict=True))
        heads = [name for name in self.senders if "attn.z" in name]
        layers = [name for name in self.senders if name.endswith("mlp_out")]
        shape = (len(layers), -1)
        about = {"unit": "edges"}
        values: dict[str, Any] = {
            "score": (("sender", "receiver"), self.scores.masked_fill(~self.kept, torch.nan).numpy(),
                      {"meaning": "what each edge of the circuit was chosen by"}),
            "kept": (("sender", "receiver"), self.kept.numpy(), {"drawn": False, "meaning": "whether it is in"}),
        }  # fmt: skip
        for name, counts in (("reads", into), ("writes", out)):
            values[name] = (("layer", "head"), np.array([counts[h] for h in heads]).reshape(shape), about)
            values[f"mlp_{name}"] = ("layer", np.array([counts[m] for m in layers]), about)
        coords = {"sender": list(self.senders), "receiver": list(self.receivers), "layer": range(len(layers))}
        attrs = {"title": "circuit", "edges": self.n_edges, "of": int(self.edges.sum())} | dict(self.attrs)
        return xr.Dataset(values, coords=coords, attrs=attrs)

    def save(self, path: str | Path) -> Path:
        """Write it to one safetensors file.

        Raises:
            OutputError: the file cannot be written.
            DataError: what it records is no plain value.
        """
        names = {"senders": list(self.senders), "receivers": list(self.receivers), "attrs": dict(self.attrs)}
        for name, value in self.attrs.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as problem:
                raise error(DataError, f'this circuit records "{name}", which no file can hold',
                            got=type(value).__name__, allowed="text, numbers and lists of them",
                            do="record a plain value") from problem  # fmt: skip
        tensors = {"edges": self.edges, "kept": self.kept, "scores": self.scores}
        with atomic(path, "a circuit to") as partial:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial,
                      metadata={MARK: json.dumps(names)})  # fmt: skip
        return Path(path)


def load(path: str | Path, model: Model | None = None) -> Circuit:
    """Read a circuit that `Circuit.save` wrote.

    Args:
        path: of the file.
        model: that it must be a circuit of, if given.

    Raises:
        DataError: the file is missing, damaged or holds no circuit; or it is one of another model.
    """
    try:
        with safe_open(str(path), "pt") as file:
            names = json.loads((file.metadata() or {})[MARK])
            tensors = {name: file.get_tensor(name) for name in ("edges", "kept", "scores")}
        made = Circuit(tuple(names["senders"]), tuple(names["receivers"]), **tensors, attrs=names["attrs"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as problem:
        raise error(DataError, f"cannot read a circuit from {path}", got=str(problem), do="save it again") from problem
    if model is not None:
        made.require(model)
    return made


def compare(first: Circuit | str | Path, second: Circuit | str | Path, **options: Any) -> xr.Dataset:
    """What two circuits have in common, each a value or the file of one; see `Circuit.compare`, and its options.

    Raises:
        DataError: a file cannot be read, or the circuits are of different graphs.
    """
    a, b = (c if isinstance(c, Circuit) else load(c) for c in (first, second))
    return a.compare(b, **options)


def _out_of(scores: Float[Tensor, "*of sender receiver"]) -> Float[Tensor, "*of node"]:
    """The sum over the edges out of each sender, and 0 of `final`."""
    found = scores.nansum(-1)
    return torch.cat([found, torch.zeros_like(found[..., :1])], dim=-1)


def node_of(receiver: str) -> str:
    """The node that a receiver belongs to, by the name under which it sends: "3.attn.z[2]" for "3.attn.q[2]"."""
    layer, _, rest = receiver.partition(".")
    if rest == "mlp.in":
        return f"{layer}.mlp_out"
    return f"{layer}.attn.z{rest[len('attn.q') :]}" if rest else receiver


def prune(
    kept: Bool[Tensor, "sender receiver"], senders: Sequence[str], receivers: Sequence[str], *, unread: bool = True
) -> Bool[Tensor, "sender receiver"]:
    """The edges that lead on to the logits; without `unread`, also from nodes that no way leads to."""
    kept = kept.clone()
    places = {name: i for i, name in enumerate(senders)}
    owner = torch.tensor([places.get(node_of(name), -1) for name in receivers])
    first = torch.tensor([name.partition(".")[2] == "" for name in senders])
    while True:
        reads, writes = torch.zeros(len(senders), dtype=torch.bool), kept.any(1)
        reads[owner[kept.any(0) & (owner >= 0)]] = True
        stays = kept & (writes[owner] | (owner < 0)).unsqueeze(0)
        stays &= (first | reads).unsqueeze(1) | (not unread)
        if bool((stays == kept).all()):
            return kept
        kept = stays


def of_mask(
    model: Model,
    kept: Bool[Tensor, "sender receiver"],
    scores: Float[Tensor, "sender receiver"] | None = None,
    parts: Sequence[str] = ("embed",),
    **attrs: Any,
) -> Circuit:
    """A circuit of a model from a mask.

    Args:
        model: whose graph it is.
        kept: [sender, receiver] in the order of `mt.explain.graph`.
        scores: of every edge.
        parts: the names of the embedding's parts, where it has several.
        attrs: what else it records.
    """
    listed: Graph = graph(model)
    edges = torch.cat([listed.mask[:1].expand(len(parts), -1), listed.mask[1:]])
    if kept.shape != edges.shape:
        raise error(ArgumentError, "a mask of edges must be [sender, receiver]", got=str(list(kept.shape)),
                    allowed=str(list(edges.shape)), do="give one for every pair of mt.explain.graph")  # fmt: skip
    scores = torch.full(edges.shape, torch.nan, dtype=torch.float64) if scores is None else scores.double().cpu()
    about = {"model": model.anatomy.name, "fingerprint": model.fingerprint} | attrs
    senders = (*parts, *listed.senders[1:])
    scores = scores.masked_fill(~edges, torch.nan)
    return Circuit(senders, listed.receivers, edges, kept.cpu() & edges, scores, about)


def required(found: Circuit, why: str) -> Circuit:
    """The circuit, if it has edges.

    Raises:
        ArgumentError: it has none.
    """
    if not found.n_edges:
        raise error(ArgumentError, "no edge is left in the circuit", got=why, allowed="at least one edge",
                    do="choose more edges, a lower tau for acdc, or less sparsity for mask")  # fmt: skip
    return found


def _kind(name: str) -> str:
    return "head" if "attn." in name else "mlp" if ".mlp" in name else name


def strata_of(senders: Sequence[str], receivers: Sequence[str]) -> np.ndarray:
    """[sender, receiver] the number of each pair's stratum."""
    sending = np.unique([_kind(name) for name in senders], return_inverse=True)[1]
    reading = np.unique([name.partition("[")[0] for name in receivers], return_inverse=True)[1]
    return sending[:, None] + (sending.max() + 1) * reading[None]


def _overlap(a: Tensor, b: Tensor, strata: np.ndarray, draws: int, rng: np.random.Generator) -> dict[str, float]:
    """Overlap of two sets [n], and that of sets drawn stratum by stratum."""
    from scipy.stats import hypergeom

    n, x, y = len(a), int(a.sum()), int(b.sum())
    shared, either = int((a & b).sum()), int((a | b).sum())
    sizes = np.bincount(strata)
    first, second = (np.bincount(strata, weights=s.numpy().astype(float)).astype(int) for s in (a, b))
    some = (first > 0) & (second > 0)
    drawn = rng.hypergeometric(first[some], (sizes - first)[some], second[some], (draws, int(some.sum()))).sum(1)
    return {
        "shared": shared, "first": x, "second": y, "jaccard": shared / either if either else float("nan"),
        "expected": float((first * second / np.maximum(sizes, 1)).sum()),
        "p": float((1 + (drawn >= shared).sum()) / (1 + draws)),
        "hypergeometric": float(hypergeom.sf(shared - 1, n, x, y)),
    }  # fmt: skip
