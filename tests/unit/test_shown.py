"""Every public object shows itself in one short line, and in a notebook as a small table whose texts are escaped."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import xarray as xr
from tests import effects, families

import microtome as mt
from microtome import edit, explain, method, metric, planted, stream, subspaces, sweep, tasks, view
from microtome.method import Result
from microtome.run.hook import trace
from microtome.shown import MOST, brief, facts, line
from microtome.view import forms

ROOMS = [name for name in mt.__all__ if inspect.ismodule(getattr(mt, name))]
LONG = 1_000  # characters that a line may have
IMAGE = "<img src=x onerror=alert(1)>"
WIDE = torch.randn(64, 2_000, generator=torch.Generator().manual_seed(0))


def public() -> Iterator[type]:
    """The classes that a user can name: of the face, of the rooms on it, and what those return that has no room."""
    every = [getattr(importlib.import_module(f"microtome.{room}"), name) for room in ROOMS for name in names(room)]
    every += [getattr(mt, name) for name in mt.__all__]
    every += [mt.run.Batch, mt.run.Plan, type(LLAMA.proof[0])]
    every += [method.Method, method.Methods, method.Column, method.Argument, method.Source, Result]
    for kind in dict.fromkeys(one for one in every if inspect.isclass(one)):
        if getattr(kind, "_is_protocol", False) or not kind.__module__.startswith("microtome"):
            continue
        theirs = issubclass(kind, BaseException | torch.nn.Module) or kind is planted.PlantedConfig
        if not (theirs or inspect.isabstract(kind) or kind in (edit.Edit, edit.SiteEdit, view.View)):
            yield kind


def names(room: str) -> list[str]:
    held = importlib.import_module(f"microtome.{room}")
    return sorted(getattr(held, "__all__", None) or [name for name in vars(held) if name[:1] != "_"])


def fed(kind: type, *arguments: Any, **options: Any) -> Any:
    made = kind(*arguments)
    values = WIDE > 0 if options.get("flags") else WIDE
    made.update(values.unflatten(0, (options["rows"], -1)) if "rows" in options else values, *options.get("more", ()))
    return made


class Numbers:
    """A tokenizer whose tokens are characters."""

    bos_token_id = None
    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


LLAMA = mt.open(families.build("llama-gqa"))
IDS = torch.arange(5, 25).repeat(70, 1)
LARGE = [f"{IMAGE} and many words more, so that it is long; number {i}. " * 20 for i in range(2_000)]


def read_from_disk() -> list[Any]:
    """Atlases, passages, rows of documents and harvests."""
    atlas = mt.atlas.Atlas(
        Path("atlases") / IMAGE,
        {
            "model": {"name": IMAGE, "fingerprint": "0" * 16},
            "tables": {f"table {i}": {"rows": 10**6} for i in range(900)},
            "text": {"source": LARGE[0], "tokens": 10**9},
        },
    )
    passage = mt.atlas.Example("top", 1.0, tuple(LARGE), (0.5,) * len(LARGE), 3, 4)
    numbers = Numbers()
    rows = list(stream.rows_of(stream.Corpus.of(IMAGE, LARGE[:3]), numbers, length=64, tokens=200))
    measured = mt.measurements
    held = object.__new__(stream.Harvest)  # as it is when it is open, without the disk
    held.__dict__ |= {
        "_store": SimpleNamespace(place=IMAGE * 30), "sites": {f"{i}.resid_post": (40,) for i in range(900)},
        "dtype": "float32", "_records": [], "complete": True,
    }  # fmt: skip
    return [
        atlas, passage,
        view.Passage(IMAGE, IMAGE, tuple(LARGE)), view.Patterns((), {0: [np.zeros((9, 900, 900))]}, {1: IMAGE}),
        stream.DocumentBatches(stream.Corpus.of(IMAGE, LARGE[:9]), numbers, length=64, rows=4, tokens=900),
        held, rows[0], rows[0].next, measured.bilinear(LLAMA, 1, LLAMA.W_U[:, 3]),
        measured.neural_collapse(WIDE, torch.arange(len(WIDE)) % 4),
    ]  # fmt: skip


def made() -> list[Any]:
    """One object of each class, most of them holding far more than can be shown."""
    run = LLAMA.run(IDS, capture=["*.resid_post", "*.mlp.post", "*.attn.pattern", "1.mlp.post[3]@-1"])
    pair = tasks.Pair(
        clean=LARGE[0], corrupt=LARGE[1], clean_tokens=tuple(range(5_000)), corrupt_tokens=tuple(range(5_000)),
        answer=" a", foil=" b", answer_ids=tuple(range(900)), foil_ids=(3,), spans={"end": (1, 2)}, group=IMAGE,
    )  # fmt: skip
    accumulators = [
        fed(stream.Moments, 2_000), fed(stream.Extremes, 2_000), fed(stream.Firing, 2_000),
        fed(stream.Covariance, 2_000), fed(stream.Quantiles, 2_000), fed(stream.Cooccurrence, 2_000, flags=True),
        fed(stream.TopExamples, 2_000, 5, rows=8, more=(list(range(8)),)),
        fed(stream.DrawnExamples, 2_000, 5, rows=8, more=(list(range(8)),)), fed(stream.Histogram, 2_000, range(50)),
        fed(stream.CrossCovariance, 2_000, 2_000, more=(WIDE,)),
        fed(stream.ExampleMeans, 2_000, more=(torch.arange(64),)),
        fed(stream.Strongest, 2_000, more=(torch.arange(64), torch.arange(64), torch.ones(64, 2_000) > 0)),
        fed(stream.Counter, [f"group {i}" for i in range(64)], 2_000, flags=True, more=(torch.arange(64),)),
    ]  # fmt: skip
    swept = LLAMA.sweep(IDS[:1], [edit.Zero(f"{i % 3}.attn.z[{i % 4}]") for i in range(60)], metric.Probability(3))
    flow = trace(LLAMA.hf, IDS[:1])
    site = mt.anatomy.parse("1.mlp.post[3-9]@-1")
    matrix = torch.eye(LLAMA.anatomy.d_model)
    frame = edit.Frame(((0, 20),) * 900, 20)
    found = LLAMA.run(IDS, capture="1.mlp.post").dataset()
    every = (
        effects.traced(),
        effects.over_layers(),
        effects.over_neurons(),
        effects.over_groups(),
        effects.words(),
        effects.parts(),
        effects.circuit(),
    )
    drawn = [form for data in every for form in forms(data).shown]
    batches = stream.TokenBatches(stream.Corpus.of(IMAGE, LARGE), Numbers(), rows=64, tokens=50_000)
    it = planted.program(min(planted.PROGRAMS))
    swap = subspaces.Swap(tuple(range(900)), tuple(range(900)), 3, 4, 5, "cause", 6, IMAGE, IMAGE, IMAGE)
    last = LLAMA.run(IDS, capture="final", logits=False)
    named = {f"{IMAGE}{i}": [[5 + i, 7, 9 + j] for j in range(4)] for i in range(20)}
    labelled = [(ids, name) for name, rows in named.items() for ids in rows]
    probe = mt.probes.fit(LLAMA, labelled, kind="mass-mean", folds=2, untrained=False)
    committed = mt.measurements.commit(last)
    change = mt.change.of(LLAMA, {f"{i}.W_out": mt.change.LowRank(WIDE[:56, :1], WIDE[:1, :40]) for i in range(3)})
    return [
        *read_from_disk(), change, *change.steps, change.steps[0].deltas["0.W_out"], mt.change.Values(WIDE),
        LLAMA, LLAMA.anatomy, LLAMA.layers[1], LLAMA.layers[1].attn_norm,
        mt.anatomy.Weights(LLAMA.hf, LLAMA.anatomy), LLAMA.proof[0], run,
        run.batch, LLAMA.plan(IDS, capture="*.mlp.post"), swept, swept.plan, swept.run(), pair,
        tasks.Task(IMAGE, "asks", (pair,) * 500, {"seed": 0}), tasks.LogOdds([(1, 2)] * 900, [(3,)] * 900),
        stream.Corpus.of(IMAGE, LARGE, [f"group {i}" for i in range(len(LARGE))]), stream.standard_library_text(),
        *accumulators, *(one.result() for one in accumulators),
        site, mt.anatomy.Site("mlp.post", 1), site.units, LLAMA.anatomy.hook_points[mt.anatomy.Site("mlp.post", 1)],
        mt.anatomy.Place("models/" + IMAGE, IMAGE), mt.anatomy.Split(1, 2, 3, 0, 1), LLAMA.anatomy.parts.final_norm,
        flow, flow.calls[0], flow.calls[0].writes[0],
        mt.anatomy.Experts(families.build("mixtral").get_submodule("model.layers.0.mlp.experts")),
        edit.Zero("1.mlp.post"), edit.Add("1.mlp.post", WIDE), edit.Set("1.mlp.post", WIDE),
        edit.Scale("1.mlp.post", 2.0), edit.Clamp("1.mlp.post", 0.0, 1.0), edit.Mean("1.mlp.post", WIDE),
        edit.Noise("1.mlp.post"), edit.Patch("1.mlp.post", source=run), edit.Apply("1.mlp.post", torch.relu),
        edit.Project("1.resid_post", matrix), edit.Rotate("1.resid_post", matrix), edit.Skip("1"), edit.Repeat("1"),
        edit.ScaleBlock("1"), edit.KnockOut("1.attn.scores[3]@-1"), edit.Freeze(), frame,
        edit.Selection(mt.anatomy.Site("mlp.post", 1), None, frame), explain.graph(LLAMA),
        explain.tuned_context(LLAMA, IDS[:1], 1)[0],
        explain.pairs_of(LLAMA, IDS[:1], IDS[:1] + 1, answer=3),
        mt.circuits.of_mask(LLAMA, explain.graph(LLAMA).mask, task=IMAGE),
        mt.circuits.Sparsification(20.0),
        sweep.Circuits(LLAMA, IDS[:2], IDS[:2] + 1, metric.LogitDifference(3, foil=4)),
        explain.Lens("bias", 1, tuple(range(-1, 900)), {"bias": WIDE}, found, {"model": IMAGE, "text": LARGE[0]}),
        metric.LogitDifference(list(range(900)), foil=list(range(1, 901))), metric.LogProbability(3),
        metric.Probability(3), metric.Rank(3), metric.Divergence(WIDE.log_softmax(-1).unsqueeze(1)),
        metric.SpanLoss([[1, 2]] * 900, (0, 1)), metric.FunctionMetric(lambda x, y: x.sum()),
        sweep.Edge("embed", "1.attn.q[0]", source=run), it, planted.PROGRAMS[min(planted.PROGRAMS)],
        planted.corruptions(it, 50, 0), mt.methods(), mt.methods()["induction"], *mt.methods()["induction"].columns,
        *mt.methods()["induction"].source, *mt.methods()["patch"].arguments.values(), mt.Settings(progress=print),
        batches, batches[0], Result.of(found), forms(found), *drawn, committed, probe,
        mt.measurements.verify_commit(committed, last), mt.fit([torch.zeros(2, requires_grad=True)], trained, [0], 0),
        mt.measurements.Sentence(("The", "cat", "sat"), ((0, 1, "det"), (1, 2, "nsubj"))),
        subspaces.Subspace.of(LLAMA, "1.resid_post", matrix, IMAGE, **{f"n{i}": IMAGE for i in range(90)}), swap,
        subspaces.Swaps((swap,) * 900, {f"n{i}": IMAGE for i in range(90)}),
        subspaces.Dictionary(WIDE, features=tuple(range(64))), planted.paths(64, 0),
        planted.Algorithm(IMAGE, tuple(LARGE), 900, tuple(LARGE), tuple(LARGE), evaluate=trained),
        tasks.Asked(IMAGE, IMAGE, LARGE[0], tuple(range(900)), 3, (1, 2), 1),
        tasks.Ravel(IMAGE, {t: {"a": t} for t in LARGE}, {"a": tuple(LARGE)}, dict.fromkeys(LARGE, "train"), {}),
        tasks.Fact(IMAGE, LARGE[0], (LARGE[1],) * 90, IMAGE),
        *(part for one in drawn for part in getattr(one, "parts", ())),
    ]  # fmt: skip


def trained(batch: int) -> torch.Tensor:
    raise AssertionError(f"a training without steps asks for no batch {batch}")


@pytest.fixture(scope="module")
def objects() -> list[Any]:
    return made()


def in_notebook(one: object) -> str:
    return getattr(one, "_repr_html_")()  # noqa: B009 (protected, but what notebooks call)


class Plain(HTMLParser):
    """The tags, and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_every_public_class_has_an_example_here(objects: list[Any]) -> None:
    missing = set(public()) - {type(one) for one in objects}
    assert not missing, sorted(kind.__name__ for kind in missing)
    assert len(set(public())) > 60


