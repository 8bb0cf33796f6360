"""How well a circuit carries an answer by itself: faithfulness by its size, completeness, minimality.

Formula:  f(C) = (m(C) - m(other)) / (m(clean) - m(other)), means over pairs, m(C) the metric when all edges outside of
          C give what replaces them (`ablation`: the corrupt run's values, a mean, zero or a constant), m(other) when
          all do; a ratio of sums over pairs, and so
          are the others: their intervals are of the jackknife, which leaves out a pair above and below;
          CPR = area under f over the share of edges, CMD = area of |1 - f|, both by trapezoids from the smallest share
          to the largest;
          random circuits of as many edges of each kind are drawn several times, and their mean is taken;
          completeness gap of K = |m(C without K) - m(model without K)| / |m(clean) - m(other)|, K nodes of C, all of
          whose edges give the other run's values;
          minimality of a node v = max over K of |m(C without K) - m(C without K and v)| / |m(clean) - m(other)|, K
          none and the first set; of a node outside of C, which C does not hold, the same with the whole model for C.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.circuits._accuracy import ACCURACY, accuracy_of
from microtome.circuits._bench import ABLATIONS, JUDGED, Bench
from microtome.circuits._circuit import Circuit, load, node_of, strata_of
from microtome.circuits._scores import from_scores
from microtome.context import current
from microtome.errors import ArgumentError, DataError, MicrotomeWarning, error
from microtome.explain import AnswerOfClean, Clean, Corrupt, FoilOfCorrupt, ReadMetric, pairs_of
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.stream import OF_SHARES, mean_interval

SHARES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Shares of edges at which faithfulness is published, in percent."""
SMALLEST_GAP = 1e-4
"""Between the clean and the other run, so that a share of it means something."""

MIB = Source("Mueller et al.", "MIB: A Mechanistic Interpretability Benchmark", 2025, "2504.13151",
             departs="edges into shared keys and values are separated by query head; "
             "the random circuits keep how many edges there are of each receiver's layer and kind")  # fmt: skip
IOI = Source("Wang et al.", "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
             2022, "2211.00593", departs="edges as well as nodes; sets of nodes are drawn at random")  # fmt: skip

DRAWS = 10
"""Random circuits of each share of edges."""

Draws = Annotated[int, Argument("random circuits of as many edges", "circuits", least=1)]
Ablation = Annotated[str, Argument("what edges that are out give", choices=ABLATIONS)]
Judged = Annotated[
    str,
    Argument("what edges that are out give; optimal fits constants to each circuit, on other pairs", choices=JUDGED),
]
OfCircuit = Annotated[
    Any, Argument("a circuit, the file of one, or scores of all edges", positional=True, from_text=str)
]  # fmt: skip


def circuit_of(model: Model, given: Any) -> Circuit:
    """The circuit that is meant: itself, its file, or the scores of all edges.

    Raises:
        DataError: it is one of another model, cannot be read, or divides the embedding.
    """
    if isinstance(given, str) or hasattr(given, "__fspath__"):
        chosen = load(given, model)
    elif isinstance(given, Circuit):
        given.require(model)
        chosen = given
    else:
        chosen = from_scores(model, given, 1.0 - 1e-12, prune=False)
    if parts := [name for name in chosen.senders if "." not in name and name != "embed"]:
        raise error(DataError, "a circuit whose embedding has several parts cannot be judged on prompts", got=parts[0],
                    allowed="the senders of mt.explain.graph", do="find it with embed as one sender")  # fmt: skip
    return chosen


def _gap(clean: Float[Tensor, " pair"], other: Float[Tensor, " pair"]) -> tuple[float, dict[str, Any]]:
    """The mean gap between the two runs, and what a result says of it; warns where it may be none.

    Raises:
        DataError: it is none.
    """
    mean, low, high = (float(x) for x in mean_interval(clean - other))
    if abs(mean) < SMALLEST_GAP:
        raise error(DataError, "the metric is the same with all edges and with none: a circuit can carry nothing",
                    got=f"a gap of {mean:.2g}", do="use other pairs or another metric")  # fmt: skip
    if low <= 0 <= high:
        what = "the gap between the clean and the other run may be none: shares of it are ratios with no known size"
        text = error(DataError, what, got=f"{mean:.3g}, interval {low:.3g} to {high:.3g}", do="use more or other pairs")
        warnings.warn(str(text), MicrotomeWarning, stacklevel=2)
    ends = {} if low != low else {"gap_lo": low, "gap_hi": high}
    return mean, {"gap": mean, **ends}


