"""A user's mistake gives one clear line, the right exit code, and nothing half-written."""

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
from tests import families

Cli = Callable[..., Any]


def check(done: Any, code: int, *texts: str) -> None:
    assert done.code == code, done.err
    assert done.err.startswith("microtome: ")
    for text in texts:
        assert text in done.err, done.err


def copied(saved: Path, to: Path) -> Path:
    to.mkdir()
    for file in saved.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_unknown_models(cli: Cli, tmp_path: Path) -> None:
    check(cli("check", tmp_path / "nothing"), 3, "ModelNotFound: no model folder", "check the path")
    check(
        cli("check", "nobody/no-such-model"),
        3,
        'no model "nobody/no-such-model" here',
        "check the name and the network",
    )
    check(cli("check", tmp_path), 3, "holds no model: it has no config.json")
    check(cli("check", tmp_path / "x.gguf"), 3, "no GGUF file")


def test_a_model_that_is_no_language_model(cli: Cli, tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(tmp_path)
    check(cli("check", tmp_path), 3, "ModelUnsupported", 'got model type "vit"', "causal or masked language models")


@pytest.mark.parametrize("damage", ["garbage", "truncated", "missing", "no config"])
def test_damaged_files(cli: Cli, saved: Path, tmp_path: Path, damage: str) -> None:
    folder = copied(saved, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    if damage == "garbage":
        weights.write_bytes(b"not a tensor at all" * 9)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / "config.json").write_text("{ broken")
    check(cli("check", folder), 3, "ModelBroken", "damaged", "again")


def test_a_truncated_gguf(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "half.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x07" * 40)
    check(cli("check", file), 3, "ModelBroken", "cannot be read", "copy or download the model again")


@pytest.mark.parametrize(
    ("address", "texts"),
    [
        ("3.mlp.post", ('no layers 3 for "3.mlp.post"', "allowed: layers 0 to 2", '"2.mlp.post"')),
        ("0.mlp.psot", ('no site is called "mlp.psot"', 'Did you mean "mlp.post"')),
        ("mlp.post", ("names no layer", '"*.mlp.post"')),
        ("0.mlp.pre", ("the MLP is gated: see mlp.gate and mlp.up",)),
        ("0.mlp.post[99]", ("no units [99]", "allowed: neuron 0 to 55")),
        ("0.mlp.post@7", ("no positions @7 in row 0", "allowed: 0 to 2, or -3 to -1")),
        ("0.mlp.post[x]", ("cannot read units",)),
    ],
)
def test_addresses(cli: Cli, saved: Path, tmp_path: Path, address: str, texts: tuple[str, ...]) -> None:
    done = cli("run", "the cat sat", "-m", saved, "-c", address, "-o", tmp_path / "x.safetensors")
    check(done, 5, "SiteError", *texts)
    assert not list(tmp_path.iterdir())


def test_prompts(cli: Cli, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    check(cli("run", "", "-m", saved, "-c", "final", "-o", out), 6, "PromptError: the prompt is empty")
    long = " ".join(["cat"] * 100)
    texts = ("longer than the model's context", "got 100 tokens", "at most 64")
    check(cli("run", long, "-m", saved, "-c", "final", "-o", out), 6, *texts)
    bare = copied(saved, tmp_path / "bare")
    for file in [*bare.glob("tokenizer*"), *bare.glob("special*")]:
        file.unlink()
    check(cli("lens", "the cat", "-m", bare), 6, "without a tokenizer")
    check(cli("contributions", "the cat", "-m", saved, "--answer", "the cat"), 6, "is not one token")
    assert not out.exists()


def test_a_capture_larger_than_memory(cli: Cli, saved: Path, tmp_path: Path) -> None:
    done = cli(
        "run", "the cat sat", "-m", saved, "-c", "*.mlp.post", "-o", tmp_path / "x.safetensors", "--budget", 1000
    )
    check(done, 8, "BudgetError", "more than memory allows", "less", "name fewer sites")
    assert not list(tmp_path.iterdir())


def test_outputs(cli: Cli, saved: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    texts = ("OutputError", "holds something that is not an atlas", "thesis.tex", "name another folder with -o")
    check(cli("atlas", saved, "--text", text, "-o", tmp_path / "taken"), 9, *texts)
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "years of work"
    file = tmp_path / "x.safetensors"
    file.write_text("kept")
    check(cli("run", "the cat", "-m", saved, "-c", "final", "-o", file), 9, "exists", "--force")
    assert file.read_text() == "kept"
    check(cli("run", "the cat", "-m", saved, "-c", "final", "-o", tmp_path / "x.pkl"), 9, ".safetensors or .zarr")
    check(cli("run", "the cat", "-m", saved, "-c", "final"), 9, "no file to write to")


def files_of(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("foreign", ["notes.txt", "assets/screenshot.png", "assets/data/neurons/mine.js", "old/x.txt"])
def test_an_atlas_with_something_of_yours_in_it_is_not_replaced(
    cli: Cli, saved: Path, text: Path, tmp_path: Path, foreign: str
) -> None:
    out = tmp_path / "atlas"
    arguments = ("atlas", saved, "--text", text, "--tokens", 128, "--length", 32, "-o", out)
    assert cli(*arguments).code == 0
    assert cli(*arguments).code == 0  # an atlas alone is
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("mine")
    before = files_of(out)
    check(cli(*arguments), 9, "OutputError", "holds something that is not an atlas", foreign, "name another folder")
    assert files_of(out) == before


def test_what_comes_while_the_atlas_is_made_stays(
    cli: Cli, saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "atlas"
    write = pq.write_table

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")
        write(*args, **kwargs)

    monkeypatch.setattr(pq, "write_table", meanwhile)
    done = cli("atlas", saved, "--text", text, "--tokens", 128, "--length", 32, "-o", out)
    check(done, 9, "OutputError", "notes.txt")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["atlas"]


def test_texts(cli: Cli, saved: Path, tmp_path: Path) -> None:
    check(cli("atlas", saved, "--text", tmp_path / "none.txt", "-o", tmp_path / "a"), 10, "DataError")
    (tmp_path / "empty.txt").write_text("")
    check(cli("atlas", saved, "--text", tmp_path / "empty.txt", "-o", tmp_path / "a"), 10, "DataError")
    assert not (tmp_path / "a").exists()


def test_an_encoder_has_no_atlas(cli: Cli, saved: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    families.build("bert").save_pretrained(folder)
    for file in [*saved.glob("tokenizer*"), *saved.glob("special*")]:
        (folder / file.name).write_bytes(file.read_bytes())
    check(cli("atlas", folder, "--text", text, "-o", tmp_path / "a"), 3, "ModelUnsupported", "causal")
    check(cli("lens", "the cat", "-m", folder), 5, "cannot be read as logits")


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
    done = cli(*arguments)
    if isinstance(problem, OSError):
        check(done, 9, "OutputError: cannot write the atlas", "No space left on device", "free space")
    else:
        check(done, 130, "stopped; nothing is left half-written")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["atlas"]


def test_a_full_disk_while_captures_are_written(
    cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(tensors: object, path: Path, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    done = cli("run", "the cat", "-m", saved, "-c", "final", "-o", tmp_path / "x.safetensors")
    check(done, 9, "cannot write", "No space left on device")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_the_middle(saved: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("the cat sat on the mat " * 40_000)
    out = tmp_path / "atlas"
    code = "from microtome.cli import main; main()"
    arguments = ["atlas", str(saved), "--text", str(long), "--tokens", "200000", "--length", "32", "-o", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".atlas.*.part")) and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    told = child.communicate(timeout=60)[1]
    assert child.returncode == 130, told
    assert "stopped; nothing is left half-written" in told
    assert "Traceback" not in told
    assert [p.name for p in tmp_path.iterdir()] == ["long.txt"]


def test_wrong_usage_exits_with_2(cli: Cli) -> None:
    done = cli("atlass")
    assert done.code == 2
    assert "Did you mean 'atlas'" in done.err
    assert cli("lens").code == 2
