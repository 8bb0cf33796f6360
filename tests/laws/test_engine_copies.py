"""A run stands by itself: copied, pickled and saved it is the same without its model, whatever state that was in."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt


class Letters:
    """A tokenizer of letters, from 5 on."""

    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5 + ord(c) - ord("a") for c in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(max(int(i) - 5, 0) % 26 + ord("a")) for i in ids)


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def same(copied: mt.Run, run: mt.Run) -> None:
    assert torch.equal(copied.logits, run.logits)
    assert list(copied.captured) == list(run.captured)
    assert all(torch.equal(copied[str(a)], run[str(a)]) for a in run.captured)
    assert copied.words == run.words
    assert copied.provenance == run.provenance
    assert torch.equal(copied.mask, run.mask)
    whole = str(next(a for a in run.captured if a.whole))
    assert copied.dataset(whole).identical(run.dataset(whole))


def pickled(run: mt.Run) -> bytes:
    """Written by pickle, as `multiprocessing` and caches do with what they are given."""
    file = io.BytesIO()
    pickle.dump(run, file)
    return file.getvalue()


@pytest.mark.parametrize("grad", [False, True])
def test_a_copy_holds_the_run_and_not_the_model(grad: bool) -> None:
    model = mt.open(families.build("llama-gqa"), tokenizer=Letters(), prove=False)
    run = model.run(["abc", "d"], capture=["*.resid_post", "1.attn.pattern"], grad=grad)
    held = sum(x.numel() for x in run.captured.values()) + run.logits.numel()
    written = pickled(run)
    assert len(written) < 4 * held + 20_000 < 4 * model.n_parameters
    for copied in (pickle.loads(written), copy.deepcopy(run)):
        same(copied, run)
        assert not copied.logits.requires_grad
        with pytest.raises(mt.errors.SiteError, match="this run keeps no gradients"):
            copied.grad(run.logits.sum())
        patched = model.run(["abc", "d"], edits=mt.edit.Patch("1.resid_post@0", copied)).logits
        assert torch.equal(patched, model.run(["abc", "d"], edits=mt.edit.Patch("1.resid_post@0", run)).logits)


def test_a_copy_of_a_cut_does_not_hold_what_it_was_cut_from() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    run = model.run(ids(8, 32), capture="1.attn.pattern@-1", logits=False)
    run.captured = {a: x.expand(8, 4, 1, 32)[:1] for a, x in run.captured.items()}
    assert len(pickled(run)) < 20_000


# ------------------------------------------------------------------------------------------------ runs on disk


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral", "falcon-gqa", "bert"])
def test_a_run_that_is_saved_and_loaded_is_itself(name: str, tmp_path: Path) -> None:
    model = mt.open(families.build(name), tokenizer=Letters(), prove=False)
    capture = ["*.resid_post", "1.attn.pattern", "1.attn.z[1]@-1", "logits@-1"]
    run = model.run(["abcd", "ef"], capture=capture, padding="left")
    run.save(tmp_path / "run.safetensors")
    for loaded in (mt.Run.load(tmp_path / "run.safetensors"), mt.Run.load(str(tmp_path / "run.safetensors"), model)):
        same(loaded, run)
        assert loaded.anatomy == run.anatomy
        assert torch.equal(loaded["*.resid_post@-1"], run["*.resid_post@-1"])
        edit, own = (mt.edit.Patch("1.resid_post@0", source) for source in (loaded, run))
        others = ["dcba", "fe"]
        patched = model.run(others, edits=edit, padding="left").logits
        assert torch.equal(patched, model.run(others, edits=own, padding="left").logits)
    half = mt.open(families.build(name).bfloat16(), prove=False).run(
        ids(), capture="1.mlp_out", logits=False, grad=True
    )
    half.save(tmp_path / "run.safetensors")  # replaces the first
    again = mt.Run.load(tmp_path / "run.safetensors")
    assert again["1.mlp_out"].dtype == torch.bfloat16
    assert torch.equal(again["1.mlp_out"], half["1.mlp_out"])
    with pytest.raises(mt.errors.SiteError, match="this run has no logits"):
        _ = again.logits
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_run_of_another_model_is_refused_where_a_model_is_given(tmp_path: Path) -> None:
    model, path = mt.open(families.build("llama-gqa"), prove=False), tmp_path / "run"
    model.run(ids(), capture="1.mlp_out").save(path)
    own = mt.Run.load(path, model).provenance["fingerprint"]
    with torch.no_grad():
        model.layers[1].W_O.add_(0.5)
    with pytest.raises(mt.errors.DataError, match=rf"is of another model; got .*{own}.*load it without model="):
        mt.Run.load(path, model)
    assert mt.Run.load(path).provenance["fingerprint"] == own


def test_a_file_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    model, path = mt.open(families.build("llama-gqa"), prove=False), tmp_path / "run"
    run = model.run(ids(), capture="1.mlp_out")
    mt.edit.save_edits(tmp_path / "edits", [mt.edit.Zero("1.mlp_out")])
    run.save(path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    for name, text in (("none", "No such file"), ("edits", "a file without a run"), ("cut", "")):
        with pytest.raises(mt.errors.DataError, match=f"cannot read a run from .*{name}; got .*{text}"):
            mt.Run.load(tmp_path / name)
    with pytest.raises(mt.errors.OutputError, match="cannot write the run to"):
        run.save(tmp_path / "missing" / "run")
    with pytest.raises(mt.errors.OutputError, match="cannot write the run to"):
        run.save(tmp_path)
    same(mt.Run.load(path), model.run(ids(), capture="1.mlp_out"))


# --------------------------------------------------------------------------- models in another state than usual


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name: str, training: bool) -> None:
    hf = families.build(name)
    model = mt.open(hf, prove=False)
    clean, corrupt, patch = ids(1), ids(1, seed=5), mt.edit.Zero("1.mlp_out@3")
    metric = mt.metric.LogitDifference(answer=7, foil=9)

    def everything() -> list[Any]:
        run = model.run(clean, capture=["embed", "*.resid_pre"])
        assert not any(x.requires_grad for x in run.captured.values())
        seen: list[Tensor] = []
        model.run(clean, observe={"embed": lambda site, x: seen.append(x)})
        swept = model.sweep(clean, [patch], metric).run()
        assert not any(x.requires_grad for x in (*seen, swept.values, swept.base))
        attributed = mt.explain.attribute(model, clean, corrupt, answer=7, foil=9)
        lens = mt.explain.logit_lens(model, clean)
        return [*run.captured.values(), *seen, swept.effects, *(
            torch.as_tensor(v.values) for data in (attributed, lens) for v in data.data_vars.values()
            if v.dtype.kind == "f"
        )]  # fmt: skip

    expected = everything()
    hf.gradient_checkpointing_enable()
    hf.train(training)
    for got, own in zip(everything(), expected, strict=True):
        torch.testing.assert_close(got, own, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neo", "bert"])
def test_a_model_that_returns_tuples_runs_like_one_that_names_its_outputs(name: str) -> None:
    hf = families.build(name)
    model = mt.open(hf, prove=False)
    expected = model.run(ids(), capture="1.resid_post")
    hf.config.return_dict = False
    model = mt.open(hf)
    run = model.run(ids(), capture="1.resid_post")
    assert torch.equal(run.logits, expected.logits)
    assert torch.equal(run["1.resid_post"], expected["1.resid_post"])
    cells, metric = [mt.edit.Zero("1.mlp_out")], mt.metric.LogitDifference(answer=7, foil=9)
    assert model.sweep(ids(1), cells, metric).run().done == 1
    assert hf.config.return_dict is False


@pytest.mark.parametrize("change", ["fewer", "more", "none"])
def test_a_model_whose_blocks_changed_is_refused(change: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    blocks = model.hf.model.layers
    changed = {"fewer": blocks[:1], "more": torch.nn.ModuleList([*blocks, blocks[0]]), "none": torch.nn.Identity()}
    model.hf.model.layers = changed[change]
    metric = mt.metric.LogitDifference(answer=7, foil=9)
    for use in (
        lambda: model.run(ids()),
        lambda: model.run(ids(), capture="0.mlp_out"),
        lambda: model.sweep(ids(1), [mt.edit.Zero("0.mlp_out")], metric),
        lambda: model.editing(mt.edit.Zero("0.mlp_out")).__enter__(),
        lambda: model.layers[0].W_O,
    ):
        with pytest.raises(mt.errors.SiteError, match=r"is stale: its blocks changed.*; allowed: 3, .*open it again"):
            use()


def test_a_module_that_is_gone_is_named() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    del model.hf.model.layers[1].mlp
    with pytest.raises(mt.errors.SiteError, match=r"no longer has model\.layers\.1\.mlp.*open it again"):
        model.run(ids(), capture="1.mlp_out")
