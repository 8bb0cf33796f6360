"""The proof's tolerance follows what is summed: true maps of any weights pass, false ones are refused beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome import planted
from microtome.anatomy import LayerWeights, NormWeights
from microtome.model._sized import Sized, normed, product, ratio


def turned(name: str, offset: float = 0.0) -> Any:
    """A compiled program, weights up to 100, whose stream is turned by a random rotation: what was nothing is rounding.

    With an offset, keys also read a constant of the stream so often, which their bias takes away again.
    """
    hf: Any = copy.deepcopy(planted.program(name).model.hf).double()
    width = hf.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    with torch.no_grad():
        for embedding in (hf.model.embed_tokens, hf.model.embed_positions):
            embedding.weight.copy_(embedding.weight @ turn)
        for block in hf.model.layers:
            attn, mlp = block.self_attn, block.mlp
            for reads in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.up_proj):
                reads.weight.copy_(reads.weight @ turn)
            for writes in (attn.o_proj, mlp.down_proj):
                writes.weight.copy_(turn.T @ writes.weight)
                writes.bias.copy_(writes.bias @ turn)
        hf.lm_head.weight.copy_(hf.lm_head.weight @ turn)
        if offset:
            _offset_keys(hf, offset)
    return hf.float()


def _offset_keys(hf: Any, offset: float) -> None:
    """Let every token write 1 to a direction, and every key read it `offset` times and take that away again.

    Of the directions it is the one that the first layer's keys and values read least, so that they stay what they are.
    """
    read = torch.cat([m.weight for b in hf.model.layers for m in (b.self_attn.q_proj, b.self_attn.k_proj)])
    constant = torch.linalg.svd(read, full_matrices=True).Vh[-1]
    hf.model.embed_tokens.weight.sub_(torch.outer(hf.model.embed_tokens.weight @ constant - 1, constant))
    hf.model.embed_positions.weight.sub_(torch.outer(hf.model.embed_positions.weight @ constant, constant))
    key = hf.model.layers[0].self_attn.k_proj
    key.weight.add_(offset * constant)
    key.bias.sub_(offset)


def refused(hf: Any) -> str:
    with pytest.raises(mt.errors.ProofError) as caught:
        mt.open(hf, strict=True)
    return str(caught.value)


@pytest.mark.parametrize("name", planted.PROGRAMS)
def test_a_compiled_program_in_any_basis_is_proven(name: str) -> None:
    """Keys of BOS are truly nothing, and rounding leaves 1e-7 of them: that is not a tenth of what there is."""
    model = mt.open(turned(name))
    assert {c.status for c in model.proof} <= {"holds", "does not apply"}
    program = planted.PROGRAMS[name]
    rows = [program.encode(program.vocabulary[: program.max_length]), program.encode(program.vocabulary[::-1][:3])]
    same = planted.program(name).model.run(rows).logits - model.run(rows).logits
    assert float(same.abs().max()) < 1e-2  # it is the same program, whose logits are about 1


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("name", ["reverse", "previous_token", "sort", "palindrome"])
def test_keys_that_are_small_sums_of_large_terms_are_proven(name: str, offset: float) -> None:
    model = mt.open(turned(name, offset))
    row = list(range(4))
    run = model.run(row, capture=["0.attn.in", "0.attn.k"])
    rounding = run["0.attn.k"] - run["0.attn.in"].double().matmul(
        model.layers[0].W_K.double().transpose(0, 1).flatten(1)
    ).add(model.layers[0].b_K.flatten()).unflatten(-1, (model.anatomy.n_heads, -1))  # type: ignore[union-attr]
    assert float(rounding.abs().max()) > 1e-5  # more than any absolute tolerance of keys of size 1 would allow


@cache
def proven(kind: str) -> Any:
    """A model whose map is proven as it is."""
    return mt.open(MODELS[kind]()).hf


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "heads in another order": lambda w: w.flip(0),
    "a thousandth too large": lambda w: w * 1.001,
    "a thousandth off here and there": lambda w: (
        w * (1 + 1e-3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0)))
    ),
}


def wide() -> Any:
    """A llama of one layer as wide as real ones, where products are small beside what is summed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=1024, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=4,
            intermediate_size=1024, vocab_size=64,
        )
    ).eval()  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "compiled": lambda: turned("more_a_than_b"),
    "compiled with heads that differ": lambda: turned("balanced"),
    "llama": lambda: families.build("llama-gqa"),
    "gpt2": lambda: families.build("gpt2"),
    "wide": wide,
}


