"""A measure of another package is found, runs, and has all that a measure has; one that is broken harms nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt

ROOT = Path(__file__).resolve().parents[2]
BROKEN = "[microtome.methods]\nbroken = a_module_that_is_not_there\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed into it, and beside it a package whose method cannot be imported."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder), str(ROOT / "examples" / "plugin")], check=True, capture_output=True)
    info = folder / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text(BROKEN)
    return folder


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    call = [sys.executable, "-c", code]
    return subprocess.run(call, capture_output=True, text=True, check=False, env=environment)


SCRIPT = """
import json, torch, warnings
import microtome as mt
from tests import families
from microtome.cli._app import run
tokens = torch.randint(5, families.VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
model = mt.open(families.build("llama-gqa"), prove=False)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    names = list(mt.measures())
data = mt.measure(model, "attention_span", "stream", text=tokens)
told = {"names": names, "warned": [str(w.message) for w in said], "values": data["attention_span"].values.tolist(),
        "even": float(data["attention_span_uniform"][0, 0]), "control": data["attention_span"].attrs["control"]}
print(json.dumps(told))
"""


def test_a_measure_of_another_package_is_found_and_runs(installed: Path) -> None:
    done = run(installed, SCRIPT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {"attention_span", "stream", "induction"} <= set(told["names"])
    assert told["control"] == "attention_span_uniform"
    tokens = torch.randint(5, families.VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    model = mt.open(families.build("llama-gqa"), prove=False)
    pattern = model.run(tokens, capture="*.attn.pattern")["*.attn.pattern"].double()
    distance = [[q - k for k in range(9)] for q in range(9)]
    expected = (pattern * torch.tensor(distance)).sum(-1)[..., 1:].mean((1, 3))
    assert np.allclose(told["values"], expected, atol=1e-6)
    assert told["even"] == pytest.approx(np.mean([q / 2 for q in range(1, 9)]))


def test_a_method_that_cannot_be_imported_is_warned_of_and_the_others_work(installed: Path) -> None:
    told = json.loads(run(installed, SCRIPT).stdout.splitlines()[-1])
    (warning,) = told["warned"]
    assert 'the method "broken" cannot be used; got a_module_that_is_not_there: ModuleNotFoundError' in warning
    assert "broken" not in told["names"]


def test_it_has_a_command(installed: Path) -> None:
    code = "from microtome.cli._app import run; raise SystemExit(run(['measure', 'attention_span', '--help']))"
    done = run(installed, code)
    assert done.returncode == 0, done.stderr
    assert "How far back does each head attend?" in done.stdout
    code = "from microtome.cli._app import run; raise SystemExit(run(['measure', 'broken']))"
    done = run(installed, code)
    assert done.returncode == 2
    assert 'the method "broken" cannot be used' in " ".join(done.stderr.split())
