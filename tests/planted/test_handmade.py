"""What is written into the hand-built Llamas is found there by plain captures and edits, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import microtome as mt
from microtome import planted

MAKERS: dict[str, Callable[..., planted.Planted]] = {
    "induction": planted.induction,
    "fact_memory": planted.fact_memory,
    "backup_head": planted.backup_head,
    "sink": planted.sink,
    "superposition": planted.superposition,
    "steering": planted.steering,
}


@pytest.mark.parametrize("name", MAKERS)
def test_each_is_a_plain_llama_with_a_whole_proof(name: str) -> None:
    first, again, other = (MAKERS[name](seed=seed).model for seed in (0, 0, 1))
    assert type(first.hf).__name__ == "LlamaForCausalLM"
    assert {check.status for check in first.proof} == {"holds"}
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", MAKERS)
def test_making_one_leaves_the_global_seed_alone(name: str) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    MAKERS[name]()
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------------------------------------------------ induction


def repeats(model: mt.Model, rows: int = 12, length: int = 40) -> Tensor:
    half = torch.stack([torch.randperm(1000, generator=torch.Generator().manual_seed(s))[:length] for s in range(rows)])
    return torch.cat([half, half], dim=1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_measure_of_induction_finds_the_induction_circuit(seed: int) -> None:
    it = planted.induction(seed)
    scores = mt.measure(it.model, "induction")
    for score, key in (("induction", "induction_head"), ("previous_token", "previous_token_head")):
        values = torch.from_numpy(scores[score].values).clone()
        assert values[it.truth[key]] > 0.9
        values[it.truth[key]] = 0.0
        assert values.max() < 0.2
    assert scores["induction_control"].max() < 0.05


def test_the_repeat_is_continued_by_these_two_heads_alone() -> None:
    it = planted.induction()
    tokens = repeats(it.model)

    def right(edits: list[mt.edit.Edit]) -> float:
        # The first token has none before it and takes itself for that: its repeat finds two places.
        said = it.model.run(tokens, edits=edits).logits[:, 41:-1].argmax(-1)
        return float((said == tokens[:, 42:]).float().mean())

    assert right([]) == 1.0
    for layer in (0, 1):
        for head in range(4):
            inside = (layer, head) in it.truth.values()
            assert (right([mt.edit.Zero(f"{layer}.attn.z[{head}]")]) < 0.05) == inside
    assert right([mt.edit.Zero("*.mlp_out")]) == 1.0


# ---------------------------------------------------------------------------------------------------------- fact memory


def fact_prompts(truth: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Every fact once, at changing places [fact, 9], with the subject's column and the answer."""
    rng, rows, columns, answers = Random(seed), [], [], []
    for s, row in zip(truth["subjects"], truth["facts"], strict=True):
        for r, answer in zip(truth["relations"], row, strict=True):
            column = rng.randrange(1, 8)
            tokens = [truth["bos"], *rng.choices(truth["fillers"], k=7), r]
            tokens[column] = s
            rows.append(tokens)
            columns.append(column)
            answers.append(answer)
    return torch.tensor(rows), torch.tensor(columns), torch.tensor(answers)


def test_all_facts_are_known_and_each_hangs_on_one_neuron() -> None:
    it = planted.fact_memory()
    tokens, _, answers = fact_prompts(it.truth)

    def right(*edits: mt.edit.Edit) -> Tensor:
        return it.model.run(tokens, edits=edits).logits[:, -1].argmax(-1) == answers

    assert bool(right().all())
    for i in (0, 5, 31):
        known = right(mt.edit.Zero(f"{it.truth['layer']}.mlp.post[{it.truth['neurons'][i]}]")).reshape(32, 4)
        assert not known[i].any()
        assert bool(torch.cat([known[:i], known[i + 1 :]]).all())


def test_each_relation_has_its_head() -> None:
    it = planted.fact_memory()
    tokens, columns, answers = fact_prompts(it.truth)
    relation = torch.arange(4).repeat(32)
    for i, (layer, head) in enumerate(it.truth["heads"]):
        run = it.model.run(tokens, capture=f"{layer}.attn.pattern")
        pattern = run[f"{layer}.attn.pattern"][:, head, -1]
        at_subject = pattern.gather(1, columns.unsqueeze(1)).squeeze(1)
        assert at_subject[relation == i].min() > 0.99
        assert pattern[relation != i, 0].min() > 0.99
        logits = it.model.run(tokens, edits=[mt.edit.Zero(f"{layer}.attn.z[{head}]")]).logits[:, -1]
        right = logits.gather(1, answers.unsqueeze(1)).squeeze(1) > 5
        assert torch.equal(right, relation != i)


