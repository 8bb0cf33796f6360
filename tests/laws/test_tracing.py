"""Causal tracing: its ends are the clean and the corrupted run, and every cell is its literal forward."""

from __future__ import annotations

from itertools import product

import pytest
import xarray as xr
from tests import families
from tests.agreement import agreed, agreement

import microtome as mt
from microtome.explain._corruption import noise_seed
from microtome.explain._spans import window_of

PROMPT, OTHER, SPAN = [7, 20, 33, 41, 52, 60], [7, 20, 64, 41, 52, 60], (2, 4)
TOLERANCE = 1e-6
"""Of probabilities: those of the model's own answer, which the noise takes away."""
RESTORED = (
    ("resid", 0, "0.resid_post"), ("resid", 1, "1.resid_post"), ("mlp", 0, "0.mlp_out"), ("mlp", 2, "1-2.mlp_out"),
    ("attn", 1, "0-1.attn_out"),
)  # fmt: skip
"""A kind, a layer, and what a window of two layers restores there."""
FAMILIES = ["llama-gqa", "gpt2", "gptj", "gemma2", "gpt_neox-parallel", "bert"]


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"))


def own(model: mt.Model) -> int:
    """The model's own answer to the prompt."""
    return int(model.run([PROMPT]).logits[0, -1].argmax())


def probability(model: mt.Model, tokens: list[int], edits: list[mt.edit.Edit], answer: int = 11) -> float:
    return float(model.run([tokens], edits=edits).logits[0, -1].softmax(-1)[answer])


def literal(model: mt.Model, seed: int, std: float, restored: str | None, answer: int = 11) -> float:
    """One plain forward with noise on the subject and one state put back."""
    edits: list[mt.edit.Edit] = [mt.edit.Noise("embed@2-3", std=std, seed=seed)]
    if restored is not None:
        edits.append(mt.edit.Patch(restored, source=model.run([PROMPT], capture=restored.split("@")[0])))
    return probability(model, PROMPT, edits, answer)


