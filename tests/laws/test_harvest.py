"""A harvest holds what runs of single rows capture; ended anywhere it goes on, and loses the open shard alone."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.harvests import CORPUS, GROUPS, TEXTS, files, killed, made, opened

import microtome as mt
from microtome.errors import ArgumentError, DataError, MicrotomeWarning, ModelUnsupported, OutputError, SiteError
from microtome.stream import Corpus, Harvest, harvest

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash of the whole machine leaves is no matter of these tests, and flushing takes most of their time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return opened()


@pytest.mark.parametrize(
    ("family", "begins"),
    [("llama-gqa", False), ("gpt2", True), *(pytest.param(n, True, marks=SLOW) for n in ("bert", "llama-gqa"))],
)
def test_values_are_those_of_each_row_alone(family: str, begins: bool, tmp_path: Path) -> None:
    model = opened(family, begins=begins)
    found = made(model, tmp_path / "h")
    found.verify()
    index = found.index.to_pandas()
    assert len(found.shards) > 2
    lead, at = [2] * begins, 0
    for document, rows in index.groupby("document"):
        rows = rows.sort_values("position")
        own = list(mt.stream.rows_of(Corpus.of("d", [TEXTS[document]]), model.tokenizer, length=16))
        at += len(rows)
        assert rows.token.tolist() == [token for row in own for token in row.tokens]
        assert rows.position.tolist() == list(range(len(rows)))
        assert rows.offset.tolist() == [place for row in own for place in row.offsets]
        assert set(rows.group) == {GROUPS[document]}
        for row in own:
            run = model.run(torch.tensor([[*lead, *row.tokens]]), capture=list(found.sites))
            here = rows.index[row.place.token : row.place.token + len(row.tokens)].to_numpy()
            for site in found.sites:
                want = run[site][0, len(lead) :]
                torch.testing.assert_close(found[site][here], want, atol=1e-5, rtol=1e-5)
    assert at == len(found) == len(index)


def test_every_token_of_the_text_is_there_once(model: mt.Model, tmp_path: Path) -> None:
    found = made(model, tmp_path / "h", length=64, shard_tokens=60)
    index = found.index.to_pandas()
    assert not index.duplicated(["document", "position"]).any()
    assert set(index.document) == {n for n, text in enumerate(TEXTS) if text}
    assert len(index) == sum(len(text.split()) for text in TEXTS)
    assert found.manifest["documents"] == len(set(index.document))
    assert sum(found.shards) == len(found) == found.manifest["tokens"]
    assert max(found.shards) <= 60
    assert found.manifest["asked"]["model"] == model.fingerprint
    assert len(made(model, tmp_path / "some", length=64, tokens=40)) == 40


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 2**-8), ("float16", 2**-11), ("int8", 0.5 / 127)])
def test_narrow_values_are_near(model: mt.Model, tmp_path: Path, dtype: str, most: float) -> None:
    exact, narrow = made(model, tmp_path / "a"), made(model, tmp_path / "b", dtype=dtype)
    for site in exact.sites:
        x, y = exact[site][:], narrow[site][:].float()
        scale = x.abs().flatten(1).amax(1) if dtype == "int8" else x.abs()
        scale = scale.reshape(-1, *[1] * (x.dim() - 1)) if dtype == "int8" else scale
        assert bool(((x - y).abs() <= most * scale * 1.001 + 1e-7).all()), site
    assert narrow.bytes < 0.75 * exact.bytes


def test_documents_in_an_order_by_seed_are_the_same_documents(model: mt.Model, tmp_path: Path) -> None:
    plain, one = made(model, tmp_path / "a"), made(model, tmp_path / "b", seed=1)
    again, other = made(model, tmp_path / "c", seed=1), made(model, tmp_path / "d", seed=2)
    assert files(tmp_path / "b").keys() == files(tmp_path / "c").keys()
    assert one.index.equals(again.index)
    orders = [found.index["document"].to_pylist() for found in (plain, one, other)]
    assert orders[0] != orders[1] != orders[2]
    ids = ["document", "position"]
    for found in (one, other):
        left, right = (x.index.to_pandas().sort_values(ids) for x in (plain, found))
        assert left.token.tolist() == right.token.tolist()
        assert left.group.tolist() == right.group.tolist()
        numbers = [x.index.to_numpy() for x in (left, right)]
        torch.testing.assert_close(plain["2.resid_post"][numbers[0]], found["2.resid_post"][numbers[1]])


def test_a_harvest_that_is_there_is_left_as_it_is(model: mt.Model, tmp_path: Path, monkeypatch: Any) -> None:
    made(model, tmp_path / "h")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "h").iterdir()}
    monkeypatch.setattr(model, "run", None)
    assert made(model, tmp_path / "h", verify=True).complete
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "h").iterdir()} == times


class Ended(BaseException):
    """An end that nothing catches, as a kill is."""


@pytest.mark.parametrize("forwards", [0, 5, *(pytest.param(n, marks=SLOW) for n in (1, 9))])
def test_ended_between_any_forwards_it_goes_on(
    model: mt.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: int
) -> None:
    whole = made(model, tmp_path / "whole", tokens=150)
    run, count = model.run, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if count == forwards:
            raise Ended
        count += 1
        return run(*args, **kwargs)

    monkeypatch.setattr(model, "run", counted)
    with pytest.raises(Ended):
        made(model, tmp_path / "h", tokens=150)
    part = Harvest(tmp_path / "h")
    assert (part.complete, len(part.shards) < len(whole.shards)) == (False, True)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "h").glob("shard-*")}
    forwards, count = -1, 0
    assert made(model, tmp_path / "h", tokens=150).complete
    assert files(tmp_path / "h") == files(tmp_path / "whole")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # nothing that was whole was made again


DAMAGES = [
    ("shard-00001.safetensors", lambda data: data[:-5], False, r"shard-00001\.safetensors is damaged: \d+ of "),
    ("tokens-00001.parquet", lambda data: data[:-5], False, r"tokens-00001\.parquet is damaged: \d+ of \d+ bytes"),
    ("shard-00001.safetensors", None, False, r"shard-00001\.safetensors is missing"),
    ("shard-00001.safetensors", lambda data: data[:-1] + b"?", True, r"00001\.safetensors is damaged: its checksum"),
    ("tokens-00001.parquet", lambda data: b"????" + data[4:], True, r"tokens-00001\.parquet is damaged: its checksum"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "subtle", "message"), DAMAGES)
def test_a_damaged_shard_is_named_and_made_anew(
    model: mt.Model, tmp_path: Path, name: str, damage: Any, subtle: bool, message: str
) -> None:
    made(model, tmp_path / "h")
    before = files(tmp_path / "h")
    path = tmp_path / "h" / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        Harvest(tmp_path / "h").verify()
    if not subtle:
        with pytest.raises(DataError, match=f"{message}.*To do: run the same harvest again"):
            Harvest(tmp_path / "h")
    with pytest.warns(MicrotomeWarning, match=f"{message}.*Shard 1 is made anew"):
        made(model, tmp_path / "h", verify=subtle)
    assert files(tmp_path / "h") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, r"got dtype int8; allowed: dtype float32"),
        ({"length": 8}, r"got length 8; allowed: length 16"),
        ({"text": "the cat"}, r"got text "),
        ({"text": Corpus.of("t", TEXTS)}, r"got groups "),
        ({"sites": "final"}, r"got sites final; allowed: sites 0\.resid_post"),
    ],
)
def test_a_harvest_of_something_else_is_replaced_only_if_told(
    model: mt.Model, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    made(model, tmp_path / "h")
    before = files(tmp_path / "h")
    with pytest.raises(OutputError, match=f"holds a harvest of something else; {message}"):
        made(model, tmp_path / "h", **change)
    assert files(tmp_path / "h") == before
    made(model, tmp_path / "h", force=True, **change)
    made(model, tmp_path / "new", **change)
    there, new = (files(tmp_path / name) for name in ("h", "new"))
    assert there.keys() == new.keys()
    assert all(there[name] == new[name] for name in there if name.endswith("safetensors"))


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "shard-00000.json"])
def test_nothing_else_is_written_over(model: mt.Model, tmp_path: Path, name: str) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / name).write_text("{}")
    with pytest.raises(OutputError, match=r"holds (something that is not a|no) harvest"):
        made(model, tmp_path / "h", force=True)
    assert files(tmp_path / "h") == {name: b"{}"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot make the folder"):
        made(model, tmp_path / "file")


def test_a_newer_form_is_not_read(model: mt.Model, tmp_path: Path) -> None:
    made(model, tmp_path / "h")
    path = tmp_path / "h" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(DataError, match="is of a newer version; got form 2; allowed: 1"):
        Harvest(tmp_path / "h")
    with pytest.raises(DataError, match="no harvest lies in"):
        Harvest(tmp_path / "absent")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_named_by_site_and_document(
    model: mt.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    run = model.run

    def poisoned(tokens: torch.Tensor, *, observe: dict[str, Any], **more: Any) -> Any:
        def see(site: Any, x: torch.Tensor) -> None:
            if str(site) == "1.attn.z" and x.shape[1] == 5:
                x = x.clone()
                x[0, 3, 1, 2] = bad
            observe[str(site)](site, x)

        return run(tokens, observe=dict.fromkeys(observe, see), **more)

    monkeypatch.setattr(model, "run", poisoned)
    text = Corpus.of("t", ["the cat sat on", "the mat sat on the", "the cat sat"], ["a", "b", "c"])
    message = rf'1\.attn\.z is not finite at token 3 of document 1 \(group "b"\); got {bad}, 1 such values'
    with pytest.raises(DataError, match=message):
        made(model, tmp_path / "h", text=text, shard_tokens=4)
    assert Harvest(tmp_path / "h").shards == (4,)
    assert not list((tmp_path / "h").glob(".*"))
    monkeypatch.setattr(model, "run", run)
    assert made(model, tmp_path / "h", text=text, shard_tokens=4).shards == (4, 5, 3)


def test_what_does_not_fit_into_float16_is_named(
    model: mt.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = model.run

    def larger(tokens: torch.Tensor, *, observe: dict[str, Any], **more: Any) -> Any:
        see = lambda site, x: observe[str(site)](site, x * 1e6)  # noqa: E731
        return run(tokens, observe=dict.fromkeys(observe, see), **more)

    monkeypatch.setattr(model, "run", larger)
    with pytest.raises(DataError, match=r"0\.\S+ does not fit into float16 in documents 0 to 2; .*choose .bfloat16"):
        made(model, tmp_path / "h", dtype="float16")
    assert made(model, tmp_path / "b", dtype="bfloat16").complete


@pytest.mark.parametrize("number", [0, 2])
def test_a_full_disk_is_one_line_and_what_was_whole_stays(
    model: mt.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    made(model, tmp_path / "whole")
    write, left = os.pwrite, [number * 5 + 2]  # a head and four sites a shard

    def full(file: int, data: Any, at: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        message = r"cannot write the harvest to .*h; got No space left on device. To do: free some space"
        with pytest.raises(OutputError, match=message) as told:
            made(model, tmp_path / "h")
    assert "\n" not in str(told.value)
    assert len(Harvest(tmp_path / "h").shards) <= number
    assert not list((tmp_path / "h").glob(".*"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(OutputError, match=message):  # before anything runs
            made(model, tmp_path / "h")
    made(model, tmp_path / "h")
    assert files(tmp_path / "h") == files(tmp_path / "whole")


def test_a_real_limit_of_the_system(model: mt.Model, tmp_path: Path) -> None:
    """Files of more than 30,000 bytes cannot be written by a process of its own."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try:
            made(model, tmp_path / "h", text=Corpus.of("t", ["the cat sat", *["the mat " * 8] * 4]), shard_tokens=64)
        except OutputError as problem:
            (tmp_path / "told").write_text(str(problem))
            raise

    assert killed(limited, after=60) == 1
    assert "File too large. To do: free some space" in (tmp_path / "told").read_text()


