"""Runs with a corrupted subject: by noise on its embeddings, or with another subject's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor

from microtome.context import current
from microtome.edit import Noise
from microtome.errors import PromptError, error
from microtome.explain._spans import at
from microtome.model import Model
from microtome.run import Run


def noise_seed(seed: int, sample: int) -> int:
    """The seed of one sample's noise: no two samples share it, of one seed or of neighbouring ones."""
    return int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0])


def noised(model: Model, tokens: Int[Tensor, "1 pos"], span: tuple[int, int], std: float, samples: int) -> Run:
    """All samples of the noise on the subject's embeddings in one run, with what then enters the first layer."""
    seeds = [noise_seed(current().seed, i) for i in range(samples)]
    edits = [Noise(f"embed{at(*span)}", std=std, seed=seed, rows=(i,)) for i, seed in enumerate(seeds)]
    return model.run(tokens.expand(samples, -1), capture="0.resid_pre", edits=edits)


def embedding_std(model: Model, tokens: Int[Tensor, "1 pos"], span: tuple[int, int], subjects: Sequence[str]) -> float:
    """The standard deviation of all numbers in the embeddings of a span of the prompt, or of texts.

    Raises:
        PromptError: the texts are none, or the model has no tokenizer to read them with.
    """
    if not subjects:
        site = f"embed{at(*span)}"
        return float(model.run(tokens, capture=site, logits=False)[site].double().std())
    if isinstance(subjects, str):
        raise error(PromptError, "subjects are several texts", got=repr(subjects), do="give a list of them")
    codec = model.codec
    if codec is None:
        do = "leave subjects= out, or open the model with tokenizer="
        raise error(PromptError, "subjects are texts, but the model has no tokenizer", do=do)
    run = model.run([codec.alone(s) for s in subjects], capture="embed", logits=False)
    return float(run["embed"][run.mask].double().std())


def first_difference(
    model: Model, clean: Int[Tensor, " pos"], corrupt: Int[Tensor, " pos"], span: tuple[int, int]
) -> int:
    """The first position where two prompts [pos] differ.

    Raises:
        PromptError: they are the same, or differ outside of the subject.
    """
    differs = (clean != corrupt).nonzero().flatten().tolist()
    if not differs:
        raise error(PromptError, "the corrupt prompt is the prompt itself", do="replace the subject by another")
    outside = [p for p in differs if not span[0] <= p < span[1]]
    if outside:
        raise error(
            PromptError, "the prompts differ outside of the subject",
            got=f"token {outside[0]}, {model.to_words(clean)[outside[0]]!r}",
            allowed=f"tokens {span[0]} to {span[1] - 1}",
            do="replace only the subject, or name everything that is replaced",
        )  # fmt: skip
    return differs[0]
