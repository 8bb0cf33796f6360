"""Attention knock-out: every cell is its literal forward, and what is not read is not missed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families
from tests.agreement import agreed, agreement

import microtome as mt
from microtome.stream import mean_interval

PROMPT = [7, 20, 33, 41, 52, 60, 61, 62]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"))


def masked(model: mt.Model, layers: str, queries: list[int], keys: list[int]) -> torch.Tensor:
    """Log-probabilities of a plain forward in which scores are written to, independently of `KnockOut`."""

    def cut(scores: torch.Tensor) -> torch.Tensor:
        scores[..., keys] = float("-inf")
        return scores

    edits = [mt.edit.Apply(f"{layers}.attn.scores@{q}", function=cut) for q in queries]
    return model.run([PROMPT], edits=edits).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gptj", "gemma2", "bert"])
@pytest.mark.parametrize(("queries", "keys"), [(-1, (1, 3)), ((4, 7), 2), ((5, 8), (0, 2))])
def test_every_cell_is_its_literal_forward(name: str, queries: object, keys: object) -> None:
    model = mt.open(families.build(name), prove=False)
    data = mt.explain.attention_knockout(model, PROMPT, queries=queries, keys=keys, window=2)
    asked = list(range(*queries)) if isinstance(queries, tuple) else [7]
    cut = list(range(*keys)) if isinstance(keys, tuple) else [keys]
    log_p = model.run([PROMPT]).logits[0, -1].log_softmax(-1)
    whole, answer = log_p.max(), int(log_p.argmax())  # the model's own answer, of which there is something to take away
    assert float(data["clean_log"]) == pytest.approx(float(whole), abs=1e-5)
    with agreement(1e-5, most=0.6) as agree, agreement(3e-6, most=0.6) as likely:
        for layer, layers in ((0, "0"), (1, "0-1"), (2, "1-2")):
            expected = masked(model, layers, asked, cut)[answer]
            agree(data["log_probability"][layer], expected - whole, layer)
            likely(data["probability"][layer], expected.exp() - whole.exp(), layer)
            agree(data["relative"][layer], (expected - whole).exp() - 1, layer)


def test_the_control_cuts_as_many_other_keys(model: mt.Model) -> None:
    data = mt.explain.attention_knockout(
        model, PROMPT, keys=(1, 7), answer=11, controls=5
    )  # only key 0 is left: too few
    assert data.attrs["controls"] == 0
    assert bool(data["log_probability_control"].isnull().all())
    data = mt.explain.attention_knockout(model, PROMPT, keys=(2, 7), queries=7, answer=11, controls=50, window=1)
    assert data.attrs["controls"] == 0
    data = mt.explain.attention_knockout(model, PROMPT, keys=(4, 7), answer=11, controls=50, window=1)
    assert data.attrs["controls"] == 4  # 3 of keys 0 to 3
    sets = [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]
    values = [torch.stack([masked(model, str(layer), [7], keys)[11] for keys in sets]).mean() for layer in range(3)]
    agreed(data["log_probability_control"], torch.stack(values) - float(data["clean_log"]), 1e-5)
    assert np.allclose(data["relative_diff"], data["relative"] - data["relative_control"])
    assert bool(data["relative_diff_lo"].isnull().all())  # of four sets
    many = mt.explain.attention_knockout(model, PROMPT, keys=(5, 7), answer=11, window=1)
    assert many.attrs["controls"] == 8  # of the 10 pairs of keys 0 to 4, no two alike
    each = torch.from_numpy((many["relative"] - many["relative_control_each"]).transpose("example", "layer").values)
    assert len(each.unique(dim=0)) == 8
    for end, expected in zip(("", "_lo", "_hi"), mean_interval(each), strict=True):
        assert np.allclose(many[f"relative_diff{end}"], expected)
    again = mt.explain.attention_knockout(model, PROMPT, keys=(4, 7), answer=11, controls=50, window=1)
    assert again.equals(data)


def test_keys_after_a_query_are_not_missed(model: mt.Model) -> None:
    data = mt.explain.attention_knockout(model, PROMPT, queries=(2, 6), keys=(5, 8), answer=11, window=3)
    expected = masked(model, "*", [5], [5])[11]  # only query 5 can read key 5
    assert [data.attrs[of] for of in ("queries", "keys")] == ["33 41 52 60", "60 61 62"]  # without a tokenizer, ids
    agreed(data["log_probability"][1], float(expected) - float(data["clean_log"]), 1e-5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"queries": (1, 3), "keys": (4, 6)},
            r"the queries cannot read the keys anyway; got queries \(1, 3\), keys \(4, 6\)",
        ),
        ({"keys": (6, 12)}, r"the prompt has no such keys; got \(6, 12\)"),
        ({"keys": "word"}, "keys given as text, but the model has no tokenizer"),
        ({"window": 0}, r"window must be an integer of 1 or more \(layers\); got 0"),
    ],
)
def test_what_cannot_be_cut_is_refused(model: mt.Model, change: dict[str, object], text: str) -> None:
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        mt.explain.attention_knockout(model, PROMPT, **({"keys": (1, 3), "answer": 11} | change))
