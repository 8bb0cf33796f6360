"""The largest activations of the residual stream.

Formula:  max_abs = max over tokens and dimensions of |resid_post|, max_abs_dim its dimension;
          of each row: t* the token with its largest activation;  massive_ratio = mean over rows of max |x_t*| / median
          |x_t*| (at most 1e6, where most entries are 0);  massive_first = share of rows in which t* is the first;
          massive_position = mean of t*;  control: the ratio of the token half the row from t*.
          Sun et al. call an activation massive above 100 and about 1,000 times the median.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.method import Column, Kept, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import Extremes

SOURCE = Source("Sun et al.", "Massive Activations in Large Language Models", 2024, "2402.17762")


@measure(
    "massive",
    of="layer",
    sites="resid_post",
    title="largest activations by layer",
    question="How large is the largest activation in the residual stream, and in which dimension does it occur?",
    columns=(
        Column(
            "max_abs", "activation", "largest absolute value in the residual stream after the layer, over all tokens",
            "none: compare median_abs of the measure stream", (0, None), interval=False, title="largest",
            chart="Largest and median activation", log=True,
        ),
        Column("max_abs_dim", "index", "the dimension of d_model in which it occurs", "none: an index", interval=False),
    ),
    source=SOURCE,
    cost="one maximum over the stream per layer",
    check="tests/laws/test_measures.py",
)  # fmt: skip
class Massive(Statistic):
    """The largest absolute activation of the residual stream, layer by layer, and its dimension."""

    def start(self, model: Model, layer: int | None) -> Kept:
        """The extremes of every dimension."""
        return {"extremes": Extremes(model.anatomy.size(Site("resid_post", layer), "d_model"))}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in all tokens, the first of each row too."""
        whole = seen.mask is None or bool(seen.mask[:, seen.lead :].all())
        kept["extremes"].update(seen["resid_post"], None if whole else seen.mask)

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """The largest of either sign, and where."""
        size = kept["extremes"].result().max_abs
        return {"max_abs": size.amax(), "max_abs_dim": size.argmax()}


@measure(
    "massive_tokens",
    of="layer",
    on=Text(sequences=16, width=128),
    sites="resid_post",
    title="where the largest activations are",
    question="At which token of a row is the largest activation, and how far does it stand out?",
    columns=(
        Column(
            "massive_ratio", "ratio", "largest activation of a row over the median size of its token's",
            "massive_ratio_elsewhere", (0, None), title="its token", chart="Largest over median activation", log=True,
        ),
        Column(
            "massive_ratio_elsewhere", "ratio", "the same of the token half the row from it", range=(0, None),
            title="another token", chart="Largest over median activation", log=True,
        ),
        Column(
            "massive_first", "share", "rows in which it is at the first token", "none: 1 / T if all tokens are alike",
            (0, 1),
        ),
        Column("massive_position", "index", "mean position of its token in the row, from 0",
               "none: (T - 1) / 2 where all tokens are alike", (0, None)),
    ),
    source=SOURCE,
    cost="one maximum over the stream per layer, and two medians per row",
    check="tests/laws/test_sinks.py",
)  # fmt: skip
def massive_tokens(seen: Seen) -> Mapping[str, Tensor]:
    """How far the largest activation of a row stands out of its token's, and at which token it is."""
    x = at_least_float32(seen["resid_post"])
    size = x.abs()
    place = size.amax(-1).argmax(1)
    rows = torch.arange(len(x), device=x.device)

    def ratio(position: Tensor) -> Tensor:
        own = size[rows, position].double()
        most = own.amax(-1)
        return most / torch.maximum(own.median(-1).values, most * 1e-6).clamp(min=1e-30)

    return {
        "massive_ratio": ratio(place), "massive_ratio_elsewhere": ratio((place + x.shape[1] // 2) % x.shape[1]),
        "massive_first": (place == 0).double(), "massive_position": place.double(),
    }  # fmt: skip
