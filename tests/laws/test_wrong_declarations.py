"""Declarations and calls that are wrong, in a process of their own: nothing imported before, annotations unchecked."""

from __future__ import annotations

import subprocess
import sys

FRESH = """
import warnings
import microtome as mt
from microtome.method import Column, Source, measure
def declare(name, column):
    def values(seen):
        'A measure from outside the package.'
        return {}
    try:
        measure(name, of="layer", sites="resid_post", question="What?", source=Source("Nobody", "A Toy", 2026),
                columns=Column(column, "1", "a thing", "none: no"), cost="nothing", check="test_toy.py")(values)
        print("taken in")
    except mt.errors.DeclarationError as problem:
        print(problem)
declare("toy", "mean")
declare("stream", "toy_x")
declare("patch", "toy_x")
declare("toy", "toy_x")
warnings.simplefilter("error")
print({"toy", "activations", "patch"} <= set(mt.methods()))
"""


def test_a_measure_from_outside_takes_no_name_or_column_of_the_package_imported_or_not() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    column, name, question, *others = done.stdout.splitlines()
    assert 'the measure "toy" has a column "mean" that "activations" has too' in column
    assert 'the name "stream" is taken by microtome.measurements._stream; got __main__' in name
    assert 'the name "patch" is taken by microtome.explain._patching' in question
    assert others == ["taken in", "True"]


WITHOUT_CHECKS_OF_ANNOTATIONS = """
from tests import families
import microtome as mt
from microtome.context import Settings
from microtome.method import Column, Source, measure

def values(seen):
    'A measure that is wrong.'
    return {}
source, column = Source("Nobody", "A Toy", 2026), Column("bad_x", "1", "a thing", "none: no")
good = {"of": "layer", "sites": "resid_post", "question": "What?", "source": source, "columns": column,
        "cost": "nothing", "check": "test_toy.py"}
model, ids = mt.open(families.build("llama-gqa"), prove=False), [5, 6, 7]
lens, ablate, patch = mt.explain.logit_lens, mt.change.mean_ablation, mt.explain.patch
for call in (
    lambda: measure("bad", **good | {"of": "layers"})(values),
    lambda: measure("bad", **good | {"source": "Nobody 2026"})(values),
    lambda: measure("bad", **good | {"source": (source, 3)})(values),
    lambda: measure("bad", **good | {"source": 3})(values),
    lambda: measure("bad", **good | {"columns": "bad_x"})(values),
    lambda: Settings(progress=3),
    lambda: Settings(on_plan="print"),
    lambda: mt.settings({"seed": 1}).__enter__(),
    lambda: lens(),
    lambda: lens("gpt2", ids),
    lambda: lens(model, ids, 3),
    lambda: lens(model, ids, prompt=ids),
    lambda: ablate(),
    lambda: ablate(None),
    lambda: ablate(*[model] * 9),
    lambda: mt.explain.circuit_recovery(model),
    lambda: patch(model, ids, [5, 6, 8], answer=1.5),
    lambda: patch(model, ids, [5, 6, 8], metric="answer"),
    lambda: mt.explain.node_effects(model, ids, model.run([5, 6, 8]), direction="noise", metric="answer"),
    lambda: mt.metric.LogProbability([1, " x", 2.5]),
    lambda: mt.tasks.LogOdds([3], [5]),
):
    try:
        call()
        print("accepted")
    except mt.errors.MicrotomeError as problem:
        print(type(problem).__name__, problem)
"""
SENTENCES = [
    "is of no unit; got 'layers'; allowed: model, layer, head, neuron",
    "has a source that is not a Source; got 'Nobody 2026'",
    "has a source that is not a Source; got 3",
    "has a source that is not a Source; got 3",
    "has a column that is not a Column; got 'bad_x'",
    "ArgumentError progress must be a function, True, False or None; got 3",
    "ArgumentError on_plan must be a function, or None; got 'print'",
    "ArgumentError cannot read this as settings; got dict",
    "ArgumentError model is missing",
    "ArgumentError model must be an open model; got str. To do: open it with mt.open.",
    "ArgumentError too many arguments without a name: logit_lens takes model, prompt; got 3; allowed: 2",
    "ArgumentError prompt is given twice",
    "ArgumentError model is missing",
    "ArgumentError model must be an open model; got NoneType",
    "ArgumentError too many arguments without a name: mean_ablation takes model, sites; got 9",
    "ArgumentError it must be of the type Planted; got Model",
    "PromptError cannot read a token; got 1.5; allowed: a text or an id",
    "ArgumentError metric must be a metric; got 'answer'",
    "ArgumentError metric must be a metric; got 'answer'",
    "EditError cannot read the tokens of a metric; got 2.5; allowed: one token, or one per prompt",
    "EditError answers and foils must be a set for each prompt; got 3; allowed: lists of tokens, ids or texts",
]


def test_values_of_a_wrong_kind_are_refused_in_a_line() -> None:
    call = [sys.executable, "-c", WITHOUT_CHECKS_OF_ANNOTATIONS]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(SENTENCES), done.stdout
    for line, text in zip(said, SENTENCES, strict=True):
        assert text in line
