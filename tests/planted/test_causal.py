"""Causal methods find what was written into the hand-built Llamas, and nothing where nothing was."""

from __future__ import annotations

from random import Random

import pytest

import microtome as mt
from microtome import planted


def ask_facts(truth: dict, relation: int = 0) -> tuple[list[list[int]], list[int]]:
    """BOS, two fillers, a subject, a filler, a relation; and the objects."""
    rng = Random(1)
    rows = [
        [
            truth["bos"],
            *rng.choices(truth["fillers"], k=2),
            s,
            rng.choice(truth["fillers"]),
            truth["relations"][relation],
        ]
        for s in truth["subjects"]
    ]
    return rows, [facts[relation] for facts in truth["facts"]]


def test_tracing_finds_the_memory_and_the_head_that_reads_it() -> None:
    it = planted.fact_memory(0)
    rows, objects = ask_facts(it.truth)
    other = next(i for i in range(4, 32) if objects[i] != objects[3])
    corrupt = [it.truth["subjects"][other] if p == 3 else t for p, t in enumerate(rows[3])]
    data = mt.explain.causal_trace(it.model, rows[3], subject=3, answer=objects[3], corrupt=corrupt, window=1)
    lost = float(data["clean"] - data["corrupt"])
    assert data.attrs["known"] == 1
    assert lost > 0.8
    noisy = mt.explain.causal_trace(it.model, rows[3], subject=3, answer=objects[3], window=1, noise=6.0, samples=10)
    gone = float(noisy["clean"] - noisy["corrupt"])
    assert gone > 0.5
    assert float(noisy["resid"][1, 5]) == pytest.approx(gone, abs=1e-4)  # the end decides in the end
    assert float(noisy["attn"][1, 5]) > 0.5 * gone
    assert float(noisy["attn_lo"][1, 5]) > 0.2 * gone
    memory = it.truth["layer"]
    assert float(data["mlp"][memory, 3]) > 0.8 * lost  # what the subject's MLP wrote is all that is missing
    assert float(data["attn"][1, 5]) > 0.8 * lost
    assert float(data["resid"][memory, 3]) > 0.8 * lost
    elsewhere = data["mlp"].values.copy()
    elsewhere[memory, 3] = 0
    assert float(data["resid"][memory, 5]) < 0.2 * lost < 0.8 * lost < float(data["resid"][1, 5])
    assert abs(elsewhere).max() < 0.2 * lost


def test_knock_out_finds_the_layer_that_reads_the_subject() -> None:
    it = planted.fact_memory(0)
    rows, objects = ask_facts(it.truth)
    data = mt.explain.attention_knockout(it.model, rows[3], queries=-1, keys=3, answer=objects[3], window=1)
    assert float(data["relative"][1]) < -0.8
    assert abs(float(data["relative"][0])) < 0.05
    assert float(abs(data["relative_control"]).max()) < 0.2


def test_pairs_of_several_lengths_find_the_memory() -> None:
    it = planted.fact_memory(2)
    rows, objects = ask_facts(it.truth)
    rows = [row[:1] + row[1:2] * (i % 3) + row[1:] for i, row in enumerate(rows[:12])]
    subjects = it.truth["subjects"]
    corrupts = [[subjects[(i + 13) % 32] if t in subjects else t for t in row] for i, row in enumerate(rows)]
    foils = [objects[(i + 13) % 32] for i in range(12)]
    kept = [i for i in range(12) if foils[i] != objects[i]]
    spans = [{"subject": 3 + i % 3, "after": 4 + i % 3, "last": -1} for i in range(12)]
    data = mt.explain.patch(
        it.model, [rows[i] for i in kept], [corrupts[i] for i in kept], answer=[objects[i] for i in kept],
        foil=[foils[i] for i in kept], spans=[spans[i] for i in kept], sites=["mlp_out", "attn_out"],
    )  # fmt: skip
    assert float(data["mlp_out"].sel(layer=0, span="subject")) == pytest.approx(1, abs=0.1)
    assert float(data["attn_out"].sel(layer=1, span="last")) == pytest.approx(1, abs=0.1)
    assert float(data["mlp_out_p"].sel(layer=0, span="subject")) <= 2 / 2 ** len(kept) + 1e-9
    assert float(abs(data["mlp_out"].sel(span="after")).max()) < 1e-3
    assert float(data["mlp_out_lo"].sel(layer=0, span="subject")) > 0.8


@pytest.mark.parametrize("seed", [0, 4])
def test_a_planted_backup_head_repairs_with_slope_minus_one(seed: int) -> None:
    it = planted.backup_head(seed)
    truth, rng = it.truth, Random(3)
    rows = []
    for name in truth["names"]:
        row = [truth["bos"], *rng.choices(truth["fillers"], k=6), truth["ask"]]
        row[rng.randrange(1, 7)] = name
        rows.append(row)
    (a, main), (b, backup) = truth["main"], truth["backup"]
    main_head, backup_head = f"{a}.attn.z[{main}]", f"{b}.attn.z[{backup}]"
    data = mt.explain.component_effects(
        it.model, rows, answer=truth["names"], components="heads", receivers="heads", ablation="zero"
    )
    one = data.sel(component=main_head)
    assert float(one["slope"]) == pytest.approx(truth["slope"], abs=0.05)
    assert float(one["slope_lo"]) <= float(one["slope"]) <= float(one["slope_hi"])
    assert float(one["direct"]) < -8
    assert float(one["repair"].sel(receiver=backup_head)) == pytest.approx(-float(one["direct"]), rel=0.05)
    assert abs(float(one["total"])) < 0.1 * abs(float(one["direct"]))
    assert float(one["direct_p"]) < 0.001
    rest = data.drop_sel(component=main_head)
    assert float(abs(rest["repair"]).max()) < 0.05 * abs(float(one["direct"]))  # nothing else is repaired
    assert float(abs(one["total_control"])) < 0.05 * abs(float(one["direct"]))


def test_another_filler_corrupts_nothing_so_that_nothing_restores() -> None:
    it = planted.fact_memory(0)
    rows, objects = ask_facts(it.truth)
    filler = next(f for f in it.truth["fillers"] if f not in rows[3])
    corrupt = [filler if p == 1 else t for p, t in enumerate(rows[3])]
    data = mt.explain.causal_trace(it.model, rows[3], subject=1, answer=objects[3], corrupt=corrupt, window=1)
    assert abs(float(data["clean"] - data["corrupt"])) < 0.01
    assert max(float(abs(data[kind]).max()) for kind in ("resid", "mlp", "attn")) < 0.01
