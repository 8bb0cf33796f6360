"""A mask over frozen weights: of ones it is the model, it keeps what matters, and the weights come back."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import families
from tests.agreement import agreed

import microtome as mt
from microtome import circuits
from microtome.circuits import Sparsification, _weight_mask
from microtome.circuits._goals import Bigrams, Goal, goal_of
from microtome.circuits._weight_mask import kept_weights
from microtome.circuits._weights import Matrices, random_like

FAMILIES = ["llama-gqa", "gpt2", "gpt_neox-parallel", "phi3", "falcon-gqa", "olmo2", "mixtral", "opt-prenorm"]
ASK: Any = circuits.weight_mask
QUICK: dict[str, Any] = {"steps": 60, "rows": 4, "draws": 1}


def text(rows: int = 32, length: int = 8, vocab: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def state(model: mt.Model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.hf.parameters()]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_ones_is_the_model_and_shares_are_those_of_matrices(name: str, dtype: torch.dtype) -> None:
    hf: Any = families.build(name)
    model = mt.open(hf.to(dtype), prove=False)
    matrices, rows = Matrices.of(model, ["*.attn_out", "1.mlp_out"]), text(2)
    plain, before = model.run(rows).logits, state(model)
    ones = {path: torch.ones(p.shape) for path, p in matrices.held.items()}
    with matrices.under() as put:
        put(ones)
        assert torch.equal(model.run(rows).logits, plain)
        put({path: 0 * x for path, x in ones.items()})
        assert not torch.equal(model.run(rows).logits, plain)
    assert all(torch.equal(a, b) for a, b in zip(before, model.hf.parameters(), strict=True))
    halves = random_like({path: torch.arange(x.numel()).view(x.shape) % 4 == 0 for path, x in ones.items()},
                         torch.Generator().manual_seed(0))  # fmt: skip
    names, shares = matrices.shares(halves)
    assert {"0.W_Q", "2.W_O", "1.W_out"} <= set(names)
    assert not [n for n in names if n.startswith("0.W_out")]
    assert float((shares - 0.25).abs().max()) < 0.12
    assert float(matrices.shares(ones)[1].min()) == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.hf.parameters(), strict=True))


def test_random_masks_keep_as_much_of_every_matrix() -> None:
    masks = {"a": torch.arange(50).view(5, 10) < 13, "b": torch.zeros(4, 4, dtype=torch.bool)}
    drawn = random_like(masks, torch.Generator().manual_seed(0))
    assert [int(x.sum()) for x in drawn.values()] == [13, 0]
    assert not torch.equal(drawn["a"], masks["a"])


def planted() -> tuple[mt.Model, torch.Tensor, torch.Tensor]:
    """A model in which half of the neurons of one MLP write nothing; and which of its weights matter [in, out]."""
    hf: Any = families.build("llama-gqa")
    mlp = hf.model.layers[1].mlp
    live = torch.arange(mlp.down_proj.weight.shape[1]) % 2 == 0
    with torch.no_grad():
        mlp.down_proj.weight *= 8.0 * live
        for layer in (0, 2):  # what else could say the same
            hf.model.layers[layer].mlp.down_proj.weight.zero_()
    return mt.open(hf, prove=False), live, mlp.down_proj.weight.detach()


def test_weights_that_do_nothing_go_and_those_that_matter_stay() -> None:
    model, live, _ = planted()
    goal = goal_of(model, text(), "model", tokens=1000, length=8)
    learned = kept_weights(Matrices.of(model, "1.mlp_out"), goal, Sparsification(0.05, 120), 8)
    kept = learned.kept
    for name, axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
        share = kept[f"model.layers.1.mlp.{name}.weight"].double().mean(axis)
        assert float(share[~live].max()) == 0.0, name  # their gradient is 0, and they cost something
        assert float(share[live].mean()) > 0.2, name
    free = kept_weights(Matrices.of(model, "1.mlp_out"), goal, Sparsification(0.002, 120), 8)
    assert sum(int(x.sum()) for x in free.kept.values()) > sum(int(x.sum()) for x in kept.values())


def test_kept_weights_suffice_and_are_needed() -> None:
    model, _, _ = planted()
    found = ASK(model, text(64), sites="1.mlp_out", target="model", sparsity=0.05, steps=120, rows=8)
    assert float(found["kl_whole"]) == pytest.approx(0.0, abs=1e-6)
    assert float(found["kl"]) < 0.5 * float(found["kl_random"])
    assert float(found["kl"]) < float(found["kl_none"])
    assert 0 < float(found["kept"].sel(component="1.W_out")) < 0.5
    assert found["toward_next"].dims == ("layer",)
    assert found.attrs["rows_judged"] == 16
    assert {"kl_lo", "kl_diff", "rise_diff_hi"} <= set(found)


def test_values_are_those_of_a_model_whose_weights_are_masked(tmp_path: Path) -> None:
    hf: Any = families.build("llama-gqa")
    file = tmp_path / "mask.safetensors"
    given = {"sites": ["0.mlp_out", "2.attn_out"], "target": "bigram", "sparsity": 0.3} | QUICK
    read = text(vocab=90)
    found = ASK(mt.open(hf, prove=False), read, save=str(file), **given)
    masks = load_file(file)
    assert found.attrs["kept_weights"] == sum(int(x.sum()) for x in masks.values())
    rows = read[3::4]
    counts = torch.zeros(101, 101, dtype=torch.float64)
    for i, row in enumerate(read):
        for a, b in pairwise(row):
            counts[a, b] += i % 4 != 3  # the others are judged
    p = counts / counts.sum(1, keepdim=True).clamp(min=1)
    known = counts.sum(1)[rows[:, :-1]] > 0
    assert not bool(known.all())
    assert found.attrs["share_read"] == pytest.approx(float(known.double().mean()), abs=1e-4)

    def mean(x: torch.Tensor) -> torch.Tensor:
        """Of each row over the tokens that are known, then over rows."""
        return ((x * known).sum(1) / known.sum(1)).mean()

    def judged(change: Any) -> tuple[float, float]:
        own: Any = families.build("llama-gqa")
        with torch.no_grad():
            for path, mask in masks.items():
                w = own.get_parameter(path)
                w *= change(mask).float()
            log_q = own(rows).logits[:, :-1].double().log_softmax(-1)
        target = p[rows[:, :-1]]
        kl = mean((target * (target.clamp(min=1e-300).log() - log_q)).sum(-1))
        loss = mean(-log_q.gather(-1, rows[:, 1:, None])[..., 0])
        return float(kl), float(loss)

    whole, alone, without = (judged(f) for f in (torch.ones_like, lambda m: m, torch.logical_not))
    assert float(found["kl_whole"]) == pytest.approx(whole[0], rel=1e-4)
    assert float(found["kl"]) == pytest.approx(alone[0], rel=1e-4)
    assert float(found["loss_whole"]) == pytest.approx(whole[1], rel=1e-4)
    assert float(found["rise"]) == pytest.approx(without[1] - whole[1], abs=1e-4)
    assert float(found["kl_none"]) == pytest.approx(judged(torch.zeros_like)[0], rel=1e-4)


def test_bigrams_are_counted_and_their_divergence_is_plain() -> None:
    rows = text(6, 9)
    bigrams = Bigrams.of(list(rows), 1, 101)
    counts = torch.zeros(101, 101, dtype=torch.float64)
    for row in rows:
        for a, b in pairwise(row[1:]):
            counts[a, b] += 1
    p = counts / counts.sum(1, keepdim=True).clamp(min=1)
    log_q = torch.randn(20, 101, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    now = rows[:, 1:-1].flatten()[:20]
    agreed(bigrams.cross(now, log_q), -(p[now] * log_q.double()).sum(-1).float(), 1e-5)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    assert torch.allclose(bigrams.entropy, entropy.float(), atol=1e-5)
    seen = counts.sum(1) > 0
    assert torch.equal(bigrams.likely >= 0, seen)
    assert all(p[t, bigrams.likely[t]] == p[t].max() for t in seen.nonzero().flatten())


def test_bigrams_of_judged_rows_are_not_counted() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    rows = text(8)
    rows[3] = torch.arange(60, 68)  # tokens of their own, that no learned row has
    rows[7, :4] = torch.arange(70, 74)
    goal = goal_of(model, rows, "bigram", tokens=1000, length=8)
    bigrams = goal.bigrams
    assert bigrams is not None
    assert int(bigrams.count[60:].sum()) == 0
    assert goal.halves[1] == [7]
    known = int((bigrams.count[rows[7, :-1]] > 0).sum())
    assert 0 < known <= 3
    assert goal.share_read == known / 14
    logits = model.run(rows[7:]).logits
    changed = logits.clone()
    changed[:, :4] = 0.0  # at tokens that are not known
    assert torch.equal(goal.divergence(logits, [7]), goal.divergence(changed, [7]))
    assert torch.equal(goal.loss(logits, [7]), goal.loss(changed, [7]))
    assert goal_of(model, rows, "model", tokens=1000, length=8).share_read == 1.0
    strange = rows.clone()
    strange[3::4] = torch.arange(60, 68)
    with pytest.raises(mt.errors.DataError, match="no token of the judged rows is followed by any in the learned ones"):
        goal_of(model, strange, "bigram", tokens=1000, length=8)


def test_the_slope_in_gates_is_that_of_differences() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    matrices, goal = Matrices.of(model, "0.mlp_out"), goal_of(model, text(4), "model", tokens=1000, length=8)
    path = next(iter(matrices.held))
    rows = goal.halves[0]
    whole = _weight_mask._whole(model, goal, rows)  # pyright: ignore[reportPrivateUsage]

    def value(gates: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        with matrices.under() as put:
            put(gates)
            found = _weight_mask._drawn_back(matrices, goal, [(rows, whole)], len(rows))  # pyright: ignore
        return float(found[0]), found[1]

    g = torch.Generator().manual_seed(0)
    gates = {p: torch.rand(x.shape, generator=g) for p, x in matrices.held.items()}
    slope = value(gates)[1][0] * matrices.held[path].detach()
    step = torch.randn(slope.shape, generator=g)
    ends = [value(gates | {path: gates[path] + s * 2e-3 * step})[0] for s in (1, -1)]
    assert (ends[0] - ends[1]) / 4e-3 == pytest.approx(float((slope * step).sum()), rel=0.02)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("learning", [True, False])
def test_weights_come_back_after_any_exception(
    kind: type[BaseException], learning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a mask is learned, and while it is judged."""
    model = mt.open(families.build("llama-gqa"), prove=False)
    before, plain = state(model), model.run(text(2)).logits
    wanted = [p.requires_grad for p in model.hf.parameters()]
    calls = 0

    def failing(self: Goal, *given: Any) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled() == learning
        if calls == 2:
            raise kind("stop")
        return divergence(self, *given)

    divergence = Goal.divergence
    monkeypatch.setattr(Goal, "divergence", failing)
    with pytest.raises(kind, match="stop"):
        ASK(model, text(16), sites="*.mlp_out", lr=1.0, growth=4.0, **QUICK | {"steps": 20})
    assert calls == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.hf.parameters(), strict=True))
    assert [p.requires_grad for p in model.hf.parameters()] == wanted
    assert torch.equal(model.run(text(2)).logits, plain)


