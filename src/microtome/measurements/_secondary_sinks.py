"""Secondary sinks: tokens that are not the first and receive much attention for some layers, and the MLP behind each.

Formula:  score(l, k) = mean over the heads of layer l of alpha_k, the mean attention that key k receives from the
          queries that see it (see `sinks`);  a token k in 1 .. T/2 - 1 is a secondary sink of layer l where
          score(l, k) > threshold;  birth = the first such layer, lifetime = how many there are;
          d_l = resid_post of layer l at the row's first token, scaled to norm 1;
          made_by = argmax_{l < birth} mlp_out_l . d_l, the layer whose MLP adds most in that direction;
          made_norm and made_cos = norm of that mlp_out, and its cosine with d_l.
          sink_alignment of a layer = correlation, over the tokens 1 .. T/2 - 1, of score(l, k) with the cosine between
          what enters the layer at k and at the first token; its control takes the cosine of the token half of these on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.axes import Tokens
from microtome.errors import DataError, SiteError, error
from microtome.measurements._sinks import THRESHOLD, sink_scores
from microtome.method import Argument, Column, Kept, Result, Seen, Source, Statistic, Text, measure
from microtome.model import Model
from microtome.stream import Covariance, ExampleMeans, slope_interval

SOURCE = Source(
    "Wong et al.", "On the Existence and Behaviour of Secondary Attention Sinks", 2025, "2512.22213",
    departs="the threshold 0.3 is that of the first token's sink; an MLP is named by how far its output points where "
    "the first token's stream does; sinks are sought in the first half of a row",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Traced:
    """What each layer says of each token [layer, row, pos]; NaN in layers without the part in question.

    Attributes:
        score: mean attention received, over heads.
        alignment: cosine of what enters the layer with that of the row's first token.
        mlp_norm, mlp_cos: norm of what the MLP adds, and its cosine with the first token's stream after the layer.
    """

    score: Float[Tensor, "layer row pos"]
    alignment: Float[Tensor, "layer row pos"]
    mlp_norm: Float[Tensor, "layer row pos"]
    mlp_cos: Float[Tensor, "layer row pos"]


def trace_sinks(model: Model, tokens: Tokens) -> Traced:
    """Run rows of tokens once, and keep what makes and shows a sink.

    Raises:
        SiteError: no layer of the model attends.
        DataError: a site holds numbers that are not finite.
    """
    a = model.anatomy
    attends = [i for i in range(a.n_layers) if Site("attn.pattern", i) in a.hook_points]
    if not attends:
        what = f"secondary sinks need attention patterns, which {a.name} has in no layer"
        raise error(SiteError, what, do="choose a model with attention")
    sites = {name: [i for i in range(a.n_layers) if Site(name, i) in a.hook_points]
             for name in ("attn.pattern", "resid_pre", "mlp_out", "resid_post")}  # fmt: skip
    nothing = torch.full((a.n_layers, *tokens.shape), torch.nan, dtype=torch.float64)
    found = {name: nothing.clone() for name in ("score", "alignment", "mlp_norm", "mlp_cos")}
    held: dict[int, Tensor] = {}

    def see(site: Site, x: Tensor) -> None:
        layer = site.layer or 0
        if not bool(x.isfinite().all()):
            what = f"{site} holds numbers that are not finite"
            raise error(DataError, what, do="leave that text out, or correct the model")
        if site.name == "attn.pattern":
            found["score"][layer] = sink_scores(x, causal=a.causal).mean(1).cpu()
            return
        x = at_least_float32(x).double()
        if site.name == "mlp_out":
            held[layer] = x
        elif site.name == "resid_pre":
            found["alignment"][layer] = torch.cosine_similarity(x, x[:, :1], dim=-1).cpu()
        elif layer in held and held[layer].shape == x.shape:
            added = held.pop(layer)
            found["mlp_norm"][layer] = added.norm(dim=-1).cpu()
            found["mlp_cos"][layer] = torch.cosine_similarity(added, x[:, :1], dim=-1).cpu()

    observe: dict[str, Any] = {f"{','.join(map(str, layers))}.{name}": see for name, layers in sites.items() if layers}
    model.run(tokens, observe=observe, logits=False)
    return Traced(**found)


@measure(
    "secondary_sinks",
    of="layer",
    on=Text(sequences=16, width=128),
    atlas="full",
    title="secondary sinks by layer",
    question="In which layers do tokens other than the first receive much attention, and do they resemble the first?",
    columns=(
        Column(
            "sink_tokens", "tokens per row", "tokens of the first half of a row, but the first, whose mean attention "
            "received is above the threshold", "none: uniform attention over ten or more tokens has none", (0, None),
        ),
        Column(
            "sink_births", "tokens per row", "those of them that were above it in no earlier layer",
            "none: part of sink_tokens", (0, None),
        ),
        Column(
            "sink_alignment", "correlation", "of the attention that a token receives with the cosine of its stream "
            "with that of the row's first token", "sink_alignment_elsewhere", (-1, 1), interval=False,
        ),
        Column(
            "sink_alignment_elsewhere", "correlation", "the same with the cosine of another token of the row",
            range=(-1, 1), interval=False,
        ),
    ),
    source=SOURCE,
    cost="one forward over the first sequences of the text, without logits",
    check="tests/laws/test_sinks.py",
)  # fmt: skip
class SecondarySinks(Statistic):
    """Secondary sinks of each layer, where they begin, and whether attention follows likeness to the first token."""

    def __init__(
        self,
        threshold: Annotated[
            float, Argument("mean attention above which a token is a sink", "share", 0, 1)
        ] = THRESHOLD,
    ) -> None:
        """Call a token a sink above this."""
        self.threshold = threshold

    def start(self, model: Model, layer: int | None) -> Kept:
        """Means by row of every layer; covariances of score, cosine and another token's cosine of each."""
        layers = model.anatomy.n_layers
        means = {name: ExampleMeans(layers) for name in ("sink_tokens", "sink_births")}
        return means | {str(i): Covariance(3) for i in range(layers)}

    def update(self, kept: Kept, seen: Seen) -> None:
        """Take in whole rows."""
        mask = seen.mask
        every = torch.ones(len(seen.examples), dtype=torch.bool) if mask is None else mask.any(1)
        traced = trace_sinks(seen.model, seen.tokens)
        half = slice(1, max(2, seen.tokens.shape[1] // 2))
        score, alignment = traced.score[:, :, half], traced.alignment[:, :, half]
        above = score > self.threshold  # False where there is no attention
        born = above & (above.cumsum(0) == 1)
        for name, x in (("sink_tokens", above), ("sink_births", born)):
            kept[name].update(x.double().sum(-1).T, seen.examples, every)
        another = alignment.roll(alignment.shape[-1] // 2, -1)
        for i in range(len(score)):
            if bool(score[i].isfinite().all()):
                values = torch.stack([score[i], alignment[i], another[i]], dim=-1)
                kept[str(i)].update(values[every])

    def result(self, kept: Kept) -> Mapping[str, Tensor]:
        """Means, and correlations; NaN in layers without attention, or where all tokens are alike."""
        means = {name: kept[name].mean for name in ("sink_tokens", "sink_births")}
        layers = range(len(kept) - len(means))
        rows = [kept[str(i)].result().correlation[0] if kept[str(i)].count else torch.full((3,), torch.nan)
                for i in layers]  # fmt: skip
        table = torch.stack([row.double().clamp(-1, 1) for row in rows])
        return means | {"sink_alignment": table[:, 1], "sink_alignment_elsewhere": table[:, 2]}


def secondary_sinks(
    model: Model, text: Any = None, *, threshold: float = THRESHOLD, sequences: int = 16, width: int = 128
) -> Result:
    """The tokens of a text that are secondary sinks, one by one, and the MLP that made each.

    Formula:  see this file's head.
    Source:   Wong et al., "On the Existence and Behaviour of Secondary Attention Sinks", 2025 (arXiv 2512.22213).
              Departs: as the measure `secondary_sinks`.
    Cost:     one forward over the rows, without logits.
    Check:    a planted sink is found with its layer and MLP, and is none without that MLP; tests/laws/test_sinks.py.

    Args:
        model: an open model.
        text: whatever a measure reads; the documentation topics of the standard library by default.
        threshold: mean attention received, over heads, above which a token is a sink of a layer.
        sequences: how many rows to read.
        width: tokens of a row.

    Returns:
        A dataset with the axis `sink`, in the order of rows and positions: `row`, `position`, `token`; `score`, the
        largest of any layer; `birth`, `lifetime` in layers; `made_by`, -1 where no layer before the birth has an MLP;
        `made_norm`, `made_cos`. Its attributes `lifetime_by_norm`, `.._lo` and `.._hi` are the slope of lifetime on
        made_norm, in layers per unit of norm, with its interval; NaN with fewer than 8 sinks.

    Raises:
        SiteError: no layer of the model attends.
        DataError: there is too little text.

    >>> mt.measurements.secondary_sinks(model, sequences=8)
    """
    found: dict[str, list[float]] = {name: [] for name in (*_WHOLE, *_REAL)}
    row = 0
    for batch in Text(text, sequences=sequences, width=width).batches(model).parts:
        tokens = batch.tokens
        _list_sinks(found, trace_sinks(model, tokens.to(model.device)), tokens, row, threshold)
        row += len(tokens)
    data = {name: ("sink", torch.tensor(values, dtype=torch.int64 if name in _WHOLE else torch.float64).numpy(),
                   {"unit": _UNITS.get(name, "index"), "meaning": _MEANING[name]})
            for name, values in found.items()}  # fmt: skip
    norm, life = (torch.tensor(found[name], dtype=torch.float64) for name in ("made_norm", "lifetime"))
    made = torch.tensor(found["made_by"], dtype=torch.float64) >= 0
    slope, low, high = (float(x) for x in slope_interval(norm[made, None], life[made, None]))
    return Result.of(xr.Dataset(data)).assign_attrs(
        dict(model.provenance) | {"source": str(SOURCE), "threshold": threshold, "rows": row,
                                  "lifetime_by_norm": slope, "lifetime_by_norm_lo": low, "lifetime_by_norm_hi": high}
    )  # fmt: skip


_WHOLE = ("row", "position", "token", "birth", "lifetime", "made_by")
_REAL = ("score", "made_norm", "made_cos")
_UNITS = {"token": "token", "lifetime": "layers", "score": "share", "made_norm": "norm", "made_cos": "cosine"}
_MEANING = {
    "row": "number of the row that was read", "position": "position in the row, from 0", "token": "the token there",
    "birth": "first layer in which it is a sink", "lifetime": "in how many layers it is one",
    "made_by": "the layer whose MLP adds most in the direction of the first token",
    "score": "largest mean attention received in any layer", "made_norm": "norm of what that MLP adds",
    "made_cos": "cosine of what it adds with the first token's stream",
}  # fmt: skip


def _list_sinks(
    found: dict[str, list[float]], traced: Traced, tokens: Tokens, first_row: int, threshold: float
) -> None:
    """Append the secondary sinks of some rows."""
    above = traced.score > threshold
    above[:, :, 0] = False
    above[:, :, max(2, tokens.shape[1] // 2) :] = False
    push = (traced.mlp_norm * traced.mlp_cos).nan_to_num(-torch.inf)
    for row, position in above.any(0).nonzero().tolist():
        layers = above[:, row, position].nonzero().squeeze(1)
        birth = int(layers[0])
        before = push[:birth, row, position]
        maker = int(before.argmax()) if birth and bool(before.isfinite().any()) else -1
        made = (traced.mlp_norm, traced.mlp_cos)
        norm, cosine = (float(x[maker, row, position]) if maker >= 0 else torch.nan for x in made)
        score = float(traced.score[:, row, position].nan_to_num(0.0).max())
        values = (first_row + row, position, int(tokens[row, position]), birth, len(layers), maker, score, norm, cosine)
        for name, value in zip((*_WHOLE, *_REAL), values, strict=True):
            found[name].append(value)
