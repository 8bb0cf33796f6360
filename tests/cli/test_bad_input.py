"""A user's mistake gives one clear line, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from tests import families
from tests.cli.conftest import check

import microtome as mt

Cli = Callable[..., Any]


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
    check(cli("check", ""), 3, "ModelNotFound: the name of the model is empty", "leave it out for the default model")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    check(cli("check", tmp_path / "model.safetensors"), 3, "is a file", "name its folder")


def test_no_network(tmp_path: Path) -> None:
    """Nobody listens at the hub's address: one line, not a traceback, in a process that may use the network."""
    code = "\n".join((
        "import huggingface_hub.utils._http as http; http.time.sleep = lambda seconds: None",  # no patience
        "from microtome.cli import main; main()",
    ))  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    arguments = [sys.executable, "-c", code, "check", "nobody/no-such-model"]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    told = done.stderr.strip().splitlines()
    assert len(told) == 1, done.stderr
    for text in ('no model "nobody/no-such-model" here', "couldn't connect to 'http://127.0.0.1:9'", "the network"):
        assert text in told[0]


def test_a_model_that_is_no_language_model(cli: Cli, tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(tmp_path)
    check(cli("check", tmp_path), 3, "ModelUnsupported", 'got model type "vit"', "causal or masked language models")


def test_a_language_model_that_is_no_stack_of_blocks(cli: Cli, tmp_path: Path) -> None:
    import transformers

    config = transformers.XLMConfig(vocab_size=20, emb_dim=16, n_layers=3, n_heads=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check(
        cli("check", tmp_path), 3, "ModelUnsupported", "has no list of blocks, each of which reads", "a stack of blocks"
    )


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


def test_weights_that_are_not_those_of_the_configuration(cli: Cli, saved: Path, tmp_path: Path) -> None:
    """A missing or misshapen tensor is not filled with random numbers."""
    from safetensors.torch import load_file, save_file

    lacking = copied(saved, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    for name in ("up_proj", "down_proj"):
        weights.pop(f"model.layers.1.mlp.{name}.weight")
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    texts = ("ModelBroken: the files of lacking lack weights", "got 2 missing", "model.layers.1.mlp.up_proj.weight")
    check(cli("check", lacking), 3, *texts, "again")
    other = copied(saved, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"intermediate_size": 60}
    (other / "config.json").write_text(json.dumps(config))
    texts = ("ModelBroken: the weights of other are not those of its config.json", "[40, 56]", "allowed: [40, 60]")
    check(cli("check", other), 3, *texts, "down_proj.weight")


@pytest.mark.parametrize("damage", ["garbage", "empty", "header", "text"])
def test_a_damaged_gguf(cli: Cli, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "half.gguf"
    head = b"GGUF\x03\x00\x00\x00"
    bytes_of = {"garbage": head + b"\x07" * 40, "empty": b"", "header": head, "text": b"this is no GGUF file" * 9}
    file.write_bytes(bytes_of[damage])
    check(cli("check", file), 3, "ModelBroken: the file half.gguf cannot be read", "copy or download the model again")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_gguf(cli: Cli, gguf_file: Path, tmp_path: Path, share: float) -> None:
    """Cut inside its header, its first tensors or its last one; whole it opens."""
    assert cli("check", gguf_file).code == 0
    whole, file = gguf_file.read_bytes(), tmp_path / "half.gguf"
    file.write_bytes(whole[: int(len(whole) * share)])
    check(cli("check", file), 3, "ModelBroken: the file half.gguf cannot be read", "copy or download the model again")


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
        ("0.mlp.post[-57]", ("no units [-57]", "allowed: neuron 0 to 55")),
        ("0.mlp.post@-4", ("no positions @-4 in row 0", "allowed: 0 to 2, or -3 to -1")),
        ("0.mlp.post@generated", ('"@generated" selects nothing in a run', "use it with generate")),
        ("0.mlp.post[3-1]", ('the range "3-1"', "runs backwards", 'write "1-3"')),
        ("5-9.resid_post", ("no layers 5-9", "allowed: layers 0 to 2")),
        ("0.logits", ('"logits" belongs to the model', 'write "logits"')),
        ("", ('cannot read the address ""', "for example 12.mlp.post[431]@-1")),
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
    for command in ("lens", "contributions"):
        check(cli(command, "", "-m", saved), 6, "PromptError: the prompt is empty", "at least one token")
        check(cli(command, long, "-m", saved), 6, *texts)
    check(cli("contributions", "the cat", "-m", saved, "--answer", "the cat"), 6, "is not one token")
    check(cli("contributions", "the cat", "-m", saved, "--answer", ""), 6, '"" is not one token; got no tokens')
    check(cli("contributions", "the cat", "-m", saved, "--foil", "zebra"), 6, '"zebra" is not in the vocabulary')
    check(cli("contributions", "the cat", "-m", saved, "--position", 2), 5, "no positions @2", "0 to 1, or -2 to -1")
    check(cli("lens", "the cat", "-m", saved, "--positions", "2"), 5, "no positions 2 in this prompt", "0 to 1, or")
    assert not out.exists()


def test_a_capture_larger_than_memory(cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("run", "the cat sat", "-m", saved, "-c", "*.mlp.post", "-o", tmp_path / "x.safetensors")
    texts = ("BudgetError", "more than memory allows, most of it *.mlp.post", "got 3.2 KiB", "name fewer sites")
    check(cli(*arguments, "--budget", 1000), 8, *texts, "allowed: 1,000 B, which is 2.2 KiB less")
    # Without a budget it is by what is free: room enough for the proof at opening, not for this.
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=400_000))
    long = ("run", "cat " * 60, *arguments[2:4], "-c", "*.attn.scores", "-c", "*.attn.result", *arguments[6:])
    check(cli(*long), 8, "most of it *.attn.scores", "KiB; allowed: 312.5 KiB")
    for wrong in ("-1", "lots", "2 furlongs"):
        check(cli(*arguments, "--budget", wrong), 2, "ArgumentError: budget must be a size in memory", '"2 GiB"')
    assert cli(*arguments[:-1], tmp_path / "x.safetensors", "--budget", "4 KiB").code == 0
    (tmp_path / "x.safetensors").unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", ["patch", *(pytest.param(c, marks=pytest.mark.slow) for c in ("trace", "attribute", "edges"))]
)
def test_a_sweep_larger_than_the_budget(cli: Cli, saved: Path, tmp_path: Path, command: str) -> None:
    pair = ("the cat sat on the", "the dog sat on the", "--answer", "mat", "--foil", "barn")
    arguments = {
        "patch": ("patch", *pair),
        "trace": ("trace", pair[0], "--subject", "cat"),
        "attribute": ("attribute", *pair),
        "edges": ("attribute", *pair, "--method", "eap", "--verify", 3),
    }[command]
    page = ("-o", tmp_path / "p.html", "-m", saved)
    done = cli(*arguments, *page, "--budget", 1000)
    assert done.code == 8
    for text in ("microtome: BudgetError: ", "more than memory allows", "allowed: 1,000 B", "raise --budget"):
        assert text in done.err, done.err
    assert not list(tmp_path.iterdir())
    small = cli(*arguments, "-m", saved, "--budget", 2**18, "--json")
    whole = cli(*arguments, "-m", saved, "--json")
    assert small.code == whole.code == 0, small.err
    maps = [json.loads(done.out)["variables"] for done in (small, whole)]
    said = cli(*arguments, "-m", saved, "--budget", "256 KiB", "--json").err
    assert said.split(" passes")[0] == small.err.split(" passes")[0]
    assert maps[0].keys() == maps[1].keys()
    for name, held in maps[0].items():
        if name.startswith(("rank_", "recall")):
            continue  # a rank between two cells that are all but equal
        np.testing.assert_allclose(
            np.array(held["values"], float), np.array(maps[1][name]["values"], float), atol=1e-4, err_msg=name
        )


EDITS: list[tuple[mt.edit.Edit, int, tuple[str, ...]]] = [
    (mt.edit.Add("0.mlp.post", torch.ones(7)), 7, ("EditError: a value does not fit 0.mlp.post", "got shape [7]")),
    (mt.edit.Zero("9.mlp.post"), 5, ("SiteError: no layers 9", "allowed: layers 0 to 2")),
    (mt.edit.Skip("9"), 5, ("SiteError: no layers 9", "allowed: layers 0 to 2")),
    (mt.edit.Zero("0.mlp.post[56]"), 5, ("no units [56]", "allowed: neuron 0 to 55")),
    (mt.edit.Zero("0.mlp.post@7"), 5, ("no positions @7 in row 0", "0 to 1, or -2 to -1")),
    (mt.edit.Zero("0.mlp.post", rows=(4,)), 7, ("no rows (4,)", "allowed: 0 to 0")),
]


@pytest.mark.parametrize(("edit", "code", "texts"), EDITS, ids=[repr(e) for e, *_ in EDITS])
def test_edits(cli: Cli, saved: Path, tmp_path: Path, edit: mt.edit.Edit, code: int, texts: tuple[str, ...]) -> None:
    mt.edit.save_edits(tmp_path / "edits", [edit])
    arguments = ("run", "the cat", "-m", saved, "-c", "final", "-o", tmp_path / "x.safetensors", "--edits")
    check(cli(*arguments, tmp_path / "edits"), code, *texts)
    assert [p.name for p in tmp_path.iterdir()] == ["edits"]


def test_files_of_edits(cli: Cli, saved: Path, tmp_path: Path) -> None:
    arguments = ("run", "the cat", "-m", saved, "-c", "final", "-o", tmp_path / "x.safetensors", "--edits")
    check(cli(*arguments, tmp_path / "none"), 10, "DataError: cannot read", "it does not exist")
    (tmp_path / "text").write_text("Zero the neuron, please.")
    check(cli(*arguments, tmp_path / "text"), 10, "DataError: cannot read edits from", "save them again")
    check(cli(*arguments, saved / "model.safetensors"), 10, "cannot read edits from", "got a file without edits")
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_outputs(cli: Cli, saved: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    texts = ("OutputError", "holds something that is not an atlas", "thesis.tex", "name another folder")
    check(cli("atlas", saved, "--text", text, "-o", tmp_path / "taken"), 9, *texts)
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "years of work"
    file = tmp_path / "x.safetensors"
    file.write_text("kept")
    check(cli("run", "the cat", "-m", saved, "-c", "final", "-o", file), 9, "exists", "--force")
    assert file.read_text() == "kept"
    check(cli("run", "the cat", "-m", saved, "-c", "final", "-o", tmp_path / "x.pkl"), 9, ".safetensors or .zarr")
    check(cli("run", "the cat", "-m", saved, "-c", "final"), 9, "no file to write to")
    nowhere = tmp_path / "none" / "x.safetensors"
    check(cli("run", "the cat", "-m", saved, "-c", "final", "-o", nowhere), 9, "no folder", "make it first")
    seed = cli("atlas", saved, "--text", text, "--seed", -1, "-o", file / "in")
    assert seed.code == 2
    assert "--seed" in seed.err
    check(cli("atlas", saved, "--text", text, "-o", file), 9, "is a file", "allowed: a folder")
    check(cli("atlas", saved, "--text", text, "-o", file / "in"), 9, "cannot write the atlas to", str(file / "in"))
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    check(cli("run", "the cat", "-m", saved, "-c", "final", "-o", folder, "--force"), 9, "is not a .safetensors to")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.safetensors", "taken", "x.safetensors"]
    assert file.read_text() == "kept"


def files_of(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("foreign", ["notes.txt", "assets/screenshot.png", "assets/data/neurons/mine.js", "old/x.txt"])
def test_an_atlas_with_something_of_yours_in_it_is_not_replaced(
    cli: Cli, saved: Path, text: Path, tmp_path: Path, foreign: str
) -> None:
    out = tmp_path / "atlas"
    arguments = ("atlas", saved, "--text", text, "--tokens", 128, "--length", 32, "-o", out)
    assert cli(*arguments).code == 0
    made = files_of(out)
    check(cli(*arguments), 9, "OutputError", "holds an earlier atlas", "--force")
    assert files_of(out) == made
    assert cli(*arguments, "--force").code == 0  # an atlas alone is
    assert files_of(out) != made
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("mine")
    before, told = (
        files_of(out),
        ("OutputError", "holds something that is not an atlas", foreign, "name another folder"),
    )
    check(cli(*arguments, "--force"), 9, *told)
    check(cli(*arguments), 9, *told)
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


def test_wrong_usage_exits_with_2(cli: Cli) -> None:
    done = cli("atlass")
    assert done.code == 2
    assert 'no command "atlass". Did you mean "atlas"' in done.err
    assert cli("lens").code == 2
