"""A commitment to an inference passes for the same run, and fails for each change that is none of rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.measurements import Commitment, commit, commit_separation, massive_dimensions, verify_commit
from microtome.measurements._commit import _compared, bits


def ids(rows: int = 1, length: int = 40, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


def run(model: mt.Model, tokens: Tensor, *edits: mt.edit.Edit) -> mt.Run:
    return model.run(tokens, capture="final", edits=list(edits), logits=False)


def test_what_is_kept_are_the_largest_entries_of_each_chunk(model: mt.Model) -> None:
    made = commit(run(model, ids(2)), every=32, top=16)
    hidden = run(model, ids(2))["final"]
    assert made.index.shape == made.value.shape == (2, 2, 16)
    assert made.bytes == 2 * 2 * 16 * 6
    for row in range(2):
        for chunk, part in enumerate((hidden[row, :32], hidden[row, 32:])):
            flat = part.flatten()
            held = made.index[row, chunk]
            assert torch.equal(flat[held].bfloat16().view(torch.int16), made.value[row, chunk])
            rest = torch.ones(flat.numel(), dtype=torch.bool)
            rest[held] = False
            assert float(flat[rest].abs().max()) <= float(flat[held].bfloat16().abs().min()) * (1 + 2**-7)
    assert (commit(run(model, ids(1, 2)), every=32, top=128).index[0, 0] >= 0).sum() == 2 * families.D_MODEL


def test_the_same_run_passes_and_others_fail(model: mt.Model) -> None:
    made = commit(run(model, ids()), top=32)
    assert made.fingerprint == model.fingerprint
    again = verify_commit(made, run(model, ids()))
    assert again.passes
    assert bool((again.chunks["overlap"] == 1).all())
    assert bool((again.chunks["mean"] == 0).all())
    both = torch.cat([ids(), ids(seed=4)])
    assert verify_commit(made, run(model, both), row=0).passes
    assert not verify_commit(made, run(model, both), row=1).passes
    assert not verify_commit(made, run(model, ids(), mt.edit.Zero("1.mlp_out"))).passes
    assert not verify_commit(made, run(model, ids(), mt.edit.Scale("final", 1.3))).passes  # places stay, values do not
    late = run(model, ids(), mt.edit.Zero("final@-1"))  # a change of one token is in its chunk alone
    assert verify_commit(made, late).chunks["passes"].values.tolist()[0][0] is True


def test_the_table_tells_changes_apart(model: mt.Model) -> None:
    before = model.fingerprint
    table = commit_separation(model, ids(), ids(seed=4), top=32, noise=1.0, dtype=torch.bfloat16)
    passes = dict(zip(table["change"].values.tolist(), table["passes"].sel(dimensions="all").values, strict=True))
    assert {name: bool(x) for name, x in passes.items()} == {
        "same": True, "batch": True, "dtype": True, "weight": False, "prompt": False,
    }  # fmt: skip
    assert model.fingerprint == before
    assert float(table["overlap"].sel(dimensions="all", change="prompt")) < 0.5


def test_massive_dimensions_hide_the_prompt_until_they_are_left_out(model: mt.Model) -> None:
    """One dimension that is huge whatever is run fills a commitment; what is committed then is no prompt."""
    value = torch.zeros(1, families.D_MODEL)
    value[0, 7] = 1000.0
    loud = mt.edit.Add("final", value[0])
    one, other = run(model, ids(1, 32), loud), run(model, ids(1, 32, seed=4), loud)  # as many tokens as entries
    assert massive_dimensions(one) == (7,)
    assert verify_commit(commit(one, top=32), other).passes
    made = commit(one, top=32, without=massive_dimensions(one))
    assert made.without == (7,)
    assert not verify_commit(made, other).passes
    assert verify_commit(made, one).passes


def test_bits_are_those_of_bfloat16() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-20, 20, 2000)
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])])
    assert torch.equal(bits(x), x.bfloat16().view(torch.int16).long() % 2**16)


def test_errors_are_of_sign_exponent_and_mantissa() -> None:
    place = torch.arange(4)
    one, other = (bits(torch.tensor(x)) for x in ([1.0, 1.5, -2.0, 4.0], [1.0, 1.5 + 3 / 128, 2.0, 4.0]))
    overlap, exponent, mean, median = _compared(place, one, place, other)
    assert (overlap, exponent, mean, median) == (1.0, 0.75, 1.0, 0.0)
    assert _compared(place, one, place + 4, other) == (0.0, 0.0, 128.0, 128.0)
    assert _compared(torch.tensor([0, -1]), one[:2], torch.tensor([0, -1]), one[:2])[:2] == (1.0, 1.0)


def test_a_commitment_is_saved_and_a_damaged_one_is_named(model: mt.Model, tmp_path: Path) -> None:
    made = commit(run(model, ids()), every=8, top=5, without=(3,))
    path = made.save(tmp_path / "run.commit")
    read = Commitment.load(path)
    assert torch.equal(read.index, made.index)
    assert torch.equal(read.value, made.value)
    assert (read.every, read.without, read.d_model, read.fingerprint) == (8, (3,), families.D_MODEL, model.fingerprint)
    assert verify_commit(read, run(model, ids())).passes
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(mt.errors.DataError, match="holds no commitment"):
        Commitment.load(path)
    with pytest.raises(mt.errors.DataError, match='no commitment "'):
        Commitment.load(tmp_path / "none")


def test_what_cannot_be_compared_is_refused(model: mt.Model) -> None:
    made = commit(run(model, ids()))
    with pytest.raises(mt.errors.DataError, match="not of the shape that was committed to"):
        verify_commit(made, run(model, ids(1, 39)))
    with pytest.raises(mt.errors.ArgumentError, match="a commitment needs chunks, entries and dimensions"):
        commit(run(model, ids()), without=range(families.D_MODEL))
    with pytest.raises(mt.errors.SiteError):
        commit(model.run(ids(), capture="0.mlp_out"))
    with pytest.raises(mt.errors.DataError, match="the rows of a commitment are of one length"):
        commit(model.run([[5, 6, 7], [5, 6]], capture="final"))
    with pytest.raises(mt.errors.DataError, match="the last hidden state of token 3 in row 0 is not finite"):
        commit(run(model, ids(), mt.edit.Scale("final@3", float("inf"))))
    with pytest.raises(mt.errors.PromptError, match="the other prompt is shorter"):
        commit_separation(model, ids(), ids(1, 5))
    assert np.isfinite(float(verify_commit(made, run(model, ids())).chunks["mean"].mean()))
