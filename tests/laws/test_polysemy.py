"""Kinds of tokens that neurons tell apart: the areas against scikit-learn's, kinds by their texts, and halves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tests import families
from torch import Tensor

import microtome as mt
from microtome.measurements._polysemy import CLASSES, EDGES, areas, class_of
from microtome.stream import TokenBatch


class Reader:
    """A tokenizer whose tokens are of four kinds."""

    bos_token_id, eos_token_id, all_special_ids = None, None, ()

    def decode(self, ids: list[int], **_: object) -> str:
        return (",", " the", "7", " cat")[ids[0] % 4]


def ids(rows: int = 8) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), tokenizer=Reader(), prove=False)


def test_kinds_are_told_by_the_text() -> None:
    told = {
        "whitespace": [" ", "\n", "\t\n"], "digits": ["12", " 7"], "punctuation": [",", " (", "...\n", "。"],
        "code": ["_", " =", "+=", "foo_bar", "()[]"], "letter": [" x", "b", " e\u0301"],
        "function word": [" the", " Is"], "capital": [" Paris"],
        "word": [" cat", " don't", " кот", " हि", " ไม่", " cafe\u0301", " می\u200cرود"],
        "inside": ["ing", "the", "ation", "िया"], "other": ["", "\ufffd", "\u0301", "\u0e48"],
    }  # fmt: skip
    assert list(told) == list(CLASSES)
    for kind, words in told.items():
        assert [CLASSES[class_of(word)] for word in words] == [kind] * len(words)


def test_areas_are_those_of_scikit_learn() -> None:
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (400,), generator=rng)
    values = torch.randn(400, 2, generator=rng) + torch.stack([kinds == 1, kinds * 0], dim=1)
    bins = torch.bucketize(values.double(), EDGES, right=True)
    counts = torch.stack([
        torch.stack([torch.bincount(bins[kinds == c, n], minlength=len(EDGES) + 1) for c in range(3)]) for n in (0, 1)
    ])  # fmt: skip
    found = areas(counts.double())
    for n in (0, 1):
        for c in range(3):
            assert float(found[n, c]) == pytest.approx(roc_auc_score(kinds == c, bins[:, n]))  # those of a bin tie
            assert float(found[n, c]) == pytest.approx(roc_auc_score(kinds == c, values[:, n]), abs=0.01)
    assert bool(areas(counts.double(), least=200).isnan().all())
    assert float(areas(counts.flip(-1).double())[0, 1]) == pytest.approx(1 - float(found[0, 1]))


def test_columns_are_those_of_captures(model: mt.Model) -> None:
    data = mt.measure(model, "polysemy", text=ids())
    post = model.run(ids(), capture="1.mlp.post")["1.mlp.post"][:, 1:].detach().double()
    kinds = ids()[:, 1:] % 4
    bins = torch.bucketize(post, EDGES, right=True)
    area = data["class_auroc"].values[1]
    for kind, name in enumerate(("punctuation", "function word", "digits", "word")):
        for n in (0, 17):
            expected = roc_auc_score((kinds == kind).flatten(), bins[..., n].flatten())
            assert area[n, CLASSES.index(name)] == pytest.approx(expected)
    assert np.isnan(area[:, CLASSES.index("letter")]).all()
    known = np.nan_to_num(abs(area - 0.5), nan=-1)
    np.testing.assert_array_equal(data["polysemy"][1], (known > 0.4).sum(1))
    np.testing.assert_array_equal(data["best_class"][1], known.argmax(1))
    assert (data["polysemy_shuffled"] == 0).mean() > 0.9
    assert abs(float(data["class_auroc_shuffled"].mean()) - 0.5) < 0.02
    none = mt.measure(model, "polysemy", text=ids(), least=1000)
    assert np.isnan(none["polysemy"]).all()
    assert (none["best_class"] == -1).all()


def test_halves_of_a_text_give_what_the_whole_gives(model: mt.Model) -> None:
    start = torch.arange(8) * 20
    one = mt.measure(model, "polysemy", text=[TokenBatch.of(ids(), start)])
    other = mt.measure(model, "polysemy", text=[TokenBatch.of(ids()[s], start[s]) for s in (slice(3), slice(3, 8))])
    for name in one.data_vars:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-9, atol=1e-9, err_msg=str(name))


def test_a_model_without_a_tokenizer_is_refused_in_one_line() -> None:
    with pytest.raises(mt.errors.DataError, match="has no tokenizer to class tokens with") as refused:
        mt.measure(mt.open(families.build("llama-gqa"), prove=False), "polysemy", text=ids())
    assert "\n" not in str(refused.value)
