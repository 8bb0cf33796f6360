"""Every block of the documentation runs; where a comment stands behind a print, it is what is printed.

A longer result may be cut: then the comment is its beginning. Blocks of one page share their names. Commands run too,
but those that write an atlas or name a model of yours.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
LONG = {
    "causal.md",
    "gallery.md",
    "tasks.md",
    "attribution.md",
    "measures.md",
    "waves.md",
    "edits.md",
    "subspaces.md",
}  # their sweeps and texts take from half a minute on
ELSEWHERE = {"design.md", "status.md", "index.md", "peers.md"}  # pages without blocks that could run
PAGES = sorted(p.name for p in DOCS.glob("*.md") if p.name not in ELSEWHERE)
PROMISE = re.compile(r"^\s*print\(.*\)  # ?(?P<promise>.*)$")
pytestmark = pytest.mark.real


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Line numbers and texts of the blocks of a page."""
    text = (DOCS / page).read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in found]


def printed(page: str) -> tuple[dict[int, str], dict[int, str]]:
    """Run all blocks of a page; what its prints said, and what the comments promise, by line."""
    said: dict[int, str] = {}

    def note(*values: Any, **options: Any) -> None:
        said[sys._getframe(1).f_lineno] = " ".join(map(str, values))

    names: dict[str, Any] = {"__name__": page, "print": note}
    promised: dict[int, str] = {}
    for start, code in blocks(page, "python"):
        exec(compile("\n" * start + code, page, "exec"), names)
        for number, line in enumerate(code.splitlines(), start + 1):
            if match := PROMISE.match(line):
                promised[number] = match["promise"]
    return said, promised


@pytest.fixture(scope="module")
def small_atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `atlas`, of the default model and few tokens: the pages read its tables."""
    import microtome as mt

    folder = tmp_path_factory.mktemp("docs")
    measures = ["stream", "induction", "head_norms", "activations", "firing", "top_examples", "neuron_weights", "loss"]
    mt.atlas.write_atlas(mt.open(), folder / "atlas", measures=measures, tokens=256, length=64, sequences=2)
    return folder


WITH_PYTHON = [p for p in PAGES if blocks(p, "python")]


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in LONG)) for p in WITH_PYTHON])
def test_the_blocks_run_and_print_what_they_say(page: str, small_atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_atlas)
    monkeypatch.setenv("MICROTOME_DATA", str(small_atlas / "data"))
    said, promised = printed(page)
    assert said.keys() >= promised.keys()
    for line, promise in promised.items():
        assert said[line].startswith(promise), f"docs/{page}, line {line} prints {said[line]}"


COMMANDS = [
    line[2:].split("#")[0].strip()
    for page in PAGES
    for _, block in blocks(page, "console")
    for line in block.splitlines()
    if line.startswith("$ microtome")
]


RUN = [c for c in dict.fromkeys(COMMANDS) if " atlas" not in c and " mine." not in c]


# The list of all tasks with what the model knows of each runs a thousand prompts.
@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, c in enumerate(RUN)]
)
def test_the_commands_run(command: str, tmp_path: Path) -> None:
    code = f"import sys, shlex; sys.argv = shlex.split({command!r}); from microtome.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
