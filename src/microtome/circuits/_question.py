"""A circuit as an answer to a question: found, its best edges measured exactly, and judged, with a page."""

from __future__ import annotations

from typing import Annotated, Any

import torch

from microtome.circuits._bench import OPTIMAL, Bench, divergence
from microtome.circuits._circuit import Circuit
from microtome.circuits._find import COSTS, METHODS, SPARSITY, effects_of, find, rival
from microtome.circuits._judge import ACCURACY, MIB, SHARES, Draws, Judged, curve
from microtome.explain import AnswerOfClean, Clean, Corrupt, FoilOfCorrupt, ReadMetric, pairs_of
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model

CONMY = Source(
    "Conmy et al.", "Towards Automated Circuit Discovery for Mechanistic Interpretability", 2023, "2304.14997",
    departs="many edges of a receiver are tried at once; the result is that of trying them one by one",
)  # fmt: skip
HANNA = Source(
    "Hanna, Pezzelle, Belinkov",
    "Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model Mechanisms", 2024, "2403.17806",
    departs="edges into shared keys and values are separated by query head",
)  # fmt: skip
EDGE = ("sender", "receiver")
JUDGED_ON = "It is judged on the pairs that it was found on; faithfulness of other pairs may be lower."
READING = (
    "Each edge is read by one input of one head, by one MLP, or by the logits. Its score is how the metric changes "
    "where this edge gives what replaces it: below 0, the answer needs it. {judged}"
)
READING_OF_ACDC = (
    "Each edge is read by one input of one head, by one MLP, or by the logits. Its score is what taking it out of the "
    "circuit cost when it was tried, {cost}: above 0, the answer needs it; score_exact is the same for the edge alone "
    "taken out of the whole model. {judged}"
)
READING_OF_MASK = (
    "Each edge is read by one input of one head, by one MLP, or by the logits. Its score is how far its gate was open "
    "when the mask ended, at tau 1: above 0.5 it is kept; score_exact is what the edge alone does, taken out of the "
    "whole model. {judged}"
)
OTHER_READINGS = {"acdc": READING_OF_ACDC, "mask": READING_OF_MASK}
COST = {"kl": "in KL from the clean run", "metric": "in what the metric loses"}


