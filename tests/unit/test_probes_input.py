"""What a probe is given: tables, rows and columns say the same, and what cannot be used is refused in one line."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import families, tokenizers

import microtome as mt
from microtome.probes._examples import read_examples, read_pairs

ROWS = [
    {"text": f"the {word} is {end}", "label": label, "group": word}
    for word in ("apple", "music", "water", "paper", "house", "river")
    for label, end in (("good", "one"), ("bad", "two"))
]


@cache
def model() -> mt.Model:
    config = families.build("llama-gqa").config
    config.vocab_size = 6000
    return mt.open(families.made(config, "wide"), tokenizer=tokenizers.build("bpe-bos"), prove=False)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_files_rows_and_columns_say_the_same(tmp_path: Path, ending: str) -> None:
    one = read_examples(written(tmp_path / f"data{ending}", ROWS))
    other = read_examples(ROWS)
    columns = read_examples({name: [row[name] for row in ROWS] for name in ROWS[0]})
    tuples = read_examples([(row["text"], row["label"], row["group"]) for row in ROWS])
    assert one.texts == other.texts == columns.texts == tuples.texts
    assert one.labels == other.labels == columns.labels == tuples.labels == ("good", "bad") * 6
    assert one.groups == other.groups == columns.groups == tuples.groups


def test_labels_of_any_library_are_names(tmp_path: Path) -> None:
    given = [True, 1, np.int64(3), np.float64(2.0), "x"]
    assert read_examples([("a", label) for label in given]).labels == ("True", "1", "3", "2", "x")


def test_repetitions_of_a_signal_stand_in_columns_or_lists(tmp_path: Path) -> None:
    rows = [{"text": "a", "one": 1.5, "two": -2}, {"text": "b", "one": 3, "two": 0.5}]
    path = written(tmp_path / "data.csv", rows)
    assert read_examples(path, label="one,two", signal=True).labels == ((1.5, -2.0), (3.0, 0.5))
    assert read_examples([("a", [1.5, -2]), ("b", [3, 0.5])], signal=True).labels == ((1.5, -2.0), (3.0, 0.5))


def changed(at: int, **values: Any) -> list[dict[str, Any]]:
    return [row | values if i == at else row for i, row in enumerate(ROWS)]


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one class": ([row | {"label": "good"} for row in ROWS], {}, 'labels of one class: .*; got "good" alone'),
    "a class of one group": (changed(0, label="odd"), {"folds": 2}, 'the class "odd" is in one group alone'),
    "groups that leak": (
        changed(2, text="the apple is one"), {"folds": 2},
        'groups leak: row 0, "text" and row 2, "text" are the same up to where they are probed; '
        'got groups "apple" and "music"',
    ),
    "groups that leak up to the position": (
        [row | {"group": f"{row['group']} {row['label']}"} for row in ROWS], {"site": "*.resid_post@2", "folds": 2},
        "groups leak: .*are the same up to where they are probed",
    ),
    "too few groups": (ROWS, {"folds": 7}, "too few groups for 7 folds; got 6; allowed: 7 or more"),
    "nan as a label": (changed(3, label=math.nan), {}, 'row 3, "label" has no label; got nan'),
    "no label": (changed(3, label=None), {}, 'row 3, "label" has no label; got nothing'),
    "a number as a class": (changed(3, label=0.5), {}, 'row 3, "label" is no class; got 0.5'),
    "no column": ([{"text": "a"}], {}, 'row 0 has no column "label"; got text'),
    "no text": (changed(1, text=""), {}, 'row 1, "text" is neither text nor token ids; got nothing'),
    "no group": (changed(1, group=""), {}, 'row 1, "group" names no group; got nothing'),
    "a position outside": (
        [row | {"position": 99} for row in ROWS], {}, 'row 0, "text": there is nothing where it is probed',
    ),
    "a position that is none": ([row | {"position": 1.5} for row in ROWS], {}, 'row 0, "position" is no position'),
    "no rows": ([], {}, "cannot read this as examples; got nothing"),
    "no examples": (3, {}, "cannot read this as examples; got int"),
    "columns of unequal length": ({"text": ["a"], "label": []}, {}, "the columns have different lengths"),
    "nan in a signal": (
        [row | {"label": math.nan if i == 2 else i} for i, row in enumerate(ROWS)], {"kind": "ridge"},
        'row 2, "label" is not finite; got nan',
    ),
    "words in a signal": (ROWS, {"kind": "ridge"}, 'row 0, "label" is no number'),
    "a signal that stands still": (
        [row | {"label": 2} for row in ROWS], {"kind": "ridge"}, "the signal never changes; got 2",
    ),
    "delays without groups": (
        [{"text": row["text"], "label": i} for i, row in enumerate(ROWS)], {"kind": "ridge", "delays": (1,)},
        "delays need groups; got none named",
    ),
    "tastes without users": (
        [{"chosen": f"{w} one", "rejected": f"{w} two"} for w in "abcdef"], {"kind": "ideal"},
        "ideal points need users",
    ),
    "one type": ([row | {"type": "x"} for row in ROWS], {"folds": 2}, "the control task needs types"),
    "a pair of one text": (
        [{"chosen": "a", "rejected": "a"}], {"kind": "preference"}, "both texts of the pair are the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_data_that_cannot_be_used_are_refused_in_one_line(name: str) -> None:
    data, options, text = BAD[name]
    with pytest.raises(mt.errors.DataError, match=text) as refused:
        mt.probes.probe(model(), data, untrained=False, **options)
    assert "\n" not in str(refused.value)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a site of pairs": ({"site": "*.attn.pattern"}, mt.errors.SiteError, "is of pairs of positions"),
    "sites at different positions": (
        {"site": "*.resid_post@-1,*.mlp_out@0"}, mt.errors.SiteError, "must be probed at the same positions",
    ),
    "no site": ({"site": "9.resid_post@-1"}, mt.errors.SiteError, "9.resid_post"),
    "generated": ({"site": "*.resid_post@generated"}, mt.errors.SiteError, "names tokens of a generation"),
    "a target of a signal": (
        {"kind": "ridge", "target": "x"}, mt.errors.ArgumentError, "target is no option of probes of the kind ridge",
    ),
    "inputs of another kind": (
        {"inputs": np.array(["a", "b"])}, mt.errors.ArgumentError, "inputs is no option of probes of the kind linear",
    ),
    "one text as inputs": (
        {"kind": "concept", "answer": 3, "folds": 2, "inputs": "a text"}, mt.errors.DataError,
        "inputs are no list of texts; got str",
    ),
    "k of another kind": ({"k": 3}, mt.errors.ArgumentError, "k is no option of probes of the kind linear"),
    "k beyond the width": ({"kind": "sparse", "k": 999, "folds": 2}, mt.errors.ArgumentError, "k must be an integer"),
    "delays of another kind": ({"delays": (1,)}, mt.errors.ArgumentError, "delays is no option of probes"),
    "a concept without a token": ({"kind": "concept"}, mt.errors.ArgumentError, "is tested on the logit of a token"),
    "a foil alone": ({"foil": 3}, mt.errors.ArgumentError, "a foil is subtracted from an answer"),
    "an answer of a signal": (
        {"kind": "ridge", "answer": 3}, mt.errors.ArgumentError, "(causal|answer) is no option of probes",
    ),
    "a target that is no class": ({"target": "x", "folds": 2}, mt.errors.ArgumentError, 'no class "x"'),
    "a shift to nowhere": ({"shift": ("x",)}, mt.errors.ArgumentError, 'no group "x" to shift to'),
    "a mixture of one layer": (
        {"kind": "mix", "site": "1.resid_post@-1", "folds": 2}, mt.errors.ArgumentError, "several layers of one site",
    ),
    "a past that is to come": ({"kind": "ridge", "delays": (-1,)}, mt.errors.ArgumentError, "delays must be 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_options_that_do_nothing_or_do_not_fit_are_refused(name: str) -> None:
    options, kind, text = WRONG[name]
    data = ROWS if options.get("kind") != "ridge" else [row | {"label": i} for i, row in enumerate(ROWS)]
    with pytest.raises(kind, match=text) as refused:
        mt.probes.probe(model(), data, untrained=False, **options)
    assert "\n" not in str(refused.value)


def test_rows_that_differ_where_they_are_probed_may_be_of_different_groups() -> None:
    rows = [row | {"group": f"{row['group']} {row['label']}"} for row in ROWS]  # those of a word differ in their end
    assert mt.probes.probe(model(), rows, folds=2, untrained=False, kind="mass-mean").attrs["groups"] == len(ROWS)


def test_a_span_is_probed_at_its_last_token_or_over_all_of_them() -> None:
    rows = [{"text": f"the {w} and {w} of it", "label": "ab"[i % 2], "span": f"and {w}"}
            for i, w in enumerate(("apple", "music", "water", "paper"))]  # fmt: skip
    found = mt.probes.fit(model(), rows, folds=2, untrained=False, kind="mass-mean")
    mean = mt.probes.fit(model(), rows, folds=2, untrained=False, kind="mass-mean", pool="mean")
    run = model().run([rows[0]["text"]], capture="1.resid_post")["1.resid_post"][0].double()
    first, end = mt.explain.span_of(model(), model().to_tokens(rows[0]["text"])[0], rows[0]["span"])
    assert end - first >= 2
    from microtome.probes._problem import problem

    options: dict[str, Any] = {"kind": "linear", "field": "text", "label": "label", "group": None, "folds": 2,
                               "shift": (), "seed": 0, "untrained": False, "site": "1.resid_post"}  # fmt: skip
    (last,) = problem(model(), rows, pool="last", **options).states.values()
    (whole,) = problem(model(), rows, pool="mean", **options).states.values()
    assert np.allclose(last[0], run[end - 1], atol=1e-5)
    assert np.allclose(whole[0], run[first:end].mean(0), atol=1e-5)
    assert not np.allclose(found.direction(1), mean.direction(1))


def test_where_rows_say_where_they_are_probed_texts_must_too(tmp_path: Path) -> None:
    rows = [{"text": f"the {w} and {w} of it", "label": "ab"[i % 2], "position": 1 + i % 3}
            for i, w in enumerate(("apple", "music", "water", "paper", "house", "river"))]  # fmt: skip
    found = mt.probes.fit(model(), rows, folds=2, untrained=False, kind="mass-mean")
    found.save(tmp_path / "probe.safetensors")
    again = mt.probes.Probe.load(tmp_path / "probe.safetensors", model())
    texts, where = [row["text"] for row in rows], [row["position"] for row in rows]
    run = model().run([texts[2]], capture="1.resid_post")["1.resid_post"][0].double()
    for probe in (found, again):
        for use in (
            lambda p: p.predict(model(), texts, 1), lambda p: p.logits(model(), texts, 1), lambda p: p.edit(1),
            lambda p: mt.probes.parts(p, model(), texts[0], 1),
        ):  # fmt: skip
            with pytest.raises(mt.errors.ArgumentError, match="was fitted where each row said"):
                use(probe)
        logits = probe.logits(model(), texts, 1, positions=where)
        assert np.allclose(logits[2], probe.reader(1).logits(run[[where[2]]])[0], atol=1e-4)
        assert set(probe.predict(model(), texts, 1, positions=where)) <= {"a", "b"}
        assert probe.edit(1, positions="-1").site.endswith("@-1")
        own = mt.probes.parts(probe, model(), texts[2], 1, position=where[2])
        assert float(own["logit"]) == pytest.approx(float(probe.normal(1) @ run[where[2]]), rel=1e-3, abs=1e-4)
    with pytest.raises(mt.errors.ArgumentError, match="one place for each text; got 1 for 6 texts"):
        found.predict(model(), texts, 1, positions=[1])


def test_pairs_that_share_a_text_are_one_group() -> None:
    from microtome.probes._problem import problem

    data = [("a one", "b two"), ("c one", "d two"), ("a one", "e two"), ("f one", "d two"), ("g one", "h two")]
    assert read_pairs(data)[0].texts[2] == "a one"
    it = problem(
        model(), data, site="*.resid_post@-1", kind="preference", field="text", label="label", group=None, pool="last",
        folds=3, shift=(), seed=0, untrained=False,
    )  # fmt: skip
    groups = it.folds.groups
    assert groups[0] == groups[2] != groups[1] == groups[3] != groups[4]


def test_probes_of_several_heads_have_no_projection_and_of_several_sites_need_one_named() -> None:
    found = mt.probes.fit(model(), ROWS, site="1.attn.z@-1,*.mlp_out@-1", folds=2, untrained=False)
    with pytest.raises(mt.errors.EditError, match="is over 4 heads"):
        found.edit(1, site="attn.z", ablate=True)
    assert found.edit(1, site="attn.z").value.shape == (4, model().anatomy.d_head)  # type: ignore[union-attr]
    with pytest.raises(mt.errors.ArgumentError, match="2 probes were fitted there"):
        found.direction(1)
    with pytest.raises(mt.errors.ArgumentError, match="no probe was fitted there"):
        found.direction(2, site="attn.z")
    with pytest.raises(mt.errors.ArgumentError, match='no class "odd"'):
        found.direction(1, "odd", site="mlp_out")
