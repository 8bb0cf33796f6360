"""Which tokens each measure of a text counts, where rows begin with a token of the tokenizer's own and where not.

Every column is compared with the same number computed plainly from captures, with the columns that do not count cut out
by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tests import families
from torch import Tensor

import microtome as mt
from microtome.measurements import token_loss
from microtome.method import Measure, Text, declared
from microtome.stream import TokenBatch

BOS, ROWS, WIDTH, LAYERS = 1, 6, 12, 3
Plain = dict[str, Any]


class Begins:
    """A tokenizer that begins every text with a token of its own, and whose even ids are marks."""

    bos_token_id, all_special_ids = BOS, ()

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [BOS, 5] if add_special_tokens else [5]}

    def decode(self, ids: list[int]) -> str:
        return "," if ids[0] % 2 == 0 else "word"


@pytest.fixture(scope="module")
def model() -> mt.Model:
    hf = families.build("llama-gqa")
    with torch.no_grad():
        hf.get_input_embeddings().weight[BOS] *= 30  # a token that shows wherever it is counted
    return mt.open(hf, tokenizer=Begins(), prove=False)


def rows() -> Tensor:
    tokens = torch.randint(5, families.VOCAB, (ROWS, WIDTH), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = BOS
    return tokens


class Seen:
    """Captures [layer, example, pos, ...] in float64: all of the row, what is text, and that without a row's first."""

    def __init__(self, model: mt.Model, lead: int) -> None:
        self.model, self.lead, self.tokens = model, lead, rows()

    def row(self, site: str) -> Tensor:
        return self.model.run(self.tokens, capture=f"*.{site}")[f"*.{site}"].double()

    def text(self, site: str) -> Tensor:
        return self.row(site)[:, :, self.lead :]

    def later(self, site: str) -> Tensor:
        return self.row(site)[:, :, 1:]  # the row's first is what stands before the text, where something does


