"""Ablation: the activations of sites are replaced by their mean.

Formula:  x[unit] := mean over the tokens of a text of x[unit], at the rows, units and positions of the address.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from microtome.change._values import means
from microtome.edit import Edit, Mean
from microtome.method import Argument, Source, Text, change
from microtome.model import Model

Sites = str | Sequence[str]


@change(
    "mean_ablation",
    command="mean-ablation",
    title="mean ablation",
    question="How does a model behave when sites keep only their average activation?",
    source=Source(
        "Wang et al.", "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
        2022, "2211.00593", departs="the mean is over all tokens of the text, unless the address names positions",
    ),
    cost="one forward over the text; two float64 numbers per unit",
    check="tests/laws/test_values.py",
    call='mt.change.mean_ablation(model, "12.mlp_out")',
)  # fmt: skip
def mean_ablation(
    model: Model,
    sites: Annotated[Sites, Argument("address, such as 12.mlp_out or 3.attn.z[2]", positional=True)],
    *,
    text: Annotated[Any, Argument("text to average over: a file, or what `mt.measure` takes", from_text=Path)] = None,
    tokens: Annotated[int, Argument("how many tokens of the text to read", "tokens", least=2)] = 20_000,
) -> list[Edit]:
    """Edits that replace sites by their mean activation over a text.

    Raises:
        SiteError: an address matches nothing.
        DataError: there is no text, or the address names attention scores or patterns.
    """
    found = means(model, Text(text, tokens=tokens).batches(model).parts, sites)
    return [Mean(site, mean=mean.float()) for site, mean in found.items()]