MATRICES = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
CASES = [
    (kind, matrix, wrong)
    for kind in MODELS
    for matrix in MATRICES
    for wrong in WRONG
    if not kind.startswith("compiled") or ("order" in wrong) == ("differ" in kind)
]


@pytest.mark.parametrize(
    ("kind", "matrix", "wrong"), [pytest.param(*c, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, c in enumerate(CASES)]
)
def test_a_wrong_weight_is_refused(kind: str, matrix: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = proven(kind)
    own = getattr(LayerWeights, matrix).fget
    monkeypatch.setattr(LayerWeights, matrix, property(lambda self: WRONG[wrong](own(self))))
    text = refused(hf)
    places = {"W_O": "3 heads", "W_out": "4 neurons"}
    assert f'fails "{places.get(matrix, "7 weights")}" at ' in text


@pytest.mark.parametrize("kind", ["llama", "gpt2", "wide"])
def test_a_gain_that_is_dropped_or_a_thousandth_off_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = MODELS[kind]()
    with torch.no_grad():
        for name, x in hf.named_parameters():
            if "norm" in name or "ln_" in name:
                x.mul_(1 + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    own: Any = NormWeights.gain.fget  # type: ignore[attr-defined]
    for gain in (lambda self: torch.ones_like(own(self)), lambda self: own(self) * 1.001):
        monkeypatch.setattr(NormWeights, "gain", property(gain))
        assert 'fails "' in refused(hf)


@pytest.mark.parametrize("name", ["reverse", "previous_token", "repeats"])
def test_keys_are_checked_where_the_first_of_them_is_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """BOS has no key in these: the other positions must tell whether the view is right."""
    model = mt.open(turned(name))
    layer = next(c.where for c in model.proof if c.where.endswith("W_K"))
    assert layer == "0.W_K"
    own: Any = LayerWeights.W_K.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(LayerWeights, "W_K", property(lambda self: 1.001 * own(self)))
    assert ".W_K (gap " in refused(model.hf)


def test_the_size_of_a_product_is_that_of_its_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[1.0, 5.0], [2.0, 0.0], [1.0, -5.0 / 3]])
    for chunk in (2**24, 3):
        monkeypatch.setattr("microtome.model._sized.CHUNK", chunk)
        made = product(x, w, torch.tensor([0.0, -7.0]))
        torch.testing.assert_close(made.value, torch.tensor([[0.0, -7.0]]))
        torch.testing.assert_close(made.size, torch.tensor([[8.0, 17.0]]))
    total = (made + made * -2.0).sum(-1)
    torch.testing.assert_close(total.value, torch.tensor([7.0]))
    torch.testing.assert_close(total.size, torch.tensor([75.0]))


def test_a_gap_is_in_units_of_its_size() -> None:
    assert ratio(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 8.0])) == 0.25
    assert ratio(torch.tensor([1e-30, 0.0]), torch.tensor([0.0, 1.0])) == float("inf")
    assert ratio(torch.tensor([float("nan"), 0.0]), torch.ones(2)) != 0


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_what_rounding_leaves_of_a_sum_stays_within_the_size_behind_a_norm(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    norm = model.layers[1].mlp_norm
    assert norm is not None
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(2, 64, families.D_MODEL, generator=generator)
    x = Sized(small, small.abs() + 1e4 * large.abs())
    off = 1e-6 * x.size * torch.randn(x.size.shape, generator=generator).sign()
    with torch.no_grad():
        made = normed(norm, x, norm.apply(small))
        gap = (norm.apply(small + off) - made.value).abs()
    assert 1e-7 < ratio(gap, made.size) < 1.5e-6
