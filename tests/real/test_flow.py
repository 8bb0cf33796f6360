"""On the default model: a fact flows from its subject, and an answer comes from the sentence that says it."""

from __future__ import annotations

import pytest

import microtome as mt

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


def test_a_fact_flows_from_its_subject(model: mt.Model) -> None:
    data = mt.explain.flow(model, "The capital of France is", answer=" Paris", foil=" Rome")
    assert abs(float(data["gap"])) < 1e-3
    assert abs(data["tokens"].sum("pos") - 1).max() < 1e-6
    assert str(data["component"].values[0]) == "23.attn.z[4] @3 France > @4 is"
    assert float(data["route_exact"].min()) == float(data["route_exact"][0]) < -3
    assert float(data["rank_correlation"]) > 0.6


def test_the_sentence_that_says_it_is_found(model: mt.Model) -> None:
    text = (
        "Mary lives in Paris. John lives in Rome. Anna lives in Madrid. Peter lives in Berlin. Where does John live? "
        "John lives in"
    )  # it answers with the city that came last, and the sentence that says that is found
    data = mt.explain.context(model, text, tokens=1)
    assert data.attrs["answer"] == " Berlin"
    assert data.attrs["sentence"] == "3 Peter lives in Berlin."
    assert data.attrs["loss_agrees"] == 1
    assert float(data["gated"]) < float(data["gated_random"])
