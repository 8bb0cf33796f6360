"""What a model does, as numbers of examples: on a text, on tasks, in generations, and how fast.

Formula:  ECE      sum over 15 bins b of confidence of n_b / n |mean confidence - share right|, of next tokens
          context  mean loss of the first quarter of a row's tokens - that of the last quarter
          repeated share of 4-grams of a continuation that have come before
          distinct number of different 2-grams / number of 2-grams
          entropy  (2/3) H_2 + (4/3) H_3, H_n the entropy of n-grams in bits, as in Meng et al., 2022
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.axes import Tokens
from microtome.method import RepeatedTokens
from microtome.model import Model
from microtome.tasks import Task

BINS = 15
PREFILL, DECODED, REPEATS = 256, 24, 3
"""Tokens of a prompt and of a continuation that are timed, and how often."""


@dataclass(frozen=True)
class TextScores:
    """Of each row of a text.

    Attributes:
        loss: [row] nats.
        context: [row] nats that the last quarter is easier than the first.
        right: [row, next] whether the likeliest token comes.
        confidence: [row, next] its probability.
        logs: [some row, next, vocab] log-probabilities of the first rows.
    """

    loss: Float[Tensor, " row"]
    context: Float[Tensor, " row"]
    right: Tensor
    confidence: Tensor
    logs: Tensor


def text_scores(model: Model, rows: Tokens, kept: int) -> TextScores:
    """Scores of rows of a text, with log-probabilities of the first `kept`."""
    parts: list[list[Tensor]] = []
    for i, row in enumerate(rows):
        logs = model.run(row.unsqueeze(0)).logits[0, :-1].float().log_softmax(-1)
        loss = -logs.gather(-1, row[1:, None].to(logs.device)).squeeze(-1).double().cpu()
        top = logs.max(-1)
        quarter = max(1, len(loss) // 4)
        parts.append([
            loss.mean(), loss[:quarter].mean() - loss[-quarter:].mean(),
            (top.indices.cpu() == row[1:].cpu()).double(), top.values.exp().double().cpu(),
            *([logs.cpu()] if i < kept else []),
        ])  # fmt: skip
    columns = [torch.stack([part[i] for part in parts]) for i in range(4)]
    logs = torch.stack([part[4] for part in parts if len(part) > 4]) if kept else torch.zeros(0, 0, 0)
    return TextScores(columns[0], columns[1], columns[2], columns[3], logs)


def divergences(before: TextScores, after: TextScores) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """[row] KL(before | after) in nats, and the share of positions with the same likeliest token."""
    found: list[tuple[Tensor, Tensor]] = []
    for a, b in zip(before.logs, after.logs, strict=True):
        kl = (a.exp() * (a - b)).sum(-1).double().mean()
        found.append((kl, (a.argmax(-1) == b.argmax(-1)).double().mean()))
    kl, same = zip(*found, strict=True)
    return torch.stack(kl), torch.stack(same)


def calibration(scores: TextScores, rows: Tensor) -> float:
    """The expected calibration error of some rows."""
    confidence, right = scores.confidence[rows].flatten(), scores.right[rows].flatten()
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    error = 0.0
    for b in number.unique().tolist():
        mine = number == b
        error += float(mine.double().mean() * (confidence[mine].mean() - right[mine].mean()).abs())
    return error


def induction_losses(model: Model, sequences: int) -> Float[Tensor, " row"]:
    """[row] Loss on the second half of random tokens that repeat."""
    look = RepeatedTokens(sequences=sequences).fitted(model)
    assert look.period is not None
    found: list[Tensor] = []
    for batch in look.batches(model).parts:
        logs = model.run(batch.tokens).logits[:, :-1].float().log_softmax(-1)
        loss = -logs.gather(-1, batch.tokens[:, 1:, None].to(logs.device)).squeeze(-1)
        found.append(loss[:, -look.period + 1 :].double().mean(1).cpu())
    return torch.cat(found)


def task_scores(model: Model, task: Task) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """[pair] Whether the likeliest token is an answer, and the logit of the answer less that of the foil."""
    found = task.accuracy(model)
    names = "top1_clean", "difference_clean"
    right, difference = (torch.as_tensor(found[name].values.astype("float64")) for name in names)
    return right, difference


def continuations(model: Model, prompts: Tokens, new: int) -> list[list[int]]:
    """The likeliest continuation of each prompt, to the full length."""
    found: list[list[int]] = []
    for prompt in prompts:
        mask = torch.ones(1, len(prompt), dtype=torch.int64, device=model.device)
        with torch.no_grad():
            out = model.hf.generate(
                input_ids=prompt.unsqueeze(0).to(model.device), attention_mask=mask, max_new_tokens=new,
                min_new_tokens=new, do_sample=False, pad_token_id=0, return_dict_in_generate=False,
            )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


def repeated(tokens: Sequence[int], n: int = 4) -> float:
    """The share of n-grams that have come before."""
    grams = _grams(tokens, n)
    return 1 - len(set(grams)) / len(grams)


def distinct(tokens: Sequence[int], n: int = 2) -> float:
    """How many n-grams are different, as a share."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams)


def entropy(tokens: Sequence[int]) -> float:
    """The weighted entropy of 2-grams and 3-grams in bits."""
    return 2 / 3 * _entropy(_grams(tokens, 2)) + 4 / 3 * _entropy(_grams(tokens, 3))


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _entropy(grams: Sequence[tuple[int, ...]]) -> float:
    shares = [count / len(grams) for count in Counter(grams).values()]
    return -sum(share * math.log2(share) for share in shares)


def speeds(model: Model) -> tuple[float, float]:
    """Tokens a second of a prompt that is read, and of one that is continued: medians."""
    length = min(PREFILL, model.anatomy.n_ctx - DECODED)
    prompt = torch.randint(model.anatomy.d_vocab, (1, length), generator=torch.Generator().manual_seed(0))
    read: list[float] = []
    written: list[float] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        model.run(prompt, logits=False)
        read.append(length / (time.perf_counter() - began))
        began = time.perf_counter()
        continuations(model, prompt[:, :8], DECODED)
        written.append(DECODED / (time.perf_counter() - began))
    return statistics.median(read), statistics.median(written)


def sizes(model: Model) -> tuple[int, int, float]:
    """Bytes of the parameters, how many there are, and the share that is not zero."""
    own = [p for p in model.hf.parameters() if not p.is_meta]
    count = sum(p.numel() for p in own)
    return sum(p.numel() * p.element_size() for p in own), count, sum(int(p.count_nonzero()) for p in own) / count
