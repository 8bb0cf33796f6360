"""How well a method finds a known circuit.

Formula:  an edge's score is the largest |change of any output| over pairs and over both corruptions, other tokens and
          shuffled positions; AUC is the share of (edge of the circuit, edge outside) of which the first has the higher
          score, a tie counting half.
          The estimates beside it: |(what the sender writes in the corrupt run - in the clean one) . R|, R the gradient
          at the receiver's input of m = d . outputs, d the unit vector along which the corruption moves the outputs;
          the largest over the same pairs and corruptions. R is the mean of the gradients at some points of the way from
          the clean embedding (0) to the corrupt one (1): eap at 0, clean-corrupted at 0 and 1, eap-ig at 5 of them from
          the corrupt one on; eap-relp is eap with the backward rules of RelP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.context import current
from microtome.edit import Set
from microtome.errors import DataError, ModelUnsupported, error
from microtome.explain._attribution import RELP
from microtome.explain._edges import WRITTEN
from microtome.explain._first_order import at_receivers, captures, contract
from microtome.explain._graph import graph
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.metric import FunctionMetric
from microtome.model import Model
from microtome.planted import (
    Corruptions,
    Planted,
    PlantedForCausalLM,
    corruptions,
    placed,
    receiver_of,
    sender_of,
    writes,
)
from microtome.sweep import Edge

Corruption = Literal["tokens", "positions"]
Estimate = Literal["eap", "eap-relp", "clean-corrupted", "eap-ig"]
POINTS: dict[str, tuple[float, ...]] = {
    "eap": (0.0,), "eap-relp": (0.0,), "clean-corrupted": (0.0, 1.0), "eap-ig": (1.0, 0.8, 0.6, 0.4, 0.2),
}  # fmt: skip
"""Where each estimate takes its gradient: shares of the way from the clean embedding to the corrupt one."""

CHANCE = "none: 0.5 is chance"
TRUTH = "none: compare `true`, which says which edges are in the circuit"
EDGE = ("sender", "receiver")


@question(
    "circuit_recovery",
    title="circuit recovery",
    question="How well do edge scores separate a known circuit from the rest of the model?",
    columns=(
        Column("score", "outputs", "largest change of any output caused by this edge alone", TRUTH, (0, None), EDGE),
        Column("estimated", "outputs", "the same, estimated from gradients", TRUTH, (0, None), ("estimate", *EDGE)),
        Column("true", "1", "whether the edge is in the circuit", "none: the truth", (0, 1), EDGE),
        Column("auc", "AUC", "how well exact scores separate the circuit from the rest", CHANCE, (0, 1), ()),
        Column("auc_estimated", "AUC", "how well estimated scores separate the circuit from the rest", CHANCE, (0, 1),
               ("estimate",)),
    ),
    source=(
        Source(
            "Gupta et al.", "InterpBench", 2024, "2407.14494",
            departs="also shuffles positions, since only this reveals edges from the positional embedding",
        ),
        Source(
            "Syed, Rager, Conmy", "Attribution Patching Outperforms Automated Circuit Discovery", 2023, "2310.10348",
            departs="uses a metric that needs no answer",
        ),
    ),
    cost="per corruption, a sweep with one cell per edge and pair, and a forward and a backward per pair",
    check="tests/planted/test_recovery.py",
    call='mt.explain.circuit_recovery(mt.planted.program("reverse"))',
)  # fmt: skip
def circuit_recovery(
    it: Planted,
    *,
    pairs: Annotated[int, Argument("how many random inputs to corrupt", "inputs", least=1)] = 16,
    corrupt: Annotated[Sequence[Corruption], Argument("what is changed in the inputs")] = ("tokens", "positions"),
    estimates: Annotated[Sequence[Estimate], Argument("the estimates that are judged")] = ("eap",),
) -> Found:
    """Score every edge of a planted model exactly, and report how well the scores separate its circuit from the rest.

    The positional embedding is a sender of its own, `pos_embed`. NaN and False where there is no edge.

    Raises:
        DataError: the truth names no edges.
        ModelUnsupported: the truth is about another kind of model than a compiled one.
    """
    _require_circuit(it)
    c = corruptions(it, pairs, current().seed)
    parts = graph(it.model)
    names, mask = ["embed", "pos_embed", *parts.senders[1:]], torch.cat([parts.mask[:1], parts.mask])
    score = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.nan)
    guesses, before = score.repeat(len(estimates), 1, 1), writes(it.model, c.clean)
    for kind in corrupt:
        tokens, where = (c.corrupt, None) if kind == "tokens" else (c.clean, c.positions)
        after = writes(it.model, tokens, where)
        written = {node if node in names else sender_of(node): after[node] - x for node, x in before.items()}
        changes = torch.stack([written[name].detach() for name in names], dim=1)
        exact, goal = _measured(it, c, tokens, where, changes, mask)
        score[mask] = torch.maximum(score[mask], exact)
        for guess, name in zip(guesses, estimates, strict=True):
            guess[mask] = torch.maximum(guess[mask], estimated(it.model, c.clean, changes, goal, name)[mask])
    true = torch.zeros_like(mask)
    for sender, receiver, slot in it.truth["edges"]:
        true[names.index(sender_of(sender)), parts.receivers.index(receiver_of(receiver, slot))] = True
    aucs = [auc(x[mask & true], x[mask & ~true]) for x in (score, *guesses)]
    values = {"score": score, "estimated": guesses, "true": true, "auc": aucs[0], "auc_estimated": aucs[1:]}
    coords = {"sender": names, "receiver": list(parts.receivers), "estimate": list(estimates)}
    return Found(values, coords=coords, attrs={"corrupt": ", ".join(corrupt)})


def _require_circuit(it: Planted) -> None:
    """Refuse what has no circuit of edges to be recovered."""
    do = "pass what planted.program gave, or a folder of this form whose truth has edges"
    if not it.truth.get("edges"):
        about = "it names nodes alone" if it.truth.get("nodes") else None
        raise error(DataError, f"the truth of {it.model.anatomy.name} names no edges to recover", got=about, do=do)
    if not isinstance(it.model.hf, PlantedForCausalLM):
        got = type(it.model.hf).__name__
        raise error(ModelUnsupported, "positions can be shuffled only in planted networks", got=got, do=do)


def _measured(
    it: Planted, c: Corruptions, tokens: Tensor, where: Tensor | None, changes: Tensor, mask: Tensor
) -> tuple[Float[Tensor, " edge"], Float[Tensor, "prompt pos vocab"]]:
    """The largest change of an output that each edge alone makes, over prompts; and the corrupt run's outputs."""
    parts, pairs = graph(it.model), len(c.clean)
    names = ["embed", "pos_embed", *parts.senders[1:]]
    base = it.model.run(c.clean).logits[:, 1:].detach()

    def change(logits: Tensor, prompts: Tensor) -> Tensor:
        return (logits - base[prompts]).abs().amax((1, 2))

    edits = [] if where is None else [placed(it.model, tokens, where)]
    source = it.model.run(tokens, capture=WRITTEN, edits=edits)
    edges = [(u, parts.receivers[v]) for u, v in mask.nonzero().tolist()]
    cells = [
        Edge("embed", receiver, change=changes[n, u]) if u < 2 else Edge(names[u], receiver, source=source)
        for n in range(pairs)
        for u, receiver in edges
    ]
    metric = FunctionMetric(change, positions=tuple(range(1, c.clean.shape[1])))
    prompts = [number for number in range(pairs) for _ in edges]
    swept = run_sweep(it.model, c.clean, cells, metric, prompts=prompts, stage="measuring edges").whole()
    return swept.values.reshape(pairs, -1).amax(0).double(), source.logits[:, 1:]


