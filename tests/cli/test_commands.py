"""Each command does its work on a tiny saved model, and says it to a person and to a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from tests import families

import microtome as mt
from microtome.anatomy import _load

Cli = Callable[..., object]
OURS = "made-by-microtome.json"


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_check_prints_the_proof(cli: Cli, saved: Path) -> None:
    done = cli("check", saved)
    assert done.code == 0
    assert "The map is proven." in done.out
    assert "7 weights" in done.out
    told = json.loads(cli("check", saved, "--json").out)
    assert told["proven"] is True
    assert {c["status"] for c in told["checks"]} == {"holds"}


def test_check_says_what_prompts_a_model_takes(cli: Cli, saved: Path, tmp_path: Path) -> None:
    told = [cli("check", saved).out]
    chatty = copied(saved, tmp_path / "chatty")
    (chatty / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    bare = tmp_path / "bare"
    families.build("llama-gqa").save_pretrained(bare)
    told += [cli("check", folder).out for folder in (chatty, bare)]
    lines = [next(line for line in out.splitlines() if line.startswith("prompts: ")) for out in told]
    assert lines[0] == "prompts: text"
    assert lines[1].startswith("prompts: text, lists of chat messages (by the chat template")
    assert lines[2] == "prompts: token ids"


def test_check_says_what_is_left_out_and_exits_with_4_only_if_asked(
    cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microtome.model import _identities

    monkeypatch.setitem(_identities.TOLERANCE, torch.float32, -1.0)  # what products are held to stays
    done = cli("check", saved)
    assert done.code == 0
    printed = " ".join(done.out.split())
    assert "The map is proven but for " in printed
    assert "methods that can run: " in printed
    assert "needs a stream that is the sum of what branches write: no attn_out in layer 0" in printed
    told = cli("check", saved, "--strict", "--json")
    assert told.code == 4
    found = json.loads(told.out)
    assert not found["proven"]
    assert found["opens"]
    assert found["missing"]["0.attn_out"].startswith('it fails "2 residual" at 0.resid_mid (gap ')
    assert found["methods"]["contributions"].startswith("needs a stream")


def test_check_of_a_model_whose_stream_is_not_proven_exits_with_4(
    cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microtome.model import _identities

    monkeypatch.setitem(_identities.PRODUCT, torch.float32, -1.0)
    done = cli("check", saved)
    assert done.code == 4
    assert "The residual stream is not proven, so the model does not open" in " ".join(done.out.split())


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "falcon-gqa", "deepseek_v3-qlora"])
def test_sites_say_why_some_are_missing(cli: Cli, name: str, tmp_path: Path) -> None:
    families.build(name).save_pretrained(tmp_path / name)
    rows = {row["site"]: row for row in json.loads(cli("sites", tmp_path / name, "--json").out)["sites"]}
    assert rows["attn.z"]["layers"] == [0, 1, 2]
    for row in rows.values():
        assert row["layers"] or row["why_not"], row
    assert "attn.z" in cli("sites", tmp_path / name).out


def test_lens_and_contributions(cli: Cli, saved: Path) -> None:
    table = cli("lens", "the cat sat on the", "-m", saved)
    assert table.code == 0
    assert "layer" in table.out
    lens = json.loads(cli("lens", "the cat sat on the", "-m", saved, "--json").out)
    assert len(lens["variables"]["word"]["values"]) == families.N_LAYERS + 1
    assert lens["variables"]["answer_rank"]["values"][-1] == [[0] * 5]
    cut = json.loads(cli("lens", "the cat sat on the", "-m", saved, "--every", 2, "--positions", "-2--1", "--json").out)
    assert cut["coords"]["layer"]["values"] == [0, 2]
    assert lens["coords"]["layer"]["values"] == [-1, 0, 1, 2]
    assert cut["coords"]["pos"]["values"] == [3, 4]
    for flags in ((), ("--detail", "source"), ("--detail", "neuron"), ("--detail", "source", "--detail", "neuron")):
        told = json.loads(cli("contributions", "the cat sat", "-m", saved, "--json", *flags).out)
        held = {name: np.array(one["values"]) for name, one in told["variables"].items()}
        parts = sum(held[name].sum() for name in told["provenance"]["parts"])
        assert parts == pytest.approx(held["logit"].sum(), abs=1e-4)
        assert abs(held["gap"]).max() < 1e-4
        table = cli("contributions", "the cat sat", "-m", saved, *flags).out
        assert "sum" in table
        assert ("reads from" in table) == ("source" in flags)
    said = cli("contributions", "the cat sat", "-m", saved, "--detail", "neuron").out.splitlines()
    few = cli("contributions", "the cat sat", "-m", saved, "--detail", "neuron", "--top", 3).out.splitlines()
    assert len(said) - len(few) == 12  # fifteen parts without --top


def test_run_writes_captures_with_their_axes(cli: Cli, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    done = cli("run", "the cat sat", "-m", saved, "-c", "*.mlp.post", "-c", "1.attn.z[2]@-1", "-o", file)
    assert done.code == 0
    with safe_open(file, "pt") as held:
        assert held.get_tensor("0.mlp.post").shape == (1, 3, families.D_MLP)
        assert held.get_tensor("1.attn.z[2]@-1").shape[:3] == (1, 1, 1)
        assert json.loads(held.metadata()["axes"])["0.mlp.post"] == ["batch", "pos", "neuron"]
        assert json.loads(held.metadata()["fingerprint"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]
    plan = json.loads(cli("run", "the cat sat", "-m", saved, "-c", "*.mlp.post", "--plan", "--json").out)
    assert plan["bytes"]["*.mlp.post"] == 3 * 3 * families.D_MLP * 4


def test_captures_that_are_one_tensor_are_written_as_two(cli: Cli, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    done = cli("run", "the cat sat", "-m", saved, "-c", "*.resid_post", "-c", "*.resid_pre", "-o", file)
    assert done.code == 0, done.err
    with safe_open(file, "pt") as held:
        assert len(held.keys()) == 2 * families.N_LAYERS + 1  # and the tokens
        assert torch.equal(held.get_tensor("0.resid_post"), held.get_tensor("1.resid_pre"))


def test_atlas_writes_tables_pages_and_manifest(cli: Cli, saved: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "atlas"
    done = cli("atlas", saved, "--text", text, "--tokens", 256, "--length", 32, "-o", out, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert Path(told["index"]).is_file()
    rows = {"layers": families.N_LAYERS, "heads": families.N_LAYERS * 4, "neurons": families.N_LAYERS * families.D_MLP}
    rows |= {"groups": 1, "group_layers": families.N_LAYERS}
    for name, path in told["tables"].items():
        table = pq.read_table(path)
        assert table.num_rows == rows[name]
        assert all(field.metadata and field.metadata[b"meaning"] for field in table.schema)
    manifest = json.loads(Path(told["manifest"]).read_text())
    assert manifest["text"]["tokens"] == 256
    looked = {name: one["looked_at"] for name, one in manifest["measures"].items()}
    assert looked["ablation_loss"] == "text, its first 8 rows, at most 128 tokens of each"
    assert looked["induction"] == "16 sequences of 32 random tokens that repeat once"  # what the context has room for
    assert "lower end" in manifest["tables"]["heads"]["columns"]["induction_lo"]["meaning"]
    assert manifest["loss_lo"] <= told["loss"] == manifest["loss"] <= manifest["loss_hi"]
    assert {"reading the text", "reading weights", "seconds"} <= manifest["cost"].keys()
    assert manifest["model"]["fingerprint"]
    again = cli("atlas", saved, "--text", text, "--tokens", 256, "--length", 32, "-o", out, "--force")
    assert again.code == 0
    assert "index.html" in again.out
    one = cli("atlas", saved, "--text", text, "--tokens", 256, "--length", 32, "-o", out, "--force", "--only", "stream")
    assert one.code == 0
    assert "block_cos" in pq.read_table(out / "layers.parquet").column_names
    assert pq.read_table(out / "heads.parquet").num_rows == 0
    assert [p.name for p in tmp_path.iterdir()] == ["atlas"]


def test_rows_of_the_atlas_begin_as_the_tokenizer_begins_a_text(
    cli: Cli, saved: Path, text: Path, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = copied(saved, tmp_path / "begins")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    out = tmp_path / "atlas"
    for model, bos_id, force in ((saved, None, ()), (folder, "<eos>", ("--force",))):
        done = cli("atlas", model, "--text", text, "--tokens", 310, "--length", 32, "-o", out, "--json", *force)
        assert done.code == 0, done.err
        told = json.loads((out / "manifest.json").read_text())["text"]
        assert told["rows_begin_with"] == bos_id
        neurons = pq.read_table(out / "neurons.parquet")
        places = {i - s for key in ("example_index",) for i, s in zip(
            neurons[key].combine_chunks().flatten().to_pylist(),
            neurons["example_start"].combine_chunks().flatten().to_pylist(), strict=True)}  # fmt: skip
        assert (0 in places) == (bos_id is None)
    assert told["tokens"] == 320  # 310 of the text, one more a row


def test_cache_is_shown_and_cleared(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROTOME_CACHE", str(tmp_path))
    assert "empty" in cli("cache", "show").out
    for name, file in (("x", OURS), ("mine", "config.json"), (".y.1.part", OURS)):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / file).write_bytes(b"0" * 2048)
    (tmp_path / "thesis.tex").write_text("years of work")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / OURS).write_text("{}")
    (tmp_path / "models" / "link").symlink_to(elsewhere)
    assert json.loads(cli("cache", "show", "--json").out)["entries"] == {"models/.y.1.part": 2048, "models/x": 2048}
    assert cli("cache", "clear", "--yes").code == 0
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == ["link", "mine"]
    assert (tmp_path / "models" / "mine" / "config.json").stat().st_size == 2048
    assert (elsewhere / OURS).is_file()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert "nothing to clear" in cli("cache", "clear", "--yes").out


STALE = {
    "of a version without marks": None, "with an older mark": '{"made_from": "x.gguf"}',
    "of another format": '{"format": 0}',
    "with a broken mark": "{", "with a mark that is none": "[1]",
}  # fmt: skip


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache of its own and a tiny default model; grows by the mark that each making saw."""
    package = tmp_path / "tiny_default"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MICROTOME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_load, "DEFAULT_PACKAGE", "tiny_default")
    seen: list[str] = []

    def dequantise(file: Path, folder: Path) -> None:
        seen.append((folder / OURS).read_text())
        families.build("llama-gqa").save_pretrained(folder)

    monkeypatch.setattr(_load, "_dequantise", dequantise)
    return seen