@pytest.mark.parametrize("name", families.some(2, FAMILIES))
def test_every_cell_is_its_literal_forward(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    answer = own(model)
    with mt.settings(seed=4):
        data = mt.explain.causal_trace(model, PROMPT, subject=SPAN, samples=2, window=2, noise=5.0)
    std = data.attrs["std"]
    assert std == pytest.approx(5 * float(model.run([PROMPT], capture="embed")["embed"][0, 2:4].std()), rel=1e-5)
    clean = probability(model, PROMPT, [], answer)
    with agreement(TOLERANCE) as agree:
        agree(data["clean"], clean)
        for sample in (0, 1):
            seed = noise_seed(4, sample)
            corrupt = literal(model, seed, std, None, answer)
            agree(data["corrupt_each"][sample] - clean, corrupt - clean, "the noise")
            for position, (kind, layer, restored) in product((2, 3, 5), RESTORED):
                expected = literal(model, seed, std, f"{restored}@{position}", answer) - corrupt
                agree(data[f"{kind}_each"][sample, layer, position], expected, (sample, kind, layer, position))
            before = literal(model, seed, std, "0.mlp_out@0", answer) - corrupt  # 0, unless attention sees both ways
            assert float(data["mlp_each"][sample, 0, 0]) == pytest.approx(before, abs=TOLERANCE)
            apart = abs(data["mlp_each"][sample] - data["attn_each"][sample])[:, 2:]
            assert float(apart.median()) > 10 * TOLERANCE  # they are not each other
    for kind in ("resid", "mlp", "attn"):
        assert float(abs(data[kind] - data[f"{kind}_each"].mean("example")).max()) < 1e-12
    assert float(abs(data["resid_each"][0] - data["resid_each"][1]).max()) > 1e-3  # two noises


def test_prompts_that_differ_outside_of_the_subject_are_refused(model: mt.Model) -> None:
    match = r"differ outside of the subject; got token 2, .*; allowed: tokens 0 to 0"
    with pytest.raises(mt.errors.PromptError, match=match):
        mt.explain.causal_trace(model, PROMPT, subject=(0, 1), answer=11, corrupt=OTHER)


def test_its_ends(model: mt.Model) -> None:
    data = mt.explain.causal_trace(model, PROMPT, subject=SPAN, samples=8)
    clean = float(data["clean"])
    assert clean == pytest.approx(probability(model, PROMPT, [], own(model)), abs=1e-6)
    assert float(abs(data["corrupt_each"] - clean).min()) > 1e-3  # the noise takes something away, or adds to it
    # Where the last token is the subject, its state in any layer is all that was changed.
    one = mt.explain.causal_trace(model, PROMPT, subject=(5, 6), samples=3, kinds=["resid"])
    lost = clean - one["corrupt_each"]
    agreed(one["resid_each"][:, :, 5], lost.expand_dims(layer=3, axis=1), 1e-5)
    agreed(data["resid_each"][:, -1, -1], clean - data["corrupt_each"], 1e-5)  # the last state alone decides
    assert float(abs(data["resid"][:, 2:]).max()) > 1e-3
    assert float(abs(data["resid"][:, :2]).max()) == 0
    assert (data["resid_lo"] <= data["resid"] + 1e-12).all()
    assert (data["resid"] <= data["resid_hi"] + 1e-12).all()
    assert data["subject"].values.tolist() == [False, False, True, True, False, False]
    assert data["mlp"].dims == ("layer", "pos")


def test_a_window_over_all_layers_restores_the_branch_everywhere(model: mt.Model) -> None:
    data = mt.explain.causal_trace(model, PROMPT, subject=SPAN, samples=1, window=6, kinds=["mlp", "attn"])
    with agreement(TOLERANCE) as agree:
        for kind, site in (("mlp", "mlp_out"), ("attn", "attn_out")):
            for position in (2, 5):
                expected = literal(model, noise_seed(0, 0), data.attrs["std"], f"*.{site}@{position}", own(model))
                agree(data[kind][1, position], expected - float(data["corrupt"]), (kind, position))
            assert bool(data[f"{kind}_lo"].isnull().all())  # one sample says nothing of the others


@pytest.mark.parametrize(
    ("layer", "width", "window"),
    [(2, 1, (2, 2)), (2, 2, (1, 2)), (2, 3, (1, 3)), (0, 3, (0, 1)), (5, 3, (4, 5)), (3, 4, (1, 4)), (3, 20, (0, 5))],
)
def test_a_window_lies_around_its_layer(layer: int, width: int, window: tuple[int, int]) -> None:
    assert window_of(layer, width, 6) == window


def test_without_noise_nothing_is_lost(model: mt.Model) -> None:
    data = mt.explain.causal_trace(model, PROMPT, subject=SPAN, answer=11, samples=2, noise=0.0)
    assert float(data["corrupt"]) == pytest.approx(float(data["clean"]), abs=1e-6)
    for kind in ("resid", "mlp", "attn"):
        assert float(abs(data[kind]).max()) < 1e-6


def test_seeds_repeat_and_differ(model: mt.Model) -> None:
    arguments = {"subject": SPAN, "samples": 2, "kinds": ["resid"]}

    def seeded(seed: int) -> xr.Dataset:
        with mt.settings(seed=seed):
            return mt.explain.causal_trace(model, PROMPT, **arguments)

    first, again, other = (seeded(seed) for seed in (1, 1, 7))
    assert first.equals(again)
    assert float(abs(first["resid"] - other["resid"]).max()) > 1e-3
    drawn = {noise_seed(seed, i) for seed in range(20) for i in range(10)}
    assert len(drawn) == 200  # neighbouring seeds share no sample
    near = seeded(2)["corrupt_each"].values
    assert abs(near[:, None] - first["corrupt_each"].values).min() > 1e-6


def test_another_subject_instead_of_noise(model: mt.Model) -> None:
    data, answer = mt.explain.causal_trace(model, PROMPT, subject=(2, 3), corrupt=OTHER, window=2), own(model)
    base = probability(model, OTHER, [], answer)
    assert float(data["corrupt"]) == pytest.approx(base, abs=1e-5)
    source = model.run([PROMPT], capture=["*.resid_post", "*.mlp_out", "*.attn_out"])
    with agreement(TOLERANCE) as agree:
        for kind, layer, position, site in (
            ("resid", 1, 2, "1.resid_post@2"),
            ("mlp", 2, 3, "1-2.mlp_out@3"),
            ("attn", 0, 5, "0.attn_out@5"),
        ):
            expected = probability(model, OTHER, [mt.edit.Patch(site, source=source)], answer) - base
            agree(data[kind][layer, position], expected, site)
    assert float(abs(data["resid"][:, :2]).max()) == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"subject": (4, 9)}, r"the prompt has no such subject; got \(4, 9\); allowed: .* <= 6"),
        ({"subject": "Rome"}, "subject given as text, but the model has no tokenizer"),
        ({"corrupt": PROMPT}, "the corrupt prompt is the prompt itself"),
        ({"corrupt": OTHER[:4]}, "differ first at token 2; got 6 and 4 tokens"),
        ({"subjects": ["Rome"]}, "subjects are texts, but the model has no tokenizer"),
        ({"samples": 0}, r"samples must be an integer of 1 or more \(draws\); got 0"),
        ({"window": 1.5}, r"window must be an integer of 1 or more \(layers\); got 1.5"),
        ({"noise": -1.0}, r"noise must be a number of 0 or more \(standard deviations of the embeddings\); got -1.0"),
        ({"kinds": []}, "kinds names nothing; allowed: resid, mlp, attn"),
        ({"kinds": ["head"]}, "kinds must be one of resid, mlp, attn, mixer; got 'head'"),
        ({"prompt": [PROMPT, OTHER]}, "one prompt at a time; got 2"),
    ],
)
def test_what_cannot_be_traced_is_refused(model: mt.Model, change: dict[str, object], text: str) -> None:
    arguments = {"prompt": PROMPT, "subject": SPAN, "answer": 11} | change
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        mt.explain.causal_trace(model, arguments.pop("prompt"), **arguments)