@question(
    "circuit",
    command="circuit",
    title="circuit",
    question="Which edges of the model carry the answer, and how much of it do they carry alone?",
    columns=(
        Column("score", "logits", "of its edges: acdc: what a removal cost, mask: sigmoid(s), others: the mean effect",
               "none: random circuits of as many edges stand beside it", dims=EDGE),
        Column("faithfulness", "1", "share of the gap between the clean and the other run that the circuit keeps",
               "faithfulness_control", dims=("share",)),
        Column("faithfulness_control", "1", "the mean of random circuits of as many edges", dims=("share",)),
        Column("spread", "1", "standard deviation of the same over random circuits",
               "none: how far one of them may be from their mean", (0, None), ("share",)),
        Column("kept", "1", "share of the gap that the circuit itself keeps", "kept_control", dims=()),
        Column("kept_control", "1", "the mean of random circuits of as many edges", dims=()),
        Column("kept_eap_ig", "1", "the same of as many edges by EAP-IG", "kept_control", dims=()),
        Column("cpr", "1", "area under faithfulness over the share of edges", "cpr_control", dims=()),
        Column("cpr_control", "1", "the same of random circuits", dims=()),
        Column("cmd", "1", "area between faithfulness and 1", "cmd_control", (0, None), dims=()),
        Column("cmd_control", "1", "the mean of random circuits, each by itself", range=(0, None), dims=()),
        *ACCURACY,
    ),
    source=(CONMY, HANNA, MIB),
    cost="that of the method, that of EAP-IG (5 backwards a pair), about two forwards a pair and share, for the "
    "circuit and each random one, twice for the circuit itself, and one a pair and edge measured exactly",
    check="tests/laws/test_circuits.py, tests/laws/test_acdc.py, tests/laws/test_circuit_faithfulness.py",
    call='mt.circuits.circuit(model, "The capital of France is", "The capital of Italy is", answer=" Paris", '
    'foil=" Rome")',
    reading=READING.format(judged=JUDGED_ON),
    needs=("sum", "attention and MLP", "*.attn.q", "*.attn.k", "*.attn.v", "*.attn.z"),
)  # fmt: skip
def circuit(
    model: Model,
    clean: Clean,
    corrupt: Corrupt = None,
    *,
    answer: AnswerOfClean = None,
    foil: FoilOfCorrupt = None,
    metric: ReadMetric = None,
    method: Annotated[str, Argument("how edges are chosen", choices=METHODS)] = "eap",
    edges: Annotated[float, Argument("how many, or a share below 1", least=0)] = 0.005,
    tau: Annotated[float, Argument("of acdc: what an edge must cost to stay")] = 0.03,
    cost: Annotated[
        str, Argument("of acdc and mask: KL from the clean run, or what the metric loses", choices=COSTS)
    ] = "kl",
    sparsity: Annotated[float, Argument("of mask: what all edges cost together, in units of cost", least=0)] = SPARSITY,
    steps: Annotated[
        int | None, Argument("of eap-ig: points, 5 by default; of mask: steps at most, 300", "steps", least=1)
    ] = None,
    ablation: Judged = "resample",
    verify: Annotated[int, Argument("how many of its edges to measure exactly", "edges", least=0)] = 50,
    draws: Draws = 3,
    save: Annotated[str | None, Argument("write the circuit to this safetensors file", from_text=str)] = None,
) -> Found:
    """Find a circuit, measure its best edges exactly, and judge it beside random ones.

    `mt.circuits.find` gives the same circuit as a value that can be saved and compared.

    Raises:
        PromptError: the pairs do not align, or there is nothing to read.
        SiteError: the stream of the model is not a sum over its parts.
        ArgumentError: there are not as many edges, none is left, or optimal constants would be fitted for each edge.
        FitError: the mask did not decide.
        DataError: the two runs do not differ.
        OutputError: the circuit cannot be written.
    """
    given: dict[str, Any] = {"answer": answer, "foil": foil, "metric": metric}
    found = find(
        model, clean, corrupt, method=method, edges=edges, tau=tau, cost=cost, sparsity=sparsity, steps=steps,
        ablation=ablation, **given,
    )  # fmt: skip
    if save is not None:
        found.save(save)
    kl, pairs = method == "acdc" and cost == "kl", pairs_of(model, clean, corrupt, **given)
    bench = Bench(model, pairs, None, ablation)
    judged = curve(bench, found, SHARES, draws, rival(model, pairs, found.n_edges))
    score = found.scores.masked_fill(~found.kept, torch.nan)
    values = judged["values"] | {"score": (EDGE, score)}
    if verify and method != "exact" and ablation != OPTIMAL:  # each edge would have constants of its own
        other = Bench(model, pairs, divergence(model, pairs), ablation) if kl else bench
        values["score_exact"] = (EDGE, exactly(other, found, verify) * (-1.0 if method == "acdc" and not kl else 1.0))
    coords = judged["coords"] | {"sender": list(found.senders), "receiver": list(found.receivers)}
    attrs = judged["attrs"] | {
        k: v for k, v in found.attrs.items() if k not in ("model", "fingerprint", "seed", "method")
    }
    attrs |= {
        "graph": "score",
        "chosen_by": found.attrs["method"],
        "circuit_edges": found.n_edges,
        "nodes": len(found.nodes),
        "judged_on": "the pairs that it was found on",
    }
    if method in OTHER_READINGS:
        attrs["reading"] = OTHER_READINGS[method].format(cost=COST[cost], judged=JUDGED_ON)
    unit = "nats" if kl else pairs.unit
    units = {"score": "1" if method == "mask" else unit, "score_exact": unit}
    weights = judged["weights"]
    return Found(values, each=judged["each"], weights=weights, coords=coords, attrs=attrs, units=units)


def exactly(bench: Bench, found: Circuit, most: int) -> torch.Tensor:
    """[sender, receiver] The mean change of the metric when one edge alone is out, of the best edges; NaN elsewhere."""
    size = found.scores.abs().nan_to_num(0.0).masked_fill(~found.kept, -1.0)
    best = size.flatten().argsort(descending=True, stable=True)[: min(most, found.n_edges)]
    return effects_of(bench, torch.stack([best // size.shape[1], best % size.shape[1]], dim=1))
