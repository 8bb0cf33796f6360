"""Ctrl-C in the middle of a sweep: a sweep keeps what it has, and a command says that it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import families

import microtome as mt
from microtome.sweep import _sweep as _cells

Cli = Callable[..., Any]
PAIR = ("the cat sat on the", "the dog sat on the")


def interrupt(patch: pytest.MonkeyPatch, after: int = 2) -> list[int]:
    """Cut sweeps into passes of one row, and stop them after some of these; returns the passes begun."""
    begun: list[int] = []
    own = _cells._run_pass

    def run_pass(*args: Any, **options: Any) -> Any:
        begun.append(len(begun))
        if len(begun) > after:
            raise KeyboardInterrupt
        return own(*args, **options)

    patch.setattr(_cells, "_run_pass", run_pass)
    patch.setattr(_cells, "_step", lambda *args: 1)
    return begun


@pytest.mark.parametrize(
    "arguments",
    [
        ("patch", *PAIR, "--answer", "mat"),
        ("trace", PAIR[0], "--subject", "cat", "--answer", "mat", "--samples", "2"),
        ("attribute", *PAIR, "--answer", "mat", "--verify", "3"),
        ("knockout", PAIR[0], "--keys", "cat"),
        ("nodes", *PAIR, "--answer", "mat"),
        ("edges", *PAIR, "--answer", "mat"),
    ],
)
def test_a_command_that_is_stopped_ends_with_130(
    cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    begun = interrupt(monkeypatch)
    done = cli(*arguments, "-m", saved, "-o", tmp_path / "page.html")
    assert begun == [0, 1, 2]
    assert done.code == 130
    assert "stopped; nothing is left half-written" in done.err
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def test_each_ctrl_c_stops_something(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    cells = [mt.edit.Zero(f"{layer}.resid_pre@{at}") for layer in range(3) for at in range(6)]
    metric = mt.metric.Probability(11)
    whole = model.sweep([[7, 20, 33, 41, 52, 60]], cells, metric).run()
    assert whole.whole() is whole
    with monkeypatch.context() as patch:
        interrupt(patch)
        part = model.sweep([[7, 20, 33, 41, 52, 60]], cells, metric).run()
        assert part.done == 2
        with pytest.raises(KeyboardInterrupt):
            part.whole()
        with pytest.raises(KeyboardInterrupt):  # the second one, before the next sweep has a cell
            model.sweep([[7, 20, 33, 41, 52, 60]], cells, metric).run()
    assert model.sweep([[7, 20, 33, 41, 52, 60]], cells, metric).run().values.equal(whole.values)