STANDING = {
    "embed": [mt.edit.Scale("embed@1-5", 1.5)],
    "resid_pre": [mt.edit.Scale("0-1.resid_pre", 1.5)],
    "later": [mt.edit.Scale("1.resid_pre", 1.5), mt.edit.Scale("0.mlp_out", 0.5)],
}


@pytest.mark.parametrize("where", STANDING)
def test_inside_editing_every_cell_is_its_literal_forward(model: mt.Model, where: str) -> None:
    """What a sweep starts with holds the standing edits of the first layer's input: they act once."""
    with model.editing(*STANDING[where]):
        data = mt.explain.causal_trace(model, PROMPT, subject=SPAN, answer=11, samples=1, window=2, noise=2.0)
        std, seed = data.attrs["std"], noise_seed(0, 0)
        corrupt = literal(model, seed, std, None)
        for kind, layer, restored in (
            ("resid", 0, "0.resid_post"),
            ("mlp", 1, "0-1.mlp_out"),
            ("attn", 0, "0.attn_out"),
        ):
            for position in (2, 5):
                expected = literal(model, seed, std, f"{restored}@{position}") - corrupt
                got = float(data[f"{kind}_each"][0, layer, position])
                assert got == pytest.approx(expected, abs=TOLERANCE), (kind, position)
        assert float(abs(data["resid_each"]).max()) > 1000 * TOLERANCE
    plain = mt.explain.causal_trace(model, PROMPT, subject=SPAN, answer=11, samples=1, window=2, noise=2.0)
    assert float(abs(plain["corrupt"] - data["corrupt"])) > 100 * TOLERANCE


def test_a_sweep_starts_with_a_stream_of_every_prompt(model: mt.Model) -> None:
    cell, metric = [mt.edit.Zero("1.mlp_out@2")], mt.metric.Probability(11)
    start = model.run([PROMPT, OTHER], capture="0.resid_pre")["0.resid_pre"]
    begun = model.sweep([PROMPT, PROMPT], cell * 2, metric, prompts=[0, 1], start=start).run()
    whole = model.sweep([PROMPT, OTHER], cell * 2, metric, prompts=[0, 1]).run()
    assert begun.values.tolist() == pytest.approx(whole.values.tolist(), abs=TOLERANCE)
    assert float(abs(begun.values[0] - begun.values[1])) > 20 * TOLERANCE
    with pytest.raises(mt.errors.EditError, match=r"must be \[prompt, pos, d_model\]; got \[1, 6, "):
        model.sweep([PROMPT, PROMPT], cell, metric, prompts=[0], start=start[:1])
