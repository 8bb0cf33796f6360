"""How well a method finds a circuit that is known.

Formula:  an edge's score is the largest |change of any output| over pairs and over both corruptions, other tokens and
          shuffled positions; AUC is the share of (edge of the circuit, edge outside) of which the first has the higher
          score, a tie counting half.
          The estimate beside it: |(what the sender writes in the corrupt run - in the clean one) . R|, R the gradient
          at the receiver's input of m = d . outputs, d the unit vector along which the corruption moves the outputs;
          the largest over the same pairs and corruptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from microtome.errors import DataError, EditError, ModelUnsupported, error
from microtome.explain._edge_scores import captures, contract
from microtome.explain._edges import WRITTEN
from microtome.explain._graph import graph
from microtome.explain._patching import refuse_unknown
from microtome.metric import FunctionMetric
from microtome.model import Model
from microtome.planted import Planted, PlantedForCausalLM, corruptions, placed, receiver_of, sender_of, writes
from microtome.sweep import Edge

if TYPE_CHECKING:
    import xarray as xr

Corruption = Literal["tokens", "positions"]
CORRUPTIONS: tuple[Corruption, ...] = ("tokens", "positions")


def circuit_recovery(
    it: Planted, *, pairs: int = 16, seed: int = 0, corrupt: tuple[Corruption, ...] = CORRUPTIONS
) -> xr.Dataset:
    """Score every edge of a planted model exactly, and say how well the scores tell its circuit from the rest.

    Formula:  see the head of this file.
    Source:   compiled circuits as ground truth, as in Gupta et al., "InterpBench", 2024 (arXiv 2407.14494). Departs:
              positions are shuffled too, since an edge from the positional embedding shows under nothing else.
              The estimate is edge attribution patching, Syed, Rager, Conmy, 2023 (arXiv 2310.10348), of a metric that
              needs no answer.
    Cost:     a sweep a corruption, with a cell for every edge of every pair; a forward and a backward a pair.
    Check:    AUC 1 on every compiled program, and below where positions are not shuffled; the estimate is the slope of
              exact effects; tests/planted.

    Args:
        it: a planted model with its truth.
        pairs: how many inputs.
        seed: of the inputs and their corruptions.
        corrupt: which corruptions to use.

    Returns:
        Dataset over (sender, receiver), `pos_embed` a sender of its own: `score` and `eap`, the estimate, in units of
        the outputs, and `true`; NaN and False where there is no edge; attributes `auc` and `auc_eap`.

    Raises:
        DataError: the truth names no edges, or there are no pairs.
        ModelUnsupported: the truth is about another kind of model than a compiled one.
        EditError: there is no such corruption, or none is asked for.
    """
    _check(it, corrupt)
    c = corruptions(it, pairs, seed)
    parts, names = graph(it.model), ["embed", "pos_embed"]
    base = it.model.run(c.clean).logits[:, 1:].detach()
    before = writes(it.model, c.clean)

    def change(logits: Tensor, prompts: Tensor) -> Tensor:
        return (logits - base[prompts]).abs().amax((1, 2))

    names += parts.senders[1:]
    mask = torch.cat([parts.mask[:1], parts.mask])
    score = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.nan)
    eap = score.clone()
    metric = FunctionMetric(change, positions=tuple(range(1, c.clean.shape[1])))
    places = mask.nonzero()
    for kind in corrupt:
        tokens, where = (c.corrupt, None) if kind == "tokens" else (c.clean, c.positions)
        edits = [] if where is None else [placed(it.model, tokens, where)]
        source, after = it.model.run(tokens, capture=WRITTEN, edits=edits), writes(it.model, tokens, where)
        cells: list[Edge] = []
        for number in range(pairs):
            own = {name: (after[name] - before[name])[number].detach() for name in names[:2]}
            for u, v in places.tolist():
                sender, receiver = names[u], parts.receivers[v]
                if sender in own:
                    cells.append(Edge("embed", receiver, change=own[sender]))
                else:
                    cells.append(Edge(sender, receiver, source=source))
        prompts = [number for number in range(pairs) for _ in range(len(places))]
        swept = it.model.sweep(c.clean, cells, metric, prompts=prompts).run().whole()
        found = swept.values.reshape(pairs, -1).amax(0).double()
        score[mask] = torch.maximum(score[mask], found)
        written = {node if node in names else sender_of(node): after[node] - x for node, x in before.items()}
        changes = torch.stack([written[name].detach() for name in names], dim=1)
        eap[mask] = torch.maximum(eap[mask], estimated(it.model, c.clean, changes, source.logits[:, 1:])[mask])
    return _dataset(it, score, eap, seed, corrupt)


def _check(it: Planted, corrupt: Sequence[str]) -> None:
    """Refuse what has no circuit of edges to be recovered, and corruptions that there are not."""
    do = "pass what planted.program gave, or a folder of this form whose truth has edges"
    if not it.truth.get("edges"):
        about = "it names nodes alone" if it.truth.get("nodes") else None
        raise error(DataError, f"the truth of {it.model.anatomy.name} names no edges to recover", got=about, do=do)
    if not isinstance(it.model.hf, PlantedForCausalLM):
        got = type(it.model.hf).__name__
        raise error(ModelUnsupported, "positions can be shuffled in planted networks alone", got=got, do=do)
    if not corrupt:
        allowed = ", ".join(CORRUPTIONS)
        raise error(EditError, "there is no corruption to recover by", got="()", allowed=allowed, do="name one")
    for kind in (corrupt,) if isinstance(corrupt, str) else corrupt:
        refuse_unknown("corruption", kind, CORRUPTIONS)
    if isinstance(corrupt, str):
        got, do = repr(corrupt), f'write ("{corrupt}",)'
        raise error(EditError, "corruptions are given as a tuple", got=got, do=do)


def estimated(model: Model, clean: Tensor, changes: Tensor, goal: Tensor) -> Tensor:
    """[sender, receiver] The largest |first-order change| of the outputs, over prompts, along the way to the goal's.

    Args:
        model: a planted model.
        clean: [prompt, pos] where the gradient is taken.
        changes: [prompt, sender, pos, d_model] what each sender writes more in the corrupt run.
        goal: [prompt, pos - 1, vocab] the outputs of the corrupt run.
    """
    found: list[Tensor] = []
    for tokens, change, end in zip(clean, changes, goal, strict=True):
        start = model.run(tokens.unsqueeze(0), capture=captures(model), grad=True)
        outputs = start.logits[0, 1:].double()
        way = (end.double() - outputs).detach()
        # A corruption that changes no output gives no direction, and so no score.
        metric = (outputs * way).sum() / way.norm().clamp(min=1e-6)
        found.append(contract(model, start, start.grad(metric), change).abs().cpu())
    return torch.stack(found).amax(0)


def _dataset(it: Planted, score: Tensor, eap: Tensor, seed: int, corrupt: tuple[Corruption, ...]) -> xr.Dataset:
    import xarray as xr

    parts = graph(it.model)
    senders = ["embed", "pos_embed", *parts.senders[1:]]
    true = torch.zeros(len(senders), len(parts.receivers), dtype=torch.bool)
    for sender, receiver, slot in it.truth["edges"]:
        true[senders.index(sender_of(sender)), parts.receivers.index(receiver_of(receiver, slot))] = True
    edges = score.isfinite()
    data = xr.Dataset(
        {name: (("sender", "receiver"), x.numpy()) for name, x in (("score", score), ("eap", eap), ("true", true))},
        coords={"sender": senders, "receiver": list(parts.receivers)},
    )
    told = {f"auc{end}": auc(x[edges & true], x[edges & ~true]) for end, x in (("", score), ("_eap", eap))}
    attributes = told | {"method": "circuit recovery", "seed": seed, "corrupt": ", ".join(corrupt)}
    return data.assign_attrs(it.model.provenance | attributes)


def auc(higher: Tensor, lower: Tensor) -> float:
    """Area under the ROC curve: how well a score separates two groups.

    Formula:  mean over i, j of 1[higher_i > lower_j] + 1[higher_i = lower_j] / 2.
    Source:   Hanley and McNeil, "The Meaning and Use of the Area under a Receiver Operating Characteristic (ROC)
              Curve", 1982; scikit-learn's `roc_auc_score`. Departs: none.
    Cost:     one sort of n + m scores.
    Check:    equal to a count by hand; tests/planted/test_recovery.py.

    Args:
        higher: [n] scores that should be the greater ones.
        lower: [m] scores of the others.

    Returns:
        0 to 1; 0.5 where the score separates nothing. NaN where a group is empty.
    """
    if not (len(higher) and len(lower)):
        return float("nan")
    from sklearn.metrics import roc_auc_score

    scores, positive = torch.cat([higher, lower]), torch.arange(len(higher) + len(lower)) < len(higher)
    return float(roc_auc_score(positive.numpy(), scores.detach().cpu().numpy()))
