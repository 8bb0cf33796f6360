"""What is made when the documentation is built: the reference names all that is public, the notebook is the gallery."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
from tests.scripts import ROOT, script

import microtome as mt

pytest.importorskip("mkdocs", reason="the documentation's packages are not installed")


@pytest.fixture(scope="module")
def pages() -> Any:
    return script("tools/docs_pages.py")


def test_the_reference_has_every_public_name(pages: Any) -> None:
    text = "\n".join(pages.reference(room) for room in pages.rooms())
    entries = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for name in mt.__all__:
        value = getattr(mt, name)
        if isinstance(value, ModuleType):
            assert f"mt.{name}" in text.split(), name
        else:
            assert f"microtome.{name}" in entries, name
    assert {"microtome.edit.Patch", "microtome.explain.patch", "microtome.stream.Corpus"} <= entries
    for method in mt.methods("measure").values():
        f = method.function
        if not f.__module__.startswith("microtome."):  # declared by another test
            continue
        assert f"{f.__module__}.{f.__name__}" in entries, method.name
    assert not [e for e in entries if e.startswith("microtome.explain.") and not hasattr(mt.explain, e.split(".")[2])]


def test_the_notebook_has_the_blocks_of_the_gallery(pages: Any) -> None:
    page = (ROOT / "docs" / pages.GALLERY).read_text()
    book = pages.notebook(page)
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code == [block.strip() for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    text = "\n".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown")
    assert text.count("\n## ") == page.count("\n## ") == 10  # the ten tasks
    assert (book["nbformat"], {c["cell_type"] for c in book["cells"]}) == (4, {"code", "markdown"})


def test_every_task_of_the_gallery_is_short(pages: Any) -> None:
    for block in pages.BLOCK.findall((ROOT / "docs" / pages.GALLERY).read_text()):
        assert len([line for line in block.splitlines() if line.strip()]) <= 10, block
