"""Arguments of a wrong kind, as a user's interpreter meets them: without the checks of annotations that tests have."""

from __future__ import annotations

import subprocess
import sys

import torch
from tests import families

import microtome as mt

SCRIPT = """
import torch
from tests import families
import microtome as mt
from microtome import planted

model = mt.map(families.build("gpt2"))
ids = [5, 6, 7]
zero = mt.Zero("0.mlp_out")
program = planted.program("reverse")


def swept(*cells, metric=mt.Probability(11)):
    return model.sweep(ids, cells, metric)


for call in (
    lambda: model.run(None),
    lambda: model.run([[6.7, 8.9]]),
    lambda: model.run(ids, capture=3),
    lambda: model.run(ids, capture=["0.mlp_out", 3]),
    lambda: model.run(ids, edits="0.mlp_out"),
    lambda: model.run(ids, edits=None),
    lambda: model.run(ids, edits=[mt.Zero("0.mlp_out"), 3]),
    lambda: mt.Add("0.mlp_out", value=[1.0] * 56),
    lambda: mt.Set("0.mlp_out", value="1"),
    lambda: mt.Add("0.mlp_out", 1.0, strength="2"),
    lambda: mt.Mean("0.mlp_out", mean=[1.0]),
    lambda: mt.Clamp("0.mlp_out", low=2, high=1),
    lambda: model.run(ids, edits=mt.Map("0.mlp_out", function=lambda x: None)),
    lambda: mt.measure.head_scores(model, sequences=0),
    lambda: mt.Probability(" Paris"),
    lambda: mt.LogProbability([]),
    lambda: mt.Rank(None),
    lambda: mt.LogitDifference(" Paris", foil=" Rome"),
    lambda: mt.SpanLoss([[1, 2], [3]], positions=(-2, -1)),
    lambda: mt.SpanLoss(" Paris", positions=(-1,)),
    lambda: mt.SpanLoss([[0.5]], positions=(-1,)),
    lambda: swept(zero, mt.Skip("1")),
    lambda: swept([zero, mt.Skip("1")]),
    lambda: swept([zero, mt.Freeze(norms=True)]),
    lambda: swept([zero, mt.Edge("embed", "final", source=model.run(ids, capture="embed"))]),
    lambda: swept([zero, [zero]]),
    lambda: swept(None),
    lambda: mt.causal_trace(model, ids, subject=(1, 2, 3)),
    lambda: mt.causal_trace(model, ids, subject=1.5),
    lambda: mt.causal_trace(model, ids, subject=("a", 2)),
    lambda: mt.causal_trace(model, ids, subject=None),
    lambda: mt.causal_trace(model, ids, subject=1, subjects="Paris"),
    lambda: mt.circuit_recovery(program, corrupt=("token",)),
    lambda: mt.circuit_recovery(program, corrupt="tokens"),
    lambda: mt.tasks.build("induction", model, "3"),
    lambda: mt.tasks.build("induction", model, 3, seed=0.5),
    lambda: mt.tasks.build("induction", model, 3, length="a"),
):
    try:
        call()
        print("no error")
    except Exception as problem:
        print(f"{type(problem).__name__}: {problem}")
"""

SAID = [
    "PromptError: cannot read the prompt; got NoneType",
    "PromptError: a token id must be an integer; got 6.7",
    "SiteError: cannot capture this; got 3",
    "SiteError: cannot capture this; got 3",
    "EditError: not an edit; got '0.mlp_out'",
    "EditError: not an edit; got None",
    "EditError: not an edit; got 3",
    "EditError: Add on 0.mlp_out cannot use this value; got list; allowed: a number or a tensor",
    "EditError: Set on 0.mlp_out cannot use this value; got str; allowed: a number or a tensor",
    "EditError: Add on 0.mlp_out cannot use this strength; got str; allowed: a number",
    "EditError: Mean on 0.mlp_out cannot use this mean; got list; allowed: a tensor",
    "EditError: Clamp on 0.mlp_out has its bounds crossed; got low=2, high=1",
    "EditError: the function of Map on 0.mlp_out changed the shape; got NoneType",
    "DataError: head_scores cannot use this number of sequences; got 0",
    "EditError: a metric names tokens by their ids; got ' Paris'; allowed: one id, or one a prompt",
    "EditError: a metric names tokens by their ids; got []",
    "EditError: a metric names tokens by their ids; got None",
    "EditError: a metric names tokens by their ids; got ' Paris'",
    "EditError: a SpanLoss cannot use these targets; got [[1, 2], [3]]",
    "EditError: a SpanLoss cannot use these targets; got ' Paris'",
    "EditError: a SpanLoss cannot use these targets; got [[0.5]]",
    "EditError: cell 1 of the sweep holds what no cell can; got Skip('1'); allowed: edits of sites, or one Edge",
    "EditError: cell 0 of the sweep holds what no cell can; got Skip('1')",
    "EditError: cell 0 of the sweep holds what no cell can; got Freeze(",
    "EditError: cell 0 of the sweep holds what no cell can; got Edge(",
    "EditError: cell 0 of the sweep holds what no cell can; got [Zero('0.mlp_out')]",
    "EditError: cell 0 of the sweep holds what no cell can; got None",
    "PromptError: cannot read the subject; got (1, 2, 3); allowed: a text, a position, or (first, end)",
    "PromptError: cannot read the subject; got 1.5",
    "PromptError: cannot read the subject; got ('a', 2)",
    "PromptError: cannot read the subject; got None",
    "PromptError: subjects are several texts; got 'Paris'",
    'EditError: no corruption "token"; allowed: tokens, positions',
    "EditError: corruptions are given as a tuple; got 'tokens'",
    "PromptError: a task has at least one pair; got n='3'",
    "PromptError: a task cannot be drawn with this seed; got 0.5",
    "PromptError: the task \"induction\" cannot use this length; got 'a'",
]


def test_each_wrong_argument_has_one_clear_line() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == len(SAID), done.stderr
    for line, said in zip(lines, SAID, strict=True):
        assert line.startswith(said), line
        assert "To do: " in line


def test_a_lone_edit_is_taken_as_one() -> None:
    model = mt.map(families.build("gpt2"))
    edit = mt.Zero("0.mlp_out")
    assert torch.equal(model.run([5, 6], edits=edit).logits, model.run([5, 6], edits=[edit]).logits)