def shares_of(given: Sequence[Any]) -> list[float]:
    """Shares in percent, from the smallest to the largest.

    Raises:
        ArgumentError: one is none, or there is none.
    """
    if not given or not all(isinstance(s, int | float) and 0 < s <= 100 for s in given):
        raise error(ArgumentError, "shares must be above 0 and at most 100 %", got=str(given), do="choose others")
    return sorted(float(s) for s in given)


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
        Column("faithfulness_control", "1", "the mean of random circuits of as many edges", dims=("share",)),
        Column("spread", "1", "standard deviation of the same over random circuits",
               "none: how far one of them may be from their mean", (0, None), ("share",)),
        Column("cpr", "1", "area under faithfulness over the share of edges", "cpr_control", dims=()),
        Column("cpr_control", "1", "the same of random circuits", dims=()),
        Column("cmd", "1", "area between faithfulness and 1", "cmd_control", (0, None), dims=()),
        Column("cmd_control", "1", "the mean of random circuits, each by itself", range=(0, None), dims=()),
        *ACCURACY,
    ),
    source=MIB,
    cost="about two forwards a pair and share, for the circuit and each random one",
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
    ablation: Judged = "resample",
    draws: Draws = DRAWS,
) -> Found:
    """Keep the edges of the largest scores, as many as each share says, and measure how much of the answer is left.

    Raises:
        PromptError: the pairs do not align, or there is nothing to read.
        DataError: the circuit is one of another model, or the two runs do not differ.
        ArgumentError: a share is none.
    """
    shares = shares_of(shares)
    chosen = circuit_of(model, circuit)
    pairs = pairs_of(model, clean, corrupt, answer=answer, foil=foil, metric=metric)
    bench = Bench(model, pairs, None, ablation)
    return Found(**curve(bench, chosen, shares, draws))


def curve(
    bench: Bench, circuit: Circuit, shares: Sequence[float], draws: int = DRAWS, rival: Tensor | None = None
) -> dict[str, Any]:
    """What `faithfulness` finds, as the arguments of `Found`; with a rival also the circuit itself beside that one."""
    generator = torch.Generator().manual_seed(current().seed)
    masks = _at_shares(circuit, ranked(circuit), shares)
    less = sum(not bool((m == circuit.edges).all()) for m in masks)  # all edges are no random circuit
    random = [_at_shares(circuit, shuffled(circuit, generator), shares)[:less] for _ in range(draws)]
    itself: list[Tensor] = []
    if rival is not None:
        share = [100 * circuit.share]
        of_size = [_at_shares(circuit, shuffled(circuit, generator), share)[0] for _ in range(draws)]
        itself = [torch.stack([circuit.kept, rival, *of_size])]
    values = bench.measure(torch.cat([torch.zeros_like(masks[:1]), masks, *random, *itself]), "running circuits")
    clean, other, n = bench.clean, values[0], len(shares)
    gap, about = _gap(clean, other)
    each = (values[1:] - other) / gap  # [circuit, pair]
    own, drawn, last = each[:n], each[n : n + draws * less].view(draws, less, -1), each[n + draws * less :]
    drawn = torch.cat([drawn, own[less:].expand(draws, -1, -1)], dim=1)  # [draw, share, pair]
    means = drawn.mean(2)
    found = {"faithfulness": own.T, "faithfulness_control": drawn.mean(0).T}
    found |= {"cpr": _area(own.T, shares), "cpr_control": _area(drawn.mean(0).T, shares)}
    found |= {} if rival is None else {"kept": last[0], "kept_eap_ig": last[1], "kept_control": last[2:].mean(0)}
    single = {
        "cmd": float(_area((1 - own.mean(1)).abs(), shares)),
        "cmd_control": float(_area((1 - means).abs(), shares).mean()),
        "spread": means.std(0) if draws > 1 else torch.full((n,), torch.nan, dtype=torch.float64),
    }
    alone = [_at_shares(circuit, shuffled(circuit, generator), [100 * circuit.share])[0] for _ in range(draws)]
    single |= accuracy_of(bench, torch.stack([circuit.kept, *alone]))
    attrs = {
        "pairs": len(bench),
        "ablation": bench.ablation,
        **about,
        "edges": [int(m.sum()) for m in masks],
        "random": f"{draws} times scores shuffled among edges of one receiver's layer and kind and one sender's kind",
        "interval_of_shares": OF_SHARES,
        **{k: v for k, v in bench.pairs.attrs().items() if k != "pairs"},
    }
    return {
        "values": single, "each": found, "weights": (clean - other) / gap,
        "coords": {"share": [f"{s:g}%" for s in shares]}, "attrs": attrs,
    }  # fmt: skip


