"""Attributes planted in rotated subspaces: who finds them, who cannot, and what an illusion is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.scripts import script

from microtome import planted, subspaces
from microtome.errors import ArgumentError, DataError, FitError, PromptError, SiteError
from microtome.subspaces import Subspace, Swaps
from microtome.subspaces._exchange import Exchange
from microtome.subspaces._learned import Plan, boundless, neuron_mask
from microtome.subspaces._score import placebo, scores, twin

cases = script("tools/planted_cases/subspaces.py")


@pytest.fixture(scope="module")
def it() -> planted.Planted:
    return planted.attributes()


@pytest.fixture(scope="module")
def swaps(it: planted.Planted) -> tuple[Swaps, Swaps]:
    return cases.halves(it, "1")


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.__name__)
def test_all_that_was_planted_is_found_and_nothing_else(case: Callable[[], dict[str, str]]) -> None:
    row = case()
    found, there = map(int, row["found"].split(" of "))
    false, others = map(int, row["false"].split(" of "))
    assert found == there > 0, row
    assert false == 0 < others, row


@pytest.mark.parametrize("rotated", [True, False])
def test_every_attribute_is_known_and_lies_where_it_was_planted(rotated: bool) -> None:
    made = planted.attributes(3, rotated=rotated)
    assert {check.status for check in made.model.proof} == {"holds"}
    assert all(q.known for q in cases.asked(made))
    _, test = cases.halves(made, "0")
    judged = Exchange(made.model, made.truth["site"], test.swaps)
    right = scores(judged, cases.true_subspace(made, "0"))
    wrong = scores(judged, cases.true_subspace(made, "2"))
    assert right["cause"] == right["isolate"] == right["disentangle"] == 1.0
    assert wrong["disentangle"] == pytest.approx((wrong["cause"] + wrong["isolate"]) / 2)
    assert wrong["disentangle_lo"] < wrong["disentangle"] < wrong["disentangle_hi"]
    assert wrong["cause"] == 0.0
    assert wrong["isolate"] < 0.7  # it takes the other attribute along


def test_the_whole_space_swaps_everything_and_no_space_nothing(it: planted.Planted, swaps: tuple[Swaps, Swaps]) -> None:
    judged = Exchange(it.model, it.truth["site"], swaps[1].swaps)
    known = it.model.provenance
    of = ("", known["model"], known["fingerprint"])
    width = judged.width
    whole = scores(judged, Subspace(it.truth["site"], torch.eye(width), *of))
    nothing = scores(judged, Subspace(it.truth["site"], torch.zeros(0, width), *of))
    assert (whole["cause"], whole["isolate"]) == (1.0, 0.0)
    assert (nothing["cause"], nothing["isolate"], nothing["rank"]) == (0.0, 1.0, 0.0)


def test_what_a_mask_over_neurons_cannot_do_a_rotation_does(it: planted.Planted, swaps: tuple[Swaps, Swaps]) -> None:
    train, test = swaps
    judged = Exchange(it.model, it.truth["site"], test.swaps)
    kept: dict[str, dict[str, float]] = {}
    ways: dict[str, dict[str, Any]] = {
        "mask": {"steps": 150, "lr": 0.1, "rows": 8},
        "boundless": {"steps": 120, "lr": 0.03, "rows": 8, "sparsity": 1.0},
        "mdas": {"steps": 40, "lr": 0.05, "rows": 8},
        "pca": {},
        "probe": {},
    }
    for method, options in ways.items():
        found = subspaces.find(it.model, train, it.truth["site"], 6, method=method, **options)
        eye = torch.eye(found.rank, dtype=torch.float64)
        assert float((found.basis @ found.basis.T - eye).abs().max()) < 1e-6
        kept[method] = scores(judged, found)
    assert kept["mdas"]["disentangle"] > 0.97
    assert kept["boundless"]["disentangle"] > 0.9
    assert 3 <= kept["boundless"]["rank"] <= 32  # its borders are soft: how far they close depends on rounding
    assert kept["mask"]["disentangle"] < 0.9
    assert kept["pca"]["disentangle"] < 0.9
    assert kept["probe"]["disentangle"] > 0.97


def test_a_mask_over_neurons_is_enough_where_nothing_is_rotated() -> None:
    made = planted.attributes(rotated=False)
    train, test = cases.halves(made, "1")
    found = subspaces.find(made.model, train, made.truth["site"], 6, method="mask", steps=150, lr=0.1, rows=8)
    assert scores(Exchange(made.model, made.truth["site"], test.swaps), found)["disentangle"] > 0.97


def test_a_placebo_and_a_twin_with_shuffled_weights_are_not_found(
    it: planted.Planted, swaps: tuple[Swaps, Swaps]
) -> None:
    train, test = (Exchange(it.model, it.truth["site"], own.swaps) for own in swaps)
    plan = Plan(6, 1.0, steps=40, lr=0.05, rows=8)
    from microtome.subspaces._ways import found_in

    false = placebo(train, 0), placebo(test, 0)
    assert scores(false[1], found_in(false[0], "mdas", plan, 1.0, given_lr=0.05))["cause"] < 0.6  # of 4 values
    other = twin(it.model, 0)
    assert other.fingerprint != it.model.fingerprint
    pair = [Exchange(other, it.truth["site"], own.swaps) for own in swaps]
    assert scores(pair[1], found_in(pair[0], "das", plan, 1.0, given_lr=0.05))["cause"] < 0.5


# --------------------------------------------------------------------------------------------------------- the illusion


def test_the_illusion_of_three_units_is_exact() -> None:
    made = planted.illusion()
    assert {check.status for check in made.model.proof} == {"holds"}
    swaps, truth = cases.illusion_swaps(made), made.truth
    split = subspaces.split_direction(made.model, swaps, truth["site"], truth["direction"])
    effect: dict[str, float] = dict(zip(split["part"].values.tolist(), split["effect"].values.tolist(), strict=True))
    assert effect["whole"] == pytest.approx(effect["component"], rel=0.01)
    assert effect["whole"] > 15
    assert abs(effect["row"]) < 1e-3 * effect["whole"]
    assert effect["null"] == 0.0
    assert split["norm"].to_series()[["row", "null"]].tolist() == pytest.approx([0.5, 0.5])
    assert split["accuracy"].to_series()[["whole", "row", "null", "component"]].tolist() == [1, 0, 0, 1]


def test_a_direction_that_das_finds_there_is_split_too() -> None:
    made = planted.illusion()
    split = subspaces.split_direction(made.model, cases.illusion_swaps(made), made.truth["site"], steps=40, lr=0.05)
    assert split.attrs["found_by"] == "das"
    assert split["accuracy"].sel(part="whole") > 0.9


def test_what_cannot_be_split_is_refused() -> None:
    made = planted.illusion()
    swaps, model = cases.illusion_swaps(made), made.model
    with pytest.raises(SiteError, match="not read by one matrix"):
        subspaces.split_direction(model, swaps, "0.resid_post", torch.ones(model.anatomy.d_model))
    with pytest.raises(ArgumentError, match="not as wide as 0.mlp.post"):
        subspaces.split_direction(model, swaps, "0.mlp.post", torch.ones(3))
    other = planted.illusion(1).model
    found = Subspace.of(other, "0.mlp.post", torch.ones(other.anatomy.d_mlp))
    with pytest.raises(ArgumentError, match="of another model"):
        subspaces.split_direction(model, swaps, "0.mlp.post", found)


# ------------------------------------------------------------------------------------------------------------- programs


def inputs(it: planted.Planted) -> list[dict[str, int]]:
    return [{"entity": e, "asked": a} for e in range(24) for a in range(3)]


def writer(it: planted.Planted) -> Callable[[Any], list[int]]:
    truth = it.truth
    return lambda given: [truth["bos"], truth["entities"][given["entity"]], truth["questions"][given["asked"]]]


def program_of(it: planted.Planted) -> Callable[..., int]:
    def program(entity: int, asked: int, let: Callable[[str, Any], Any]) -> int:
        values = [let(f"value {a}", it.truth["known"][entity][a]) for a in range(3)]
        return values[asked]

    return program


def test_a_program_holds_at_the_right_places_and_at_no_others(it: planted.Planted) -> None:
    bases = [cases.true_subspace(it, str(a)) for a in range(3)]
    right = {f"value {a}": (bases[a], 1) for a in range(3)}
    wrong = {f"value {a}": (bases[(a + 1) % 3], 1) for a in range(3)}
    options: dict[str, Any] = {"write": writer(it), "answer": int, "swaps": 120}
    good = subspaces.interchange(it.model, program_of(it), inputs(it), at=right, **options)
    assert good["accuracy"].values.tolist() == [1.0] * 3
    assert good["kept"].values.tolist() == [1.0] * 3
    assert float(good["agreement"]) == 1.0
    assert (good["accuracy_random"] < 0.5).all()
    bad = subspaces.interchange(it.model, program_of(it), inputs(it), at=wrong, **options)
    assert (bad["accuracy"] == 0).all()
    whole = subspaces.interchange(it.model, program_of(it), inputs(it), at={"value 0": "0.resid_post@1"}, **options)
    assert float(whole["accuracy"][0]) == 1.0
    assert float(whole["kept"][0]) < 0.6  # it takes the other attributes along


def test_a_program_that_does_not_fit_is_refused(it: planted.Planted) -> None:
    options: dict[str, Any] = {"write": writer(it), "answer": int, "at": {"value 0": "0.resid_post@1"}}

    def wrong(entity: int, asked: int, let: Callable[[str, Any], Any]) -> int:
        return let("value 0", it.truth["known"][(entity + 1) % 24][asked])

    with pytest.raises(PromptError, match="the program disagrees with .* before anything is swapped"):
        subspaces.interchange(it.model, wrong, inputs(it), **options, least=0.9)
    given: dict[str, Any] = {**options, "at": {"other": "0.resid_post@1"}}
    with pytest.raises(ArgumentError, match='no variable "other"'):
        subspaces.interchange(it.model, program_of(it), inputs(it), **given)
    given = {**options, "at": {"value 0": "0.resid_post"}}
    with pytest.raises(ArgumentError, match="is not one position"):
        subspaces.interchange(it.model, program_of(it), inputs(it), **given)
    with pytest.raises(ArgumentError, match="the program fails on"):
        subspaces.interchange(it.model, lambda let: 1, inputs(it), **options)
    for name in ("write", "answer"):

        def fails(given: Any) -> Any:
            raise KeyError("other")

        with pytest.raises(ArgumentError, match=f"{name} fails on .*; got KeyError: 'other'"):
            subspaces.interchange(it.model, program_of(it), inputs(it), **{**options, name: fails})
    count = iter(range(10**6))
    with pytest.raises(ArgumentError, match="inputs and variables alone"):
        subspaces.interchange(it.model, lambda let, **given: next(count), inputs(it), **options)


def test_tokens_as_variables() -> None:
    """The induction model continues what stands in the text, so that a changed token changes what follows."""
    made = planted.induction()

    def program(word: int, let: Callable[[str, Any], Any]) -> int:
        return let("stored", word)

    def write(given: Any, variables: Any) -> list[int]:
        return [5, 6, 7, variables["stored"], 8, 9, 5, 6, 7]

    words = [{"word": w} for w in range(20, 44)]
    found = subspaces.token_interchange(made.model, program, words, write=write, answer=int, swaps=60)
    assert float(found["right"][0]) == 1.0
    assert float(found["follows"][0]) == 1.0
    assert float(found["keeps"][0]) == float(found["follows_unchanged"][0]) == 0.0


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_input(it: planted.Planted, swaps: tuple[Swaps, Swaps]) -> None:
    train, _ = swaps
    with pytest.raises(ArgumentError, match="no subspace of 0.resid_post has this rank; got 999"):
        subspaces.find(it.model, train, "0.resid_post", 999, method="random")
    with pytest.raises(SiteError, match="is not one place of one layer"):
        subspaces.find(it.model, train, "*.resid_post", 2)
    with pytest.raises(SiteError, match="several vectors at a position"):
        subspaces.find(it.model, train, "0.attn.z", 2)
    with pytest.raises(SiteError, match="no vector at a position"):
        subspaces.find(it.model, train, "0.attn.pattern", 2)
    behind = Swaps(tuple(replace(s, base_at=len(s.base)) for s in train))
    with pytest.raises(
        PromptError, match=r"swap 0 has a place outside its prompt; got position \d+; allowed: 0 to \d+"
    ):
        subspaces.find(it.model, behind, "0.resid_post", 2)
    with pytest.raises(ArgumentError, match="no such way to find a subspace"):
        subspaces.find(it.model, train, "0.resid_post", 2, method="magic")
    false = Swaps(tuple(replace(s, own=0) for s in train))
    with pytest.raises(PromptError, match="answers none of the prompts"):
        subspaces.find(it.model, false, "0.resid_post", 2)


@pytest.mark.parametrize("learn", [neuron_mask])
def test_a_mask_that_never_decides_is_refused(
    it: planted.Planted, swaps: tuple[Swaps, Swaps], learn: Callable[..., Any]
) -> None:
    ready = Exchange(it.model, it.truth["site"], swaps[0].swaps)
    with pytest.raises(FitError, match="did not decide which dimensions it keeps; got 100"):
        learn(ready, Plan(6, steps=0))
    assert boundless(ready, Plan(6, steps=0))[0].shape[0] == ready.width // 2  # a boundary always decides


# --------------------------------------------------------------------------------------------------------- dictionaries


def directions_of(it: planted.Planted, attribute: str | None, n: int = 120) -> torch.Tensor:
    """Random unit directions, and in the midst of them those of an attribute if one is named."""
    rng = torch.Generator().manual_seed(3)
    width = it.model.anatomy.d_model
    drawn = torch.randn(n, width, generator=rng)
    own = it.truth["basis"][attribute] if attribute else drawn[:0]
    return torch.cat([drawn[: n // 2], own, drawn[n // 2 :]])


def test_a_dictionary_that_holds_the_attribute_swaps_it_alone_and_a_random_one_does_not(
    it: planted.Planted, swaps: tuple[Swaps, Swaps]
) -> None:
    train, test = swaps
    judged = Exchange(it.model, it.truth["site"], test.swaps)
    found: dict[str, dict[str, float]] = {}
    for name, held in (("right", directions_of(it, "1")), ("random", directions_of(it, None))):
        for choose in ("difference", "probe"):
            given: dict[str, Any] = {"method": "dictionary", "dictionary": held, "choose": choose}
            part = subspaces.find(it.model, train, it.truth["site"], 6, **given)
            found[f"{name} {choose}"] = scores(judged, part) | {
                "own": sum(60 <= f < 66 for f in part.attrs["features"])
            }
    right = found["right difference"]
    assert right["own"] >= 5  # four values span no more
    assert min(right["cause"], right["isolate"]) > 0.97
    assert found["right probe"]["own"] >= 3
    assert found["right probe"]["disentangle"] > 0.85
    assert max(found[f"random {choose}"]["cause"] for choose in ("difference", "probe")) < 0.5


def coder(it: planted.Planted, attribute: str, swaps: Swaps) -> dict[str, torch.Tensor]:
    """A sparse autoencoder with a feature for each value of an attribute, and random ones."""
    site, truth = it.truth["site"], it.truth
    rows = [[truth["bos"], entity] for entity in truth["entities"]]
    x = it.model.run(rows, capture=site)[site][:, 1].double()
    known = torch.tensor([row[int(attribute)] for row in truth["known"]])
    basis = truth["basis"][attribute].double()
    part = (x - x.mean(0)) @ basis.T
    means = torch.stack([part[known == value].mean(0) for value in truth["values"][int(attribute)]])
    solved = torch.linalg.pinv(means)  # [code, value]: one for its own value, none for the others
    own = solved.T @ basis
    rng = torch.Generator().manual_seed(4)
    drawn = torch.randn(40, x.shape[1], generator=rng).double()
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    encoder = torch.cat([drawn, own])
    directions = torch.cat([drawn, means @ basis])
    return {"W_enc": encoder.T, "W_dec": directions, "centre": x.mean(0)}


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
def test_codes_of_an_encoder_are_swapped_and_its_error_stays(
    it: planted.Planted, swaps: tuple[Swaps, Swaps], tmp_path: Path, kind: str
) -> None:
    train, test = swaps
    given = coder(it, "1", train)
    given |= {"topk": {"k": torch.tensor(38)}, "jumprelu": {"threshold": torch.full((44,), 0.2)}}.get(kind, {})
    save_file({name: x.contiguous() for name, x in given.items()}, tmp_path / "sae.safetensors")
    site = it.truth["site"]
    found = subspaces.find(it.model, train, site, 4, method="dictionary", dictionary=tmp_path / "sae.safetensors")
    assert found.codes is not None
    assert sorted(found.codes.features) == [40, 41, 42, 43]
    judged = Exchange(it.model, site, test.swaps)
    result = scores(judged, found)
    assert (result["cause"], result["isolate"]) == (1.0, 1.0)
    base, source = judged.base.double(), judged.source.double()
    codes = found.codes
    moved = (codes.codes(source) - codes.codes(base)) @ given["W_dec"][list(codes.features)]
    torch.testing.assert_close(found.moved(base, source), moved)
    assert float(found.moved(base, base).abs().max()) == 0.0
    found.save(tmp_path / "part.safetensors")
    again = Subspace.load(tmp_path / "part.safetensors", it.model)
    torch.testing.assert_close(again.moved(base, source), moved)
    with pytest.raises(ArgumentError, match=r"codes of .* are swapped by no patch"):
        found.patch({site: base})


def test_codes_are_what_their_activation_says() -> None:
    encoder = torch.eye(3)
    x = torch.tensor([[3.0, -1.0, 2.0], [0.5, 4.0, 5.0]])
    given: dict[str, Any] = {"W_dec": torch.eye(3) * 2, "W_enc": encoder}

    def codes(**more: Any) -> list[list[float]]:
        return subspaces.Dictionary.read(given | more).codes(x).tolist()

    assert codes() == [[3, 0, 2], [0.5, 4, 5]]
    assert codes(b_enc=torch.tensor([1.0, 2, -3])) == [[4, 1, 0], [1.5, 6, 2]]
    assert codes(centre=torch.tensor([1.0, 0, 0])) == [[2, 0, 2], [0, 4, 5]]
    assert codes(threshold=torch.full((3,), 2.5)) == [[3, 0, 0], [0, 4, 5]]
    assert codes(k=torch.tensor(1)) == [[3, 0, 0], [0, 0, 5]]
    part = subspaces.Dictionary.read(given | {"k": 1}).only([2, 0])
    assert part.features == (2, 0)
    assert part.codes(x).tolist() == [[0, 3], [5, 0]]  # the features that are left out still compete
    assert part.moved(x[:1], x[1:]).tolist() == [[-6, 0, 10]]
    plain = subspaces.Dictionary.read(torch.tensor([[0.0, 2.0, 0.0]]))
    assert plain.codes(x).tolist() == [[-1], [4]]


def test_dictionaries_that_do_not_fit_are_refused(
    it: planted.Planted, swaps: tuple[Swaps, Swaps], tmp_path: Path
) -> None:
    train, site = swaps[0], it.truth["site"]
    width = it.model.anatomy.d_model

    def refused(match: str, kind: type[Exception] = ArgumentError, **more: Any) -> None:
        options = {"method": "dictionary", "dictionary": torch.eye(width)} | more
        with pytest.raises(kind, match=match):
            subspaces.find(it.model, train, site, 2, **options)

    refused('a dictionary and its method go together; got method="dictionary" and no dictionary', dictionary=None)
    refused('go together; got method="pca" and a dictionary', method="pca")
    refused("no such way to choose features; got 'best'; allowed: difference, probe", choose="best")
    refused(f"is not as wide as {site}; got directions of 3; allowed: {width}", dictionary=torch.eye(3))
    refused("has fewer features than are to be chosen; got 2; allowed: 1 to 1", dictionary=torch.eye(width)[:1])
    refused("this is no dictionary; got decoder, other; allowed: W_dec, W_enc", dictionary={"decoder": 1, "other": 2})
    odd = {"W_dec": torch.eye(width), "W_enc": torch.ones(width, 3)}
    refused(r"do not fit together; got W_enc \[3, \d+\]", dictionary=odd)
    refused("without an encoder has directions alone", dictionary={"W_dec": torch.eye(width), "k": 2})
    refused("keeps a number of codes; got k=999", dictionary=odd | {"W_enc": torch.eye(width), "k": 999})
    refused("W_dec of this dictionary is not finite", dictionary=torch.full((4, width), torch.nan))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    refused("cannot read a dictionary from", DataError, dictionary=tmp_path / "bad.safetensors")
    refused("cannot read a dictionary from", DataError, dictionary=str(tmp_path / "none.safetensors"))


def test_a_subspace_of_neurons_says_what_of_it_is_read() -> None:
    made = planted.illusion()
    swaps, site = cases.illusion_swaps(made), made.truth["site"]
    direction = made.truth["direction"].reshape(1, -1)
    found = subspaces.find(made.model, swaps, site, 1, method="dictionary", dictionary=direction)
    assert found.attrs["row_share"] == pytest.approx(0.5)
    assert (found.attrs["cause_row"], found.attrs["cause_null"]) == (0.0, 0.0)  # and the whole swaps every answer
    carrier = torch.eye(made.model.anatomy.d_mlp)[[made.truth["neurons"]["carrier"]]]
    right = subspaces.find(made.model, swaps, site, 1, method="dictionary", dictionary=carrier)
    assert right.attrs["cause_row"] == 1.0
    coded = {"W_dec": carrier, "W_enc": carrier.T}
    again = subspaces.find(made.model, swaps, site, 1, method="dictionary", dictionary=coded)
    assert (again.attrs["cause_row"], again.attrs["cause_null"]) == (1.0, 0.0)
    stream = subspaces.find(made.model, swaps, "0.resid_post", 1, method="random")
    assert "row_share" not in stream.attrs
