"""How a circuit is described: nodes, and edges from what a node writes to what another reads.

    nodes    embed, pos_embed, L{i}.head.{h}, L{i}.mlp, output
    edges    (sender, receiver, input): input is q, k or v of a head, and in for an MLP and the output

Number of edges of a model of L layers and H heads: every one of the 3H + 1 inputs of layer i is read from the two
embeddings, the H + 1 nodes of each layer before it and, for the MLP, the H heads of its own; the output from all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from microtome.errors import DataError, error, nearest
from microtome.model import Model

EdgeName = tuple[str, str, str]


def nodes(model: Model) -> list[str]:
    """Every node of a model, in the order in which a forward reaches them."""
    found = ["embed", "pos_embed"]
    for i in range(model.anatomy.n_layers):
        found += [f"L{i}.head.{h}" for h in range(model.anatomy.n_heads)] + [f"L{i}.mlp"]
    return [*found, "output"]


def edges(model: Model) -> list[EdgeName]:
    """Every edge that a model could have, as (sender, receiver, input).

    >>> edges(planted.program("reverse").model)[0]
    ('embed', 'L0.head.0', 'q')
    """
    found: list[EdgeName] = []
    senders = ["embed", "pos_embed"]
    for i in range(model.anatomy.n_layers):
        heads = [f"L{i}.head.{h}" for h in range(model.anatomy.n_heads)]
        found += [(u, v, x) for v in heads for x in "qkv" for u in senders]
        senders += heads
        found += [(u, f"L{i}.mlp", "in") for u in senders]
        senders.append(f"L{i}.mlp")
    return found + [(u, "output", "in") for u in senders]


def head_of(node: str) -> tuple[int, int] | None:
    """Layer and head of a node, or None if it is none."""
    match = re.fullmatch(r"L(\d+)\.head\.(\d+)", node)
    return None if match is None else (int(match[1]), int(match[2]))


def mlp_of(node: str) -> int | None:
    """Layer of an MLP's node, or None if it is none."""
    match = re.fullmatch(r"L(\d+)\.mlp", node)
    return None if match is None else int(match[1])


def sender_of(node: str) -> str:
    """The name of a node where it writes, as the graph of a model has it: ``"0.attn.z[1]"`` for ``"L0.head.1"``."""
    head, layer = head_of(node), mlp_of(node)
    if head is not None:
        return f"{head[0]}.attn.z[{head[1]}]"
    return node if layer is None else f"{layer}.mlp_out"


def receiver_of(node: str, slot: str) -> str:
    """The name of a node's input, as the graph of a model has it: ``"0.attn.q[1]"`` for q of ``"L0.head.1"``."""
    head, layer = head_of(node), mlp_of(node)
    if head is not None:
        return f"{head[0]}.attn.{slot}[{head[1]}]"
    return "final" if layer is None else f"{layer}.mlp.in"


def check_truth(model: Model, truth: Mapping[str, Any]) -> None:
    """Refuse a truth whose nodes or edges the model cannot have.

    Raises:
        DataError: names the first of them.
    """
    known, possible = nodes(model), set(edges(model))
    attributes = _listed(truth, "nodes")
    for node in attributes:
        if not isinstance(node, str):
            raise error(DataError, "the truth names a node that is not text", got=repr(node), allowed=", ".join(known))
        if node not in known:
            raise DataError(
                f'the truth names a node that {model.anatomy.name} has not: "{node}".{nearest(node, known)}'
            )
    for edge in _listed(truth, "edges"):
        listed = isinstance(edge, list | tuple) and all(isinstance(end, str) for end in cast("Sequence[Any]", edge))
        if not listed or tuple(edge) not in possible:
            allowed = "[sender, receiver, input] in the order of the model, input one of q, k, v, in"
            raise error(
                DataError, f"the truth names an edge that {model.anatomy.name} does not have", got=edge, allowed=allowed
            )
        lost = [node for node in edge[:2] if node not in attributes]
        if lost:
            raise error(DataError, f"an edge of the truth ends at {lost[0]}, which is not one of its nodes", got=edge)


def _listed(truth: Mapping[str, Any], name: str) -> Sequence[Any]:
    """The nodes or the edges of a truth; none where it has no such entry."""
    value: object = truth.get(name, ())
    if isinstance(value, list | tuple):
        return cast("Sequence[Any]", value)
    do = "list them, or leave the entry out"
    raise error(DataError, f"the {name} of a truth are not a list", got=repr(value), allowed="a list", do=do)
