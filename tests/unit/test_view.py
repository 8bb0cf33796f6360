"""`mt.view(result)`: one value that shows itself in a terminal, in a notebook, and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests import effects

import microtome as mt


def test_a_result_is_viewed_by_calling_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    room: Any = mt.view
    data = effects.over_layers()
    shown = room(data)
    assert "change of the loss" in repr(shown)
    assert all(len(line) <= 90 for line in repr(shown).splitlines())
    assert "\x1b" not in repr(shown)
    assert shown._repr_html_() == mt.view.html(data, top=5)
    page = shown.save(tmp_path / "page.html").read_text()
    assert "change of the loss" in page
    alone = room(data["gain"])
    assert "gain" in repr(alone)
    assert "change of the loss" not in repr(alone)
    assert mt.view.View(data).data is data


@pytest.mark.parametrize("given", ["a text", 3, None, [1, 2]])
def test_what_is_no_result_is_refused(given: Any) -> None:
    room: Any = mt.view
    with pytest.raises(
        mt.errors.ArgumentError, match="this cannot be viewed; got .*To do: give what a method returned"
    ):
        room(given)