@pytest.mark.parametrize("what", STALE)
def test_a_default_model_that_an_earlier_version_made_is_made_again(
    cli: Cli, made: list[str], tmp_path: Path, what: str
) -> None:
    folder, mark = tmp_path / "cache" / "models" / _load.DEFAULT_NAME, STALE[what]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"quantization_config": {}}')
    if mark is not None:
        (folder / OURS).write_text(mark)
    assert list(json.loads(cli("cache", "show", "--json").out)["entries"]) == [f"models/{folder.name}"]
    for _ in range(2):
        assert _load.default_folder() == folder
    assert made == ['{"made_from": "tiny.gguf"}']  # once, and not called whole before it was
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / OURS).read_text())["format"] == _load.FORMAT
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert mt.open(prove=False).anatomy.d_model == families.D_MODEL
    assert list(json.loads(cli("cache", "show", "--json").out)["entries"]) == [f"models/{folder.name}"]
    assert cli("cache", "clear", "--yes").code == 0
    assert not folder.exists()


@pytest.mark.parametrize("other", ["finished first", "is a link"])
def test_the_default_model_takes_no_other_folder_away(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    folder, elsewhere = tmp_path / "cache" / "models" / _load.DEFAULT_NAME, tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").touch()
    if other == "is a link":
        folder.parent.mkdir(parents=True)
        folder.symlink_to(elsewhere)
        assert _load.default_folder() == folder
        assert not folder.is_symlink()
        assert [p.name for p in elsewhere.iterdir()] == ["config.json"]
    else:
        own = _load._dequantise

        def slowly(file: Path, part: Path) -> None:
            own(file, part)
            elsewhere.rename(folder)
            (folder / OURS).write_text(json.dumps({"format": _load.FORMAT}))

        monkeypatch.setattr(_load, "_dequantise", slowly)
        assert _load.default_folder() == folder
        assert (folder / "config.json").stat().st_size == 0
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("microtome ")


def test_run_writes_mixed_captures_into_one_zarr(cli: Cli, saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    import xarray as xr

    file = tmp_path / "mixed.zarr"
    done = cli("run", "the cat sat", "-m", saved, "-c", "*.resid_post", "-c", "1.mlp.post[3]@-1", "-o", file)
    assert done.code == 0
    data = xr.open_zarr(file)
    assert data["resid_post"].dims == ("layer", "batch", "pos", "d_model")
    assert data["mlp.post"].dims == ("layer_2", "batch", "pos_2", "neuron")
    assert data["pos_2"].values.tolist() == [2]
    assert data["token_2"].values.tolist() == data["token"].values[:, [2]].tolist()


def test_run_writes_zarr_that_says_what_it_holds(cli: Cli, saved: Path, tmp_path: Path) -> None:
    import torch
    import xarray as xr

    import microtome as mt

    file = tmp_path / "kept.zarr"
    assert cli("run", "the cat sat", "-m", saved, "-c", "*.resid_post", "-o", file).code == 0
    data = xr.open_zarr(file)
    run = mt.open(saved).run("the cat sat", capture="*.resid_post")
    assert data["resid_post"].dims == ("layer", "batch", "pos", "d_model")
    assert torch.equal(torch.from_numpy(data["resid_post"].values), run["*.resid_post"])
    assert data["token"].values.tolist() == run.words
    assert data.attrs["fingerprint"] == run.provenance["fingerprint"]
