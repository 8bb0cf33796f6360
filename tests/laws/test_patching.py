"""Activation patching: its ends are exactly 0 and 1, and every cell is its literal forward."""

from __future__ import annotations

import pytest
import torch
from tests import families
from tests.agreement import agreed, agreement

import microtome as mt

CLEAN, CORRUPT = [7, 20, 33, 41, 52], [7, 20, 64, 41, 52]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"))


def difference(logits: torch.Tensor) -> float:
    return float(logits[0, -1, 11] - logits[0, -1, 13])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_stream_where_the_prompts_differ_carries_everything(model: mt.Model, direction: str) -> None:
    data = mt.explain.patch(model, CLEAN, CORRUPT, answer=11, foil=13, direction=direction)
    stream = torch.from_numpy(data["resid_pre"].values)
    assert abs(stream[0, 2] - 1) < 1e-4
    assert stream[0, [0, 1, 3, 4]].abs().max() < 1e-4
    assert stream[:, :2].abs().max() < 1e-4  # nothing flows back to earlier positions


def test_cells_equal_literal_forwards(model: mt.Model) -> None:
    data = mt.explain.patch(
        model,
        CLEAN,
        CORRUPT,
        answer=11,
        foil=13,
        sites=["mlp_out", "attn.z[head]", "attn.v[head]", "attn.pattern[head]"],
    )
    source = model.run(CLEAN, capture=["*.mlp_out", "*.attn.z", "*.attn.v", "*.attn.pattern"])
    low, high = difference(model.run(CORRUPT).logits), difference(source.logits)
    assert float(data["clean"]) == pytest.approx(high, abs=1e-5)
    assert float(data["corrupt"]) == pytest.approx(low, abs=1e-5)
    assert data["attn.v[head]"].dims == ("layer", "kv_head")
    assert data["attn.pattern[head]"].dims == ("layer", "head")
    with agreement(1e-4, most=1.0) as agree:
        for site, value in (
            ("1.mlp_out@3", data["mlp_out"][1, 3]),
            ("2.attn.z[3]", data["attn.z[head]"][2, 3]),
            ("0.attn.v[1]", data["attn.v[head]"][0, 1]),
            ("1.attn.pattern[2]", data["attn.pattern[head]"][1, 2]),
        ):
            got = difference(model.run(CORRUPT, edits=[mt.edit.Patch(site, source=source)]).logits)
            agree(value, (got - low) / (high - low), site)


def test_without_a_foil_the_log_probability_is_read(model: mt.Model) -> None:
    data = mt.explain.patch(model, CLEAN, CORRUPT, answer=11, sites=["resid_post"])
    assert float(data["clean"]) == pytest.approx(float(model.run(CLEAN).logits[0, -1].log_softmax(-1)[11]), abs=1e-5)


def test_an_answer_of_several_tokens_is_read_over_its_span(model: mt.Model) -> None:
    clean, corrupt = [*CLEAN, 11, 12], [*CORRUPT, 11, 12]
    metric = mt.metric.SpanLoss(torch.tensor([[11, 12]]), positions=(4, 5))
    data = mt.explain.patch(model, clean, corrupt, metric=metric, sites=["mlp_out"])

    def loss(edits: list[mt.edit.Edit], tokens: list[int]) -> float:
        log_p = model.run([tokens], edits=edits).logits[0].log_softmax(-1)
        return -float(log_p[4, 11] + log_p[5, 12]) / 2

    assert float(data["clean"]) == pytest.approx(loss([], clean), abs=1e-5)
    low, high = loss([], corrupt), loss([], clean)
    got = loss([mt.edit.Patch("1.mlp_out@2", source=model.run([clean], capture="1.mlp_out"))], corrupt)
    agreed(data["mlp_out"][1, 2], (got - low) / (high - low), 1e-3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"corrupt": [7, 20, 64, 41]}, "differ first at token 2; got 5 and 4 tokens"),
        ({"foil": 11}, 'the foil equals the answer; got "11"'),
        ({"answer": None, "foil": None}, r"there is nothing to read\. To do: give answer= or metric="),
        ({"answer": None}, r"a foil needs an answer to be compared with\. To do: give answer= too"),
        (
            {"metric": mt.metric.Probability(11)},
            r"a metric and an answer cannot both be read\. To do: give one of them",
        ),
        (
            {"metric": mt.metric.Probability(11, position=1), "answer": None, "foil": None},
            r"the metric does not depend on what is patched, so that every effect would be 0; "
            r"got it reads positions \[1\], and the prompts differ from token 2 on",
        ),
        ({"corrupt": CLEAN}, "the clean and the corrupt prompt are the same, so that there is nothing to patch"),
        ({"direction": "sideways"}, "direction must be one of denoise, noise; got 'sideways'"),
        ({"sites": []}, r"sites names nothing; allowed: resid_pre, "),
        ({"sites": ["logits"]}, "sites must be one of resid_pre, .*; got 'logits'"),
        ({"share": "no"}, "share must be True or False; got 'no'"),
        ({"corrupt": None}, r"there is no corrupt prompt\. To do: give corrupt=, give a Task, or name a .csv"),
        ({"answer": " Paris", "foil": None}, 'cannot read " Paris": this model was opened without a tokenizer'),
    ],
)
def test_what_cannot_be_patched_is_refused(model: mt.Model, change: dict[str, object], text: str) -> None:
    arguments = {"clean": CLEAN, "corrupt": CORRUPT, "answer": 11, "foil": 13} | change
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        mt.explain.patch(model, **arguments)
