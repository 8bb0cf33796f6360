"""How well a circuit carries an answer by itself: faithfulness by its size, completeness, minimality.

Formula:  f(C) = (m(C) - m(other)) / (m(clean) - m(other)), means over pairs, m(C) the metric when all edges outside of
          C give the other run's values (`mt.sweep.Circuits`), m(other) when all do;
          CPR = area under f over the share of edges, CMD = area of |1 - f|, both by trapezoids from the smallest share
          to the largest;
          completeness gap of K = |m(C without K) - m(model without K)| / |m(clean) - m(other)|, K nodes of C, all of
          whose edges give the other run's values;
          minimality of a node v = max over K of |m(C without K) - m(C without K and v)| / |m(clean) - m(other)|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.circuits._bench import ABLATIONS, Bench
from microtome.circuits._circuit import Circuit, load, node_of, strata_of
from microtome.circuits._scores import from_scores
from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.explain import AnswerOfClean, Clean, Corrupt, FoilOfCorrupt, ReadMetric, pairs_of
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model

SHARES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Shares of edges at which faithfulness is published, in percent."""
SMALLEST_GAP = 1e-4
"""Between the clean and the other run, so that a share of it means something."""

MIB = Source("Mueller et al.", "MIB: A Mechanistic Interpretability Benchmark", 2025, "2504.13151",
             departs="edges into shared keys and values are separated by query head; "
             "the random circuits keep how many edges there are of each receiver's layer and kind")  # fmt: skip
IOI = Source("Wang et al.", "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
             2022, "2211.00593", departs="edges as well as nodes; sets of nodes are drawn at random")  # fmt: skip

Ablation = Annotated[str, Argument("what edges that are out give", choices=ABLATIONS)]
OfCircuit = Annotated[
    Any, Argument("a circuit, the file of one, or scores of all edges", positional=True, from_text=str)
]  # fmt: skip


def circuit_of(model: Model, given: Any) -> Circuit:
    """The circuit that is meant: itself, its file, or the scores of all edges.

    Raises:
        DataError: it is one of another model, or cannot be read.
    """
    if isinstance(given, str) or hasattr(given, "__fspath__"):
        return load(given, model)
    if isinstance(given, Circuit):
        given.require(model)
        return given
    return from_scores(model, given, 1.0 - 1e-12, prune=False)


def _gap(clean: Tensor, other: Tensor) -> float:
    gap = float((clean - other).mean())
    if abs(gap) < SMALLEST_GAP:
        raise error(DataError, "the metric is the same with all edges and with none: a circuit can carry nothing",
                    got=f"a gap of {gap:.2g}", do="use other pairs or another metric")  # fmt: skip
    return gap


def ranked(circuit: Circuit) -> Float[Tensor, "sender receiver"]:
    """The sizes of scores; edges of the circuit come before all others."""
    size = circuit.scores.abs().nan_to_num(0.0)
    return size + circuit.kept * (1.0 + size.max()) if bool((circuit.edges & ~circuit.kept).any()) else size


def shuffled(circuit: Circuit, generator: torch.Generator) -> Float[Tensor, "sender receiver"]:
    """The same, shuffled among the edges of one receiver's layer and kind and one sender's kind."""
    size = ranked(circuit)
    found, edges = torch.zeros_like(size), circuit.edges.nonzero()
    stratum = torch.from_numpy(strata_of(circuit.senders, circuit.receivers))[edges[:, 0], edges[:, 1]]
    order = torch.rand(len(edges), generator=generator, dtype=torch.float64)
    mixed, own = torch.argsort(stratum.double() * 2 + order), torch.argsort(stratum, stable=True)
    values = size[edges[:, 0], edges[:, 1]][mixed]
    found[edges[own, 0], edges[own, 1]] = values
    return found


def _at_shares(circuit: Circuit, size: Tensor, shares: Sequence[float]) -> Bool[Tensor, "share sender receiver"]:
    """The edges of the largest scores, as many as each share in percent says."""
    total = int(circuit.edges.sum())
    order = torch.where(circuit.edges, size, -1.0).flatten().argsort(descending=True, stable=True)
    masks = torch.zeros(len(shares), size.numel(), dtype=torch.bool)
    for row, share in zip(masks, shares, strict=True):
        row[order[: max(1, round(total * share / 100))]] = True
    return masks.view(len(shares), *size.shape)


