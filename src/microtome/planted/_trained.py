"""Transformers with ordinary weights, trained so that the circuit of a compiled program is theirs too."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from microtome.errors import DataError, error, nearest
from microtome.planted._algorithm import Algorithm, Answers, Taught, taught
from microtome.planted._corruptions import Corruptions
from microtome.planted._exchange import Exchange
from microtome.planted._folder import Planted, load
from microtome.planted._truth import EdgeName, edges, nodes

TRAINED = ("histogram", "previous_token", "repeats")


def trained(name: str) -> Planted:
    """A network with layer norms, GELU and dense weights, whose circuit is known because it was trained to be there.

    Source:   Gupta et al., "InterpBench: Semi-Synthetic Transformers for Evaluating Mechanistic Interpretability
              Techniques", 2024 (arXiv 2407.14494): interchange intervention training with a strictness loss. Departs:
              see `train`, with which `tools/train_programs.py` made the weights.
    Check:    `interchange_accuracy` of every node, `edge_accuracy` of every edge where edges are known;
              tests/planted/test_trained.py.

    Args:
        name: one of the programs that were trained.

    Returns:
        A `Planted`. Its truth: `program`; `places`, the node here that stands for each head and MLP of the program's
        circuit; `nodes`, all that are inside; `edges` likewise, but of "histogram", of which nodes alone were trained
        and no edges are known; `vocabulary`, `bos` and `outputs` as for `program`.

    Raises:
        DataError: the program was not trained.
    """
    if name not in TRAINED:
        raise DataError(f'no trained program is called "{name}".{nearest(name, list(TRAINED))} {", ".join(TRAINED)}.')
    return load(Path(__file__).parent / "trained" / name)


def interchange_accuracy(it: Planted, n: int, seed: int, program: Algorithm | None = None) -> dict[str, float]:
    """How often a trained network says what its program says, when the activations of one node are exchanged.

    Formula:  for a node inside: the share of positions at which the network, with that place's activations from a
              source input, says what the program says with its node's from there; for one outside: at which it says
              what the program says, undisturbed; `behaviour`: without any exchange.
    Source:   interchange intervention accuracy of Geiger et al., "Causal Abstractions of Neural Networks", 2021
              (arXiv 2106.02997); for nodes outside, the strictness of Gupta et al., 2024 (arXiv 2407.14494).
    Cost:     four forwards of n inputs for every node inside, three of them of the program; one for every node outside.
    Check:    the compiled program in the place of the network scores 1; tests/planted/test_trained.py.

    Args:
        it: what `trained` or `train` gave.
        n: how many pairs of base and source, drawn as the program's are in training.
        seed: of the pairs.
        program: the algorithm that it was trained to compute, if that was one.

    Returns:
        By node of the network, and `behaviour`: a share of the positions at which the program says anything, 0 to 1.

    Raises:
        DataError: the truth does not say which program the network does, or where.
    """
    high, inputs, made = _compared(it, n, seed, program)
    stands_for = {place: node for node, place in it.truth["places"].items()}
    wanted = high.answers(inputs)
    found = {"behaviour": _agreement(made.base.logits, wanted)}
    for node in nodes(it.model)[2:-1]:
        expected = high.with_variable(inputs, stands_for[node]) if node in stands_for else wanted
        found[node] = _agreement(it.model.run(inputs.clean, edits=[made.node(node)]).logits, expected)
    return found


def edge_accuracy(it: Planted, n: int, seed: int, program: Algorithm | None = None) -> dict[EdgeName, float]:
    """How often a trained network says what its program says, when one edge carries what it does in another input.

    Formula:  as `interchange_accuracy`: for an edge of the circuit, what the program says with its own edge exchanged;
              for one outside, what it says undisturbed. Edges from `pos_embed` carry shuffled positions.
    Source:   Gupta et al., 2024 (arXiv 2407.14494). Departs: they exchange nodes alone.
    Cost:     a forward of n inputs for every edge, and three of the program for every one of the circuit.
    Check:    the compiled program in the place of the network scores 1; tests/planted/test_train.py.

    Args:
        it: what `trained` or `train` gave.
        n: how many pairs of base and source.
        seed: of the pairs.
        program: the algorithm that it was trained to compute, if that was one; its own edges are left out, since plain
            Python has none to exchange.

    Returns:
        By edge: a share of the positions at which the program says anything, 0 to 1.

    Raises:
        DataError: the truth does not say which program the network does, or where, or names no edges.
    """
    high, inputs, made = _compared(it, n, seed, program)
    if not it.truth.get("edges"):
        do = "ask interchange_accuracy, of nodes"
        raise error(DataError, f"the truth of {it.model.anatomy.name} names no edges to judge", do=do)
    at, wanted = it.truth["places"], high.answers(inputs)
    own = {(at.get(u, u), at.get(v, v), x): (u, v, x) for u, v, x in high.edges}
    found: dict[EdgeName, float] = {}
    for edge in edges(it.model):
        expected = high.with_edge(inputs, own[edge]) if edge in own else wanted
        if expected is not None:
            found[edge] = _agreement(it.model.run(inputs.clean, edits=[made.edge(edge)]).logits, expected)
    return found


def _compared(it: Planted, n: int, seed: int, own: Algorithm | None) -> tuple[Taught, Corruptions, Exchange]:
    """The program of a network, inputs, and the exchanges of the network on them.

    Raises:
        DataError: the truth does not say which program it is, or where.
    """
    missing = [name for name in ("program", "places") if name not in it.truth]
    if missing:
        raise error(
            DataError,
            f"the truth of {it.model.anatomy.name} does not say where a program's nodes are located",
            got=f"no {' and no '.join(missing)}",
            do="pass what planted.trained or planted.train gave",
        )
    high = taught(it.truth["program"] if own is None else own)
    inputs = high.draw(n, seed, high.length)
    return high, inputs, Exchange.of(it.model, inputs)


def _agreement(logits: Tensor, expected: Answers) -> float:
    """The share of positions at which the largest output is the expected one, where there is any."""
    same = logits[:, 1:].argmax(-1) == expected.labels
    return float(same[expected.there].double().mean())
