"""How well a method finds the nodes of a known circuit.

Formula:  a node's score is the largest |change of any output| over pairs and over both corruptions, other tokens and
          shuffled positions, where the node alone has its activations, at all positions, from the corrupt run. True are
          the heads and MLPs from which an edge of the circuit goes out. AUC as in `_recovery`.
          The estimates beside it: the largest |score| of `attribute`, summed over the positions of an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.edit import Patch
from microtome.errors import DataError, error
from microtome.explain._attribution import RELP
from microtome.explain._node_scores import scores_of_nodes
from microtome.explain._pairs import Pairs
from microtome.explain._recovery import (
    STEPS,
    Corruption,
    auc,
    drawn_scores,
    outputs_of,
    require_planted,
)
from microtome.method import Argument, Column, Found, Source, question, run_sweep
from microtome.metric import FunctionMetric
from microtome.model import Model
from microtome.planted import Planted, corruptions, nodes, sender_of

Estimate = Literal["atp", "relp", "atp*", "ig", "random"]
MOST_STEPS = 20
"""Points of `ig` at most: no number makes it complete where attention is all but a step."""
WRITTEN = ("attn.z[head]", "mlp_out")
NODE = ("component",)
CHANCE = "none: 0.5 is chance"
TRUTH = "none: compare `true`, which says which nodes are in the circuit"


@question(
    "node_recovery",
    title="recovery of nodes",
    question="How well do scores of heads and MLPs separate a known circuit from the rest of the model?",
    columns=(
        Column("score", "outputs", "largest change of any output caused by this node alone", TRUTH, (0, None), NODE),
        Column("estimated", "outputs", "the same, estimated from gradients", TRUTH, (0, None), ("estimate", *NODE)),
        Column("true", "1", "whether an edge of the circuit goes out of the node", "none: the truth", (0, 1), NODE),
        Column("auc", "AUC", "how well exact scores separate the circuit from the rest", CHANCE, (0, 1), ()),
        Column("auc_estimated", "AUC", "how well estimated scores separate the circuit from the rest", CHANCE, (0, 1),
               ("estimate",)),
    ),
    source=(
        Source(
            "Gupta et al.", "InterpBench", 2024, "2407.14494",
            departs="also shuffles positions, since only this reveals what depends on positions alone",
        ),
        Source(
            "Kramár, Lieberum, Shah, Nanda",
            "AtP*: An efficient and scalable method for localizing LLM behaviour to components", 2024, "2403.00745",
            departs="uses a metric that needs no answer; queries and keys are no nodes here",
        ),
    ),
    cost="per corruption, a sweep with one cell per node and pair, and each estimate as `attribute` makes it",
    check="tests/planted/test_node_recovery.py",
    call='mt.explain.node_recovery(mt.planted.trained("repeats"))',
)  # fmt: skip
def node_recovery(
    it: Planted,
    *,
    pairs: Annotated[int, Argument("how many random inputs to corrupt", "inputs", least=1)] = 16,
    corrupt: Annotated[Sequence[Corruption], Argument("what is changed in the inputs")] = ("tokens", "positions"),
    estimates: Annotated[Sequence[Estimate], Argument("the estimates that are judged")] = ("atp",),
) -> Found:
    """Score every head and MLP of a planted model exactly, and report how well this separates its circuit.

    An AUC is NaN where every node is in the circuit.

    Raises:
        DataError: the truth names neither edges nor nodes.
        ModelUnsupported: the truth is about another kind of model than a compiled one.
    """
    require_planted(it)
    names = nodes(it.model)[2:-1]
    true = torch.tensor([name in _true(it) for name in names])
    c = corruptions(it, pairs, current().seed)
    score = torch.zeros(len(names), dtype=torch.float64)
    guesses = score.repeat(len(estimates), 1)
    for kind in corrupt:
        model, asked = outputs_of(it, c, kind)
        score = torch.maximum(score, _measured(model, asked, names))
        for guess, name in zip(guesses, estimates, strict=True):
            guess[:] = torch.maximum(guess, estimated_nodes(model, asked, kind, name))
    aucs = [auc(x[true], x[~true]) for x in (score, *guesses)]
    values = {"score": score, "estimated": guesses, "true": true, "auc": aucs[0], "auc_estimated": aucs[1:]}
    coords = {"component": [sender_of(name) for name in names], "estimate": list(estimates)}
    return Found(values, coords=coords, attrs={"corrupt": ", ".join(corrupt)})


def _true(it: Planted) -> set[str]:
    """The nodes from which an edge of the circuit goes out; all that are named where no edges are known.

    Raises:
        DataError: neither is known.
    """
    found = {edge[0] for edge in it.truth.get("edges", ())} or set(it.truth.get("nodes", ()))
    if not found:
        do = "pass what planted.program or planted.trained gave, or a folder of this form whose truth has nodes"
        raise error(DataError, f"the truth of {it.model.anatomy.name} names no nodes to recover", do=do)
    return found


def _measured(model: Model, pairs: Pairs, names: Sequence[str]) -> Float[Tensor, " node"]:
    """The largest change of an output that each node alone makes, over prompts."""
    clean, other = (torch.stack(list(rows)) for rows in (pairs.start("noise"), pairs.goal("noise")))
    base = model.run(clean).logits[:, 1:].detach()

    def change(logits: Tensor, prompts: Tensor) -> Tensor:
        return (logits - base[prompts]).abs().amax((1, 2))

    source = model.run(other, capture=["*.attn.z", "*.mlp_out"])
    cells = [Patch(sender_of(name), source) for _ in clean for name in names]
    prompts = [number for number in range(len(clean)) for _ in names]
    metric = FunctionMetric(change, positions=tuple(range(1, clean.shape[1])))
    swept = run_sweep(model, clean, cells, metric, prompts=prompts, stage="measuring nodes").whole()
    return swept.values.reshape(len(clean), -1).amax(0).double()


def estimated_nodes(model: Model, pairs: Pairs, kind: str, method: str) -> Float[Tensor, " node"]:
    """The largest |score| of each head and MLP, layer by layer, over the pairs of one corruption."""
    a = model.anatomy
    if method == "random":
        return drawn_scores(model, kind, a.n_layers * (a.n_heads + 1))
    rules = RELP if method == "relp" else None
    asked: dict[str, Any] = {"rules": rules, "sites": WRITTEN, "steps": STEPS, "most": MOST_STEPS}
    found = scores_of_nodes(model, pairs, "noise", method=method, **asked).scores
    by_layer = torch.cat([found[WRITTEN[0]], found[WRITTEN[1]].sum(-1, keepdim=True)], dim=-1)
    return by_layer.abs().amax(0).flatten()