def test_every_public_object_has_a_short_line_and_a_table(objects: list[Any]) -> None:
    for one in objects:
        kind, text = type(one).__name__, repr(one)
        if not isinstance(one, method.Methods | xr.Dataset):  # a list of all methods, one a line; xarray's own
            assert len(text) <= LONG, (kind, len(text))
            assert "\n" not in text, kind
        assert " at 0x" not in text, text
        assert len(text) > len(kind) + 2 or one == edit.Freeze(), (
            "it says more than its kind, but for what is all default"
        )
        page = Plain()
        page.feed(in_notebook(one))
        assert IMAGE not in in_notebook(one), kind
        assert len(page.words.strip()) >= len(kind), kind
        if not isinstance(one, method.Methods | xr.Dataset):
            assert {"table", "tr", "th"} <= page.tags <= {"table", "tr", "th", "td"}, kind
            assert len(in_notebook(one)) < 6 * LONG, kind


def test_what_the_lines_say(objects: list[Any]) -> None:
    said = {type(one).__name__: repr(one) for one in objects}
    assert "2,000 texts of" in repr(stream.Corpus.of("words", LARGE))
    run = next(one for one in objects if isinstance(one, mt.Run))
    assert repr(run).startswith("Run(tokens=[70, 20] ")
    assert "… 70 in all" in repr(run)
    assert "logits=[70, 20, " in repr(run)
    assert "resid_post of 3 layers [70, 20, " in repr(run)
    assert "1.mlp.post[3]@-1 [70, 1, 1]" in repr(run)
    assert "heads=4, 2 key/value heads of" in said["Anatomy"]
    assert "W_Q=[4, " in said["LayerWeights"]
    assert "mean=[2000] float64" in said["MomentsResult"]
    assert "settings=((2000,), 2)" in repr(stream.Moments(2_000))
    assert "cells=[Zero('0.attn.z[0]'), " in said["Sweep"]
    assert "60 in all" in said["Sweep"]


