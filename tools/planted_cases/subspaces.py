"""Attributes in rotated subspaces, and the smallest illusion: what ways to find a subspace make of them."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from microtome import planted, subspaces
from microtome.subspaces import Subspace, Swaps
from microtome.subspaces._exchange import Exchange
from microtome.subspaces._score import scores
from microtome.tasks import Asked


def asked(it: planted.Planted) -> tuple[Asked, ...]:
    """Every question about every entity of `planted.attributes`, with what the model says."""
    truth = it.truth
    places = list(product(range(len(truth["entities"])), range(len(truth["questions"]))))
    rows = [[truth["bos"], truth["entities"][e], truth["questions"][a]] for e, a in places]
    said = it.model.run(rows).logits[:, -1].argmax(-1).tolist()
    return tuple(
        Asked(f"entity {e}", str(a), f"question {a}", tuple(row), 1, (truth["known"][e][a],), token)
        for (e, a), row, token in zip(places, rows, said, strict=True)
    )


def halves(it: planted.Planted, attribute: str, each: int = 4) -> tuple[Swaps, Swaps]:
    """Swaps of one attribute among the first two thirds of the entities, and among the others."""
    every = asked(it)
    names = list(dict.fromkeys(q.entity for q in every))
    cut = 2 * len(names) // 3
    first, second = (subspaces.of_asked(every, attribute, own, each=each) for own in (names[:cut], names[cut:]))
    return first, second


def true_subspace(it: planted.Planted, attribute: str) -> Subspace:
    """Where an attribute is."""
    return Subspace.of(it.model, it.truth["site"], it.truth["basis"][attribute], "truth")


def illusion_swaps(it: planted.Planted) -> Swaps:
    """Every word of `planted.illusion` swapped with one of the other kind."""
    truth = it.truth
    pairs = list(zip(truth["first"], truth["second"], strict=True))
    sides = [(a, b, truth["yes"], truth["no"]) for a, b in pairs] + [
        (b, a, truth["no"], truth["yes"]) for a, b in pairs
    ]
    return Swaps(tuple(
        subspaces.Swap((0, base), (0, source), 1, 1, label, "cause", own, "kind", str(base), str(source))
        for base, source, own, label in sides
    ))  # fmt: skip


def rotated_attributes() -> dict[str, Any]:
    """The subspace of each attribute, which no coordinate is aligned with, gives and keeps what MDAS wants of it."""
    it, right, false = planted.attributes(), 0, 0
    for attribute in it.truth["basis"]:
        train, test = halves(it, attribute)
        judged = Exchange(it.model, it.truth["site"], test.swaps)
        for method in ("mdas", "random", "neurons"):
            found = subspaces.find(
                it.model, train, it.truth["site"], 6, method=method, steps=40, lr=0.05, rows=8, seed=0
            )
            good = scores(judged, found)["disentangle"] > 0.95
            right, false = right + (good and method == "mdas"), false + (good and method != "mdas")
    kinds = len(it.truth["basis"])
    return {
        "measure": "subspaces.find", "planted": f"{kinds} attributes in rotated subspaces",
        "found": f"{right} of {kinds}", "false": f"{false} of {2 * kinds}",
    }  # fmt: skip


def illusory_direction() -> dict[str, Any]:
    """A direction that swaps every answer, and neither of whose parts swaps one; the carrier's row part swaps all."""
    it = planted.illusion()
    swaps, site, neurons = illusion_swaps(it), it.truth["site"], it.truth["neurons"]
    carrier = torch.eye(it.model.anatomy.d_mlp)[neurons["carrier"]]
    shown = [
        subspaces.split_direction(it.model, swaps, site, v)["accuracy"].sel(part=["whole", "row"]).values.tolist()
        for v in (it.truth["direction"], carrier)
    ]
    return {
        "measure": "split_direction", "planted": "a direction of an unread and a dormant neuron",
        "found": f"{int(shown[0] == [1.0, 0.0])} of 1", "false": f"{int(shown[1] != [1.0, 1.0])} of 1",
    }  # fmt: skip


CASES = (rotated_attributes, illusory_direction)
