"""How well a method finds a known circuit.

Formula:  an edge's score is the largest |change of any output| over pairs and over both corruptions, other tokens and
          shuffled positions; AUC is the share of (edge of the circuit, edge outside) of which the first has the higher
          score, a tie counting half.
          The estimates beside it: the largest |score| of `attribute` over the same pairs and corruptions, of
          m = d . outputs, d the unit vector along which the corruption moves the outputs, from the clean run on;
          eap-relp is eap with the backward rules of RelP, and random draws scores at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.errors import DataError, ModelUnsupported, error
from microtome.explain._attribution import RELP
from microtome.explain._edge_scores import edge_scores
from microtome.explain._edges import WRITTEN
from microtome.explain._graph import graph
from microtome.explain._pairs import Pairs
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.metric import FunctionMetric
from microtome.model import Model
from microtome.planted import (
    Corruptions,
    Planted,
    PlantedForCausalLM,
    by_place,
    corruptions,
    place_ids,
    placed,
    receiver_of,
    sender_of,
    writes,
)
from microtome.sweep import Edge

Corruption = Literal["tokens", "positions"]
Estimate = Literal["eap", "eap-relp", "clean-corrupted", "eap-ig", "eap-ig-activations", "random"]
STEPS = 5
"""Points of the estimates that take gradients along a way."""

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
    cost="per corruption, a sweep with one cell per edge and pair, and each estimate as `attribute` makes it",
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
    require_planted(it, edges=True)
    c = corruptions(it, pairs, current().seed)
    parts = graph(it.model)
    names, mask = ["embed", "pos_embed", *parts.senders[1:]], torch.cat([parts.mask[:1], parts.mask])
    score = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.nan)
    guesses = score.repeat(len(estimates), 1, 1)
    for kind in corrupt:
        tokens, where = (c.corrupt, None) if kind == "tokens" else (c.clean, c.positions)
        score[mask] = torch.maximum(score[mask], _measured(it, c, tokens, where, mask))
        asked = outputs_of(it, c, kind)
        for guess, name in zip(guesses, estimates, strict=True):
            guess[mask] = torch.maximum(guess[mask], estimated(asked, kind, name)[mask])
    true = torch.zeros_like(mask)
    for sender, receiver, slot in it.truth["edges"]:
        true[names.index(sender_of(sender)), parts.receivers.index(receiver_of(receiver, slot))] = True
    aucs = [auc(x[mask & true], x[mask & ~true]) for x in (score, *guesses)]
    values = {"score": score, "estimated": guesses, "true": true, "auc": aucs[0], "auc_estimated": aucs[1:]}
    coords = {"sender": names, "receiver": list(parts.receivers), "estimate": list(estimates)}
    return Found(values, coords=coords, attrs={"corrupt": ", ".join(corrupt)})


def require_planted(it: Planted, *, edges: bool = False) -> None:
    """Refuse what has no edges to be recovered where they are asked for, and a model without shuffled positions.

    Raises:
        DataError: the truth names no edges; ModelUnsupported: it is not a planted network.
    """
    do = "pass what planted.program or planted.trained gave, or a folder of this form whose truth has edges"
    if edges and not it.truth.get("edges"):
        about = "it names nodes alone" if it.truth.get("nodes") else None
        raise error(DataError, f"the truth of {it.model.anatomy.name} names no edges to recover", got=about, do=do)
    if not isinstance(it.model.hf, PlantedForCausalLM):
        got = type(it.model.hf).__name__
        raise error(ModelUnsupported, "positions can be shuffled only in planted networks", got=got, do=do)


def _measured(
    it: Planted, c: Corruptions, tokens: Tensor, where: Tensor | None, mask: Tensor
) -> Float[Tensor, " edge"]:
    """The largest change of an output that each edge alone makes, over prompts."""
    parts, pairs = graph(it.model), len(c.clean)
    names = ["embed", "pos_embed", *parts.senders[1:]]
    before, after = writes(it.model, c.clean), writes(it.model, tokens, where)
    changes = torch.stack([(after[name] - before[name]).detach() for name in names[:2]], dim=1)
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
    return swept.values.reshape(pairs, -1).amax(0).double()


def outputs_of(it: Planted, c: Corruptions, kind: str) -> tuple[Model, Pairs]:
    """A model to which a corruption is a prompt, and pairs of which is read how far outputs move along the way.

    Formula:  m = d . outputs, d the unit vector along which the corruption moves them, over all positions but the
              first; 0 where it moves none.
    """
    model = by_place(it.model)
    clean, where = place_ids(it.model, c.clean), c.positions if kind == "positions" else None
    other = place_ids(it.model, c.clean if kind == "positions" else c.corrupt, where)
    ends = [model.run(ids).logits[:, 1:].detach().double() for ids in (clean, other)]
    way = ends[1] - ends[0]
    way = way / way.flatten(1).norm(dim=1).clamp(min=1e-6).reshape(-1, 1, 1)

    def moved(logits: Tensor, prompts: Tensor) -> Tensor:
        return (logits.double() * way[prompts]).sum((1, 2))

    metric = FunctionMetric(moved, positions=tuple(range(1, clean.shape[1])))
    return model, Pairs(tuple(torch.stack([clean, other], dim=1)), metric)


def estimated(asked: tuple[Model, Pairs], kind: str, method: str) -> Float[Tensor, "sender receiver"]:
    """The largest |score| of each edge over the pairs of one corruption; the two embeddings are the first senders."""
    model, pairs = asked
    if method == "random":
        parts = graph(model)
        return drawn_scores(model, kind, len(parts.senders) + 1, len(parts.receivers))
    name, rules = ("eap", RELP) if method == "eap-relp" else (method, None)
    found = edge_scores(model, pairs, "noise", method=name, steps=STEPS, rules=rules).scores.abs().amax(0)
    still = torch.zeros_like(found[:1])  # the embedding of what a corruption leaves as it is
    return torch.cat([still, found] if kind == "positions" else [found[:1], still, found[1:]])


def drawn_scores(model: Model, kind: str, *shape: int) -> Float[Tensor, "*of"]:
    """Random scores, of a seed of their own for every model and corruption."""
    rng = np.random.default_rng([current().seed, crc32(f"{model.fingerprint} {kind}".encode())])
    return torch.from_numpy(rng.random(shape))


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
