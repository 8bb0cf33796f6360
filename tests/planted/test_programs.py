"""Compiled programs compute their references, and their circuits are what ablation says they are."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

import microtome as mt
from microtome import planted

NAMES = list(planted.PROGRAMS)
FOLDER = Path(planted.__file__).parent / "programs"
PAIRS = 32
LARGE = {"balanced", "maximum_so_far", "palindrome", "sort_by_frequency"}  # hundreds of edges each


def outputs(logits: Tensor) -> Tensor:
    """What a program says: nothing is said at BOS."""
    return logits[:, 1:]


def edge_effects(it: planted.Planted, c: planted.Corruptions) -> dict[planted.EdgeName, float]:
    """The literal oracle: add the change of the sender's write to one input, run, and take the largest change said."""
    model = it.model
    clean, base = planted.writes(model, c.clean), outputs(model.run(c.clean).logits)
    effects: dict[planted.EdgeName, float] = {}
    for other in (planted.writes(model, c.corrupt), planted.writes(model, c.clean, c.positions)):
        for sender, receiver, slot in planted.edges(model):
            change = other[sender] - clean[sender]
            head, layer = planted.head_of(receiver), planted.mlp_of(receiver)
            if head is not None:
                weight = getattr(model.layers[head[0]], f"W_{slot.upper()}")[head[1]]
                edit = mt.edit.Add(f"{head[0]}.attn.{slot}[{head[1]}]", (change @ weight).unsqueeze(2))
            else:
                edit = mt.edit.Add("final" if layer is None else f"{layer}.mlp.in", change)
            gap = outputs(model.run(c.clean, edits=[edit]).logits) - base
            effects[sender, receiver, slot] = max(effects.get((sender, receiver, slot), 0.0), float(gap.abs().max()))
    return effects


def auc(true: list[float], false: list[float]) -> float:
    """How often a true one outranks a false one; a tie counts half."""
    a, b = torch.tensor(true).unsqueeze(1), torch.tensor(false)
    return float(((a > b).double() + 0.5 * (a == b).double()).mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_transformer_computes_the_program(name: str) -> None:
    it, program = planted.program(name), planted.PROGRAMS[name]
    rng = Random(7)
    wrong = []
    for length in range(1, program.max_length + 1):
        rows = [program.sample(program, rng, length) for _ in range(25)]
        rows += [rng.choices(program.vocabulary, k=length) for _ in range(25)]
        said = planted.decode(it, it.model.run([program.encode(row) for row in rows]).logits)
        for row, values in zip(rows, said, strict=True):
            expected = program.evaluate(row)
            assert len(values) == len(expected) == length
            for value, wanted in zip(values, expected, strict=True):
                if wanted is None:
                    continue
                same = value == pytest.approx(wanted, abs=1e-4) if program.numeric else value == wanted
                wrong += [] if same else [(row, values, expected)]
    assert not wrong, wrong[0]


@pytest.mark.parametrize("name", NAMES)
def test_ablation_finds_the_nodes(name: str) -> None:
    """What lies outside of the circuit changes nothing, not by a bit; what lies inside changes some output."""
    it = planted.program(name)
    model, inside = it.model, set(it.truth["nodes"])
    assert "output" in inside
    # At full length the counting of the length survives: none is as good as the most.
    inputs = [planted.corruptions(it, PAIRS, seed=1, length=n) for n in (model.anatomy.n_ctx - 3, model.anatomy.n_ctx)]
    bases = [outputs(model.run(c.clean).logits) for c in inputs]
    for node in planted.nodes(model)[2:-1]:
        gaps = [
            float(
                (outputs(model.run(c.clean, edits=[mt.edit.Zero(planted.sender_of(node))]).logits) - base).abs().max()
            )
            for c, base in zip(inputs, bases, strict=True)
        ]
        assert (max(gaps) > 0.05) == (node in inside), (node, gaps)
        assert max(gaps) == 0 or node in inside
    c, base = inputs[-1], bases[-1]
    tokens = float((outputs(model.run(c.corrupt).logits) - base).abs().max())
    assert (tokens > 0.05) == ("embed" in inside)
    places = float(
        (outputs(model.run(c.clean, edits=[planted.placed(model, c.clean, c.positions)]).logits) - base).abs().max()
    )
    assert (places > 0.05) == (any(edge[0] == "pos_embed" for edge in it.truth["edges"])), places


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in NAMES])
def test_exact_effects_find_the_edges(name: str) -> None:
    """With both corruptions every edge of the circuit has an effect and no other edge has any: AUC 1."""
    it = planted.program(name)
    effects = edge_effects(it, planted.corruptions(it, PAIRS, seed=2))
    true = {tuple(edge) for edge in it.truth["edges"]}
    constant = {tuple(edge) for edge in it.truth["constant"]}
    assert true
    assert not true & constant
    inside = [effects[edge] for edge in true]
    outside = [effect for edge, effect in effects.items() if edge not in true]
    silent = [effects[edge] for edge in effects if edge not in true | constant]
    assert max(silent) == 0
    assert auc(inside, outside) == 1.0, sorted((effects[e], e) for e in effects if (effects[e] > 1e-3) != (e in true))
    assert min(inside) > 100 * max(*outside, 1e-4)


