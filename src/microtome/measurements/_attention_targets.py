"""What heads attend to in a text: delimiters, and the token itself.

Formula:  A the pattern of a head, D the keys whose token is a delimiter (punctuation, line breaks: no letter or digit):
          delimiter = mean over q of sum_{k in D} A[q, k],   self = mean over q of A[q, q],  q without each row's first;
          controls: the same with attention spread evenly over the keys 0 .. q.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        _share("delimiter_uniform", "the same, if attention were spread evenly"),
        _share("self_attention", "attention to the token itself", "self_uniform"),
        _share("self_uniform", "the same, if attention were spread evenly"),
    ),
    source=Source(
        "Clark et al.", "What Does BERT Look At? An Analysis of BERT's Attention", 2019, "1906.04341", "section 3",
        departs="delimiters are tokens without letters or digits, not special tokens; even attention is the control",
    ),
    cost="one forward of the first sequences of the text; patterns are formed and not kept",
    check="tests/laws/test_measures.py",
)  # fmt: skip
def attention_targets(seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
    """Shares of attention to delimiters and to the token itself, beside those of even attention."""
    pattern = seen["attn.pattern"].double()
    keys = delimiters(seen).to(pattern)
    count = torch.arange(1, pattern.shape[-1] + 1, dtype=pattern.dtype, device=pattern.device)
    heads = pattern.new_ones(pattern.shape[1])
    found = {
        "delimiter_attention": torch.einsum("bhqk,bk->bqh", pattern, keys),
        "delimiter_uniform": (keys.cumsum(1) / count).unsqueeze(-1) * heads,
        "self_attention": pattern.diagonal(dim1=2, dim2=3).transpose(1, 2),
        "self_uniform": (1 / count).expand(len(keys), -1).unsqueeze(-1) * heads,
    }
    return {name: (x, seen.later) for name, x in found.items()}


def delimiters(seen: Seen) -> Tensor:
    """[example, pos] The tokens without a letter or digit; none where there is no tokenizer."""
    ids, place = seen.tokens.unique(return_inverse=True)
    if seen.model.tokenizer is None:
        return torch.zeros_like(place, dtype=torch.bool)
    marks = [bool(word) and not any(c.isalnum() for c in word) for word in seen.model.to_words(ids)]
    return torch.tensor(marks, device=place.device)[place]
