"""Arguments of a wrong kind, as a user's interpreter meets them: without the checks of annotations that tests have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests import families

import microtome as mt

SCRIPT = """
import torch
from tests import families
import microtome as mt
from microtome import planted

model = mt.open(families.build("gpt2"), prove=False)
ids = [5, 6, 7]
zero = mt.edit.Zero("0.mlp_out")
program = planted.program("reverse")


def named(a, let):
    return let("b", a)


def swept(*cells, metric=mt.metric.Probability(11)):
    return model.sweep(ids, cells, metric)


kept = model.run(ids, capture="0.mlp_out", grad=True)
for call in (
    lambda: model.run(None),
    lambda: model.run([[6.7, 8.9]]),
    lambda: model.run(ids, capture=3),
    lambda: model.run(ids, capture=["0.mlp_out", 3]),
    lambda: model.run(ids, edits="0.mlp_out"),
    lambda: model.run(ids, edits=None),
    lambda: model.run(ids, edits=[mt.edit.Zero("0.mlp_out"), 3]),
    lambda: mt.edit.Add("0.mlp_out", value=[1.0] * 56),
    lambda: mt.edit.Set("0.mlp_out", value="1"),
    lambda: mt.edit.Add("0.mlp_out", 1.0, strength="2"),
    lambda: mt.edit.Mean("0.mlp_out", mean=[1.0]),
    lambda: mt.edit.Clamp("0.mlp_out", low=2, high=1),
    lambda: model.run(ids, edits=mt.edit.Apply("0.mlp_out", function=lambda x: None)),
    lambda: mt.measure(model, "induction", sequences=0),
    lambda: swept(zero, metric=mt.metric.Probability(" Paris")),
    lambda: mt.metric.LogProbability([]),
    lambda: mt.metric.Rank(None),
    lambda: mt.metric.LogitDifference(" Paris", foil=" Rome").read(kept.logits[:, -1:], torch.tensor([0])),
    lambda: mt.metric.SpanLoss([[1, 2], [3]], positions=(-2, -1)),
    lambda: mt.metric.SpanLoss([" Paris"], positions=(-1,)).read(kept.logits[:, -1:], torch.tensor([0])),
    lambda: mt.metric.SpanLoss([[0.5]], positions=(-1,)),
    lambda: swept(zero, mt.edit.Skip("1")),
    lambda: swept([zero, mt.edit.Skip("1")]),
    lambda: swept([zero, mt.edit.Freeze(norms=True)]),
    lambda: swept([zero, mt.sweep.Edge("embed", "final", source=model.run(ids, capture="embed"))]),
    lambda: swept([zero, [zero]]),
    lambda: swept(None),
    lambda: mt.explain.causal_trace(model, ids, subject=(1, 2, 3)),
    lambda: mt.explain.causal_trace(model, ids, subject=1.5),
    lambda: mt.explain.causal_trace(model, ids, subject=("a", 2)),
    lambda: mt.explain.causal_trace(model, ids, subject=None),
    lambda: mt.explain.causal_trace(model, ids, subject=1, subjects="Paris"),
    lambda: mt.explain.causal_trace(model, ids, subject=1, window="3"),
    lambda: mt.explain.causal_trace(model, ids, subject=1, kinds="mlps"),
    lambda: mt.explain.causal_trace(model, ids),
    lambda: mt.explain.patch(model, ids, [5, 6, 8], answer=11, direction="sideways"),
    lambda: mt.explain.patch(model, ids, [5, 6, 8], answer=11, share="no"),
    lambda: mt.explain.patch(model, ids, [5, 6, 8], answers=11),
    lambda: mt.explain.patch(model, ids),
    lambda: mt.explain.component_effects(model, [ids], answer=11, everywhere=1),
    lambda: mt.explain.circuit_recovery(program, corrupt=("token",)),
    lambda: mt.explain.circuit_recovery(program, corrupt=3),
    lambda: mt.tasks.build("induction", model, "3"),
    lambda: mt.tasks.build("induction", model, 3, seed=0.5),
    lambda: mt.tasks.build("induction", model, 3, length="a"),
    lambda: mt.edit.Zero(3),
    lambda: mt.edit.Zero("0.mlp_out", rows=0),
    lambda: mt.edit.Zero("0.mlp_out", rows=(0.5,)),
    lambda: mt.edit.Zero("0.mlp_out", rows=(True, False)),
    lambda: mt.edit.Noise("0.mlp_out", seed="1"),
    lambda: mt.edit.Patch("0.mlp_out", source="x"),
    lambda: model.run(ids, edits=mt.edit.Patch("0.mlp_out", source={"0.mlp_out": [1.0]})),
    lambda: mt.edit.Skip(1.5),
    lambda: mt.edit.Skip(None),
    lambda: mt.edit.Skip(["1"]),
    lambda: mt.edit.Skip(True),
    lambda: mt.edit.Skip([]),
    lambda: mt.edit.Repeat(1, 1.5),
    lambda: mt.edit.ScaleBlock(1, "2"),
    lambda: model.run(ids, stop_at="1"),
    lambda: model.run(ids, stop_at=True),
    lambda: model.run(ids, observe=["0.mlp_out"]),
    lambda: model.run(ids, observe={"0.mlp_out": 3}),
    lambda: model.run(ids, padding="Left"),
    lambda: kept.grad(kept.logits),
    lambda: kept.grad(torch.tensor(1.0)),
    lambda: kept.grad(1.0),
    lambda: mt.explain.contributions(model, ids, detail=("sources",)),
    lambda: mt.explain.contributions(model, ids, detail="neurons"),
    lambda: model.generate("a", max_new_tokens="3"),
    lambda: model.generate("a", max_new_tokens=2.5),
    lambda: mt.explain.contributions(model, ids, answer=[1.5]),
    lambda: mt.explain.contributions(model, ids, answer=True),
    lambda: mt.sweep.Edge("embed", "final", source="x"),
    lambda: mt.subspaces.find(model, [1, 2], "0.resid_post", 2),
    lambda: mt.subspaces.split_direction(model, [1, 2], "0.mlp.post"),
    lambda: mt.subspaces.interchange(model, named, [[1], [2]], write=named, at={}),
    lambda: mt.subspaces.interchange(model, named, [{"a": 1}, {"a": 2}], write=lambda given: given["b"], at={}),
    lambda: mt.explain.helix(model, [ids] * 8, range(8), periods=(0,)),
    lambda: mt.explain.helix(model, [ids] * 8, range(8), periods=()),
    lambda: mt.explain.helix(model, [ids] * 8, ["one"] * 8),
    lambda: mt.explain.helix(model, [ids] * 8, [float("nan")] * 8),
    lambda: mt.explain.helix(model, [ids] * 8, [0.5] * 8),
    lambda: mt.explain.fourier(model, [ids] * 2, range(5, 10), answers=[float("nan"), 1]),
    lambda: mt.explain.fourier(model, [ids] * 2, range(5, 10), answers="12"),
    lambda: mt.explain.fourier(model, [ids] * 2, [float("nan"), 5, 6, 7]),
    lambda: mt.explain.fourier(model, [ids] * 2, 5),
    lambda: mt.explain.function_vector(model, [1, 2]),
    lambda: mt.explain.function_vector(model, ["ab", "cd"]),
    lambda: mt.explain.function_vector(model, 5),
    lambda: mt.explain.cross_task(model, [[([1], [2])]] * 3),
    lambda: mt.explain.token_lens(model, ids, span=0, answers=7.5),
    lambda: mt.explain.patching_grid(model, ids, [5, 6, 8], answer=11, foil=12, windows=()),
    lambda: mt.explain.patching_grid(model, ids, [5, 6, 8], answer=11, foil=12, windows=("a",)),
    lambda: mt.explain.patching_grid(model, ids, [5, 6, 8], answer=11, foil=12, windows=(0,)),
    lambda: mt.explain.patching_grid(model, ids, [5, 6, 8], answer=11, foil=12, windows=3),
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
    "EditError: Clamp on 0.mlp_out has its bounds in the wrong order; got low=2, high=1",
    "EditError: the function of Apply on 0.mlp_out changed the shape; got NoneType",
    "ArgumentError: sequences must be an integer of 1 or more (sequences); got 0",
    'PromptError: cannot read " Paris": this model was opened without a tokenizer',
    "EditError: cannot read the tokens of a metric; got []; allowed: one token, or one per prompt: ids, or texts",
    "EditError: cannot read the tokens of a metric; got None",
    "EditError: a metric that names tokens as text must be read by a model's tokenizer first; got ' Rome'",
    "EditError: a SpanLoss cannot use these targets; got [[1, 2], [3]]",
    "EditError: a metric that names tokens as text must be read by a model's tokenizer first; got [' Paris']",
    "EditError: a SpanLoss cannot use these targets; got [[0.5]]",
    "EditError: cell 1 of the sweep holds something other than edits of sites; got Skip('1'); allowed: edits of",
    "EditError: cell 0 of the sweep holds something other than edits of sites; got Skip('1')",
    "EditError: cell 0 of the sweep holds something other than edits of sites; got Freeze(",
    "EditError: cell 0 of the sweep holds something other than edits of sites; got Edge(",
    "EditError: cell 0 of the sweep holds something other than edits of sites; got [Zero('0.mlp_out')]",
    "EditError: cell 0 of the sweep holds something other than edits of sites; got None",
    "PromptError: cannot read the subject; got (1, 2, 3); allowed: a text, a position, or (first, end)",
    "PromptError: cannot read the subject; got 1.5",
    "PromptError: cannot read the subject; got ('a', 2)",
    "PromptError: cannot read the subject; got None",
    "PromptError: subjects are several texts; got 'Paris'",
    "ArgumentError: window must be an integer of 1 or more (layers); got '3'",
    "ArgumentError: kinds must be one of resid, mlp, attn, mixer; got 'mlps'",
    "ArgumentError: subject is missing",
    "ArgumentError: direction must be one of denoise, noise; got 'sideways'",
    "ArgumentError: share must be True or False; got 'no'",
    'ArgumentError: no argument "answers". Did you mean "answer" or "spans" or "sites"?; allowed: clean, corrupt, ',
    "PromptError: there is no corrupt prompt",
    "ArgumentError: everywhere must be True or False; got 1",
    "ArgumentError: corrupt must be one of tokens, positions; got 'token'",
    "ArgumentError: corrupt must be one of tokens, positions; got 3",
    "PromptError: a task has at least one pair; got n='3'",
    "PromptError: a task cannot be drawn with this seed; got 0.5",
    "PromptError: the task \"induction\" cannot use this length; got 'a'",
    'SiteError: cannot read the address "3"',
    "EditError: Zero on 0.mlp_out cannot use these rows; got 0; allowed: a tuple of row numbers",
    "EditError: Zero on 0.mlp_out cannot use these rows; got (0.5,)",
    "EditError: Zero on 0.mlp_out cannot use these rows; got (True, False)",
    "EditError: Noise on 0.mlp_out cannot use this seed; got str; allowed: an integer",
    "EditError: Patch on 0.mlp_out cannot use this source; got str; allowed: a run, or a mapping",
    "EditError: the source of Patch does not fit 0.mlp_out; got list; allowed: a tensor [batch, pos, d_model]",
    "SiteError: cannot read layers; got 1.5; allowed: an integer, a range",
    "SiteError: cannot read layers; got None",
    "SiteError: cannot read layers; got ['1']",
    "SiteError: cannot read layers; got True",
    "SiteError: cannot read layers; got []",
    "EditError: Repeat of layers 1 cannot use this times; got float; allowed: an integer",
    "EditError: ScaleBlock of layers 1 cannot use this factor; got str; allowed: a number or a tensor",
    "SiteError: cannot stop at layer '1' of GPT2LMHeadModel; allowed: 0 to 2",
    "SiteError: cannot stop at layer True of GPT2LMHeadModel",
    "SiteError: cannot observe this; got ['0.mlp_out']; allowed: a mapping from addresses to functions",
    "SiteError: cannot observe this; got {'0.mlp_out': 3}",
    'PromptError: cannot pad on this side; got \'Left\'; allowed: "left" or "right"',
    "SiteError: no gradient of this can be taken; got shape [1, 3, 101]; allowed: a tensor of one number",
    "SiteError: no gradient of this can be taken; got shape [] without a graph",
    "SiteError: no gradient of this can be taken; got float",
    "ArgumentError: detail must be one of source, neuron; got 'sources'",
    "ArgumentError: detail must be one of source, neuron; got 'neurons'",
    "PromptError: a generation must add tokens; got max_new_tokens='3'; allowed: 1 or more",
    "PromptError: a generation must add tokens; got max_new_tokens=2.5",
    "PromptError: cannot read a token; got 1.5; allowed: a text or an id",
    "PromptError: cannot read a token; got True",
    "EditError: the edge embed -> final cannot use this source; got str; allowed: a run, or a mapping",
    "ArgumentError: interchanges are given as Swaps; got list",
    "ArgumentError: interchanges are given as Swaps; got list",
    "ArgumentError: an input names its values; got list [1]",
    "ArgumentError: write fails on {'a': 1}; got KeyError: 'b'",
    "ArgumentError: these are no periods of a helix; got (0,); allowed: numbers above 0",
    "ArgumentError: these are no periods of a helix; got ()",
    "ArgumentError: numbers must be integers; got 'one'",
    "ArgumentError: numbers must be integers; got nan",
    "ArgumentError: numbers must be integers; got 0.5",
    "ArgumentError: answers must be integers; got nan",
    "ArgumentError: answers must be integers; got '12'",
    "PromptError: cannot read a token; got nan",
    "ArgumentError: these are no axis of numbers; got int",
    "DataError: a task is made of pairs of texts, or of token ids; got 1 as number 0",
    "DataError: a task is made of pairs of texts, or of token ids; got 'ab' as number 0",
    "DataError: a task is a list of pairs; got int",
    "ArgumentError: tasks are given by name; got list",
    "PromptError: cannot read a token; got 7.5",
    "ArgumentError: windows are numbers of layers; got (); allowed: integers of 1 or more",
    "ArgumentError: windows are numbers of layers; got ('a',)",
    "ArgumentError: windows are numbers of layers; got (0,)",
    "ArgumentError: windows are numbers of layers; got 3",
]