@question(
    "completeness",
    title="completeness and minimality of a circuit",
    question="Does the circuit hold all that matters, and does it need each of its nodes?",
    columns=(
        Column("complete", "1", "gap between circuit and model when a set of nodes is ablated in both",
               "complete_control", (0, None), ("set",)),
        Column("complete_control", "1", "the mean of random circuits of as many edges", range=(0, None),
               dims=("set",)),
        Column("minimal", "1", "largest change of the circuit's metric by ablating this node too", "minimal_control",
               (0, None), ("component",)),
        Column("minimal_control", "1", "the same of a random node outside, in the model: NaN where none is outside",
               range=(0, None), dims=("component",)),
    ),
    source=IOI,
    cost="about two forwards a pair, set and circuit, random ones too, and four a pair and node, twice",
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
    draws: Draws = DRAWS,
) -> Found:
    """Ablate random sets of a circuit's nodes in it and in the model; then each node alone besides.

    A pair counts with the sign of the mean, and a node with the start in which its mean is larger, so that means over
    pairs are what the formulas say; intervals take sign and start as known.

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
    return _complete(Bench(model, pairs, None, ablation), chosen, inner, sets, draws)


def _complete(bench: Bench, circuit: Circuit, inner: list[str], sets: int, draws: int) -> Found:
    generator = torch.Generator().manual_seed(current().seed)
    n = max(1, len(inner) // 2)
    drawn = [[inner[i] for i in torch.randperm(len(inner), generator=generator)[:n].tolist()] for _ in range(sets)]
    share = [100 * circuit.share]
    random = [_at_shares(circuit, shuffled(circuit, generator), share)[0] for _ in range(draws)]
    outside = [name for name in circuit.senders if "." in name and name not in inner]
    others = [outside[i] for i in torch.randint(len(outside), (len(inner),), generator=generator)] if outside else []
    whole, first = circuit.edges, drawn[0]
    rows = [torch.zeros_like(circuit.kept)]
    rows += [without(circuit, base, names) for names in drawn for base in (whole, circuit.kept, *random)]
    # The circuit, and the circuit without the first set, each also without a node; the model for nodes outside.
    for base, names in ((circuit.kept, inner), (whole, others)):
        nodes = [[], *([name] for name in names)]
        rows += [without(circuit, base, [*start, *node]) for node in nodes for start in ([], first)]
    values = bench.measure(torch.stack(rows), "ablating nodes")  # [row, pair]
    gap, about = _gap(bench.clean, values[0])
    by_set, by_node, by_other = values[1:].split([sets * (2 + draws), 2 * (1 + len(inner)), 2 * (1 + len(others))])
    by_set = by_set.unflatten(0, (sets, 2 + draws))
    random_gaps = torch.stack([_one_sided(by_set[:, 2 + k] - by_set[:, 0]) for k in range(draws)]).mean(0)
    each = {
        "complete": _one_sided(by_set[:, 1] - by_set[:, 0]), "complete_control": random_gaps,
        "minimal": _largest(by_node),
    }  # fmt: skip
    nothing = {"minimal_control": torch.full((len(inner),), torch.nan, dtype=torch.float64)}
    each |= {"minimal_control": _largest(by_other)} if others else {}
    coords = {"component": inner, "set": [f"set {i}" for i in range(sets)]}
    attrs = {"pairs": len(bench), "ablation": bench.ablation, "sets": [", ".join(names) for names in drawn]} | about
    attrs |= {
        "outside": others,
        "random": f"{draws} circuits of as many edges of each receiver's layer and kind and sender's kind",
    }
    return Found(
        {} if others else nothing, {name: (x / abs(gap)).T for name, x in each.items()},
        weights=(bench.clean - values[0]) / gap, coords=coords, attrs=attrs,
    )  # fmt: skip


def _one_sided(changes: Float[Tensor, "unit pair"]) -> Float[Tensor, "unit pair"]:
    """The same with the sign that makes each mean over pairs positive, so that the mean is |mean|."""
    return changes * torch.where(changes.mean(1) < 0, -1.0, 1.0).unsqueeze(1)


def _largest(values: Float[Tensor, "row pair"]) -> Float[Tensor, "node pair"]:
    """Of each node the change from the start in which its mean is larger; rows are two starts, then two a node."""
    rows = values.unflatten(0, (-1, 2))
    changes = rows[1:] - rows[0]  # [node, start, pair]
    larger = changes.mean(2).abs().argmax(1)
    return _one_sided(changes[torch.arange(len(changes)), larger])


def without(circuit: Circuit, kept: Bool[Tensor, "sender receiver"], names: Sequence[str]) -> Tensor:
    """Edges of which those from and into some nodes are gone."""
    gone = set(names)
    rows = torch.tensor([name in gone for name in circuit.senders])
    columns = torch.tensor([node_of(name) in gone for name in circuit.receivers])
    return kept & ~rows.unsqueeze(1) & ~columns.unsqueeze(0)