def estimated(
    model: Model,
    clean: Int[Tensor, "prompt pos"],
    changes: Float[Tensor, "prompt sender pos d_model"],
    goal: Float[Tensor, "prompt output vocab"],
    method: Estimate = "eap",
) -> Float[Tensor, "sender receiver"]:
    """The largest |first-order change| of the outputs, over prompts, along the way to the goal's.

    `changes` is what each sender writes more in the corrupt run, the two embeddings first, and `goal` its outputs at
    all positions but the first.
    """
    found: list[Tensor] = []
    rules = [RELP] if method == "eap-relp" else []
    for tokens, change, end in zip(clean, changes, goal, strict=True):
        row = tokens.unsqueeze(0)
        plain = model.run(row, capture="embed")
        way = (end.double() - plain.logits[0, 1:].double()).detach()
        scores: list[Tensor] = []
        for share in POINTS[method]:
            moved = Set("embed", value=plain["embed"] + share * change[:2].sum(0))
            start = model.run(row, capture=captures(model), edits=[*([moved] if share else []), *rules], grad=True)
            # A corruption that changes no output gives no direction, and so no score.
            metric = (start.logits[0, 1:].double() * way).sum() / way.norm().clamp(min=1e-6)
            scores.append(contract(change.unsqueeze(1), at_receivers(model, start, start.grad(metric)))[0])
        found.append(torch.stack(scores).mean(0).abs().cpu())
    return torch.stack(found).amax(0)


def auc(higher: Float[Tensor, " n"], lower: Float[Tensor, " m"]) -> float:
    """How well one score separates two groups: the area under the ROC curve, of Hanley and McNeil, 1982.

    Formula:  mean over i, j of 1[higher_i > lower_j] + 1[higher_i = lower_j] / 2.

    Args:
        higher: scores that should be the greater ones.
        lower: scores of the others.

    Returns:
        0 to 1; 0.5 where the score carries no information. NaN where a group is empty.
    """
    from sklearn.metrics import roc_auc_score

    if not len(higher) or not len(lower):
        return float("nan")
    scores, own = torch.cat([higher, lower]), torch.arange(len(higher) + len(lower)) < len(higher)
    return float(roc_auc_score(own.numpy(), scores.cpu().numpy()))