def test_a_task_has_answers() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    pairs = tuple(
        mt.tasks.Pair("", "", tuple(row.tolist()), tuple(row.flip(0).tolist()), "a", "b", (11 + i,), (12 + i,), {})
        for i, row in enumerate(text(8))
    )
    task = mt.tasks.Task("own", "answers", pairs, {"seed": 0}, text=False)
    found = ASK(model, task, sites="*.mlp_out", sparsity=0.5, **QUICK | {"steps": 100})
    log_q = model.run(text(8)[3::4]).logits[:, -1].double().log_softmax(-1)
    expected = -float(log_q[torch.arange(2), torch.tensor([14, 18])].mean())
    assert (found.attrs["target"], float(found["kl_whole"])) == ("answers", pytest.approx(expected, rel=1e-5))
    assert float(found["loss_whole"]) == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(float(found["rise"]))


def test_what_cannot_be_masked_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    for given, kind, words in (
        ({"sites": "0.resid_post"}, mt.errors.SiteError, '"0.resid_post" names no branch whose weights can be masked'),
        ({"sites": "7.mlp_out"}, mt.errors.SiteError, "no layers 7"),
        ({"target": "answers"}, mt.errors.ArgumentError, "a text has no answers"),
        ({"text": text(3)}, mt.errors.DataError, "learned from some rows and judged on others; got 3 rows"),
        ({"steps": 2, "lr": 5e-5}, mt.errors.FitError, "did not decide which weights it keeps in 2 steps"),
        ({"sparsity": 1e6, "steps": 60}, mt.errors.ArgumentError, "the mask keeps no weight"),
    ):
        with pytest.raises(kind, match=words):
            ASK(model, **{"text": text(8), "sites": "0.mlp_out"} | given)
    bert = mt.open(families.build("bert"), prove=False)
    with pytest.raises(mt.errors.ModelUnsupported):
        ASK(bert, text(8))