def stream(seen: Seen) -> Plain:
    pre, mid, post, attn, mlp = map(seen.later, ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"))
    cosine = torch.cosine_similarity

    def away(x: Tensor) -> Tensor:
        """The token half a row on, round the end of what follows the first one."""
        return x.roll(-(x.shape[2] // 2), 2)

    found = {
        "resid_pre_norm": pre.norm(dim=-1), "resid_mid_norm": mid.norm(dim=-1), "resid_post_norm": post.norm(dim=-1),
        "attn_share": attn.norm(dim=-1) / pre.norm(dim=-1), "mlp_share": mlp.norm(dim=-1) / mid.norm(dim=-1),
        "attn_cos": cosine(pre, attn, dim=-1), "mlp_cos": cosine(mid, mlp, dim=-1),
        "block_cos": cosine(pre, post, dim=-1), "block_influence": 1 - cosine(pre, post, dim=-1),
        "attn_cos_elsewhere": cosine(pre, away(attn), dim=-1), "mlp_cos_elsewhere": cosine(mid, away(mlp), dim=-1),
        "block_cos_elsewhere": cosine(pre, away(post), dim=-1),
        "block_influence_elsewhere": 1 - cosine(pre, away(post), dim=-1),
        "resid_post_norm_first": seen.row("resid_post")[:, :, :1].norm(dim=-1),
        "median_abs": seen.row("resid_post").abs().median(-1).values,
    }  # fmt: skip
    return {name: x.mean((1, 2)) for name, x in found.items()}


def massive(seen: Seen) -> Plain:
    peaks = seen.row("resid_post").abs().amax((1, 2))
    return {"max_abs": peaks.amax(-1), "max_abs_dim": peaks.argmax(-1)}


def head_norms(seen: Seen) -> Plain:
    norms = seen.later("attn.result").norm(dim=-1)
    return {"result_norm": norms.mean((1, 2)), "result_norm_std": norms.std((1, 2), correction=0)}


def activations(seen: Seen) -> Plain:
    x = seen.text("mlp.post").flatten(1, 2)
    return {"mean": x.mean(1), "std": x.std(1, correction=0), "max": x.amax(1), "min": x.amin(1)}


def firing(seen: Seen) -> Plain:
    return {"firing_rate": (seen.text("mlp.gate") > 0).double().mean((1, 2))}


def top_examples(seen: Seen) -> Plain:
    """All rows are asked for as drawn, so that these are the same rows as the strongest ones."""
    x = seen.text("mlp.post")
    values, place = x.max(2)
    best, row = values.sort(1, descending=True)
    best, row, place = (part.transpose(1, 2) for part in (best, row, place.gather(1, row)))  # [layer, neuron, rank]
    start = row * WIDTH
    around = torch.full((*place.shape, 25), torch.nan, dtype=x.dtype)
    for layer, neuron, rank in np.ndindex(*place.shape):
        values = x[layer, row[layer, neuron, rank], :, neuron]
        for offset in range(-16, 9):
            if 0 <= (p := int(place[layer, neuron, rank]) + offset) < len(values):
                around[layer, neuron, rank, 16 + offset] = values[p].float().bfloat16().double()
    found = {"value": best, "index": start + place + seen.lead, "start": start, "around": around}
    return {f"example_{k}": v[:, :, :2] for k, v in found.items()} | {f"drawn_{k}": v for k, v in found.items()}


def distribution(seen: Seen) -> Plain:
    """Of every sixteenth token, counted through the rows as they lie in the text."""
    chosen = [(r, p) for r in range(len(seen.tokens)) for p in range(seen.lead, WIDTH) if (r * WIDTH + p) % 16 == 0]
    r, p = (torch.tensor(x) for x in zip(*chosen, strict=True))
    post, gate, up = (seen.row(site)[:, r, p] for site in ("mlp.post", "mlp.gate", "mlp.up"))  # [layer, token, neuron]
    edges = np.array([-(2.0**k) for k in range(8, -9, -1)] + [2.0**k for k in range(-8, 9)])
    bins = np.searchsorted(edges, post.float().numpy(), side="right")
    signs = {"gate_pos_in_pos": (gate > 0) & (up > 0), "gate_pos_in_neg": (gate > 0) & (up <= 0),
             "gate_neg_in_pos": (gate <= 0) & (up > 0), "gate_neg_in_neg": (gate <= 0) & (up <= 0)}  # fmt: skip
    histogram = np.stack([(bins == b).sum(1) for b in range(35)], axis=-1)
    sizes = [torch.where(x, post.double().abs(), -1.0).numpy() for x in signs.values()]  # [layer, token, neuron]
    best = np.stack([x.argmax(1) for x in sizes], -1)  # the first of equal ones
    never = np.stack([x.max(1) < 0 for x in sizes], -1)
    x = post.double().numpy()
    value = np.stack([np.take_along_axis(x, best[:, None, :, k], 1)[:, 0] for k in range(4)], -1)
    found = {"value": np.where(never, np.nan, value), "index": np.where(never, -1, (r * WIDTH + p).numpy()[best]),
             "start": np.where(never, -1, (r * WIDTH).numpy()[best])}  # fmt: skip
    shares = {name: x.double().mean(1) for name, x in signs.items()}
    return {"histogram": histogram} | shares | {f"signs_{name}": x for name, x in found.items()}


def kurtosis(seen: Seen) -> Plain:
    x = seen.text("mlp.post").flatten(1, 2).numpy()
    return {"kurtosis": stats.kurtosis(x, axis=1, fisher=False), "skewness": stats.skew(x, axis=1)}


def effective_rank(seen: Seen) -> Plain:
    found: dict[str, list[float]] = {"effective_rank": [], "effective_rank_diagonal": []}
    for x in seen.later("resid_post").flatten(1, 2).numpy():
        covariance = np.cov(x.T)
        for name, size in zip(found, (np.linalg.eigvalsh(covariance), np.diag(covariance)), strict=True):
            p = size[size > 1e-12 * size.max()] / size.sum()
            found[name].append(float(np.exp(-(p * np.log(p)).sum())))
    return {name: np.array(x) for name, x in found.items()}


def attention_targets(seen: Seen) -> Plain:
    pattern = seen.row("attn.pattern")
    marks = (seen.tokens % 2 == 0).double()
    even = torch.ones(WIDTH, WIDTH).double().tril()
    found = {"attention": pattern, "uniform": (even / even.sum(1, keepdim=True)).expand_as(pattern)}
    told: Plain = {}
    for name, a in found.items():
        told[f"delimiter_{name}"] = torch.einsum("lbhqk,bk->lbhq", a, marks)[..., 1:].mean((1, 3))
        told[f"self_{name}"] = a.diagonal(dim1=3, dim2=4)[..., 1:].mean((1, 3))
    return told


def loss(seen: Seen) -> Plain:
    logits = seen.model.run(seen.tokens).logits
    return {
        "loss": token_loss(logits, seen.tokens).mean(),
        "loss_uniform": token_loss(torch.zeros_like(logits), seen.tokens).mean(),
    }


def ablation_loss(seen: Seen) -> Plain:
    def loss_with(*edits: mt.edit.Edit) -> float:
        return float(token_loss(seen.model.run(seen.tokens, edits=list(edits)).logits, seen.tokens).mean())

    parts: dict[str, Callable[[int], mt.edit.Edit]] = {
        "attn": lambda i: mt.edit.Zero(f"{i}.attn_out"), "mlp": lambda i: mt.edit.Zero(f"{i}.mlp_out"),
        "block": mt.edit.Skip,
    }  # fmt: skip
    whole = loss_with()
    return {f"loss_skip_{n}": np.array([loss_with(f(i)) - whole for i in range(LAYERS)]) for n, f in parts.items()}


EXPECTED: dict[str, Callable[[Seen], Plain]] = {
    f.__name__: f
    for f in (
        stream, massive, head_norms, activations, firing, top_examples, distribution, kurtosis, effective_rank,
        attention_targets, loss, ablation_loss,
    )
}  # fmt: skip


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_measure_counts_the_tokens_that_it_says(model: mt.Model, name: str, lead: int) -> None:
    options = {"examples": 2, "drawn": len(rows())} if name == "top_examples" else {}
    data = mt.measure(model, name, text=[TokenBatch.of(rows(), lead=lead)], **options)
    expected = EXPECTED[name](Seen(model, lead))
    assert {str(v) for v in data.data_vars if not str(v).endswith(("_lo", "_hi", "_diff"))} == set(expected)
    for column, value in expected.items():
        np.testing.assert_allclose(data[column], value, rtol=1e-4, atol=1e-5, err_msg=column)


def test_no_measure_of_a_text_is_left_out() -> None:
    every = [declared(n) for n, m in mt.methods("measure").items() if m.home.startswith("microtome.measurements.")]
    found = {m.method.name for m in every if isinstance(m, Measure) and isinstance(m.on, Text)}
    elsewhere = {m.method.name for m in every if "tests/laws/test_measures" not in m.method.check}
    assert found <= {*EXPECTED, "expert_neurons"} | elsewhere  # those of experts are in tests/laws/test_experts.py