def test_the_memory_at_the_subject_decides() -> None:
    """Another subject's MLP output there brings its facts; at any other place it brings nothing."""
    it = planted.fact_memory()
    truth = it.truth
    fillers = truth["fillers"][:3]

    def prompt(subject: int) -> list[int]:
        return [truth["bos"], fillers[0], truth["subjects"][subject], fillers[1], truth["relations"][2]]

    other = it.model.run(prompt(9), capture="0.mlp_out")
    assert truth["facts"][9][2] != truth["facts"][4][2]
    for position, expected in ((2, 9), (1, 4), (3, 4), (4, 4)):
        said = it.model.run(prompt(4), edits=[mt.edit.Patch(f"0.mlp_out@{position}", other)]).logits[0, -1].argmax()
        assert int(said) == truth["facts"][expected][2]


# ---------------------------------------------------------------------------------------------------------- backup head


def asked(truth: Any) -> Tensor:
    rng, rows = Random(3), []
    for name in truth["names"]:
        tokens = [truth["bos"], *rng.choices(truth["fillers"], k=6), truth["ask"]]
        tokens[rng.randrange(1, 7)] = name
        rows.append(tokens)
    return torch.tensor(rows)


@pytest.mark.parametrize("seed", [0, 4])
def test_the_backup_makes_up_for_the_main_head(seed: int) -> None:
    it = planted.backup_head(seed)
    model, truth = it.model, it.truth
    tokens, names = asked(truth), torch.tensor(truth["names"])
    (a, main), (b, backup) = truth["main"], truth["backup"]
    capture = ["0.attn.result@-1", "1.attn.result@-1", "final.scale"]
    base = model.run(tokens, capture=capture)
    held = mt.edit.Patch("final.scale@-1", base)
    ablated = model.run(tokens, capture=capture, edits=[mt.edit.Zero(f"{a}.attn.z[{main}]"), held])

    def direct(run: mt.Run, layer: int, head: int) -> Tensor:
        """What a head adds to the logit of the name, by the norm of the base run."""
        write = run[f"{layer}.attn.result@-1"][:, 0, head] * model.final_norm.gain
        return (write * model.W_U[:, names].T).sum(-1) / base["final.scale"][:, -1]

    lost = direct(ablated, a, main) - direct(base, a, main)
    gained = direct(ablated, b, backup) - direct(base, b, backup)
    assert lost.max() < -8
    slope = float(torch.linalg.lstsq(lost.unsqueeze(1), gained.unsqueeze(1)).solution)
    assert slope == pytest.approx(truth["slope"], abs=0.05)
    total = (ablated.logits - base.logits)[:, -1].gather(1, names.unsqueeze(1)).squeeze(1)
    assert (total - lost - gained).abs().max() < 1e-3
    assert total.abs().max() < 0.1 * lost.abs().min()
    assert direct(base, b, backup).abs().max() < 0.01
    for run, expected in ((base, True), (ablated, True)):
        assert bool((run.logits[:, -1].argmax(-1) == names).all()) == expected
    both = [mt.edit.Zero(f"{a}.attn.z[{main}]"), mt.edit.Zero(f"{b}.attn.z[{backup}]")]
    assert float((model.run(tokens, edits=both).logits[:, -1].argmax(-1) == names).float().mean()) < 0.1


# ----------------------------------------------------------------------------------------------------------------- sink


def test_sink_heads_wait_for_their_trigger() -> None:
    it = planted.sink()
    model, truth = it.model, it.truth
    rng = Random(0)
    for i, (layer, head) in enumerate(truth["heads"]):
        tokens = [truth["bos"], *rng.choices(truth["fillers"], k=20)]
        tokens[9] = truth["triggers"][i]
        run = model.run(tokens, capture=[f"{layer}.attn.pattern", f"{layer}.attn.result"])
        pattern = run[f"{layer}.attn.pattern"][0, head]
        assert pattern[1:9, 0].min() > 0.99
        assert pattern[9:, 0].max() < 0.01
        assert pattern[9:, 9].min() > 0.99
        write = run[f"{layer}.attn.result"][0, :, head].norm(dim=-1)
        assert write[1:9].max() < 0.01 * write[9:].min()
        said = run.logits[0].argmax(-1)
        assert bool((said[9:] == truth["alarms"][i]).all())
        for other in range(4):
            if (layer, other) not in truth["heads"]:
                assert run[f"{layer}.attn.pattern"][0, other, 5:, 0].mean() < 0.5


def test_the_sink_stands_on_one_massive_activation() -> None:
    it = planted.sink()
    model, truth = it.model, it.truth
    tokens = [truth["bos"], *truth["fillers"][:12]]
    site = f"{truth['layer']}.resid_post"
    patterns = [f"{layer}.attn.pattern" for layer, _ in truth["heads"]]
    run = model.run(tokens, capture=[site, *patterns])
    largest = run[site][0].abs().argmax()
    assert divmod(int(largest), model.anatomy.d_model) == (0, truth["dimension"])
    assert float(run[site][0].max()) == pytest.approx(truth["value"], rel=0.05)
    others = run[site][0, 1:].abs()
    assert others.max() < truth["value"] / 20
    without = model.run(
        tokens, capture=patterns, edits=[mt.edit.Zero(f"{truth['layer']}.mlp.post[{truth['neuron']}]@0")]
    )
    for layer, head in truth["heads"]:
        assert run[f"{layer}.attn.pattern"][0, head, 1:, 0].min() > 0.99
        assert without[f"{layer}.attn.pattern"][0, head, 5:, 0].max() < 0.3


