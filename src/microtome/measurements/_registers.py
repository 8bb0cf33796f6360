"""Register neurons: those that make a token an outlier of the stream; and what happens if another token is it instead.

Formula:  r(l, t) = |resid_post of layer l at t| / median over the row of that;
          outlier of a row = the token with the largest r in any layer;  birth = the first layer in which its r is at
          least half of its largest;  d = resid_post of the outlier in that layer, scaled to norm 1;
          for a neuron n of layer l <= birth, a its activation:
          register_activation = |a| at the outlier - mean of |a| elsewhere in the row;
          register_write = (a at the outlier - mean of a elsewhere) (w_out,n . d), how much it adds to the outlier;
          both are 0 in later layers. Controls: the same at the token half the row from the outlier.
          A neuron may be as loud at the outlier and make it none: register_write tells the two apart.
          The edit `register` moves, for each neuron, its value of largest size to one token, and 0 to all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.edit import Apply, Edit, Set
from microtome.errors import ArgumentError, DataError, SiteError, error
from microtome.measurements._neuron_weights import neuron_directions
from microtome.method import Argument, Column, Seen, Source, Text, measure
from microtome.model import Model

HALF = 0.5
"""Share of an outlier's largest ratio from which on it is one."""


@measure(
    "registers",
    of="neuron",
    on=Text(sequences=8, width=128),
    atlas="full",
    title="register neurons",
    question="Which neurons make one token of a text an outlier of the residual stream?",
    columns=(
        Column(
            "register_activation", "activation", "size of the activation at the row's outlier less its mean elsewhere; "
            "0 behind the layer in which the outlier appears", "register_activation_elsewhere",
        ),
        Column(
            "register_activation_elsewhere", "activation", "the same at the token half the row from the outlier",
        ),
        Column(
            "register_write", "norm", "what the neuron adds to the outlier, in its direction, less the mean of what it "
            "adds to other tokens; 0 behind the layer in which the outlier appears", "register_write_elsewhere",
        ),
        Column("register_write_elsewhere", "norm", "the same at the token half the row from the outlier"),
    ),
    source=Source(
        "Jiang et al.", "Vision Transformers Don't Need Trained Registers", 2025, "2506.08010", "section 4",
        departs="text in place of images; one outlier a row; sizes of activations, since gated neurons have both "
        "signs; what a neuron adds to the outlier beside how loud it is",
    ),
    cost="two forwards over the first sequences of the text, without logits; 32 bytes per row and neuron",
    check="tests/laws/test_sinks.py",
)  # fmt: skip
def registers(
    seen: Seen,
    half: Annotated[
        float, Argument("share of its largest ratio from which on a token is an outlier", "1", 0, 1)
    ] = HALF,
) -> dict[str, Float[Tensor, "example layer neuron"]]:
    """How loud every neuron is where the stream has its outlier, and how much it adds to it.

    Raises:
        SiteError: the model has no neurons, or layers with other numbers of them than one another.
    """
    model, tokens = seen.model, seen.tokens
    layers = _layers(model)
    ratio, streams = _ratios(model, tokens)
    outlier, birth = outliers(ratio, half)
    rows = torch.arange(len(tokens))
    away = (outlier + tokens.shape[1] // 2) % tokens.shape[1]
    size = (len(rows), model.anatomy.n_layers, model.anatomy.size(Site("mlp.post", layers[0]), "neuron"))
    lanes = streams.shape[-1] != model.anatomy.d_model  # of which a neuron writes into several, by weights of the token
    names = ("register_activation", *(() if lanes else ("register_write",)))
    found = {name + end: torch.zeros(size, dtype=torch.float64) for name in names for end in ("", "_elsewhere")}
    places = {"": outlier, "_elsewhere": away}
    directions = {end: streams[birth, rows, place] for end, place in places.items()}
    directions = {end: d / d.norm(dim=-1, keepdim=True).clamp(min=1e-30) for end, d in directions.items()}
    # During a forward the parts of the model are hooked, so that its weights are read before.
    writes = {i: neuron_directions(model, i)["w_out"].double().cpu() for i in layers if i <= int(birth.max())}

    def see(site: Site, x: Tensor) -> None:
        i = site.layer or 0
        a = at_least_float32(x).double().cpu()
        before = (i <= birth).double().unsqueeze(-1)
        for end, place in places.items():
            for name, values in zip(names, (a.abs(), a), strict=False):
                there = values[rows, place]
                other = (values.sum(1) - there) / (values.shape[1] - 1)
                by = directions[end] @ writes[i].T if name == "register_write" else 1.0
                found[name + end][:, i] = before * (there - other) * by

    if writes:  # else no layer before the outlier has neurons
        model.run(tokens, observe={f"{','.join(map(str, writes))}.mlp.post": see}, logits=False)
    return found


def _layers(model: Model) -> list[int]:
    """The layers with neurons.

    Raises:
        SiteError: there are none, or their numbers differ.
    """
    a = model.anatomy
    layers = [i for i in range(a.n_layers) if Site("mlp.post", i) in a.hook_points]
    if not layers or len({a.size(Site("mlp.post", i), "neuron") for i in layers}) > 1:
        what = f"register neurons need layers with neurons, as many in each, which {a.name} has not"
        raise error(SiteError, what, do="choose a model without experts")
    return layers


def _ratios(
    model: Model, tokens: Int[Tensor, "row pos"]
) -> tuple[Float[Tensor, "layer row pos"], Float[Tensor, "layer row pos d_model"]]:
    """How large each token is after each layer, relative to its row, and the streams themselves.

    Raises:
        DataError: a stream holds numbers that are not finite.
    """
    run = model.run(tokens, capture="*.resid_post", logits=False)
    streams = torch.stack([at_least_float32(run[f"{i}.resid_post"]).cpu() for i in range(model.anatomy.n_layers)])
    streams = streams.double()
    norm = streams.norm(dim=-1)
    if not bool(norm.isfinite().all()):
        layer = int((~norm.isfinite()).flatten(1).any(1).double().argmax())
        what = f"{layer}.resid_post holds numbers that are not finite"
        raise error(DataError, what, do="leave that text out, or correct the model")
    return norm / norm.median(-1, keepdim=True).values.clamp(min=1e-30), streams


def outliers(
    ratio: Float[Tensor, "layer row pos"], half: float = HALF
) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """[row] The position of each row's outlier, and the layer in which it appears; see this file's head."""
    most, position = ratio.amax(0).max(-1)
    there = ratio.gather(-1, position.expand(len(ratio), -1).unsqueeze(-1)).squeeze(-1)  # [layer, row]
    return position, (there >= half * most).double().argmax(0)


def register(neurons: Iterable[tuple[int, int]], *, position: int = 0, blank: bool = True) -> list[Edit]:
    """Edits that make one token the register: neurons are as loud there as they were anywhere, and silent elsewhere.

    Formula:  a'_n(position) = a_n(t*), t* = argmax_t |a_n(t)|;  a'_n(t) = 0 at all other t;  with `blank`, the
              embedding of the position is 0.
    Source:   Jiang et al., "Vision Transformers Don't Need Trained Registers", 2025 (arXiv 2506.08010), section 4.
              Departs: the register stands first, not last, since causal attention sees no later token; the maximum is
              that of the size.
    Cost:     nothing beside the run.
    Check:    of a neuron that is active at one token, moving to that token is the identity; a planted sink moves to the
              register; tests/laws/test_sinks.py.

    Args:
        neurons: layer and neuron of each.
        position: the token that becomes the register; put one token more, of any kind, in front of the text.
        blank: whether its embedding is set to 0.

    Returns:
        Edits for `model.run`, for rows of one length.

    Raises:
        ArgumentError: there is no neuron.

    >>> model.run(torch.cat([tokens[:, :1], tokens], 1), edits=mt.measurements.register([(11, 431)]))
    """
    pairs = list(neurons)
    if not pairs:
        raise error(ArgumentError, "there is no neuron to move", got="none", do="name one or more as (layer, neuron)")
    by_layer: dict[int, list[int]] = {}
    for layer, neuron in pairs:
        by_layer.setdefault(layer, []).append(neuron)

    def move(x: Tensor) -> Tensor:
        where = x.abs().argmax(1, keepdim=True)
        new = torch.zeros_like(x)
        new[:, position] = x.gather(1, where).squeeze(1)
        return new

    edits: list[Edit] = [Set(f"embed@{position}", value=0.0)] if blank else []
    return edits + [
        Apply(f"{layer}.mlp.post[{','.join(map(str, sorted(set(some))))}]", function=move)
        for layer, some in sorted(by_layer.items())
    ]