@pytest.mark.parametrize("most", [2, pytest.param(20, marks=SLOW)])
def test_killed_at_random_nothing_is_lost_and_nothing_twice(model: mt.Model, tmp_path: Path, most: int) -> None:
    text = Corpus.of("t", [text for text in TEXTS for _ in range(2)])
    began = time.monotonic()
    assert killed(lambda: made(model, tmp_path / "whole", text=text, shard_tokens=20), after=60) == 0
    taken, draw, kills = time.monotonic() - began, random.Random(0), 0
    while kills < most:
        code = killed(lambda: made(model, tmp_path / "h", text=text, shard_tokens=20), after=draw.uniform(0, taken / 3))
        kills += code is None
        assert code in (0, None)
        if code == 0:  # all is there: begin again
            assert files(tmp_path / "h") == files(tmp_path / "whole")
            for path in (tmp_path / "h").iterdir():
                path.unlink()
        elif (tmp_path / "h" / "manifest.json").exists():
            Harvest(tmp_path / "h").verify()
    made(model, tmp_path / "h", text=text, shard_tokens=20)
    assert files(tmp_path / "h") == files(tmp_path / "whole")


def test_documents_longer_than_a_row_are_told(model: mt.Model, tmp_path: Path) -> None:
    given: dict[str, Any] = {"sites": "final", "text": CORPUS}
    with pytest.warns(MicrotomeWarning, match=r"^4 of 8 documents are longer than a row of 16 tokens; up to length=64"):
        harvest(model, out=tmp_path / "a", length=16, **given)
    with pytest.warns(MicrotomeWarning, match=r"of 64 tokens, the model's context: they were read in pieces"):
        harvest(model, out=tmp_path / "b", length=999, sites="final", text="the cat " * 50)
    harvest(model, out=tmp_path / "c", length=64, **given)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"sites": "0.attn.pattern"}, SiteError, r"has no value for each token; got \[batch, head, q_pos, k_pos\]"),
        ({"sites": "final@-1"}, SiteError, r'"final@-1" names positions. To do: leave them out'),
        ({"sites": "9.resid_post"}, SiteError, r"allowed: layers 0 to 2"),
        ({"sites": []}, ArgumentError, r"no site is named"),
        ({"dtype": "int4"}, ArgumentError, r"no such dtype of a harvest; got 'int4'; allowed: float32, bfloat16"),
        ({"tokens": 0}, ArgumentError, r"tokens is too small for a harvest; got 0; allowed: 1 or more"),
        ({"text": Corpus("e", ("", ""), ("g",), "0")}, DataError, r'corpus "e" gives no tokens'),
        ({"out": "nosuch://x"}, OutputError, r"no file system here for nosuch://x"),
    ],
)
def test_what_cannot_be_harvested(
    model: mt.Model, tmp_path: Path, given: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        made(model, **({"out": tmp_path / "h"} | given))


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    bare = mt.open(opened().hf, tokenizer=None, prove=False)
    bare.tokenizer = None
    with pytest.raises(ModelUnsupported, match="has no tokenizer to read a text with"):
        made(bare, tmp_path / "h")
