"""Mean activations over a text, and activations of other prompts: values to ablate with.

Formula:  mean[unit] = sum over real tokens at the address of x[unit] / their number, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import Site, parse
from microtome.errors import DataError, error
from microtome.model import Model
from microtome.run import Prompt
from microtome.stream import Moments, TokenBatch


def means(model: Model, text: Prompt | Iterable[TokenBatch], sites: str | Sequence[str]) -> dict[str, Tensor]:
    """The mean activation of sites over prompts or a corpus, for `Mean(mean=)` and `Set`.

    Formula:  see the head of this file.
    Source:   mean ablation as in Wang et al., "Interpretability in the Wild", 2022 (arXiv 2211.00593). Departs: over
              all tokens of the text (padding, and a token put before a text by its tokenizer in batches of a corpus,
              are left out), unless the address names positions.
    Cost:     one forward over the text; two float64 numbers per unit.
    Check:    equals the mean of what runs capture, padded or not; tests/laws/test_values.py.

    Args:
        model: an open model.
        text: a prompt, several of any lengths, or batches of a corpus such as `stream.TokenBatches`.
        sites: addresses; with positions, such as ``"*.mlp_out@-1"``, the mean is over those alone.

    Returns:
        A mean [unit, ...] in float64 by address of one layer, as asked for: ``{"3.mlp_out@-1": ...}``.

    Raises:
        DataError: there is no text, or the address names attention scores or patterns.
    """
    addresses = [parse(s) for s in ([sites] if isinstance(sites, str) else sites)]
    square = next((a for a in addresses if a.name in ("attn.scores", "attn.pattern")), None)
    if square is not None:
        raise error(DataError, f"no mean of {square}", got="a site over pairs of positions", do="average it yourself")
    moments: dict[str, Moments] = {}
    for prompt, own in _prompts(text):
        run = model.run(prompt, capture=addresses, logits=False)
        for address, x in run.captured.items():
            everywhere = run.batch.frame.columns_of(address.positions) is None
            held = moments.setdefault(str(address), Moments(tuple(x.shape[2:])))
            held.update(x.detach(), (run.mask if own is None else own.to(run.mask.device)) if everywhere else None)
    if not moments:
        raise error(DataError, "means needs text", got="no batches", do="give prompts or a corpus")
    return {name: held.result().mean.reshape(held.shape) for name, held in moments.items()}


def _prompts(text: Prompt | Iterable[TokenBatch]) -> Iterator[tuple[Prompt, Tensor | None]]:
    """One prompt, or the tokens of each batch with the mask of its text: what is put before it is none of it."""
    parts: Any = text
    if isinstance(parts, str | Tensor) or (
        isinstance(parts, Sequence) and not any(isinstance(part, TokenBatch) for part in parts)
    ):
        yield parts, None
    else:
        yield from ((part.tokens, part.text) for part in parts)


def resampled(model: Model, prompts: Prompt, sites: str | Sequence[str], *, seed: int = 0) -> dict[str, Tensor]:
    """Each prompt's activations taken from another prompt of the list, drawn at random: a source for `Patch`.

    Formula:  source[row] = x[o(row)], o a random cycle through the prompts of each length, so that none is its own.
    Source:   resampling ablation as in Chan et al., "Causal Scrubbing", 2022. Departs: none.
    Cost:     one forward of the prompts; the sites of all of them in memory.
    Check:    every row is another prompt's, none its own, each used once; tests/laws/test_values.py.

    Args:
        model: an open model.
        prompts: at least two of each length that occurs.
        sites: addresses of whole sites.
        seed: of the draw.

    Returns:
        Tensors [prompt, pos, unit, ...] by site; in a sweep over the same prompts, ``Patch(site, source=...)`` takes
        each prompt's own row.

    Raises:
        DataError: a prompt has no other of its length.
        SiteError: an address names units or positions.
    """
    batch = model.to_batch(prompts)
    other = others(batch.lengths, seed)
    wanted = [sites] if isinstance(sites, str) else list(sites)
    run = model.run([batch.rows[i] for i in other], capture=wanted, logits=False)
    named: list[Site] = [site for s in wanted for site in model.anatomy.sites(parse(s))]
    return {str(site): run.whole(site) for site in named}


def others(lengths: Sequence[int], seed: int) -> list[int]:
    """For each of several prompts another one of the same length, each used once: one random cycle per length.

    Raises:
        DataError: a prompt has no other of its length.
    """
    generator = torch.Generator().manual_seed(seed)
    other = [0] * len(lengths)
    for length in sorted(set(lengths)):
        members = [i for i, n in enumerate(lengths) if n == length]
        if len(members) < 2:
            raise error(
                DataError,
                f"prompt {members[0]} cannot be resampled",
                got=f"no other prompt of {length} tokens",
                do="give at least two of each length",
            )
        shuffled = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        for i, member in enumerate(shuffled):
            other[member] = shuffled[(i + 1) % len(shuffled)]
    return other