def test_tokens_alone_do_not_show_what_positions_carry() -> None:
    it = planted.program("previous_token")
    c = planted.corruptions(it, PAIRS, seed=2)
    tokens_only = edge_effects(it, planted.Corruptions(c.clean, c.corrupt, torch.arange(9).expand_as(c.clean)))
    carried = [edge for edge in it.truth["edges"] if edge[0] == "pos_embed"]
    assert carried
    assert all(tokens_only[tuple(edge)] == 0 for edge in carried)


def test_corruptions_keep_bos_and_follow_the_seed() -> None:
    it = planted.program("reverse")
    c, again, other = (planted.corruptions(it, 40, seed=s) for s in (5, 5, 6))
    assert torch.equal(c.clean, again.clean)
    assert torch.equal(c.corrupt, again.corrupt)
    assert torch.equal(c.positions, again.positions)
    assert not torch.equal(c.clean, other.clean)
    bos = it.truth["bos"]
    assert bool((c.clean[:, 0] == bos).all() and (c.corrupt[:, 0] == bos).all() and (c.positions[:, 0] == 0).all())
    assert bool((c.clean[:, 1:] != bos).all() and (c.corrupt[:, 1:] != bos).all())
    assert torch.equal(c.positions.sort(-1).values, torch.arange(9).expand(40, 9))
    assert planted.corruptions(it, 3, seed=0, length=5).clean.shape == (3, 5)
    with pytest.raises(mt.errors.DataError, match="no corruptions of this length; got 2; allowed: 3 to 9"):
        planted.corruptions(it, 3, seed=0, length=2)


def test_what_nodes_write_sums_to_the_stream() -> None:
    """Biases of W_O apart, of which compiled programs have none."""
    it = planted.program("sort")
    c = planted.corruptions(it, 8, seed=3)
    last = f"{it.model.anatomy.n_layers - 1}.resid_post"
    for places in (torch.arange(7).expand_as(c.clean), c.positions):
        total = sum(planted.writes(it.model, c.clean, places).values())
        run = it.model.run(c.clean, capture=last, edits=[planted.placed(it.model, c.clean, places)])
        assert (total - run[last]).abs().max() < 1e-5
        assert torch.equal(run.logits, it.model.hf(input_ids=c.clean, position_ids=places).logits)
    own = planted.writes(it.model, c.clean)
    assert torch.equal(own["pos_embed"], it.model.hf.model.embed_positions.weight[:7].expand_as(own["pos_embed"]))


def test_nodes_have_the_names_of_the_graph() -> None:
    senders = [planted.sender_of(node) for node in ("embed", "L0.head.2", "L1.mlp")]
    assert senders == ["embed", "0.attn.z[2]", "1.mlp_out"]
    receivers = [planted.receiver_of(*end) for end in (("L0.head.2", "k"), ("L1.mlp", "in"), ("output", "in"))]
    assert receivers == ["0.attn.k[2]", "1.mlp.in", "final"]


def test_an_unknown_program_is_named() -> None:
    with pytest.raises(mt.errors.DataError, match='no program is called "revers". Did you mean "reverse"'):
        planted.program("revers")


def test_every_program_has_weights_and_says_what_it_is() -> None:
    assert len(NAMES) >= 20
    for name, program in planted.PROGRAMS.items():
        truth = json.loads((FOLDER / name / "truth.json").read_text())
        assert truth["program"] == name
        assert truth["vocabulary"] == list(program.vocabulary)
        assert (truth["outputs"] is None) == program.numeric
