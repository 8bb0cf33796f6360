"""Texts that were trained into a tiny model are told from others; what is said of them is what plain runs give."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt

LENGTH = 12


def strings(count: int, seed: int) -> Tensor:
    return torch.randint(5, families.VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


@cache
def taught() -> mt.Model:
    """A model that knows four random strings, each from its first half on."""
    it = mt.open(copy.deepcopy(families.build("llama-gqa")), prove=False)

    def loss(rows: Tensor) -> Tensor:
        logits = it.hf(rows).logits[:, LENGTH // 2 - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, LENGTH // 2 :].flatten())

    with mt.settings(progress=False):
        mt.fit(it.hf, loss, [strings(4, 0)], steps=120, lr=5e-3)
    return it


def test_planted_strings_are_known_and_no_others() -> None:
    it = taught()
    data = mt.explain.memorised(it, torch.cat([strings(4, 0), strings(8, 1)]))
    assert data["memorised"].values.tolist() == [1] * 4 + [0] * 8
    assert float(data["loss"][:4].max()) < 0.1 < 1 < float(data["loss"][4:].min())
    assert float(data["matched"][4:].max()) < 1
    for end in ("", "_other"):  # where a gradient lies, whatever its size: known texts have a small one
        whole = sum(float(data[f"{name}_gradient{end}"].sum()) for name in ("attn", "mlp"))
        assert whole == pytest.approx(1.0)
        for name in ("attn_gradient", "mlp_gradient"):
            low, high = data[f"{name}{end}_lo"], data[f"{name}{end}_hi"]
            there = (low < data[f"{name}{end}"]) & (data[f"{name}{end}"] < high)
            assert there.all() if end else np.isnan(low).all()  # of four texts there is none
    assert 0 < float(data["fragile"][:4].mean()) <= 1
    assert data.attrs["known"] == 4


def test_gradients_are_those_of_the_weights_and_leave_no_trace() -> None:
    it = mt.open(families.build("gpt2"), prove=False)
    rows = strings(2, 3)
    flags = [p.requires_grad for p in it.hf.parameters()]
    data = mt.explain.memorised(it, rows, prefix=5)
    assert [p.requires_grad for p in it.hf.parameters()] == flags
    assert all(p.grad is None for p in it.hf.parameters())
    held = copy.deepcopy(it.hf).requires_grad_(True)
    expected = []
    for row in rows:
        held.zero_grad()
        torch.nn.functional.cross_entropy(held(row[None]).logits[0, 4:-1], row[5:]).backward()
        parts = [m for block in held.transformer.h for m in (block.attn, block.mlp)]
        norms = torch.stack([torch.cat([p.grad.flatten() for p in m.parameters()]).norm() for m in parts])
        expected.append((norms / norms.sum())[2:4])  # of the layer 1
    found = [float(data["attn_gradient"][1]), float(data["mlp_gradient"][1])]
    assert found == pytest.approx(torch.stack(expected).mean(0).tolist(), rel=1e-4)  # none is known: of all


def test_attention_to_rare_tokens_is_a_correlation() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    row, counts = strings(1, 4), torch.arange(families.VOCAB).float()
    data = mt.explain.memorised(it, row, frequencies=counts)
    pattern = it.run(row, capture="1.attn.pattern")["1.attn.pattern"][0, 2, 5:-1, 1:6].mean(0)
    rarity = -((counts + 1) / (counts.sum() + len(counts))).log()[row[0, 1:6]]
    assert float(data["rare_attention"][1, 2]) == pytest.approx(np.corrcoef(pattern, rarity)[0, 1], abs=1e-5)
    assert float(data["rare_attention_shuffled"][1, 2]) != float(data["rare_attention"][1, 2])


def test_what_follows_a_replaced_token_is_the_greedy_continuation() -> None:
    it = taught()
    row = strings(4, 0)[:1]
    with mt.settings(seed=3):
        data = mt.explain.memorised(it, row)
    # The same tokens are drawn: one permutation for the control comes before.
    generator = torch.Generator().manual_seed(3)
    torch.randperm(LENGTH // 2 - 1, generator=generator)
    step = torch.randint(1, families.VOCAB, (LENGTH // 2,), generator=generator)
    for k in range(LENGTH // 2):
        own = row[0, : LENGTH // 2].clone()
        own[k] = (own[k] + step[k]) % families.VOCAB
        while len(own) < LENGTH:
            own = torch.cat([own, it.run(own[None]).logits[0, -1].argmax().reshape(1)])
        same = (own[LENGTH // 2 :] == row[0, LENGTH // 2 :]).long().cumprod(0).sum()
        assert float(data["follows"][0, k]) == pytest.approx(float(same) / (LENGTH // 2))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"texts": [[7, 8, 9]]}, "text 0 has no prefix of two tokens and a continuation; got 3 tokens, a prefix of 1"),
        ({"texts": [[7, 8, 9, 10], [7, 8]], "prefix": 2}, "text 1 has no prefix of two tokens"),
        ({"texts": [[7, 8, 9, 10]], "frequencies": torch.ones(3)}, "frequencies must be one number a token"),
    ],
)
def test_what_is_no_text_with_a_continuation_is_refused(given: dict[str, object], match: str) -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.PromptError, match=match):
        mt.explain.memorised(it, **given)  # type: ignore[arg-type]
