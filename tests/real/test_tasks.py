"""The default model does what it is known to do, far above chance and above the control.

Measured with 50 pairs and seed 0 (docs/tasks.md): indirect object 0.84, induction 0.66, capitals 0.69 right. The tests
take fewer pairs, and ask that the whole 95 % interval lies above a bound far below those figures.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import microtome as mt

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(prove=False)


@pytest.mark.parametrize(
    ("name", "least"),
    [("indirect_object", 0.5), ("induction", 0.3), ("fact.capital", 0.4), ("docstring", 0.6)],
)
def test_it_answers(model: mt.Model, name: str, least: float) -> None:
    data = mt.tasks.build(name, model, 24).accuracy(model)
    assert float(data["accuracy_lo"]) > least
    assert float(data["accuracy_corrupt_hi"]) < 0.35
    assert float(data["preferred"]) > 0.9
    assert float(data["mean_difference_clean_lo"]) > 1
    assert float(data["mean_difference_corrupt_hi"]) < -1


def test_known_capitals_are_capitals(model: mt.Model) -> None:
    known = mt.tasks.build("fact.capital", model, 24).known_by(model)
    table = {subject: f" {answer}" for _, subject, answer in mt.tasks.facts("capital")}
    for pair in known:
        subject = model.tokenizer.decode(pair.clean_tokens[slice(*pair.spans["subject"])]).strip()
        assert table[subject] == pair.answer
    assert known.attrs["accuracy"] == len(known) / 24


def test_the_page_runs_and_its_table_names_every_task(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (root / "docs" / "tasks.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)).replace("n=50", "n=8")
    exec(compile(code, "tasks.md", "exec"), {})
    assert "'subject': (3, 4)" in capsys.readouterr().out
    assert re.findall(r"^\| `([\w.]+)`", text, re.MULTILINE) == mt.tasks.names()
    assert f"hold {len(mt.tasks.facts())} facts" in text
