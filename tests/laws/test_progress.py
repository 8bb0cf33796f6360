"""Progress is drawn where somebody sees it, once, with the time left; and nowhere else."""

from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tests import families

import microtome as mt
from microtome import context, progress
from microtome.context import current, drawn

PROMPT = [7, 20, 33, 41, 52, 60]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Kept:
    """Keeps what would be drawn."""

    made: list[Kept]

    def __init__(self, began: float) -> None:
        self.reports: list[tuple[str, int, int]] = []
        self.closed = 0
        Kept.made.append(self)

    def report(self, stage: str, done: int, everything: int) -> None:
        assert not self.closed
        self.reports.append((stage, done, everything))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Kept]:
    Kept.made = []
    monkeypatch.setattr(progress, "drawing", Kept)
    monkeypatch.setattr(context, "visible", lambda: True)
    return Kept.made


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


@pytest.mark.parametrize(
    ("elapsed", "done", "everything", "words"),
    [
        (12, 0, 10, "0:12"), (12, 3, 10, "0:12, 0:28 left"), (12, 10, 10, "0:12"), (60, 1, 2, "1:00, 1:00 left"),
        (3601, 1, 3, "1:00:01, 2:00:02 left"), (0.2, 1, 1000, "0:00, 3:20 left"),
    ],
)  # fmt: skip
def test_the_time_left_is_that_of_the_cells_so_far(elapsed: float, done: int, everything: int, words: str) -> None:
    assert progress.in_words(elapsed, done, everything) == words


def test_a_method_draws_its_stages_to_their_end_and_closes(model: mt.Model, kept: list[Kept]) -> None:
    mt.explain.attention_knockout(model, PROMPT, keys=2)
    (one,) = kept
    assert {stage for stage, *_ in one.reports} == {"cutting attention"}
    assert one.reports[-1][1] == one.reports[-1][2] > 1
    assert one.closed == 1


def test_methods_inside_of_others_draw_where_these_do(model: mt.Model, kept: list[Kept]) -> None:
    pair = ([7, 20, 33], [7, 21, 33])
    with drawn():
        mt.explain.patch(model, *pair, answer=5, sites=["mlp_out"])
        mt.explain.patch(model, *pair, answer=5, sites=["mlp_out"])
    (one,) = kept
    assert [done == everything for _, done, everything in one.reports].count(True) == 2
    assert one.closed == 1


def test_it_is_closed_whatever_happens(kept: list[Kept]) -> None:
    def stopped() -> None:
        with drawn():
            current().report("a", 1, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [one.closed for one in kept] == [1]
    current().report("a", 2, 3)  # outside of any method nothing is drawn
    assert len(kept) == 1


@pytest.mark.parametrize("value", [False, None])
def test_it_is_off_by_a_setting(model: mt.Model, kept: list[Kept], value: Any) -> None:
    with mt.settings(progress=value):
        mt.explain.attention_knockout(model, PROMPT, keys=2)
    assert kept == []


def test_a_function_is_called_instead(model: mt.Model, kept: list[Kept]) -> None:
    told: list[Any] = []
    with mt.settings(progress=lambda *report: told.append(report)):
        mt.explain.attention_knockout(model, PROMPT, keys=2)
    assert told
    assert kept == []


def test_nothing_is_drawn_where_nobody_sees_it(model: mt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Kept.made = []
    monkeypatch.setattr(progress, "drawing", Kept)
    for file, seen in ((io.StringIO(), 0), (Terminal(), 1)):
        monkeypatch.setattr(sys, "stderr", file)
        mt.explain.attention_knockout(model, PROMPT, keys=2)
        assert len(Kept.made) == seen
        assert file.getvalue() == ""


def test_a_bar_shows_the_stage_its_cells_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    file = io.StringIO()
    bars = progress.Bars(Console(file=file, force_terminal=True, width=100, color_system=None))
    assert "running" in file.getvalue()
    now[0] += 10
    bars.report("patching", 1, 4)
    bars._bars.refresh()
    assert "patching" in file.getvalue()
    assert "1/4" in file.getvalue()
    assert "0:10, 0:30 left" in file.getvalue()
    now[0] += 30
    bars.report("patching", 4, 4)
    now[0] += 500
    bars.close()
    last = file.getvalue().rpartition("patching")[2]
    assert " 4/4 0:40" in last
    assert "left" not in last


def test_a_notebook_shows_a_line(model: mt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(data["text/plain"])

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(data["text/plain"])
        return Handle()

    shell = type("ZMQInteractiveShell", (), {})()
    made = ModuleType("IPython.display")
    vars(made)["display"] = display
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", made)
    monkeypatch.setattr(progress, "PAUSE", 0)
    mt.explain.attention_knockout(model, PROMPT, keys=2)
    assert shown
    assert shown[-1].startswith("cutting attention ")
    done, everything = shown[-1].split()[2].split("/")
    assert done == everything
