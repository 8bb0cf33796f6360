"""Neurons that set how sure the model is: they write where the unembedding hardly reads, and change the final norm.

Formula:  W = the unembedding with the final norm folded in, diag(gain) W_U [d_model, vocab], its rows centred where the
          norm is a layer norm, its mean over the vocabulary taken off, since logits count relative to each other;
          w = what the neuron writes, U = eigenvectors of W W^T by falling eigenvalue:
          null_share_k = |U_[last k]^T w| / |w|, for k = d_model times 1/64, 1/32, 1/16, 1/8, 1/4 and 1/2: the curve,
          since no one k is right; its control is that of a random direction, sqrt(k / d_model);
          logit_var = Var_v cos(w, W_v), and for a random direction on average (1 - |mean_v W_v/|W_v||^2) / d_model.
          Effects of a neuron of the last MLP, its activation set to its mean over the text, x' the stream then:
          total = mean |loss' - loss|;  direct = the same with the final norm dividing by what it divided by before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site, at_least_float32, parse
from microtome.context import current
from microtome.edit import Set
from microtome.errors import ArgumentError, error
from microtome.measurements._damage import matched
from microtome.measurements._neuron_weights import output_directions
from microtome.method import Batches, Column, Seen, Source, Text, Weights, measure
from microtome.metric import token_loss
from microtome.model import Model
from microtome.stream import ExampleMeans, mean_interval

CUTS = (64, 32, 16, 8, 4, 2)
SOURCE = Source(
    "Stolfo et al.", "Confidence Regulation Neurons in Language Models", 2024, "2406.16254", "entropy neurons",
    departs="the curve of null shares, not one k; logits relative to their mean; neurons of every layer",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reading:
    """What the end of a model reads.

    Attributes:
        basis: [d_model, direction] by falling eigenvalue.
        units: [d_model, vocab] the columns of the folded unembedding, at norm 1.
        state: says of which weights.
    """

    basis: Float[Tensor, "d_model direction"]
    units: Float[Tensor, "d_model vocab"]
    state: tuple[int, ...]


_READINGS: WeakKeyDictionary[Model, Reading] = WeakKeyDictionary()


def reading(model: Model) -> Reading:
    """What the end of a model reads, computed once as long as its weights stay what they are.

    Raises:
        SiteError: the model's residual stream cannot be read as logits.
    """
    norm = model.require_readable()
    W_U, gain = model.W_U.detach(), norm.gain
    state = (W_U.data_ptr(), W_U._version, gain._version if isinstance(gain, Tensor) else 0)
    held = _READINGS.get(model)
    if held is not None and held.state == state:
        return held
    own = gain.detach().double().unsqueeze(1) if isinstance(gain, Tensor) else gain
    folded = norm.centre((W_U.double() * own).T).T
    folded = folded - folded.mean(1, keepdim=True)
    basis = torch.linalg.eigh(folded @ folded.T).eigenvectors.flip(1)
    units = (folded / folded.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)).float()
    made = _READINGS[model] = Reading(basis, units, state)
    return made


@measure(
    "confidence_neurons",
    of="neuron",
    on=Weights(),
    sites=("mlp.post", "final"),
    atlas="full",
    title="neurons of confidence",
    question="Which neurons write where the unembedding hardly reads, so that they change confidence and no choice?",
    columns=(
        Column("null_share", "share", "share of the norm of what the neuron writes that lies in the directions read "
               "least: the last 1/64, 1/32, 1/16, 1/8, 1/4 and 1/2 of them", "null_share_random", (0, 1),
               extra=("cut",), interval=False),
        Column("null_share_random", "share", "root mean square of the same for a random direction", range=(0, 1),
               extra=("cut",), interval=False),
        Column("logit_var", "1", "variance over the vocabulary of the cosine of what it writes and what reads a token",
               "logit_var_random", (0, 1), interval=False),
        Column("logit_var_random", "1", "mean of the same over random directions", range=(0, 1), interval=False),
        Column("write_norm", "norm", "norm of what one unit of activation adds to the stream",
               "none: describes one neuron, to compare with others of its layer", (0, None), interval=False),
    ),
    source=SOURCE,
    cost="d_model^2 vocab operations and one eigendecomposition once; 2 d_model vocab operations per neuron",
    check="tests/laws/test_confidence.py, tests/planted/test_neurons.py",
    needs=("mlp_out", "W_out"),
)  # fmt: skip
def confidence_neurons(seen: Seen) -> dict[str, Float[Tensor, "neuron ..."]]:
    """How much of what each neuron writes the unembedding reads.

    Raises:
        SiteError: the model's residual stream cannot be read as logits.
    """
    end = reading(seen.model)
    w = output_directions(seen.model, seen.layer or 0).double()
    d, size = w.shape[1], w.norm(dim=1)
    cosine = w / size.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
    read = (cosine @ end.basis).square()
    last = [max(1, round(d / cut)) for cut in CUTS]
    share = torch.stack([read[:, d - k :].sum(1).sqrt() for k in last], dim=1).clamp(max=1)
    even = torch.tensor([math.sqrt(k / d) for k in last], dtype=torch.float64).expand_as(share)
    variance = [
        (at_least_float32(some) @ end.units).double().var(1, correction=0) for some in cosine.float().split(512)
    ]
    spread = (1 - float(end.units.double().mean(1).square().sum())) / d
    return {
        "null_share": share, "null_share_random": even.contiguous(), "logit_var": torch.cat(variance),
        "logit_var_random": torch.full_like(size, spread), "write_norm": size,
    }  # fmt: skip


def confidence_effects(
    model: Model,
    neurons: Sequence[int],
    text: Any = None,
    *,
    tokens: int = 1_000,
    length: int = 64,
    rows: int = 4,
    controls: int = 1,
) -> xr.Dataset:
    """How much neurons of the last MLP change the loss, in all and apart from the final norm.

    Formula:  the neuron's activation is set to its mean over the text; total = mean over tokens of |loss' - loss|;
              direct = the same where the final norm divides by what it divided by before; mediated = total - direct;
              entropy = mean of the entropy of the next token then minus now, and of the same apart from the norm,
              entropy_direct. Controls: neurons drawn from the 8 of the layer with the nearest norm of what they write.
    Source:   Stolfo et al., "Confidence Regulation Neurons in Language Models", 2024 (arXiv 2406.16254), total and
              direct effect. Departs: all tokens of the text; a mean over the text that is read.
    Cost:     two forwards, and neurons x (1 + controls) times the last layer and the unembedding twice.
    Check:    a neuron that writes where nothing is read has no direct effect; with the norm free the direct effect is
              the total one; tests/laws/test_confidence.py.

    Args:
        model: an open causal model, whose stream can be read as logits.
        neurons: numbers of neurons of the last layer that has an MLP with neurons.
        text: whatever a measure reads; the documentation topics of the standard library by default.
        tokens: of the text to read.
        length: tokens of a row.
        rows: rows of a batch.
        controls: drawn neurons for each, whose effects are averaged.

    Returns:
        A dataset with the axis `neuron` (and the coordinate `layer`): `total`, `direct`, `mediated`, `entropy` and
        `entropy_direct`, in nats, each with its 95 % interval over rows as `_lo` and `_hi`, and the mean of the
        controls as `_random`.

    Raises:
        ArgumentError: a neuron is not one of that layer.
        SiteError: the stream cannot be read as logits, or the last block has no such neurons.
        ModelUnsupported: the model does not predict the next token.
    """
    model.require_next_token()
    model.require_readable()
    layer = model.anatomy.n_layers - 1
    model.anatomy.sites(parse(f"{layer}.mlp.post"))
    count = model.anatomy.size(Site("mlp.post", layer), "neuron")
    chosen = [int(n) for n in neurons]
    if not chosen or not all(0 <= n < count for n in chosen):
        got, allowed = ", ".join(map(str, chosen)) or "none", f"0 to {count - 1}"
        raise error(ArgumentError, f"neurons must be of layer {layer}", got=got, allowed=allowed, do="name such")
    norms = {layer: output_directions(model, layer).detach().double().norm(dim=1).cpu()}
    rng, taken = torch.Generator().manual_seed(current().seed), {(layer, n) for n in chosen}
    drawn = [[matched(norms, [(layer, n)], taken, rng)[0][1] for _ in range(controls)] for n in chosen]
    read = Text(text, tokens=tokens, length=length, rows=rows).batches(model)
    plan = [*chosen, *(n for some in drawn for n in some)]
    kept = _effects(model, layer, plan, read)
    variables: dict[str, Any] = {}
    for name, held in kept.items():
        found = held.result()
        each = [x.numpy() for x in mean_interval(found.total, weights=found.count)]
        about = {"unit": "nats", "meaning": MEANT[name]}
        for ending, x in zip(("", "_lo", "_hi"), each, strict=True):
            variables[name + ending] = ("neuron", x[: len(chosen)], about)
        if controls:
            random = each[0][len(chosen) :].reshape(len(chosen), controls).mean(1)
            variables[f"{name}_random"] = ("neuron", random, about)
    told = {"method": "confidence_effects", "text": read.source, "seed": current().seed}
    data = xr.Dataset(variables, coords={"neuron": np.array(chosen), "layer": layer})
    return data.assign_attrs(dict(model.provenance) | told)


MEANT = {
    "total": "mean size of the change of the loss when the neuron is set to its mean",
    "direct": "the same with the final norm dividing as before",
    "mediated": "total minus direct: what goes through the final norm",
    "entropy": "mean change of the entropy of the next token",
    "entropy_direct": "the same with the final norm dividing as before",
}


@torch.no_grad()
def _effects(model: Model, layer: int, plan: Sequence[int], read: Batches) -> dict[str, ExampleMeans]:
    """The effects of each neuron, by row."""
    site = f"{layer}.mlp.post"
    sums, count = torch.zeros(len(plan), dtype=torch.float64), 0
    for batch in read.parts:
        post = model.run(batch.tokens, capture=site, logits=False)[site][..., list(plan)].double().cpu()
        text = torch.ones(batch.tokens.shape, dtype=torch.bool) if batch.text is None else batch.text
        sums, count = sums + post[text].sum(0), count + int(text.sum())
    kept = {name: ExampleMeans(len(plan)) for name in MEANT}
    for done, batch in enumerate(read.parts):
        run = model.run(batch.tokens, capture=[f"{layer}.resid_pre", "final.scale"])
        values: dict[str, list[Tensor]] = {name: [] for name in kept}
        base = _loss_and_entropy(run.logits, batch.tokens)
        for number, neuron in enumerate(plan):
            edit = Set(f"{site}[{neuron}]", float(sums[number]) / count)
            at, given = f"{layer}.resid_post", run[f"{layer}.resid_pre"]
            other = model.run(batch.tokens, capture=at, edits=edit, start_at=layer, given=given)
            held = model.unembed(other[at], run["final.scale"])
            after, apart = (_loss_and_entropy(x, batch.tokens) for x in (other.logits, held))
            total, direct = (after[0] - base[0]).abs(), (apart[0] - base[0]).abs()
            values["total"].append(total)
            values["direct"].append(direct)
            values["mediated"].append(total - direct)
            values["entropy"].append(after[1] - base[1])
            values["entropy_direct"].append(apart[1] - base[1])
        predicted = torch.ones(batch.tokens.shape, dtype=torch.bool) if batch.text is None else batch.text
        for name, every in values.items():
            kept[name].update(torch.stack(every, dim=-1), batch.start, predicted[:, 1:])
        current().report("switching neurons off", done + 1, len(read.parts))
    return kept


def _loss_and_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each next token, and the entropy of its prediction [example, next]."""
    entropy = torch.stack([torch.distributions.Categorical(logits=row[:-1].float()).entropy() for row in logits])
    return token_loss(logits, tokens.to(logits.device)).double().cpu(), entropy.double().cpu()
