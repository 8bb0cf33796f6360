"""What a mask forbids stays forbidden, whatever is done to the scores; and what is padded takes part in nothing."""

from __future__ import annotations

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt

NEAR = {"rtol": 1e-4, "atol": 2e-5}
LOWEST = -1e30
CAUSAL = [n for n in families.NAMES if families.KIND[n] == "causal"]


def row(n: int, seed: int = 0) -> list[int]:
    return torch.randint(5, families.VOCAB, (n,), generator=torch.Generator().manual_seed(n + 100 * seed)).tolist()


ROWS = [row(5), row(9)]
EDITS: list[mt.edit.Edit] = [
    mt.edit.Zero("1.attn.scores"),
    mt.edit.Zero("1.attn.scores[2]@-1"),
    mt.edit.Set("1.attn.scores", 0.7),
    mt.edit.Scale("1.attn.scores", 1e-30),
    mt.edit.Scale("1.attn.scores", -0.5),
    mt.edit.Clamp("1.attn.scores", -1.0, 1.0),
    mt.edit.Add("1.attn.scores", 1e30),
    mt.edit.Apply("1.attn.scores", torch.zeros_like),
    mt.edit.Apply("1.attn.scores", lambda x: x.softmax(-1)),
    mt.edit.Mean("1.attn.scores"),
]


