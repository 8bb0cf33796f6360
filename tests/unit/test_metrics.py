"""Metrics against plain torch on random logits, and what they refuse."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from tests import families

import microtome as mt

LOGITS = torch.randn(4, 2, 11, generator=torch.Generator().manual_seed(0)) * 3
WHICH = torch.tensor([0, 1, 1, 0])


def test_they_are_what_their_formulas_say() -> None:
    answers, foils = torch.tensor([3, 7])[WHICH], torch.tensor([5, 2])[WHICH]
    z, rows = LOGITS[:, 0], torch.arange(4)
    logp = torch.log(torch.exp(z) / torch.exp(z).sum(-1, keepdim=True))
    for metric, expected in (
        (mt.metric.LogitDifference([3, 7], foil=[5, 2]), z[rows, answers] - z[rows, foils]),
        (mt.metric.LogitDifference([3, 7], foil=5), z[rows, answers] - z[:, 5]),
        (mt.metric.Probability(4), logp[:, 4].exp()),
        (mt.metric.LogProbability([3, 7]), logp[rows, answers]),
        (
            mt.metric.Rank([3, 7]),
            torch.tensor([float(sum(v > row[a] for v in row)) for row, a in zip(z, answers, strict=True)]),
        ),
    ):
        torch.testing.assert_close(metric.read(LOGITS, WHICH), expected.float(), rtol=1e-5, atol=1e-5)


def test_rank_counts_what_is_greater_alone() -> None:
    logits = torch.tensor([[[1.0, 2.0, 2.0, 3.0]]])
    assert mt.metric.Rank(1).read(logits, torch.tensor([0])).tolist() == [1.0]
    assert mt.metric.Rank(3).read(logits, torch.tensor([0])).tolist() == [0.0]


def test_divergence_is_from_the_base_to_the_row() -> None:
    base = torch.randn(2, 2, 11, generator=torch.Generator().manual_seed(1))
    metric = mt.metric.Divergence.of(base, positions=(0, 1))
    p, q = base.softmax(-1)[WHICH], LOGITS.softmax(-1)
    expected = (p * (p.log() - q.log())).sum((-1, -2))
    torch.testing.assert_close(metric.read(LOGITS, WHICH), expected, rtol=1e-5, atol=1e-5)
    reverse = (q * (q.log() - p.log())).sum((-1, -2))
    assert (expected - reverse).abs().max() > 0.1
    assert metric.read(base, torch.tensor([0, 1])).abs().max() < 1e-6
    masked = base.clone()
    masked[..., 4] = -torch.inf
    zero = mt.metric.Divergence.of(masked, positions=(0, 1)).read(masked, torch.tensor([0, 1]))
    assert zero.abs().max() < 1e-6


def test_span_loss_is_the_mean_loss_of_its_targets() -> None:
    targets = torch.tensor([[3, 4], [5, 6]])
    metric = mt.metric.SpanLoss(targets, positions=(-2, -1))
    loss = torch.nn.functional.cross_entropy(LOGITS.flatten(0, 1), targets[WHICH].flatten(), reduction="none")
    torch.testing.assert_close(metric.read(LOGITS, WHICH), loss.reshape(4, 2).mean(1), rtol=1e-5, atol=1e-5)
    assert metric.columns(0, 9) == [7, 8]
    for same in (targets.tolist(), targets.int()):
        assert torch.equal(mt.metric.SpanLoss(same, positions=(-2, -1)).read(LOGITS, WHICH), metric.read(LOGITS, WHICH))


@pytest.mark.parametrize("ids", [torch.tensor([3, 7]), (3, 7)])
def test_ids_may_be_any_whole_numbers(ids: torch.Tensor | tuple[int, int]) -> None:
    expected = mt.metric.Rank([3, 7]).read(LOGITS, WHICH)
    assert torch.equal(mt.metric.Rank(ids).read(LOGITS, WHICH), expected)
    assert torch.equal(mt.metric.Rank(torch.tensor(3)).read(LOGITS, WHICH), mt.metric.Rank(3).read(LOGITS, WHICH))


def test_differences_are_taken_in_float32() -> None:
    low = LOGITS.to(torch.bfloat16)
    got = mt.metric.LogitDifference(3, foil=5).read(low, WHICH)
    assert got.dtype == torch.float32
    assert torch.equal(got, low[:, 0, 3].float() - low[:, 0, 5].float())


def test_a_metric_over_few_tokens_is_the_same() -> None:
    metric = mt.metric.LogitDifference([3, 7], foil=[5, 3])
    ids, narrow = metric.token_subset()
    assert ids == (3, 7, 5)
    assert torch.equal(narrow.read(LOGITS[..., list(ids)], WHICH), metric.read(LOGITS, WHICH))


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (
            lambda: mt.metric.FunctionMetric(lambda z, p: z, positions=(9,)),
            r"reads position 9 of prompt 0; allowed: -9 to 8",
        ),
        (lambda: mt.metric.FunctionMetric(lambda z, p: z, positions=(-10,)), "reads position -10 of prompt 0"),
        (lambda: mt.metric.SpanLoss(torch.zeros(1, 1, dtype=torch.long), positions=(50,)), "reads position 50"),
        (lambda: mt.metric.LogitDifference(5000, foil=3), "answer of a metric lies outside the vocabulary; got 5000"),
        (lambda: mt.metric.LogitDifference(5, foil=-1), "foil of a metric lies outside the vocabulary; got -1"),
        (lambda: mt.metric.LogitDifference([1, 2], foil=[3, 4, 5]), "2 answers and 3 foils"),
        (lambda: mt.metric.Probability([1, 2, 3]), "another number of answers than there are prompts; got 3 for 1"),
        (
            lambda: mt.metric.FunctionMetric(lambda z, p: z.mean()),
            r"did not return one value per row; got shape \[\]; allowed: a tensor of 1",
        ),
        (
            lambda: mt.metric.FunctionMetric(lambda z, p: z[:, 0, 0].tolist()),
            "did not return one value per row; got list",
        ),
        (
            lambda: mt.metric.FunctionMetric(lambda z, p: z[0, 0]),
            r"did not return one value per row; got shape \[101\]",
        ),
        (lambda: mt.metric.LogitDifference(4, foil=4), "the foil equals the answer"),
        (
            lambda: mt.metric.SpanLoss(torch.tensor([[500]]), positions=(0,)),
            "targets of a SpanLoss lie outside .* got 500",
        ),
        (
            lambda: mt.metric.SpanLoss(torch.tensor([[5, 6]]), positions=(0,)),
            r"targets of a SpanLoss does not fit .*\[1, 2\]",
        ),
        (lambda: mt.metric.Divergence.of(torch.zeros(1, 1, 7)), r"base of a Divergence does not fit .*\[1, 1, 101\]"),
        (lambda: mt.metric.Divergence(torch.zeros(1, 1, 5)), "not made of log-probabilities"),
    ],
)
def test_what_cannot_be_read_is_refused(metric: object, text: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.EditError, match=text):
        model.sweep(list(range(5, 14)), [mt.edit.Zero("0.resid_pre@0")], metric()).run()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_divergence_from_a_run_reads_each_prompt_where_it_ends(padding: Literal["left", "right"]) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    prompts = [[7, 20, 33, 41], [9, 11]]
    base = model.run(prompts, padding=padding)
    metric = mt.metric.Divergence.of(base, positions=(-1, 0))
    swept = model.sweep(
        prompts, [mt.edit.Scale("1.mlp_out", 1.0), mt.edit.Scale("1.mlp_out", 1.0)], metric, prompts=[0, 1]
    ).run()
    assert swept.values.abs().max() < 1e-5
    alone = torch.stack([model.run([p]).logits[0, [len(p) - 1, 0]].log_softmax(-1) for p in prompts])
    torch.testing.assert_close(metric.base, alone, atol=1e-5, rtol=1e-5)


def test_a_difference_needs_its_foil() -> None:
    with pytest.raises(TypeError, match="foil"):
        mt.metric.LogitDifference(11)  # pyright: ignore[reportCallIssue]


def test_a_text_is_no_set_of_answers() -> None:
    with pytest.raises(mt.errors.EditError, match=r"must be a set for each prompt; got .*; allowed: lists of tokens"):
        mt.tasks.LogOdds(["ab"], ["cd"])
