"""Strict interchange intervention training: a network with ordinary weights that has the circuit of a program.

Formula:  loss = behaviour + interchange + passed * passed on + strict * outside, each a cross-entropy, in nats, with
          what the program says:
          behaviour    of a base input;
          interchange  with the activations of one node from a source input, and the program's variable from there;
          passed on    with what one edge of the circuit carries from the source, there and in the program;
          outside      with the activations of a place that stands for nothing, or with what an edge outside the circuit
                       carries, from the source: the program says what it does of the base; the mean over
                       some of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from microtome.context import current, seed_of
from microtome.errors import ArgumentError, DataError, error, nearest
from microtome.model import Model
from microtome.model import open as open_model
from microtome.planted._algorithm import Algorithm, Answers, Taught, taught
from microtome.planted._corruptions import Corruptions
from microtome.planted._exchange import Exchange
from microtome.planted._folder import Planted
from microtome.planted._network import PlantedConfig, PlantedForCausalLM
from microtome.planted._truth import EdgeName, check_truth, edges, head_of, mlp_of, nodes
from microtome.training import fit

SHORTEST = 4
"""Tokens of the shortest inputs that are trained on, BOS included."""
ENDS = ("embed", "pos_embed", "output")


def train(
    program: str | Planted | Algorithm, places: Mapping[str, str] | None = None, *, steps: int = 4000, batch: int = 64,
    layers: int | None = None, heads: int = 4, d_head: int = 10, d_mlp: int = 64, lr: float = 4e-3,
    strict: float = 1.0, passed: float = 1.0, idle: int = 3, seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None, every: int = 250,
) -> Planted:  # fmt: skip
    """Train a small transformer that computes a program by the program's own circuit, at places that are known.

    Formula:  see the head of this file.
    Source:   Gupta et al., "InterpBench: Semi-Synthetic Transformers for Evaluating Mechanistic Interpretability
              Techniques", 2024 (arXiv 2407.14494), strict interchange intervention training; after Geiger et al.,
              "Inducing Causal Structure for Interpretable Neural Networks", 2022 (arXiv 2112.00826). Departs: the
              compiled transformer itself is the program that is intervened on; activations are exchanged at all
              positions at once; edges are trained too, those of the circuit and those outside.
    Cost:     a step: two forwards and a backward of `batch` inputs, and a forward and a backward of 2 + 2 idle times as
              many; seven forwards of a compiled program.
    Check:    at the nodes and edges of the circuit exchanges do what they do in the program, elsewhere nothing; a
              resumed training equals one that ran through; tests/planted/test_train.py.

    Args:
        program: a name of `PROGRAMS`, what `program` gave, or an `Algorithm` in plain Python.
        places: for each head and MLP of the program's circuit, or variable of the algorithm, the node of the network
            that stands for it; by default one of the same layer and kind, drawn by the seed.
        steps: updates of all weights.
        batch: pairs of a base and a source input in each.
        layers: of the network; by default one more than the program has, or two more than the algorithm has variables.
        heads: of each layer.
        d_head: width of each; the stream is as wide as all of a layer.
        d_mlp: neurons of each layer.
        lr: the learning rate after 100 steps; it falls to 0 as a cosine.
        strict: weight of what is outside.
        passed: weight of the edges of the circuit.
        idle: places, and edges, outside that are exchanged in each step, one at a time.
        seed: of weights, places and inputs; that of the settings by default.
        checkpoint: a file of the state; if it holds this training, that goes on where it stood.
        every: steps between two checkpoints.

    Returns:
        A `Planted`. Its truth: `program`; `places`; `nodes` and `edges` that are inside; `vocabulary`, `bos` and
        `outputs` as for `program`; `steps`, `seed` and `training`, with which it was made. `interchange_accuracy` and
        `edge_accuracy` say how true that is.

    Raises:
        DataError: the program disagrees with its own model, or has no labels; a place is not there, is taken twice, or
            stands for nothing.
        ArgumentError: a size is outside what is allowed.
        FitError: the loss is not finite.

    >>> it = planted.train("repeats", steps=1000, seed=0)
    >>> planted.interchange_accuracy(it, 256, seed=1)
    """
    check_sizes(steps=steps, batch=batch, layers=layers, heads=heads, d_head=d_head, d_mlp=d_mlp, idle=idle)
    high, seed = taught(program), seed_of(current().seed if seed is None else seed)
    low = _network(high, layers or _depth(high), heads, d_head, d_mlp, seed)
    at = _drawn_places(high, low, seed) if places is None else dict(places)
    _check_places(high, low, at)
    truth = _truth(high, low, at)
    plan = _Plan(high, at, tuple(_outside(low, at)), _edges_outside(low, truth), batch, idle, seed)

    def loss(given: _Step) -> tuple[Tensor, dict[str, Tensor]]:
        parts = _losses(low, given)
        whole = parts["behaviour"] + parts["interchange"] + passed * parts["passed"] + strict * parts["outside"]
        return whole, {name: x.detach() for name, x in parts.items()}

    fit(
        low.hf, loss, plan.step, steps, lr=lr, schedule="cosine", warmup=min(100, steps // 10), clip=1.0,
        weight_decay=1e-4, seed=seed, model=low, checkpoint=checkpoint, every=every, name=f"training {high.name}",
    )  # fmt: skip
    taken = {"batch": batch, "lr": lr, "strict": strict, "passed": passed, "idle": idle}
    return Planted(open_model(low.hf), truth | {"steps": steps, "seed": seed, "training": taken})


def check_sizes(**sizes: int | None) -> None:
    """Refuse numbers that cannot be.

    Raises:
        ArgumentError: names the first of them.
    """
    for name, x in sizes.items():
        least = 0 if name in ("steps", "idle") else 1
        if x is not None and x < least:
            raise error(ArgumentError, f"{name} of a trained network", got=x, allowed=f"{least} or more")


def _depth(high: Taught) -> int:
    layers = [(head_of(n) or (mlp_of(n), 0))[0] for n in high.variables]
    known = [i for i in layers if i is not None]
    return max(known, default=0) + 2 if len(known) == len(layers) else len(layers) + 2


def _network(high: Taught, layers: int, heads: int, d_head: int, d_mlp: int, seed: int) -> Model:
    """A network with GELU and layer norms, of random weights."""
    config = PlantedConfig(
        vocab_size=len(high.vocabulary) + 1, output_size=len(high.outputs), hidden_size=heads * d_head,
        num_hidden_layers=layers, num_attention_heads=heads, head_dim=d_head, intermediate_size=d_mlp,
        max_position_embeddings=high.length, hidden_act="gelu", normalization="layer", attention_scale=d_head**-0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf: Any = PlantedForCausalLM(config)
        for module in hf.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.7)
    hf.requires_grad_(False)
    hf.config.name_or_path = high.name
    return open_model(hf, prove=False)


def _drawn_places(high: Taught, low: Model, seed: int) -> dict[str, str]:
    """For each head and MLP of the program a place of the same layer and kind; for each variable the next MLP.

    Raises:
        DataError: a layer has fewer heads than the program.
    """
    rng, found = Random(seed), dict[str, str]()
    free = {layer: list(range(low.anatomy.n_heads)) for layer in range(low.anatomy.n_layers)}
    for i, name in enumerate(high.variables):
        head, layer = head_of(name), mlp_of(name)
        if head is None:
            found[name] = f"L{min(i, low.anatomy.n_layers - 1) if layer is None else layer}.mlp"
        elif not free.get(head[0]):
            do = "give more heads= or layers="
            raise error(DataError, f"there is no place for {name} of {high.name}", got=f"{len(free)} layers", do=do)
        else:
            found[name] = f"L{head[0]}.head.{free[head[0]].pop(rng.randrange(len(free[head[0]])))}"
    return found


def _check_places(high: Taught, low: Model, at: Mapping[str, str]) -> None:
    """Refuse an alignment that cannot be.

    Raises:
        DataError: it names what is not there, leaves something out, or gives one place twice.
    """
    known, there = list(high.variables), nodes(low)[2:-1]
    for name, place in at.items():
        if name not in known:
            do = f"align {', '.join(known)}.{nearest(name, known)}"
            raise error(DataError, f'{high.name} has no "{name}" to be aligned', do=do)
        if place not in there:
            allowed = f"heads and MLPs of {low.anatomy.n_layers} layers, such as {there[0]} and {there[-1]}"
            do, what = f"name another place.{nearest(place, there)}", f'"{name}" is aligned to a node that is not there'
            raise error(DataError, what, got=place, allowed=allowed, do=do)
    left = [name for name in known if name not in at]
    if left:
        raise error(DataError, f'"{left[0]}" of {high.name} has no place', do=f'give places={{"{left[0]}": ...}}')
    twice = [place for place in at.values() if list(at.values()).count(place) > 1]
    if twice:
        raise error(DataError, f"{twice[0]} stands for two parts of {high.name}", do="give each a place of its own")


def _truth(high: Taught, low: Model, at: Mapping[str, str]) -> dict[str, Any]:
    """What is inside the network after training."""
    placed: list[EdgeName] = [(at.get(u, u), at.get(v, v), x) for u, v, x in high.edges]
    inside = {*at.values(), "embed", "output", *(end for edge in placed for end in edge[:2])}
    truth: dict[str, Any] = {
        "program": high.name, "vocabulary": list(high.vocabulary), "bos": len(high.vocabulary),
        "outputs": list(high.outputs), "nodes": [n for n in nodes(low) if n in inside], "places": dict(at),
        "edges": [list(edge) for edge in placed],
    }  # fmt: skip
    check_truth(low, truth)
    return truth


def _outside(low: Model, at: Mapping[str, str]) -> list[str]:
    return [n for n in nodes(low)[2:-1] if n not in at.values()]


def _edges_outside(low: Model, truth: Mapping[str, Any]) -> tuple[EdgeName, ...]:
    """Edges that carry nothing, where it is known which do."""
    inside = {tuple(edge) for edge in truth["edges"]}
    return tuple(edge for edge in edges(low) if inside and edge not in inside)


@dataclass(frozen=True)
class _Step:
    """What one step asks: of which inputs, with which exchanges, and what the program says to each."""

    inputs: Corruptions
    wanted: Answers
    node: str
    changed: Answers
    edge: EdgeName | None
    passed: Answers | None
    outside: tuple[str | EdgeName, ...]


@dataclass(frozen=True)
class _Plan:
    """The steps of a training; each is the same whenever it is asked for."""

    high: Taught
    at: Mapping[str, str]
    outside: tuple[str, ...]
    edges_outside: tuple[EdgeName, ...]
    batch: int
    idle: int
    seed: int

    def step(self, number: int) -> _Step:
        """The step of a number, from 0."""
        rng, high = Random(f"{self.seed} {number}"), self.high
        inputs = high.draw(self.batch, rng.randrange(2**31), rng.randrange(min(SHORTEST, high.length), high.length + 1))
        node = high.variables[number % len(high.variables)]
        edge = high.edges[number % len(high.edges)] if high.edges else None
        passed = None if edge is None else high.with_edge(inputs, edge)
        own = None if edge is None else (self.at.get(edge[0], edge[0]), self.at.get(edge[1], edge[1]), edge[2])
        idle: list[str | EdgeName] = [*rng.sample(self.outside, min(self.idle, len(self.outside)))]
        idle += rng.sample(self.edges_outside, min(self.idle, len(self.edges_outside)))
        return _Step(
            inputs, high.answers(inputs), self.at[node], high.with_variable(inputs, node),
            None if passed is None else own, passed, tuple(idle),
        )  # fmt: skip


def _losses(low: Model, given: _Step) -> dict[str, Tensor]:
    """The parts of the loss, of one step."""
    made = Exchange.of(low, given.inputs, grad=True)
    asked: list[tuple[str | EdgeName, Answers]] = [(given.node, given.changed)]
    asked += [] if given.edge is None or given.passed is None else [(given.edge, given.passed)]
    inside = len(asked)
    asked += [(name, given.wanted) for name in given.outside]
    edits = [
        made.node(name, i, len(asked)) if isinstance(name, str) else made.edge(name, i, len(asked))
        for i, (name, _) in enumerate(asked)
    ]
    logits = low.run(given.inputs.clean.repeat(len(asked), 1), edits=edits, grad=True).logits.chunk(len(asked))
    found = [_cross_entropy(x, answers) for x, (_, answers) in zip(logits, asked, strict=True)]
    none = found[0].new_zeros(())
    return {
        "behaviour": _cross_entropy(made.base.logits, given.wanted), "interchange": found[0],
        "passed": found[1] if inside == 2 else none,
        "outside": torch.stack(found[inside:]).mean() if found[inside:] else none,
    }  # fmt: skip


def _cross_entropy(logits: Tensor, answers: Answers) -> Tensor:
    """Mean where the program says something, in nats; 0 where it says nothing at all."""
    if not bool(answers.there.any()):
        return logits.sum() * 0.0
    return nn.functional.cross_entropy(logits[:, 1:][answers.there], answers.labels[answers.there])
