"""The share of prompts that a circuit answers by itself, beside the model's and random circuits'."""

from __future__ import annotations

import pytest
import torch
from tests.laws.test_circuits import GRAPH, MODEL
from tests.laws.test_edges import ids

import microtome as mt
from microtome import circuits
from microtome.circuits._accuracy import accuracy_of
from microtome.circuits._bench import Bench
from microtome.circuits._question import JUDGED_ON


def given(n: int = 6) -> dict[str, object]:
    """Half of the clean prompts are answered, and one of the corrupt ones says the same."""
    clean = [ids(i)[0].tolist() for i in range(n)]
    corrupt = [ids(i + 50)[0].tolist() for i in range(n)]
    said, other = (MODEL.run(rows).logits[:, -1].argmax(-1).tolist() for rows in (clean, corrupt))
    answers = [a if i % 3 else b for i, (a, b) in enumerate(zip(said, other, strict=True))]
    return {"clean": clean, "corrupt": corrupt, "answer": answers}


def test_all_edges_answer_what_the_model_answers_and_none_what_the_other_run_does() -> None:
    pairs = mt.explain.pairs_of(MODEL, **given())  # type: ignore[arg-type]
    none = torch.zeros_like(GRAPH.mask)
    found = accuracy_of(Bench(MODEL, pairs), torch.stack([GRAPH.mask, none, none]))
    assert found["accuracy"] == found["answered"] == pairs.answered(MODEL)
    other = mt.explain.pairs_of(MODEL, given()["corrupt"], given()["clean"], answer=given()["answer"])  # type: ignore
    assert found["accuracy_control"] == other.answered(MODEL)
    assert 0 < found["answered"] < 1
    ends = mt.stream.share_interval(found["accuracy"] * len(pairs), len(pairs))
    assert (found["accuracy_lo"], found["accuracy_hi"]) == (((), ends[0]), ((), ends[1]))
    assert 0 < found["accuracy_control"] < 1


def test_results_of_circuits_say_it() -> None:
    found = circuits.circuit(MODEL, method="eap", edges=0.3, verify=0, draws=2, **given())  # type: ignore[arg-type]
    assert {"accuracy", "accuracy_lo", "accuracy_hi", "accuracy_control", "answered", "answered_lo"} <= set(found)
    assert found.attrs["judged_on"] == "the pairs that it was found on"
    assert found.attrs["reading"].endswith(JUDGED_ON)
    metric = mt.metric.LogitDifference(11, foil=13)
    rows = given()
    read = circuits.circuit(MODEL, rows["clean"], rows["corrupt"], metric=metric, method="eap", edges=0.3, verify=0)  # type: ignore
    assert bool(read["accuracy"].isnull())
    whole = mt.explain.edge_scores(
        MODEL, mt.explain.pairs_of(MODEL, **given()), "noise", method="eap", steps=1, rules=None  # type: ignore[arg-type]
    ).scores.mean(0)  # fmt: skip
    judged = circuits.faithfulness(MODEL, whole, draws=1, **given())  # type: ignore[arg-type]
    assert float(judged["accuracy"]) == pytest.approx(float(judged["answered"]))