def test_values_are_cut_and_say_how_much_there_was() -> None:
    assert brief(list(range(900))) == "[0, 1, 2, 3, … 900 in all]"
    assert brief({i: i for i in range(90)}) == "{0: 0, 1: 1, 2: 2, 3: 3, … 90 in all}"
    assert brief("x" * 5_000) == f"'{'x' * 60}'… (5,000 characters)"
    assert brief(WIDE) == "[64, 2000] float32"
    assert brief(np.zeros((2, 3), np.int64)) == "[2, 3] int64"
    assert brief((1,)) == "(1,)"
    assert brief([[[[[1]]]]]) == "[[[1 in all]]]"
    assert brief(families.build) == "build"

    @dataclasses.dataclass
    class Many:
        a: str
        b: str
        c: str
        d: str
        e: str = dataclasses.field(default="not shown", repr=False)

    text = line(Many(*("y z " * 80 + str(i) for i in range(4))))
    assert len(text) <= MOST + 20
    assert text.startswith("Many(a='y z ")
    assert "e=" not in text
    assert set(facts(Many("1", "2", "3", "4"))) == set("abcd")
    assert line(Many(*([["w" * 60] * 4] * 4 for _ in range(4)))).endswith("…)"), "what does not fit is said"  # type: ignore


def test_public_constants_are_short() -> None:
    for room in ROOMS:
        for name in names(room):
            value = getattr(importlib.import_module(f"microtome.{room}"), name)
            ours = not inspect.ismodule(value) and not inspect.isclass(value)
            if ours and not isinstance(value, pa.Table):
                assert len(repr(value)) <= LONG, (room, name, len(repr(value)))


def test_a_line_computes_nothing_of_the_values(objects: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither copies nor numbers of a tensor are asked for: a line of many gigabytes is as quick as of one value."""
    asked: list[str] = []
    for name in ("tolist", "cpu", "clone", "numpy", "double", "float"):
        call: Callable[..., Any] = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda x, *a, _c=call, _n=name, **k: (asked.append(_n) if x.numel() > 99 else 0, _c(x, *a, **k))[1],
        )
    for one in objects:
        if not isinstance(one, mt.Run):  # it reads its prompts out
            repr(one)
    assert asked == []
