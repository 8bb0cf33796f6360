"""The largest activations of the residual stream.

Formula:  max_abs = max over tokens and dimensions of |resid_post|, max_abs_dim its dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from microtome.anatomy import Site
from microtome.method import Column, Kept, Seen, Source, Statistic, measure
from microtome.model import Model
from microtome.stream import Extremes


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
    source=Source("Sun et al.", "Massive Activations in Large Language Models", 2024, "2402.17762"),
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