@pytest.mark.parametrize("name", families.some(2))
def test_no_edit_of_scores_lifts_a_mask(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    for side in ("left", "right"):
        base = model.run(ROWS, capture=["1.attn.pattern", "1.attn.scores"], padding=side)
        hidden = base["1.attn.scores"] < LOWEST
        hidden = hidden & base.mask[:, None, :, None]  # what a pad looks at is nobody's business
        assert hidden.any()
        assert base["1.attn.pattern"][hidden].abs().max() == 0
        for edit in EDITS:
            run = model.run(ROWS, capture="1.attn.pattern", edits=[edit], padding=side)
            assert run["1.attn.pattern"][hidden].abs().max() == 0, edit
            assert run.logits[run.mask].isfinite().all(), edit
        # A mean is that of the scores that are there: finite, and near the others.
        run = model.run(ROWS, capture="1.attn.scores", edits=[mt.edit.Mean("1.attn.scores")], padding=side)
        seen = ~hidden & base.mask[:, None, :, None]
        assert run["1.attn.scores"][seen].abs().max() <= base["1.attn.scores"][seen].abs().max()


@pytest.mark.parametrize("name", families.some(2, CAUSAL))
def test_an_edit_of_scores_leaves_what_comes_before_it_alone(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    tokens, other = row(9), row(9, seed=1)
    changed = [*tokens[:6], *other[6:]]
    for edit in EDITS[:-1]:
        one, two = (model.run([t], edits=[edit]).logits[0, :6] for t in (tokens, changed))
        torch.testing.assert_close(one, two, **NEAR, msg=lambda text, e=edit: f"{e}: {text}")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mistral", "falcon-mqa", "gemma2", "gpt_neo"])
def test_scores_of_another_run_lift_no_mask(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    free = torch.zeros(1, 4, 9, 9)
    base = model.run([row(9)], capture="1.attn.scores")["1.attn.scores"]
    edit = mt.edit.Patch("1.attn.scores", source={"1.attn.scores": free})
    run = model.run([row(9)], capture=["1.attn.scores", "1.attn.pattern"], edits=[edit])
    hidden = base < LOWEST
    assert run["1.attn.pattern"][hidden].abs().max() == 0
    counts = (~hidden).sum(-1, keepdim=True)
    torch.testing.assert_close(run["1.attn.pattern"], (~hidden) / counts, **NEAR)


def test_what_is_knocked_out_stays_so() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    for after in (mt.edit.Zero("1.attn.scores"), mt.edit.Set("1.attn.scores", 3.0)):
        edits = [mt.edit.KnockOut("1.attn.scores@-1", keys="2"), after]
        run = model.run([row(9)], capture="1.attn.pattern", edits=edits)
        assert run["1.attn.pattern"][0, :, -1, 2].abs().max() == 0
        assert run["1.attn.pattern"][0, :, -1, 1].abs().min() > 0


def test_a_pattern_is_what_its_edit_says() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    run = model.run([row(9)], capture="1.attn.pattern", edits=[mt.edit.Set("1.attn.pattern", 0.25)])
    assert (run["1.attn.pattern"] == 0.25).all()
    assert "neither masked nor normalised again" in mt.anatomy.parse("1.attn.pattern").spec.meaning


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("site", ["1.resid_post", "1.attn.z[1]", "1.mlp.post[3,5]", "1.attn.scale"])
def test_a_mean_is_over_real_tokens(site: str, padding: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    rows = [row(5), row(9), row(7)]
    base = model.run(rows, capture=site, padding=padding)
    for chosen in (None, (0,), (2, 0)):
        run = model.run(rows, capture=site, edits=[mt.edit.Mean(site, rows=chosen)], padding=padding)
        picked = list(range(3)) if chosen is None else list(chosen)
        real = torch.cat([base[site][i][base.mask[i]] for i in picked])
        for i in picked:
            expected = real.mean(0).expand_as(run[site][i])
            torch.testing.assert_close(run[site][i], expected, **NEAR)


def test_a_mean_in_a_generation_is_over_real_tokens() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    batch = model.to_batch(ROWS, "left")
    seen: list[Tensor] = []
    keep = mt.edit.Apply("1.resid_post", lambda x: (seen.append(x.clone()), x)[1])
    with model.editing(keep, mt.edit.Mean("1.resid_post"), keep):
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        model.hf.generate(input_ids=batch.tokens, attention_mask=batch.mask.long(), **options)
    assert len(seen) == 6
    for before, after, mask in zip(seen[::2], seen[1::2], (batch.mask, *[torch.ones(2, 1) > 0] * 2), strict=True):
        torch.testing.assert_close(after, before[mask].mean(0).expand_as(after), **NEAR)


def test_projection_with_a_dependent_basis_removes_its_span_alone() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    one, two = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    whole = torch.stack([one, two])

    def after(basis: Tensor, onto: bool = False) -> Tensor:
        edit = mt.edit.Project("1.resid_pre", basis, onto=onto)
        return model.run([row(9)], capture="1.resid_pre", edits=[edit])["1.resid_pre"]

    for basis in (torch.stack([one, one, two]), torch.stack([one, two, one + two, one * 3]), whole * 1e-6, whole * 1e6):
        torch.testing.assert_close(after(basis), after(whole), **NEAR)
        torch.testing.assert_close(after(basis, onto=True), after(whole, onto=True), **NEAR)
    base = model.run([row(9)], capture="1.resid_pre")["1.resid_pre"]
    assert torch.equal(after(torch.zeros(2, 40)), base)
    torch.testing.assert_close(after(torch.cat([torch.eye(40), torch.eye(40)])), torch.zeros_like(base), **NEAR)


PARALLEL = ["gptj", "phi", "codegen", "falcon-mqa", "falcon-onenorm", "cohere", "stablelm-parallel"]


@pytest.mark.parametrize("name", PARALLEL)
def test_one_norm_has_one_divisor(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    parts = model.anatomy.parts.layers[1]
    assert parts.attn_norm is not None
    assert parts.mlp_norm is not None
    assert parts.attn_norm.path == parts.mlp_norm.path
    sites = ["1.attn.scale", "1.mlp.scale"]
    base = model.run([row(9)], capture=["1.attn.in", "1.mlp.in", *sites])
    other = model.run([row(9, seed=1)], capture=sites)

    def swap(site: str) -> mt.edit.Edit:
        return mt.edit.Patch(site, other)

    one = model.run([row(9)], edits=[swap(sites[0])], capture=["1.attn.in", *sites])
    for edits in ([swap(s) for s in sites], [swap(s) for s in reversed(sites)], [swap(sites[1])], [swap(sites[1])] * 2):
        run = model.run([row(9)], edits=edits, capture=["1.attn.in", *sites])
        for site in ("1.attn.in", *sites):
            torch.testing.assert_close(run[site], one[site], **NEAR)
        torch.testing.assert_close(run.logits, one.logits, **NEAR)
    assert not torch.allclose(one["1.attn.in"], base["1.attn.in"], atol=1e-3)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "gptj"])
def test_divisors_nest_and_freeze(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    half = mt.edit.Scale("1.attn.scale", 0.5)
    quarter = model.run([row(9)], edits=[mt.edit.Scale("1.attn.scale", 0.25)], capture="1.attn.scale")
    with model.editing(half):
        run = model.run([row(9)], edits=[half], capture="1.attn.scale")
    torch.testing.assert_close(run["1.attn.scale"], quarter["1.attn.scale"], **NEAR)
    torch.testing.assert_close(run.logits, quarter.logits, **NEAR)
    # With its divisor held, a norm is linear but for its bias: so is its gradient, whatever the divisor was set to.
    edits = [mt.edit.Set("1.attn.scale", 2.0), mt.edit.Freeze(patterns=False, activations=False)]
    for order in (edits, edits[::-1]):
        run = model.run([row(9)], edits=order, capture=["1.resid_pre", "1.attn.in"], grad=True)
        weight = torch.randn(run["1.attn.in"].shape, generator=torch.Generator().manual_seed(2))
        grad = run.grad((run["1.attn.in"] * weight).sum())["1.resid_pre"]
        norm = model.layers[1].attn_norm
        assert norm is not None
        expected = weight * norm.gain / 2.0
        expected = norm.centre(expected)  # the transpose of centring is centring
        torch.testing.assert_close(grad, expected.detach(), **NEAR)
