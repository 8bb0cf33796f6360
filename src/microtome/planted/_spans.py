"""A small trained transformer whose answer is in one span of the prompt, and whose other span says nothing."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from microtome.model import open as open_model
from microtome.planted._folder import Planted
from microtome.training import fit

CLASSES, FILLERS, SPAN = 4, 12, 5
BOS, ASK = 0, 1
SIGNAL, NULL = (1, 1 + SPAN), (1 + SPAN, 1 + 2 * SPAN)
VOCAB = 2 + CLASSES + FILLERS
LENGTH = 2 + 2 * SPAN


def spans(seed: int = 0, *, steps: int = 400, rows: int = 64) -> Planted:
    """A two-layer GPT-2 that was trained to name the class token of the first span; the second has one of its own.

    Formula:  a prompt is BOS, five tokens of signal, five of null, and a question; each span holds one token of a class
              at a place of its own among fillers; the next token is the class of the first span. What the null span
              holds is independent of the answer, and looks like the signal.
    Source:   BlockMNIST of Shah et al., "Do Input Gradients Highlight Discriminative Features?", 2021 (arXiv
              2102.12781). Departs: tokens in place of images.
    Check:    it answers, whatever the null span holds; tests/planted/test_spans.py.

    Args:
        seed: of weights and prompts.
        steps: of training.
        rows: of a step.

    Returns:
        A `Planted`. Its truth: `signal` and `null`, spans (first, end); `bos`, `ask`; `classes` and `fillers`, tokens.
    """
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH + 2, n_embd=48, n_layer=2, n_head=4, bos_token_id=BOS, eos_token_id=BOS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = GPT2LMHeadModel(config).eval()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(hf(input_ids=batch[0]).logits[:, -1], batch[1])

    fit(hf, loss, lambda step: span_rows(rows, 1_000_003 * seed + step + 1), steps, lr=3e-3, schedule="cosine",
        warmup=20, seed=seed, name="training a planted model")  # fmt: skip
    classes = list(range(2, 2 + CLASSES))
    truth = {"signal": SIGNAL, "null": NULL, "bos": BOS, "ask": ASK, "classes": classes}
    return Planted(open_model(hf.requires_grad_(False)), truth | {"fillers": list(range(2 + CLASSES, VOCAB))})


def span_rows(n: int, seed: int) -> tuple[Int[Tensor, "row pos"], Int[Tensor, " row"]]:
    """Prompts of `spans`, and the answer of each."""
    draw = torch.Generator().manual_seed(seed)
    tokens = 2 + CLASSES + torch.randint(FILLERS, (n, LENGTH), generator=draw)
    tokens[:, 0], tokens[:, -1] = BOS, ASK
    held = 2 + torch.randint(CLASSES, (n, 2), generator=draw)
    for k, (first, end) in enumerate((SIGNAL, NULL)):
        places = torch.randint(first, end, (n,), generator=draw)
        tokens[torch.arange(n), places] = held[:, k]
    return tokens, held[:, 0]
