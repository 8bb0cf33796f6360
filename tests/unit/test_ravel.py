"""RAVEL is read as published, and what is asked of a model is what it says to one prompt at a time."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests import families, tokenizers

import microtome as mt
from microtome import subspaces, tasks
from microtome.errors import ArgumentError, DataError, PromptError

ROOT = Path(__file__).resolve().parents[2]


def spoken() -> mt.Model:
    """A tiny model with a tokenizer of words."""
    hf, tokenizer = families.build("llama-gqa"), tokenizers.build("bpe-bos")
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return mt.open(hf, tokenizer=tokenizer, prove=False)


def archive(folder: Path) -> Path:
    """A small file of the published form."""
    names = [f"thing{i}" for i in range(20)]
    tables = {
        "entity_attributes": {n: {"Color": ["red", "blue"][i % 2], "Size": ["big", "small,tiny"][i // 2 % 2]}
                              for i, n in enumerate(names)},
        "attribute_to_prompts": {"Color": ["The color of %s is", "%s is"], "Size": ["The size of %s is", "%s %s"]},
        "entity_to_split": {n: "train" if i < 12 else "test" for i, n in enumerate(names)},
        "prompt_to_split": {"%s is": "train"},
    }  # fmt: skip
    inner = folder / "data"
    inner.mkdir()
    for part, table in tables.items():
        (inner / f"ravel_city_{part}.json").write_text(json.dumps(table), encoding="utf-8")
    with tarfile.open(folder / "data.tgz", "w:gz") as held:
        held.add(inner, "data")
    return folder / "data.tgz"


def test_archive_and_folder_are_the_same_and_nothing_is_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    one, other = tasks.ravel(path), tasks.ravel(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert one == other
    assert len(one) == 20
    assert one.templates["Size"] == ("The size of %s is",)  # one place for the entity
    assert one.split["thing0"] == "train"


def test_what_is_no_ravel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        tasks.ravel(tmp_path / "none.tgz")
    with pytest.raises(DataError, match='no entities of the kind "verb"'):
        tasks.ravel(archive(tmp_path), "verb")
    (tmp_path / "bad.tgz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match="as RAVEL"):
        tasks.ravel(tmp_path / "bad.tgz")
    with pytest.raises(ArgumentError, match='no attribute "Colour".* "Color"'):
        tasks.ravel(tmp_path / "data.tgz").require(["Colour"])


def test_questions_are_what_the_model_says_to_one_prompt_at_a_time(tmp_path: Path) -> None:
    model = spoken()
    data = tasks.ravel(archive(tmp_path))
    asked = data.ask(model, entities=8, templates=2, tried=2, trial=2)
    assert {q.attribute for q in asked} == {"Color", "Size"}
    for q in asked:
        run = model.run(q.template.replace("%s", q.entity))
        assert tuple(run.tokens[0].tolist()) == q.tokens
        assert int(run.logits[0, -1].argmax()) == q.said
        assert model.to_text(q.tokens[: q.at + 1]).endswith(q.entity)
    share, low, high = tasks.shares(asked)["Color"]
    assert 0 <= low <= share <= high <= 1


def test_a_model_that_answers_too_few_is_refused_with_the_share(tmp_path: Path) -> None:
    model = spoken()
    with pytest.raises(PromptError, match=r"too few training entities whose Color .* it answers \d"):
        subspaces.das(model, archive(tmp_path), entities=8, steps=0)


def _published() -> Path:
    for place in (os.environ.get("MICROTOME_DATA"), ROOT.parent / "shared" / "data"):
        if place and (Path(place) / "ravel" / "data.tgz").exists():
            return Path(place) / "ravel" / "data.tgz"
    pytest.skip("the published data are not here: set MICROTOME_DATA")


def test_the_published_numbers_of_entities() -> None:
    path = _published()
    counts = {"city": 3552, "nobel_prize_winner": 928, "verb": 986, "physical_object": 563, "occupation": 799}
    for kind, n in counts.items():
        assert len(tasks.ravel(path, kind)) == n
    city = tasks.ravel(path)
    assert set(city.attributes) == {"Country", "Continent", "Latitude", "Longitude", "Language", "Timezone"}
    assert {city.split[name] for name in city.values} == {"train", "val", "test"}


def pairs(folder: Path, words: list[str], asked: int = 8) -> Path:
    """A file of pairs with these words as answers, in turn."""
    both = [
        (words[i % len(words)], words[(i + 1 + i // len(words) % (len(words) - 1)) % len(words)]) for i in range(asked)
    ]
    rows = [f"the cat {a} on {i} the,the cat {b} on {i} the, {a}, {b}" for i, (a, b) in enumerate(both)]
    path = folder / "pairs.csv"
    path.write_text("\n".join(["clean,corrupt,answer,foil", *rows]))
    return path


def test_pairs_have_no_isolation_and_a_placebo_of_other_answers(tmp_path: Path) -> None:
    path = pairs(tmp_path, ["cat", "dog", "car", "big"])
    given: dict[str, Any] = {"site": "1.resid_post", "rank": 2, "steps": 2}
    data = subspaces.das(spoken(), path, **given)
    assert data["found_by"].values.tolist() == ["neurons", "pca", "random", "das", "placebo"]
    assert data["cause"].dims == ("attribute", "found_by")
    assert data.sel(found_by="das")["cause"].shape == (1,)  # `method` is an option of sel itself
    assert [one.partition(":")[0] for one in data.attrs["control"].split("; ")] == ["random", "placebo"]
    with pytest.raises(ArgumentError, match="mdas is das where no swap wants isolation; got das, mdas"):
        subspaces.das(spoken(), path, methods=["das", "mdas"], **given)
    with pytest.raises(ArgumentError, match="ways are named once each"):
        subspaces.das(spoken(), path, methods=["pca", "pca"], **given)


def test_a_dictionary_that_is_given_is_a_way_more(tmp_path: Path) -> None:
    model, path = spoken(), pairs(tmp_path, ["cat", "dog", "car", "big"])
    given: dict[str, Any] = {"site": "1.resid_post", "rank": 2, "steps": 0, "methods": ["random"]}
    directions = torch.eye(model.anatomy.d_model)
    save_file({"directions": directions}, tmp_path / "features.safetensors")
    data = subspaces.das(model, path, dictionary=str(tmp_path / "features.safetensors"), **given)
    assert data["found_by"].values.tolist() == ["random", "dictionary", "placebo"]
    assert float(data["rank"].sel(found_by="dictionary")[0]) == 2
    with pytest.raises(ArgumentError, match="a dictionary and its method go together"):
        subspaces.das(model, path, **given | {"methods": ["dictionary"]})
    with pytest.raises(ArgumentError, match=r"the dictionary is not as wide as 1.resid_post; got directions of 3"):
        subspaces.das(model, path, dictionary=directions[:, :3], **given)


def test_a_placebo_of_two_answers_is_left_out_or_refused(tmp_path: Path) -> None:
    path = pairs(tmp_path, ["cat", "dog"])
    given: dict[str, Any] = {"site": "1.resid_post", "rank": 2, "steps": 0}
    assert "placebo" not in subspaces.das(spoken(), path, **given)["found_by"].values
    with pytest.raises(PromptError, match="these swaps have no placebo; got 2 different labels; allowed: 3 or more"):
        subspaces.das(spoken(), path, controls=["placebo", "twin"], **given)


def test_a_placebo_never_asks_for_what_the_base_says_already(tmp_path: Path) -> None:
    model = spoken()
    swaps = subspaces.Swaps.of_pairs(tasks.read(pairs(tmp_path, ["cat", "dog", "car", "big"], 24), model))
    labels = {s.label for s in swaps}
    false = [swaps.placebo(seed) for seed in range(20)]
    assert all(s.label in labels and s.label != s.own for own in false for s in own)
    kept = [s.label == t.label for own in false for s, t in zip(own, swaps, strict=True)]
    assert sum(kept) / len(kept) == pytest.approx(1 / 3, abs=0.1)  # by chance alone, of the three others