def _area(values: Float[Tensor, "*of share"], shares: Sequence[float]) -> Tensor:
    return torch.trapezoid(values, torch.tensor(shares, dtype=torch.float64) / 100)


@question(
    "faithfulness",
    title="faithfulness of circuits",
    question="How much of an answer do the highest-scored edges carry alone, by how many they are?",
    columns=(
        Column("faithfulness", "1", "share of the gap between the clean and the other run that the circuit keeps",
               "faithfulness_control", dims=("share",)),
        Column("faithfulness_control", "1", "the same of a random circuit of as many edges", dims=("share",)),
        Column("cpr", "1", "area under faithfulness over the share of edges", "cpr_control", dims=()),
        Column("cpr_control", "1", "the same of random circuits", dims=()),
        Column("cmd", "1", "area between faithfulness and 1", "cmd_control", (0, None), dims=()),
        Column("cmd_control", "1", "the same of random circuits", range=(0, None), dims=()),
    ),
    source=MIB,
    cost="about two forwards a pair and share, twice: for the circuit and the random one",
    check="tests/laws/test_circuit_faithfulness.py, tests/planted/test_circuits.py",
    call='mt.circuits.faithfulness(model, "circuit.safetensors", "The capital of France is", '
    '"The capital of Italy is", answer=" Paris", foil=" Rome")',
    reading="1 is the whole model, 0 the model with every edge replaced; above 1, edges outside work against the "
    "answer.",
    needs=("sum", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z"),
)  # fmt: skip
def faithfulness(
    model: Model,
    circuit: OfCircuit,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    shares: Annotated[Sequence[float], Argument("shares of edges", "%", command=False)] = SHARES,
    ablation: Ablation = "resample",
) -> Found:
    """Keep the edges of the largest scores, as many as each share says, and measure how much of the answer is left.

    Raises:
        PromptError: the pairs do not align, or there is nothing to read.
        DataError: the circuit is one of another model, or the two runs do not differ.
        ArgumentError: a share is none.
    """
    shares = sorted(float(s) for s in shares)
    if not shares or not all(0 < s <= 100 for s in shares):
        raise error(ArgumentError, "shares must be above 0 and at most 100 %", got=str(shares), do="choose others")
    chosen = circuit_of(model, circuit)
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    bench = Bench(model, pairs, None, ablation)
    return Found(**curve(bench, chosen, shares))


def curve(bench: Bench, circuit: Circuit, shares: Sequence[float]) -> dict[str, Any]:
    """What `faithfulness` finds, as the arguments of `Found`."""
    generator = torch.Generator().manual_seed(current().seed)
    masks = _at_shares(circuit, ranked(circuit), shares)
    random = _at_shares(circuit, shuffled(circuit, generator), shares)
    none = torch.zeros_like(masks[:1])
    values = bench.measure(torch.cat([none, masks, random]), "running circuits")
    clean, other, n = bench.clean, values[0], len(shares)
    gap = _gap(clean, other)
    each = [(part - other) / gap for part in (values[1 : n + 1], values[n + 1 :])]  # [share, pair]
    found = {"faithfulness": each[0].T, "faithfulness_control": each[1].T}
    found |= {"cpr": _area(each[0].T, shares), "cpr_control": _area(each[1].T, shares)}
    means = [part.mean(1) for part in each]
    single = {f"cmd{end}": float(_area((1 - m).abs(), shares)) for end, m in (("", means[0]), ("_control", means[1]))}
    attrs = {
        "pairs": len(bench),
        "ablation": bench.ablation,
        "gap": gap,
        "edges": [int(m.sum()) for m in masks],
        "random": "scores shuffled among edges of one receiver's layer and kind and one sender's kind",
        **{k: v for k, v in bench.pairs.attrs().items() if k != "pairs"},
    }
    return {"values": single, "each": found, "coords": {"share": [f"{s:g}%" for s in shares]}, "attrs": attrs}


@question(
    "completeness",
    title="completeness and minimality of a circuit",
    question="Does the circuit hold all that matters, and does it need each of its nodes?",
    columns=(
        Column("complete", "1", "gap between circuit and model when a set of nodes is ablated in both",
               "complete_control", (0, None), ("set",)),
        Column("complete_control", "1", "the same of a random circuit of as many edges", range=(0, None),
               dims=("set",)),
        Column("minimal", "1", "largest change of the circuit's metric by ablating this node too", "minimal_control",
               (0, None), ("component",)),
        Column("minimal_control", "1", "largest change of the model's metric by ablating a random other node",
               range=(0, None), dims=("component",)),
    ),
    source=IOI,
    cost="about two forwards a pair, set and circuit, and a pair and node",
    check="tests/laws/test_circuit_faithfulness.py",
    call='mt.circuits.completeness(model, "circuit.safetensors", "The capital of France is", '
    '"The capital of Italy is", answer=" Paris", foil=" Rome")',
    reading="All are shares of the gap between the clean run and the other: a complete circuit has 0 for every set; "
    "a minimal one has no node near 0.",
    needs=("sum", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z"),
)  # fmt: skip
def completeness(
    model: Model,
    circuit: OfCircuit,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    sets: Annotated[int, Argument("random sets of half of the circuit's nodes", "sets", least=1)] = 8,
    ablation: Ablation = "resample",
) -> Found:
    """Ablate random sets of a circuit's nodes in it and in the model; then each node alone besides.

    Raises:
        PromptError: the pairs do not align, or there is nothing to read.
        DataError: the circuit is one of another model, has no nodes, or the two runs do not differ.
    """
    chosen = circuit_of(model, circuit)
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    inner = [name for name in chosen.nodes if "." in name]
    if not inner:
        raise error(
            DataError, "this circuit has no heads and MLPs", got=f"{chosen.n_edges} edges", do="use a larger one"
        )
    return _complete(Bench(model, pairs, None, ablation), chosen, inner, sets)


def _complete(bench: Bench, circuit: Circuit, inner: list[str], sets: int) -> Found:
    generator = torch.Generator().manual_seed(current().seed)
    n = max(1, len(inner) // 2)
    drawn = [[inner[i] for i in torch.randperm(len(inner), generator=generator)[:n].tolist()] for _ in range(sets)]
    random = (
        _at_shares(circuit, shuffled(circuit, generator), [100 * circuit.share])[0] if circuit.n_edges else circuit.kept
    )
    whole, none = circuit.edges, torch.zeros_like(circuit.kept)
    bases = (circuit.kept, whole, random)
    rows = [none, *(without(circuit, base, names) for names in drawn for base in bases)]
    outside = [name for name in circuit.senders if "." in name and name not in inner] or inner
    others = [outside[i] for i in torch.randint(len(outside), (len(inner),), generator=generator).tolist()]
    # Of each node: the circuit and the circuit without the first set, each also without the node.
    first = drawn[0]
    starts: tuple[list[str], ...] = ([], first)
    rows += [circuit.kept, without(circuit, circuit.kept, first)]
    rows += [without(circuit, circuit.kept, [*start, name]) for name in inner for start in starts]
    rows += [without(circuit, whole, [name]) for name in others]
    values = bench.measure(torch.stack(rows), "ablating nodes").mean(1)
    clean = bench.clean.mean()
    gap = abs(_gap(clean.reshape(1), values[:1]))
    by_set = values[1 : 1 + 3 * sets].view(sets, 3)
    at = 1 + 3 * sets
    base, own = values[at : at + 2], values[at + 2 : at + 2 + 2 * len(inner)].view(len(inner), 2)
    control = values[at + 2 + 2 * len(inner) :]
    found = {
        "complete": (by_set[:, 0] - by_set[:, 1]).abs() / gap,
        "complete_control": (by_set[:, 2] - by_set[:, 1]).abs() / gap,
        "minimal": ((own - base).abs() / gap).amax(1),
        "minimal_control": (control - clean).abs() / gap,
    }
    coords = {"component": inner, "set": [f"set {i}" for i in range(sets)]}
    attrs = {"pairs": len(bench), "ablation": bench.ablation, "sets": [", ".join(names) for names in drawn], "gap": gap}
    return Found(found, coords=coords, attrs=attrs)


def without(circuit: Circuit, kept: Bool[Tensor, "sender receiver"], names: Sequence[str]) -> Tensor:
    """Edges of which those from and into some nodes are gone."""
    gone = set(names)
    rows = torch.tensor([name in gone for name in circuit.senders])
    columns = torch.tensor([node_of(name) in gone for name in circuit.receivers])
    return kept & ~rows.unsqueeze(1) & ~columns.unsqueeze(0)
