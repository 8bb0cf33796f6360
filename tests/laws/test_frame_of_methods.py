"""What a declaration turns into: one toy measure appears everywhere, and what is wrong with one is said in a line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xarray as xr
from tests import families
from tests.cli.conftest import TEXT, tokenizer
from torch import Tensor

import microtome as mt
from microtome.method import Argument, Column, Found, Seen, Source, Text, forget, measure, question
from microtome.method._document import page
from microtome.stream import LEAST, OF_MEANS, Corpus, TokenBatch

SOURCE = Source("Nobody", "A Toy for Tests", 2026)


def toy_columns() -> tuple[Column, ...]:
    return (
        Column("toy_size", "norm", "mean size of the stream, halved", "toy_even", (0, None), title="toy", chart="Toys"),
        Column("toy_even", "norm", "the same for a stream of ones", range=(0, None), chart="Toys"),
    )


@pytest.fixture
def toy() -> Iterator[str]:
    @measure(
        "toy", of="layer", sites="resid_post", question="How large is a toy?", columns=toy_columns(), source=SOURCE,
        cost="nothing", check="tests/laws/test_frame_of_methods.py",
    )  # fmt: skip
    def sizes(
        seen: Seen, half: Annotated[float, Argument("what to multiply by", "ratio", least=0)] = 0.5
    ) -> dict[str, Tensor]:
        """Half the size of the stream."""
        x = seen["resid_post"].double()
        return {"toy_size": half * x.norm(dim=-1), "toy_even": half * torch.ones_like(x).norm(dim=-1)}

    yield "toy"
    forget("toy")


def ids(rows: int = 4, length: int = 12) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), prove=False)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def corpus(**groups: str) -> Mapping[str, Corpus]:
    return {name: Corpus.of(name, [text]) for name, text in groups.items()}


# ------------------------------------------------------------------------------------------ one declaration, everywhere


def test_a_toy_measure_gives_its_columns_with_intervals_and_what_it_says_of_them(toy: str, model: mt.Model) -> None:
    rows = ids(9)
    data = mt.measure(model, toy, text=rows)
    run = model.run(rows, capture="*.resid_post")
    norms = torch.stack([run[f"{i}.resid_post"].double().norm(dim=-1) for i in range(3)])
    assert np.allclose(data["toy_size"], 0.5 * norms.mean((1, 2)))
    assert (data["toy_size_lo"] < data["toy_size"]).all()
    assert (data["toy_size"] < data["toy_size_hi"]).all()
    assert data["toy_size"].attrs["control"] == "toy_even"
    assert (data["toy_size"].attrs["unit"], data["toy_size_lo"].attrs["unit"]) == ("norm", "norm")
    assert "95 % interval" in data["toy_size_hi"].attrs["meaning"]
    even = 0.5 * model.anatomy.d_model**0.5  # of every row alike: taken off the value and off both ends
    for end in ("", "_lo", "_hi"):
        assert np.allclose(data[f"toy_size_diff{end}"], data[f"toy_size{end}"] - even)
    assert data["toy_size_diff"].attrs == {"unit": "norm", "meaning": "toy_size minus its control, toy_even"}
    assert (
        data["toy_size_diff_lo"]
        .attrs["meaning"]
        .endswith("interval over examples of: toy_size minus its control, toy_even")
    )
    assert "toy_even_diff" not in data
    assert data.attrs["interval"] == OF_MEANS
    few = mt.measure(model, toy, text=ids(LEAST - 1))
    assert np.isfinite(few["toy_size_diff"]).all()
    assert np.isnan(few["toy_size_lo"]).all()
    assert np.isnan(few["toy_size_diff_lo"]).all()
    assert data.attrs["source"] == str(SOURCE)
    assert data.attrs["fingerprint"] == model.fingerprint
    assert np.allclose(mt.measure(model, toy, text=rows, half=1.0)["toy_size"], 2 * data["toy_size"])
    with pytest.raises(mt.errors.ArgumentError, match=r"half must be a number of 0 or more \(ratio\); got -1"):
        mt.measure(model, toy, text=ids(), half=-1)


def test_a_toy_measure_is_in_the_atlas_its_schema_and_its_pages(toy: str, reader: Any, tmp_path: Any) -> None:
    model = mt.open(families.build("llama-gqa"), tokenizer=reader, prove=False)
    mt.atlas.write_atlas(model, tmp_path / "atlas", text=[TEXT] * 20, tokens=200, length=20, measures=[toy, "stream"])
    table = pq.read_table(tmp_path / "atlas" / "layers.parquet")
    assert {"toy_size", "toy_size_lo", "toy_size_hi", "toy_even"} <= set(table.column_names)
    stored = table.schema.field("toy_size").metadata
    assert stored[b"unit"] == b"norm"
    assert stored[b"control"] == b"toy_even"
    manifest = json.loads((tmp_path / "atlas" / "manifest.json").read_text())
    column = manifest["tables"]["layers"]["columns"]["toy_size"]
    assert (column["chart"], column["title"], column["range"]) == ("Toys", "toy", [0, None])
    assert manifest["measures"]["toy"]["question"] == "How large is a toy?"
    pages = (tmp_path / "atlas" / "assets" / "data" / "model.js").read_text()
    assert '"toy_size"' in pages
    assert '"Toys"' in pages


def test_a_toy_measure_has_a_row_in_the_documentation_and_shows_itself(toy: str, model: mt.Model) -> None:
    method = mt.methods("measure")[toy]
    text = page([(method, "microtome measure toy")])
    row = next(line for line in text.splitlines() if line.startswith("| `toy`"))
    for part in ("How large is a toy?", 'mt.measure(model, "toy")', "microtome measure toy", "*A Toy for Tests*, 2026"):
        assert part in row
    assert "`toy_size`: mean size of the stream, halved (norm; control: toy_even)" in str(method.function.__doc__)
    assert "half: what to multiply by" in str(method.function.__doc__)
    assert "How large is a toy?" in repr(mt.measures())
    shown = mt.measure(model, toy, text=ids())._repr_html_()
    assert "<svg" in shown
    assert "toy" in shown


# ---------------------------------------------------------------------------------------------- passes, groups, merging


def test_measures_of_one_pass_give_what_each_gives_alone(model: mt.Model) -> None:
    names = ("stream", "head_norms", "activations", "firing", "loss", "kurtosis", "effective_rank")
    calls: list[int] = []
    handle = model.hf.register_forward_pre_hook(lambda *_: calls.append(1))
    together = mt.measure(model, *names, text=ids(), rows=2)
    count = len(calls)
    for name in names:
        alone = mt.measure(model, name, text=ids(), rows=2)
        for column in alone.data_vars:
            assert np.array_equal(alone[column], together[column], equal_nan=True), column
    handle.remove()
    assert count == 4  # two batches of the text, two of its first rows
    assert len(calls) == count + 2 * len(names)


def test_a_group_is_what_its_own_rows_give_and_all_groups_make_the_whole(reader: Any) -> None:
    """The means of groups, each weighed by its tokens, are the mean of the whole; every group has its share."""
    model = mt.open(families.build("llama-gqa"), tokenizer=reader, prove=False)
    words = TEXT.split()
    text = corpus(one=" ".join(words[:13] * 9), two=" ".join(words[5:24] * 6), three=" ".join(words[::-1][:20] * 6))
    options: dict[str, Any] = {"text": text, "length": 7, "rows": 2, "tokens": 180}
    names = ("activations", "firing", "massive", "stream", "loss")
    whole = mt.measure(model, *names, **options)
    parts = mt.measure(model, *names, groups=True, **options)
    assert parts["mean"].dims == ("group", "layer", "neuron")
    assert list(parts["group"].values) == ["one", "two", "three"]
    batches = list(Text(text, tokens=180, length=7, rows=2).batches(model).parts)
    assert all(len(row.unique()) == 1 for batch in batches for row in batch.group)
    group = torch.cat([batch.group.flatten() for batch in batches])
    share = torch.bincount(group, minlength=3).double().numpy() / len(group)
    assert share.tolist() == [1 / 3] * 3
    for name in ("mean", "firing_rate"):
        assert np.allclose(np.einsum("g,gln->ln", share, parts[name]), whole[name], atol=1e-10), name
    assert np.allclose(parts["max"].max("group"), whole["max"])
    assert np.allclose(parts["max_abs"].max("group"), whole["max_abs"])
    assert np.allclose(parts["attn_share"].mean("group"), whole["attn_share"])
    assert float(np.abs(parts["mean"][0] - parts["mean"][1]).max()) > 1e-3
    for number, (name, own) in enumerate(text.items()):  # each group is what its own text gives alone
        own = mt.stream.DocumentBatches(mt.stream.corpus_of(own), reader, length=7, rows=2, tokens=60)
        alone = mt.measure(model, "activations", "loss", text=own)
        assert np.allclose(alone["mean"], parts["mean"].sel(group=name)), number
        assert np.isfinite(alone["loss_hi"])
        assert np.allclose(alone["loss_hi"], parts["loss_hi"].sel(group=name), atol=1e-9)
    chosen = mt.measure(model, "activations", groups=["three", "one"], **options)
    assert np.array_equal(chosen["mean"][1], parts["mean"][0])
    assert list(mt.measure(model, "activations", groups="two", **options)["group"].values) == ["two"]


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (["four"], 'no group "four" in this text; allowed: one, two'),
        ([], r"groups must be True, or names of groups; got \[\]"),
        (3, "groups must be True, or names of groups; got 3"),
    ],
)
def test_wrong_groups_are_refused_before_anything_runs(reader: Any, groups: Any, text: str) -> None:
    model = mt.open(families.build("llama-gqa"), tokenizer=reader, prove=False)
    ran: list[int] = []
    model.hf.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(mt.errors.ArgumentError, match=text):
        mt.measure(model, "firing", text=corpus(one=TEXT, two=TEXT), groups=groups)
    with pytest.raises(mt.errors.ArgumentError, match="groups belong to a text, and none of these measures reads"):
        mt.measure(model, "induction", groups=True)
    assert not ran


def test_the_first_rows_are_shared_among_the_groups(reader: Any) -> None:
    model = mt.open(families.build("llama-gqa"), tokenizer=reader, prove=False)
    data = mt.measure(model, "kurtosis", text=corpus(one=TEXT, two=" ".join(TEXT.split()[::-1])), groups=True)
    assert np.isfinite(data["kurtosis"].values).all()
    assert float(np.abs(data["kurtosis"][0] - data["kurtosis"][1]).max()) > 1e-2


def test_an_option_of_one_measure_does_not_reach_the_text_of_another(model: mt.Model) -> None:
    alone = mt.measure(model, "firing", text=ids(6))
    beside = mt.measure(model, "firing", "induction", text=ids(6), sequences=2, period=12)
    assert np.array_equal(alone["firing_rate"], beside["firing_rate"])
    with pytest.raises(mt.errors.ArgumentError, match="none of these measures has an argument sequences"):
        mt.measure(model, "firing", text=ids(), sequences=2)


def test_batches_made_outside_keep_their_groups_and_need_starts_of_their_own(model: mt.Model) -> None:
    made = TokenBatch.of(ids())
    other = replace(TokenBatch.of(ids(2), torch.tensor([100, 112])), group=torch.ones(2, 12, dtype=torch.long))
    data = mt.measure(model, "loss", text=[made, other], groups=True)
    assert list(data["group"].values) == ["0", "1"]
    assert float(data["loss"][1]) == pytest.approx(float(mt.measure(model, "loss", text=ids(2))["loss"]))
    generator = (batch for batch in (made, other))
    assert mt.measure(model, "loss", text=generator)["loss"].dims == ()
    with pytest.raises(mt.errors.DataError, match="two rows of the batches have the same start; got 8 rows"):
        mt.measure(model, "loss", text=[TokenBatch.of(ids()), TokenBatch.of(ids())])
    mixed = replace(made, group=torch.arange(12).expand(4, -1) // 6)
    with pytest.raises(mt.errors.DataError, match="a row of the text holds several groups"):
        mt.measure(model, "ablation_loss", text=[mixed], groups=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (5, "cannot read this as text; got int; allowed: a corpus"),
        ({}, "the mapping from groups to texts is empty"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"tokens must be integers \[row, pos\]; got torch.int64 \[2, 3, 4\]"),
        (torch.zeros(2, 3), "tokens must be integers"),
        ("missing.txt", '"missing.txt"'),
    ],
)
def test_what_is_no_text_is_refused(reader: Any, text: Any, says: str) -> None:
    model = mt.open(families.build("llama-gqa"), tokenizer=reader, prove=False)
    with pytest.raises(mt.errors.DataError, match=says):
        mt.measure(model, "firing", text=text)


def test_a_sentence_is_a_text_and_groups_may_be_of_any_kind(reader: Any) -> None:
    model = mt.open(families.build("llama-gqa"), tokenizer=reader, prove=False)
    assert (
        mt.measure(model, "firing", text="the cat sat. the dog ran to the barn")
        .attrs["text"]
        .startswith("text, sha256")
    )
    data = mt.measure(model, "firing", text={"a": ids(), "b": [TEXT]}, groups=True, length=8)
    assert np.allclose(data["firing_rate"][0], mt.measure(model, "firing", text=ids())["firing_rate"])


def test_a_result_says_what_was_read_and_with_which_arguments(model: mt.Model) -> None:
    attrs = mt.measure(model, "top_examples", "loss", text=ids()).attrs
    assert (attrs["tokens"], attrs["length"], attrs["rows"], attrs["examples"]) == (20_000, 256, 4, 5)
    assert attrs["text"] == "tokens"
    assert "Key-Value Memories" in attrs["source"]
    assert "Shannon" in attrs["source"]


def test_positions_and_groups_are_those_of_the_documents(reader: Any) -> None:
    joined = mt.stream.joined("both", corpus(one=" ".join(TEXT.split()[:9]), two=" ".join(TEXT.split()[:14])).values())
    batches = list(mt.stream.TokenBatches(joined, reader, length=5, rows=2, tokens=23))
    position = torch.cat([b.position.flatten() for b in batches]).tolist()
    group = torch.cat([b.group.flatten() for b in batches]).tolist()
    assert position[:10] == [*range(10)]  # nine tokens and the separator behind them
    assert position[10:] == [*range(len(position) - 10)]
    assert group == [0] * 10 + [1] * (len(position) - 10)


@pytest.mark.parametrize("names", [("stream", "loss"), ("massive", "activations", "kurtosis"), ("head_norms",)])
def test_parts_of_a_text_merge_to_the_whole(model: mt.Model, names: tuple[str, ...]) -> None:
    from microtome.method import Bound, Pass, declared

    tokens = ids(6)

    def part(rows: slice) -> Pass:
        bound = [Bound(one, one.statistic({}), one.layers(model)) for one in map(declared, names)]  # type: ignore[attr-defined]
        made = Pass(model, bound, Text())
        for row in range(*rows.indices(6)):
            made.update(TokenBatch.of(tokens[row : row + 1], torch.tensor([row * 12])))
        return made

    whole = part(slice(None)).results()
    for order in ((0, 1), (1, 0)):
        halves = [part(slice(0, 2)), part(slice(2, 6))]
        merged = halves[order[0]].merge(halves[order[1]]).results()
        for name, data in whole.items():
            for column in data.data_vars:
                assert np.allclose(data[column], merged[name][column], rtol=1e-10, equal_nan=True), column
    other = Pass(model, [], Text())
    with pytest.raises(mt.errors.DataError, match="cannot merge passes of other measures"):
        other.merge(part(slice(0, 1)))


# ------------------------------------------------------------------------------------------------------------ bad input

GOOD: dict[str, Any] = {
    "of": "layer", "sites": "resid_post", "question": "What?", "columns": toy_columns(), "source": SOURCE,
    "cost": "nothing", "check": "tests/laws/test_frame_of_methods.py",
}  # fmt: skip
WRONG = [
    ({"check": ""}, 'the measure "bad" lacks check'),
    ({"source": ()}, 'the measure "bad" lacks source'),
    ({"cost": "", "question": ""}, 'the measure "bad" lacks question and cost'),
    ({"columns": ()}, 'the measure "bad" lacks columns'),
    ({"sites": "resid"}, 'names the site "resid", which does not exist'),
    ({"columns": (Column("bad_x", "", "a thing", "none: no"),)}, 'has a column "bad_x" without a unit'),
    ({"columns": (Column("bad_x", "1", "a thing"),)}, 'has a column "bad_x" without a control'),
    ({"columns": (Column("bad_x", "1", "", "none: no"),)}, 'has a column "bad_x" without a meaning'),
    ({"columns": (Column("bad_x", "1", "a thing", "bad_y"),)}, 'whose control "bad_y" is not one of its columns'),
    ({"columns": (Column("bad_lo", "1", "a thing", "none: no"),)}, "whose ending belongs to intervals"),
    ({"optional": "resid_middle"}, 'names the site "resid_middle", which does not exist'),
    ({"source": Source("", "", 0)}, "has a source without authors and title and year"),
    ({"check": "by eye, and twice"}, "names no test that proves it; got by eye, and twice"),
    ({"columns": (Column("bad_x", "1", "a thing", "bad_x"),)}, 'has a column "bad_x" that is its own control'),
    ({"columns": (Column("bad_x", "1", "a thing", "none: no", shade="bad_y"),)}, 'whose shade "bad_y" is not one of'),
    ({"columns": (Column("bad_x", "1", "a thing", "none: no", (1, 0)),)}, "ends below its beginning; got 1 to 0"),
    ({"sites": "logits"}, 'is of each layer, but sees the site "logits", which is of the whole model'),
    ({"sites": ("resid_post", "final")}, 'is of each layer, but sees the site "final"'),
    ({"optional": "embed"}, 'is of each layer, but sees the site "embed"'),
    ({"columns": (Column("bad_x", "1", "a thing", "none: no", extra=("rank",)),)}, "axes of its own, which the mean"),
    ({"columns": (Column("loss", "1", "a thing", "none: no"),)}, '"bad" has a column "loss" that "loss" has too'),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_a_wrong_declaration_is_refused_in_one_line(change: dict[str, Any], text: str) -> None:
    mt.measures()
    with pytest.raises(mt.errors.DeclarationError) as refused:

        @measure("bad", **(GOOD | change))
        def bad(seen: Seen) -> dict[str, Tensor]:
            """A measure that is wrong."""
            return {}

    assert text in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "bad" not in mt.methods()


def test_a_column_may_stand_alone_and_nothing_stays_registered_when_a_declaration_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def alone(seen: Seen) -> dict[str, Tensor]:
        """A measure of one column."""
        return {}

    good = GOOD | {"columns": Column("alone_x", "1", "a thing", "none: no")}
    try:
        measure("alone", **good)(alone)
        assert [c.name for c in mt.methods()["alone"].columns] == ["alone_x"]
    finally:
        forget("alone")
    monkeypatch.setattr("microtome.method._measure.docstring", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure("alone", **good)(alone)
    assert "alone" not in mt.methods()


def test_a_method_whose_declaration_fails_is_warned_of_and_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("microtome.method._registry")

    def refuse(name: str) -> None:
        raise mt.errors.DeclarationError("this one contradicts itself.")

    monkeypatch.delitem(registry._DECLARED, "stream", raising=False)
    monkeypatch.setattr(registry, "declared", refuse)
    with pytest.warns(UserWarning, match="this one contradicts itself"):
        assert "stream" not in mt.methods("measure")


def test_a_measure_without_a_summary_or_with_a_bare_argument_is_refused() -> None:
    def silent(seen: Seen) -> dict[str, Tensor]:
        return {}

    def bare(seen: Seen, size: int = 3) -> dict[str, Tensor]:
        """Has an argument that says nothing of itself."""
        return {}

    with pytest.raises(mt.errors.DeclarationError, match='"bad" lacks summary'):
        measure("bad", **GOOD)(silent)
    with pytest.raises(mt.errors.DeclarationError, match='an argument "size" without an Argument in its annotation'):
        measure("bad", **GOOD)(bare)


def test_a_result_with_an_undeclared_column_is_refused(model: mt.Model) -> None:
    @question(
        "bad", question="What?", columns=(Column("x", "1", "a thing", "none: no", dims=()),), source=SOURCE,
        cost="nothing", check="tests/laws/test_frame_of_methods.py", call="bad(model)",
    )  # fmt: skip
    def bad(model: mt.Model) -> Found:
        """Gives what it does not declare."""
        return Found({"y": 1.0})

    try:
        with pytest.raises(mt.errors.DeclarationError, match='gives "y", which it does not declare; allowed: x'):
            bad(model)
    finally:
        forget("bad")


def test_a_difference_counts_its_examples_as_its_column_does(model: mt.Model) -> None:
    """Sums over unequal weights, with a control by example and with one that is a single number."""
    weights = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, 1.0, 2.0, 6.0, 2.0])
    sums, noise = weights * torch.linspace(1.0, 3.0, 9), weights * torch.linspace(0.5, -0.5, 9) ** 2

    @question(
        "weighted_gain", question="What?",
        columns=(
            Column("gain", "1", "a gain", "by_example", dims=()), Column("by_example", "1", "its control", "", dims=()),
            Column("rise", "1", "a rise", "known", dims=()), Column("known", "1", "its control", "", dims=()),
        ),
        source=Source("Nobody", "Nothing", 2026), cost="nothing", check="tests/laws/test_frame_of_methods.py", call="",
    )  # fmt: skip
    def weighted_gain(model: mt.Model) -> Found:
        """A gain over examples that count unequally."""
        return Found({"known": 0.25}, each={"gain": sums, "rise": sums, "by_example": noise}, weights=weights)

    try:
        data = weighted_gain(model)
    finally:
        forget("weighted_gain")
    for name, control, each in (("gain", "by_example", sums - noise), ("rise", "known", sums - 0.25 * weights)):
        mean, low, high = mt.stream.mean_interval(each, weights=weights)
        assert (
            float(data[f"{name}_diff"])
            == pytest.approx(float(data[name] - data[control]))
            == pytest.approx(float(mean))
        )
        assert float(data[f"{name}_diff_lo"]) == pytest.approx(float(low))
        assert float(data[f"{name}_diff_hi"]) == pytest.approx(float(high))
        plain = mt.stream.mean_interval(each)
        assert abs(float(plain[1]) - float(low)) > 0.1  # weights matter here


def test_unknown_measures_and_arguments_are_refused_with_what_is_near(model: mt.Model) -> None:
    with pytest.raises(mt.errors.ArgumentError, match='no method "inductoin".*Did you mean "induction"'):
        mt.measure(model, "inductoin")
    with pytest.raises(mt.errors.ArgumentError, match=r'argument perod; allowed: period, sequences.*"period"'):
        mt.measure(model, "induction", perod=12)
    with pytest.raises(mt.errors.ArgumentError, match='"attention_knockout" is a question, not a measure'):
        mt.measure(model, "attention_knockout")
    with pytest.raises(mt.errors.ArgumentError, match="no measure is named"):
        mt.measure(model)
    with pytest.raises(mt.errors.DataError, match="has no tokenizer to read a text with"):
        mt.measure(model, "stream")


def test_a_span_to_the_last_position_ends_with_the_prompt(model: mt.Model) -> None:
    from microtome.explain._spans import span_of
    from microtome.method import span_from_text

    tokens = ids(1, 8)[0]
    assert span_of(model, tokens, span_from_text("@3--1")) == (3, 8)
    assert span_of(model, tokens, span_from_text("@3--2")) == (3, 7)
    assert span_of(model, tokens, span_from_text("@-1")) == (7, 8)


def test_a_result_with_open_ranges_is_written_to_netcdf_and_read_back(toy: str, model: mt.Model, tmp_path: Any) -> None:
    data = mt.measure(model, toy, "activations", text=ids())
    assert "range" not in Column("x", "1", "a thing", "none: no").attrs
    assert Column("x", "1", "a thing", "none: no", (None, 1)).attrs["range"] == [-np.inf, 1]
    data.to_netcdf(tmp_path / "toy.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "toy.nc", engine="scipy") as read:
        assert list(read["toy_size"].attrs["range"]) == [0, np.inf]
        assert np.allclose(read["toy_size"], data["toy_size"])
