"""Transformers with ordinary weights, trained so that the circuit of a compiled program is theirs too."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from microtome.edit import Edit, Patch
from microtome.errors import DataError, error, nearest
from microtome.planted._corruptions import corruptions
from microtome.planted._folder import Planted, load
from microtome.planted._programs import program
from microtome.planted._truth import nodes, sender_of

TRAINED = ("histogram", "previous_token", "repeats")


def trained(name: str) -> Planted:
    """A network with layer norms, GELU and dense weights, whose circuit is known because it was trained to be there.

    Source:   Gupta et al., "InterpBench: Semi-Synthetic Transformers for Evaluating Mechanistic Interpretability
              Techniques", 2024 (arXiv 2407.14494): interchange intervention training with a strictness loss. Departs:
              see `tools/train_programs.py`, which made the weights.
    Check:    `interchange_accuracy` of every node; tests/planted/test_trained.py.

    Args:
        name: one of the programs that were trained.

    Returns:
        A `Planted`. Its truth: `program`; `places`, the node here that stands for each head and MLP of the program's
        circuit; `nodes`, all that are inside; `vocabulary`, `bos` and `outputs` as for `program`.

    Raises:
        DataError: the program was not trained.
    """
    if name not in TRAINED:
        raise DataError(f'no trained program is called "{name}".{nearest(name, list(TRAINED))} {", ".join(TRAINED)}.')
    return load(Path(__file__).parent / "trained" / name)


def interchange_accuracy(it: Planted, n: int, seed: int) -> dict[str, float]:
    """How often a trained network says what its program says, when the activations of one node are exchanged.

    Formula:  for a node inside: the share of positions at which the network, with that place's activations from a
              source input, says what the program says with its node's from there; for one outside: at which it says
              what the program says, undisturbed; `behaviour`: without any exchange.
    Source:   interchange intervention accuracy of Geiger et al., "Causal Abstractions of Neural Networks", 2021
              (arXiv 2106.02997); for nodes outside, the strictness of Gupta et al., 2024 (arXiv 2407.14494).
    Cost:     three forwards of n inputs for every node inside, one for every node outside.
    Check:    the compiled program in the place of the network scores 1; tests/planted/test_trained.py.

    Args:
        it: what `trained` gave.
        n: how many pairs of base and source, drawn as `corruptions` draws them.
        seed: of the pairs.

    Returns:
        By node of the network, and `behaviour`: a share of the positions at which the program says anything, 0 to 1.

    Raises:
        DataError: the truth does not say which program the network does, or where.
    """
    missing = [name for name in ("program", "places") if name not in it.truth]
    if missing:
        raise error(
            DataError,
            f"the truth of {it.model.anatomy.name} does not say where a program's nodes are located",
            got=f"no {' and no '.join(missing)}",
            do="pass what planted.trained gave",
        )
    high = program(it.truth["program"])
    c = corruptions(high, n, seed)
    source_high = high.model.run(c.corrupt, capture=["*.attn.z", "*.mlp_out"])
    source = it.model.run(c.corrupt, capture=["*.attn.z", "*.mlp_out"])
    wanted = high.model.run(c.clean).logits

    def agree(edits: list[Edit], expected: Tensor) -> float:
        said = it.model.run(c.clean, edits=edits).logits[:, 1:].argmax(-1)
        defined = expected[:, 1:].amax(-1) > 0.5
        return float((said == expected[:, 1:].argmax(-1))[defined].double().mean())

    found = {"behaviour": agree([], wanted)}
    stands_for = {place: node for node, place in it.truth["places"].items()}
    for node in nodes(it.model)[2:-1]:
        expected = wanted
        if node in stands_for:
            expected = high.model.run(c.clean, edits=[Patch(sender_of(stands_for[node]), source_high)]).logits
        found[node] = agree([Patch(sender_of(node), source)], expected)
    return found
