"""Laws of the logit lens by groups of texts: plain sums of softmaxes, tokens by their counts, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.measurements._lens_groups import group_tokens, members
from microtome.method import Seen, declared
from microtome.stream import TokenBatch


def ids(rows: int, seed: int, low: int = 5, high: int = families.VOCAB) -> Tensor:
    return torch.randint(low, high, (rows, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


TEXT = {"a": ids(5, 0, 5, 25), "b": ids(6, 1, 20, 45), "c": ids(4, 2, 40, 60)}


def test_tokens_belong_to_the_group_that_has_most_of_them() -> None:
    counts = torch.tensor([[90.0, 8, 4, 0, 2, 0], [0.0, 2, 4, 90, 0, 0]])
    assert group_tokens(counts).tolist() == [0, -1, -1, 1, -1, -1]  # 8 : 2 is 0.794 of rates; 2 are too few; 0 are none
    assert group_tokens(counts, own=0.75).tolist() == [0, 0, -1, 1, -1, -1]
    assert group_tokens(counts, least=2).tolist() == [0, -1, -1, 1, 0, -1]
    more = counts * torch.tensor([[10.0], [1.0]])  # rates decide, not counts
    assert torch.equal(group_tokens(more, least=1), group_tokens(counts, least=1))
    assert members(group_tokens(counts), 2).sum(0).tolist() == [1, 1]


def test_it_is_the_softmax_of_each_layer_summed_over_the_tokens_of_a_group(model: mt.Model) -> None:
    data = mt.measure(model, "lens_groups", text=TEXT, stride=3)
    counts = torch.stack([torch.bincount(rows.flatten(), minlength=families.VOCAB) for rows in TEXT.values()]).double()
    belongs = group_tokens(counts)
    assert data["group_vocabulary"].values.tolist() == [int((belongs == g).sum()) for g in range(3)]
    for r, rows in enumerate(TEXT.values()):
        run = model.run(rows, capture="*.resid_post")
        assert float(data["text_share"][r]) == pytest.approx(float((belongs[rows] == r).double().mean()))
        for layer in range(3):
            p = model.unembed(run[f"{layer}.resid_post"][:, 2::3]).softmax(-1).mean((0, 1)).detach()
            if layer == 2:
                own = run.logits[:, 2::3].softmax(-1).mean((0, 1)).detach()
                torch.testing.assert_close(p, own, atol=1e-6, rtol=1e-4)
            for g in range(3):
                expected = float(p[belongs == g].sum())
                assert float(data["lens_map"][g, layer, r]) == pytest.approx(expected, abs=1e-6)
    whole = data["lens_map"].values
    for g in range(3):
        others = [r for r in range(3) if r != g]
        np.testing.assert_allclose(data["lens_share"][g], whole[g, :, g])
        np.testing.assert_allclose(data["lens_share_elsewhere"][g], whole[g][:, others].mean(1))
    np.testing.assert_allclose(data["lens_share_diff"], data["lens_share"] - data["lens_share_elsewhere"], atol=1e-12)
    assert (whole.sum(0) <= 1 + 1e-9).all()


def test_groups_may_come_in_any_order(model: mt.Model) -> None:
    one, other = (mt.measure(model, "lens_groups", text=text) for text in (TEXT, dict(reversed(TEXT.items()))))
    for name in ("lens_share", "lens_share_elsewhere", "text_share"):
        np.testing.assert_allclose(one[name], other[name].sel(group=one["group"]), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(one["lens_map"], other["lens_map"].sel(group=one["group"]).values[..., ::-1], rtol=1e-6)


def test_of_rows_shorter_than_a_stride_the_last_token_is_read(model: mt.Model) -> None:
    text = {name: rows[:, :3] for name, rows in TEXT.items()}
    short, last = (mt.measure(model, "lens_groups", text=text, least=1, stride=n) for n in (8, 3))
    for name in short.data_vars:
        np.testing.assert_allclose(short[name], last[name], err_msg=str(name))
    assert (short["lens_share"] > 0).all()


def test_a_stream_that_cannot_be_read_as_logits_is_refused_in_one_line() -> None:
    with pytest.raises(mt.errors.SiteError, match="cannot be read as logits") as refused:
        mt.measure(mt.open(families.build("bert"), prove=False), "lens_groups", text=TEXT)
    assert "\n" not in str(refused.value)


def test_tokens_that_do_not_count_have_no_weight(model: mt.Model) -> None:
    rows, statistic = ids(2, 3), declared("lens_groups").statistic({"stride": 1})  # pyright: ignore[reportAttributeAccessIssue]
    mask = torch.ones(rows.shape, dtype=torch.bool)
    mask[0, :5], mask[1, 9:] = False, False
    kept = statistic.start(model, None)
    statistic.update(kept, Seen(model, None, TokenBatch.of(rows), None, mask))
    run = model.run(rows, capture="*.resid_post")
    for layer in range(3):
        p = model.unembed(run[f"{layer}.resid_post"]).softmax(-1).detach().double()
        expected = (p[0, 5:].mean(0) + p[1, :9].mean(0)) / 2
        torch.testing.assert_close(kept[f"lens.{layer}"].result().mean, expected, atol=1e-7, rtol=1e-4)
        assert float((expected - p.mean((0, 1))).abs().max()) > 1e-5
    assert int(kept["tokens"].result().count.sum()) == 7 + 9
