"""What a model does, as numbers of examples: on a text, on tasks, in generations, and how fast.

Formula:  ECE      sum over 15 bins b of confidence of n_b / n |mean confidence - share right|, of next tokens
          context  mean loss of the first quarter of a row's tokens - that of the last quarter
          repeated share of 4-grams of a continuation that have come before
          distinct number of different 2-grams / number of 2-grams
          entropy  ((2/3) H_2 + (4/3) H_3) / 2, H_n the entropy of n-grams in bits, as the code of Meng et al., 2022
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
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
        best: [row, next] the likeliest token.
        right: [row, next] whether it comes.
        confidence: [row, next] its probability.
        logs: [row, some next, vocab] log-probabilities at some positions, evenly spaced.
    """

    loss: Float[Tensor, " row"]
    context: Float[Tensor, " row"]
    best: Int[Tensor, "row next"]
    right: Float[Tensor, "row next"]
    confidence: Float[Tensor, "row next"]
    logs: Float[Tensor, "row some vocab"]


def text_scores(model: Model, rows: Tokens, kept: int) -> TextScores:
    """Scores of rows of a text, with log-probabilities at `kept` positions of each."""
    found: list[tuple[Tensor, ...]] = []
    some = torch.linspace(0, rows.shape[1] - 2, max(1, min(kept, rows.shape[1] - 1))).long().unique()
    for row in rows:
        logs = model.run(row.unsqueeze(0)).logits[0, :-1].float().log_softmax(-1).cpu()
        loss = -logs.gather(-1, row[1:, None].cpu()).squeeze(-1).double()
        top, quarter = logs.max(-1), max(1, len(loss) // 4)
        gain = loss[:quarter].mean() - loss[-quarter:].mean()
        right = (top.indices == row[1:].cpu()).double()
        found.append((loss.mean(), gain, top.indices, right, top.values.exp().double(), logs[some]))
    return TextScores(*(torch.stack(column) for column in zip(*found, strict=True)))


def divergences(before: TextScores, after: TextScores) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """[row] KL(before | after) in nats, and the share of positions with the same likeliest token."""
    a = before.logs
    kl = [(x.exp() * (x - y)).sum(-1).double().mean() for x, y in zip(a, after.logs, strict=True)]
    return torch.stack(kl), (before.best == after.best).double().mean(1)


def calibration(scores: TextScores) -> float:
    """The expected calibration error."""
    confidence, right = scores.confidence.flatten(), scores.right.flatten()
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = [
        float((number == b).double().mean() * (confidence[number == b].mean() - right[number == b].mean()).abs())
        for b in number.unique().tolist()
    ]
    return sum(gaps)


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
    """The likeliest continuation of each prompt, to the full length: no penalty of the model's own settings counts."""
    from transformers import GenerationConfig

    plain = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=1, pad_token_id=0,
                             repetition_penalty=1.0, no_repeat_ngram_size=0)  # fmt: skip
    found: list[list[int]] = []
    for prompt in prompts:
        mask = torch.ones(1, len(prompt), dtype=torch.int64, device=model.device)
        with torch.no_grad():
            ids = prompt.unsqueeze(0).to(model.device)
            out = model.hf.generate(input_ids=ids, attention_mask=mask, generation_config=plain)
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
    return (2 / 3 * _entropy(_grams(tokens, 2)) + 4 / 3 * _entropy(_grams(tokens, 3))) / 2


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _entropy(grams: Sequence[tuple[int, ...]]) -> float:
    shares = [count / len(grams) for count in Counter(grams).values()]
    return -sum(share * math.log2(share) for share in shares)


def speeds(model: Model) -> tuple[float, float]:
    """Seconds to read a thousand tokens of a prompt, and to write a thousand behind one: medians of three."""
    length = max(1, min(PREFILL, model.anatomy.n_ctx - DECODED))
    prompt = torch.randint(model.anatomy.d_vocab, (1, length), generator=torch.Generator().manual_seed(0))
    model.run(prompt, logits=False)  # the first run is slower
    read, written = list[float](), list[float]()
    for _ in range(REPEATS):
        read.append(_timed(model, lambda: model.run(prompt, logits=False)) / length)
        written.append(_timed(model, lambda: continuations(model, prompt[:, :8], DECODED)) / DECODED)
    return 1000 * statistics.median(read), 1000 * statistics.median(written)


def _timed(model: Model, what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began


def sizes(model: Model) -> tuple[int, int, float]:
    """Bytes of the parameters, how many there are, and the share that is not zero."""
    own = [p for p in model.hf.parameters() if not p.is_meta]
    count = sum(p.numel() for p in own)
    return sum(p.numel() * p.element_size() for p in own), count, sum(int(p.count_nonzero()) for p in own) / count