# -------------------------------------------------------------------------------------------------------- superposition


def test_the_stream_is_a_sparse_sum_of_more_directions_than_dimensions() -> None:
    it = planted.superposition()
    model, truth = it.model, it.truth
    directions, activations = truth["directions"], truth["activations"]
    assert directions.norm(dim=1).sub(1).abs().max() < 1e-5
    assert int(torch.linalg.matrix_rank(directions)) == 24 < len(directions) == 64
    assert bool(((activations > 0).sum(1) == 3).all())
    overlap = directions @ directions.T - torch.eye(64)
    assert overlap.abs().max() < 0.5
    tokens = torch.arange(300).reshape(20, 15)
    expected = activations[tokens] @ directions + truth["rest"]
    run = model.run(tokens, capture=["embed", "0.resid_post"])
    assert (run[truth["site"]] - expected).abs().max() < 1e-5
    used = directions.abs().sum(0) > 0
    assert (run["0.resid_post"] - expected)[..., used].abs().max() < 1e-5


def test_a_direction_speaks_for_the_tokens_that_have_its_feature() -> None:
    it = planted.superposition()
    directions, activations = it.truth["directions"], it.truth["activations"]
    tokens = [[3, 50, 7]]
    base = it.model.run(tokens).logits[0, -1]
    for f in range(0, 64, 9):
        raised = (
            it.model.run(tokens, edits=[mt.edit.Add("0.resid_post@-1", directions[f], strength=2.0)]).logits[0, -1]
            - base
        )
        has = activations[:, f] > 0
        if has.any():
            assert raised[has].mean() > 3 * raised[~has].abs().mean()


# ------------------------------------------------------------------------------------------------------------- steering


def texts(truth: Any, tone: str, rows: int = 16, seed: int = 0) -> Tensor:
    """Texts that end in a neutral word, half of whose other words have a tone."""
    rng = Random(seed)
    toned = truth[tone]
    found = [
        [
            truth["bos"],
            *(rng.choice(toned if i % 2 else truth["neutral"]) for i in range(9)),
            rng.choice(truth["neutral"]),
        ]
        for _ in range(rows)
    ]
    return torch.tensor(found)


def share(truth: Any, logits: Tensor, tone: str) -> float:
    return float(logits[:, -1].softmax(-1)[:, truth[tone]].sum(-1).mean())


@pytest.mark.parametrize("seed", [0, 2])
def test_one_direction_sets_the_tone(seed: int) -> None:
    it = planted.steering(seed)
    model, truth = it.model, it.truth
    for tone in ("good", "bad"):
        assert share(truth, model.run(texts(truth, tone)).logits, tone) > 0.9
    neutral = texts(truth, "neutral")
    base = model.run(neutral).logits
    assert share(truth, base, "good") == pytest.approx(1 / 3, abs=0.05)
    v = truth["direction"]
    other = torch.randn(len(v), generator=torch.Generator().manual_seed(5))
    other = other - (other @ v) * v
    inside = it.model.W_U.abs().sum(1) == 0  # not the direction that the words themselves are read from
    other = torch.where(inside, other, 0.0)
    other = (other - (other @ v) * v) / other.norm()
    for strength, tone in ((2.0, "good"), (-2.0, "bad")):
        steered = model.run(neutral, edits=[mt.edit.Add(truth["site"], v, strength=strength)]).logits
        assert share(truth, steered, tone) > 0.9
        control = model.run(neutral, edits=[mt.edit.Add(truth["site"], other, strength=strength)]).logits
        assert share(truth, control, tone) == pytest.approx(share(truth, base, tone), abs=0.05)
    weak = model.run(neutral, edits=[mt.edit.Add(truth["site"], v, strength=0.25)]).logits
    assert share(truth, weak, "good") == pytest.approx(share(truth, base, "good"), abs=0.02)


def test_the_difference_of_means_finds_the_direction() -> None:
    it = planted.steering()
    truth = it.truth
    at = f"{truth['site']}@-1"
    good, bad = (it.model.run(texts(truth, tone), capture=at)[at].mean((0, 1)) for tone in ("good", "bad"))
    assert torch.cosine_similarity(good - bad, truth["direction"], dim=0) > 0.99


def test_the_direction_is_written_and_read_where_it_is_said() -> None:
    it = planted.steering()
    model, truth = it.model, it.truth
    layer, head = truth["head"]
    good = texts(truth, "good")
    assert share(truth, model.run(good, edits=[mt.edit.Zero(f"{layer}.attn.z[{head}]")]).logits, "good") < 0.5
    assert (
        share(truth, model.run(good, edits=[mt.edit.Project(truth["site"], truth["direction"])]).logits, "good") < 0.5
    )
    first = truth["neurons"][0]
    assert share(truth, model.run(good, edits=[mt.edit.Zero(f"{first[0]}.mlp.post[{first[1]}]")]).logits, "good") < 0.5
