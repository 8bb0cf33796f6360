"""A full disk, a closed output or a stop in the middle leaves nothing half-written and nothing changed."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from tests import families
from tests.cli.conftest import check

import microtome as mt
from microtome.anatomy import _load
from microtome.edit import _saved
from microtome.run import _saved as _saved_run

Cli = Callable[..., Any]


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_a_stop_leaves_the_old_atlas(
    cli: Cli, saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    out = tmp_path / "atlas"
    arguments = ("atlas", saved, "--text", text, "--tokens", 128, "--length", 32, "-o", out)
    assert cli(*arguments).code == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}

    def full(*args: object, **kwargs: object) -> None:
        raise problem

    monkeypatch.setattr(pq, "write_table", full)
    done = cli(*arguments, "--force")
    if isinstance(problem, OSError):
        check(done, 9, "OutputError: cannot write the atlas", "No space left on device", "free space")
    else:
        check(done, 130, "stopped; nothing is left half-written")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["atlas"]


FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_IN_RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("problem", [FULL, FULL_IN_RUST, KeyboardInterrupt()], ids=["full", "full in rust", "Ctrl-C"])
def test_a_full_disk_or_a_stop_while_captures_are_written(
    cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    def full(tensors: object, path: Path, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise problem

    file = tmp_path / "x.safetensors"
    file.write_text("kept")
    monkeypatch.setattr(_saved_run, "save_file", full)
    done = cli("run", "the cat", "-m", saved, "-c", "final", "-o", file, "--force")
    if isinstance(problem, KeyboardInterrupt):
        check(done, 130, "stopped; nothing is left half-written")
    else:
        check(done, 9, f"OutputError: cannot write the run to {file}", "No space left on device", "free space")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert file.read_text() == "kept"


@pytest.mark.real
@pytest.mark.parametrize("problem", [FULL, FULL_IN_RUST, KeyboardInterrupt()], ids=["full", "full in rust", "Ctrl-C"])
def test_a_full_disk_or_a_stop_while_the_default_model_is_made(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    def full(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise problem

    monkeypatch.setenv("MICROTOME_CACHE", str(tmp_path))
    monkeypatch.setattr(_load, "_dequantise", full)
    done = cli("check")
    if isinstance(problem, KeyboardInterrupt):
        check(done, 130, "stopped; nothing is left half-written")
    else:
        check(done, 9, "OutputError: cannot write the default model to", "No space left", "set MICROTOME_CACHE")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_edits_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise FULL_IN_RUST

    monkeypatch.setattr(_saved, "save_file", full)
    with pytest.raises(mt.errors.OutputError, match=r"cannot write edits to .*No space left on device"):
        mt.edit.save_edits(tmp_path / "edits", [mt.edit.Zero("0.mlp.post")])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_results_that_nobody_can_keep(saved: Path) -> None:
    """A full disk behind stdout, and a reader who has seen enough."""
    command = [sys.executable, "-c", "from microtome.cli import main; main()", "sites", str(saved)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 9, done.stderr
    told = done.stderr.strip().splitlines()
    assert len(told) == 1, done.stderr
    assert told[0].startswith("microtome: OutputError: cannot write; got [Errno 28] No space left on device.")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.close()
    assert child.communicate()[1] == ""
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, 143, id="told to end", marks=pytest.mark.slow),
    ],
)
def test_a_stop_in_the_middle(saved: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    long = tmp_path / "long.txt"
    long.write_text("the cat sat on the mat " * 40_000)
    out = tmp_path / "atlas"
    arguments = ["atlas", str(saved), "--text", str(long), "--tokens", "200000", "--length", "32", "-o", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-c", "from microtome.cli import main; main()", *arguments],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".atlas.*.part")) and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(number)
    told = child.communicate(timeout=60)[1]
    assert child.returncode == code, told
    assert ("stopped; nothing is left half-written" in told) == (number == signal.SIGINT)
    assert "Traceback" not in told
    assert [p.name for p in tmp_path.iterdir()] == ["long.txt"]


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_no_edit_is_left_in_the_model(problem: BaseException) -> None:
    """Whatever ends a run or a generation, the model is itself again."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    tokens = torch.arange(5, 11).unsqueeze(0)
    plain, hooks = model.hf(tokens).logits, hooks_of(model.hf)

    def end(*args: object) -> None:
        raise problem

    with pytest.raises(type(problem)):
        model.run(tokens, edits=[mt.edit.Zero("0.mlp_out"), mt.edit.Skip(1)], observe={"2.mlp.post": end})
    with (
        pytest.raises(type(problem)),
        model.editing(mt.edit.Zero("0.mlp_out"), mt.edit.Apply("2.mlp.post", function=end)),
    ):
        model.hf.generate(tokens, max_new_tokens=3)
    assert hooks_of(model.hf) == hooks
    assert torch.equal(model.hf(tokens).logits, plain)


def hooks_of(hf: Any) -> list[tuple[str, int, int, str]]:
    """Hooks of every module, and whose forward it has."""
    return [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m.forward, "__qualname__", ""))
        for name, m in hf.named_modules()
    ]
