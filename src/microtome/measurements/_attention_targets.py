"""What heads attend to in a text: delimiters, and the token itself.

Formula:  A the pattern of a head, D the keys whose token is a delimiter (punctuation, line breaks: no letter or digit):
          delimiter = mean over q of sum_{k in D} A[q, k],   self = mean over q of A[q, q],  q without each row's first;
          controls: the same for uniform attention over the keys 0 .. q, or over all keys where q sees both ways.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.errors import DataError, error
from microtome.method import Column, Seen, Source, Text, measure


def _share(name: str, meaning: str, control: str = "") -> Column:
    return Column(name, "share", meaning, control, range=(0, 1))


@measure(
    "attention_targets",
    of="head",
    on=Text(sequences=16, width=128),
    sites="attn.pattern",
    title="what heads attend to",
    question="How much does each head attend to delimiters, and to the token itself?",
    columns=(
        _share("delimiter_attention", "attention to punctuation and line breaks", "delimiter_uniform"),
        _share("delimiter_uniform", "the same for uniform attention"),
        _share("self_attention", "attention to the token itself", "self_uniform"),
        _share("self_uniform", "the same for uniform attention"),
    ),
    source=Source(
        "Clark et al.", "What Does BERT Look At? An Analysis of BERT's Attention", 2019, "1906.04341", "section 3",
        departs="delimiters are tokens without letters or digits, not special tokens; uniform attention is the control",
    ),
    cost="one forward over the first sequences of the text; patterns are computed but not kept",
    check="tests/laws/test_measures.py",
)  # fmt: skip
def attention_targets(seen: Seen) -> dict[str, tuple[Float[Tensor, "batch pos head"], Bool[Tensor, "batch pos"]]]:
    """Shares of attention to delimiters and to the token itself, beside those of uniform attention.

    Raises:
        DataError: the model has no tokenizer.
    """
    found = target_shares(seen["attn.pattern"], delimiters(seen), causal=seen.model.anatomy.causal)
    return {name: (x, seen.later) for name, x in found.items()}


def target_shares(
    pattern: Float[Tensor, "batch head q_pos k_pos"], delimiter: Bool[Tensor, "batch k_pos"], *, causal: bool
) -> dict[str, Float[Tensor, "batch q_pos head"]]:
    """The shares [batch, q_pos, head] of patterns [batch, head, q_pos, k_pos], and those of uniform attention.

    Args:
        pattern: what each query attends to.
        delimiter: [batch, k_pos] which keys are delimiters.
        causal: whether a query sees the keys 0 .. q only; all of them otherwise.
    """
    pattern = pattern.double()
    keys = delimiter.to(pattern)
    width = pattern.shape[-1]
    count = torch.arange(1, width + 1, dtype=pattern.dtype, device=pattern.device)
    count = count if causal else torch.full_like(count, width)
    seen_keys = keys.cumsum(1) if causal else keys.sum(1, keepdim=True)
    heads = pattern.new_ones(pattern.shape[1])
    return {
        "delimiter_attention": torch.einsum("bhqk,bk->bqh", pattern, keys),
        "delimiter_uniform": (seen_keys / count).unsqueeze(-1) * heads,
        "self_attention": pattern.diagonal(dim1=2, dim2=3).transpose(1, 2),
        "self_uniform": (1 / count).expand(len(keys), -1).unsqueeze(-1) * heads,
    }


def delimiters(seen: Seen) -> Bool[Tensor, "batch pos"]:
    """[example, pos] The tokens without a letter or digit.

    Raises:
        DataError: the model has no tokenizer.
    """
    if seen.model.tokenizer is None:
        what = f"{seen.model.anatomy.name} has no tokenizer to find delimiters with"
        raise error(DataError, what, do="open the model with its tokenizer")
    ids, place = seen.tokens.unique(return_inverse=True)
    marks = [bool(word) and not any(c.isalnum() for c in word) for word in seen.model.to_words(ids)]
    return torch.tensor(marks, device=place.device)[place]