def test_each_wrong_argument_has_one_clear_line() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == len(SAID), done.stderr
    for line, said in zip(lines, SAID, strict=True):
        assert line.startswith(said), line
        assert "To do: " in line


NUMPY = """
import sys
import numpy as np
import microtome as mt

one, three = np.int64(1), np.int64(3)
half, two = np.float32(0.5), np.float16(2)
edits = [
    mt.edit.Add("0.mlp_out", half, half), mt.edit.Scale("1.mlp_out", two),
    mt.edit.Clamp("1.mlp_out", low=half, high=three),
    mt.edit.Noise("1.mlp_out", std=half, seed=three), mt.edit.Skip(one),
    mt.edit.Repeat(one, three), mt.edit.ScaleBlock([one, three], half),
    mt.edit.Zero("1.mlp_out", rows=np.arange(2)),
]
mt.edit.save_edits(sys.argv[1], edits)
again = mt.edit.load_edits(sys.argv[1])
assert again == edits, (again, edits)
print(*again, sep="\\n")
"""


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", NUMPY, str(tmp_path / "e.safetensors")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "Add('0.mlp_out', value=0.5, strength=0.5)",
        "Scale('1.mlp_out', factor=2.0)",
        "Clamp('1.mlp_out', low=0.5, high=3)",
        "Noise('1.mlp_out', std=0.5, seed=3)",
        "Skip(1)",
        "Repeat(1, times=3)",
        "ScaleBlock([1, 3], factor=0.5)",
        "Zero('1.mlp_out', rows=(0, 1))",
    ], done.stderr


def test_a_lone_edit_is_taken_as_one() -> None:
    model = mt.open(families.build("gpt2"), prove=False)
    edit = mt.edit.Zero("0.mlp_out")
    assert torch.equal(model.run([5, 6], edits=edit).logits, model.run([5, 6], edits=[edit]).logits)


def test_a_name_that_papers_use_leads_to_the_method() -> None:
    from microtome.catalogue import KNOWN_AS, likely

    names = mt.methods()
    assert not KNOWN_AS.keys() & names.keys()
    assert set(KNOWN_AS.values()) <= names.keys()
    assert likely("Successor Heads", names) == ' Did you mean "head_functions"?'
    assert likely("inductoin", names).startswith(' Did you mean "induction"')
    assert likely("maps", ["firing"]) == ""
    model = mt.open(families.build("gpt2"), prove=False)
    with pytest.raises(mt.errors.ArgumentError, match='no method "maps".*Did you mean "head_functions"'):
        mt.measure(model, "maps")
