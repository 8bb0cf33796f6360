"""What a lens reads: the stream, a branch, heads, or rows of an MLP's weights; and how a vector becomes logits.

Formula:  read(x) = (gain * centre(x) / s) W_U * logit_scale, s the final norm's divisor: that of x itself, or held at
          that of the run; with the biases of norm and unembedding, and the cap, where x is a whole stream.
          With s held it is linear in x: embedding, branches and biases sum to the logit; heads and b_O to attn_out.
          What a head writes is z_h W_O^h; behind a norm of the branch gain * centre(z_h W_O^h) / s_b, with s_b held.
          A row of W_in or W_gate has the gain of the MLP's norm folded in, one of W_out that of a norm behind the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site, at_least_float32, parse_indices
from microtome.errors import ArgumentError, SiteError, error
from microtome.explain._neuron_writes import directions
from microtome.model import Model

STREAMS = {"resid_post": "the stream after each layer", "resid_mid": "the stream between the branches of each layer"}
BRANCHES = {
    "attn_out": "what attention writes", "mlp_out": "what the MLP writes",
    "mixer_out": "what a mixer that is no attention writes",
}  # fmt: skip
HEADS = "attn.z"
ROWS = {"W_in": "rows that neurons read with", "W_gate": "rows that gates read with", "W_out": "what neurons write"}
ALLOWED = f"{', '.join((*STREAMS, *BRANCHES, HEADS))}, {HEADS}[3], {'[431], '.join(ROWS)}[431]"
_WRITTEN = re.compile(r"([A-Za-z_.]+)(?:\[([^\]]*)\])?")


@dataclass(frozen=True)
class Part:
    """A part of the model that a lens reads, and which of its units; none where all are meant."""

    name: str
    units: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is a whole stream, which the biases of norm and unembedding belong to."""
        return self.name in STREAMS

    @property
    def meaning(self) -> str:
        """What it is, in words."""
        if self.name == HEADS:
            return "what each head writes, by itself" if not self.units else f"what head {self.units[0]} writes"
        return (STREAMS | BRANCHES | ROWS)[self.name]

    def layers(self, model: Model) -> list[int]:
        """The layers that have it.

        Raises:
            SiteError: there are none.
        """
        a, rows = model.anatomy, self.name in ROWS
        name = "attn.result" if self.name == HEADS else "mlp.post" if rows else self.name
        found = [i for i in range(a.n_layers) if Site(name, i) in a.hook_points]
        if rows:
            found = [i for i in found if a.parts.layers[i].experts is None]
        if not found:
            why = next((why for site, why in a.missing.items() if site.name == name), "no layer has one")
            raise error(SiteError, f"{a.name} has no {self.name} to read", got=why, do="read another part")
        return found


def part_of(model: Model, of: str) -> Part:
    """The part that is written so: "mlp_out", "attn.z" for each head, "attn.z[3]", "W_in[431]", "W_out[0-9]".

    Raises:
        ArgumentError: a lens reads no such part, or units must be named, or are none of this model.
    """
    match = _WRITTEN.fullmatch(of)
    name, units = (match[1], match[2]) if match else ("", None)
    if name not in (*STREAMS, *BRANCHES, HEADS, *ROWS):
        raise error(ArgumentError, "a lens reads no such part", got=repr(of), allowed=ALLOWED, do="name one of these")
    if units is None:
        if name in ROWS:
            do = f"name some, such as {name}[431]; of all neurons: mt.explain.row_lens(model, prompt, rows={name!r})"
            raise error(ArgumentError, "say which neurons the lens is to read", got=repr(of), do=do)
        return Part(name)
    if name not in (HEADS, *ROWS):
        raise error(ArgumentError, f"{name} has no units that a lens reads by themselves", got=repr(of), do="drop them")
    a = model.anatomy
    size = a.n_heads if name == HEADS else a.d_mlp
    chosen = parse_indices(units, "units").resolve(size)
    if not chosen or (name == HEADS and len(chosen) > 1):
        allowed = f"one of 0 to {size - 1}; {HEADS} for each head" if name == HEADS else f"0 to {size - 1}"
        what = "the lens reads one head at all positions" if name == HEADS else "there are no such neurons"
        raise error(ArgumentError, what, got=repr(of), allowed=allowed, do="name others")
    return Part(name, tuple(chosen))


def head_writes(
    model: Model, layer: int, result: Float[Tensor, "*at head d_model"]
) -> Float[Tensor, "*at head d_model"]:
    """What each head adds to the stream, from its `attn.result`: with b_O and what a norm adds it sums to attn_out."""
    weights, scale = model.layers[layer], model.anatomy.hook_points[Site("attn_out", layer)].scale
    norm, found = weights.attn_post_norm, result
    if norm is not None:
        raw = result.sum(-2) if weights.b_O is None else result.sum(-2) + weights.b_O
        found = norm.centre(result) * norm.gain / norm.scale(raw).to(result.dtype).unsqueeze(-1).unsqueeze(-1)
        found = found.to(result.dtype)
    return found if scale == 1.0 else found * scale


def rows_of(model: Model, layer: int, rows: str) -> Float[Tensor, "neuron d_model"]:
    """The rows of an MLP's matrix, in the space of the stream: what neurons read with, or what they write.

    Raises:
        SiteError: the layer has no such matrix.
    """
    weights = model.layers[layer]
    if rows == "W_out":
        scale = model.anatomy.hook_points[Site("mlp_out", layer)].scale
        return directions(model, layer) * scale
    matrix, norm = at_least_float32(getattr(weights, rows).detach()), weights.mlp_norm
    return matrix.T if norm is None else matrix.T * norm.gain


@dataclass(frozen=True)
class Reading:
    """How vectors become logits.

    Attributes:
        model: the model.
        scale: the divisor of the final norm in the run, by place of what is read.
        held: whether it divides every vector; else each has its own.
        whole: whether what is read is a whole stream.
    """

    model: Model
    scale: Float[Tensor, "*at"]
    held: bool
    whole: bool

    def logits(self, x: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at vocab"]:
        """The logits of vectors."""
        if not self.held:
            return self.model.unembed(x)
        if self.whole:
            return self.model.unembed(x, self.scale)
        return self._normed(x).to(self.model.W_U.dtype) @ self.model.W_U * self.model.anatomy.logit_scale

    def of_tokens(self, x: Float[Tensor, "*at d_model"], tokens: Int[Tensor, "*at"]) -> Float[Tensor, "*at"]:
        """The logit of one token for each vector, before any cap, the divisor held, in float64."""
        found = (self._normed(x).double() * self.model.W_U.T[tokens].double()).sum(-1)
        if self.whole:
            found = found + bias_logits(self.model)[tokens]
        return found * self.model.anatomy.logit_scale

    def _normed(self, x: Tensor) -> Tensor:
        norm = self.model.require_readable()
        return norm.centre(x) / self.scale.unsqueeze(-1).to(x.dtype) * norm.gain


def bias_logits(model: Model) -> Float[Tensor, " vocab"]:
    """What the biases of the final norm and of the unembedding add to each logit, before the scale of logits."""
    norm = model.require_readable()
    found = model.W_U.new_zeros(model.W_U.shape[1], dtype=torch.float64)
    if norm.bias is not None:
        found = found + (norm.bias.to(model.W_U.dtype) @ model.W_U).double()
    return found if model.b_U is None else found + model.b_U.double()


def chosen_rows(model: Model, layer: int, part: Part) -> Float[Tensor, "unit d_model"]:
    """The rows of the neurons of a part, in one layer."""
    units: Sequence[int] = part.units
    return rows_of(model, layer, part.name)[list(units)].to(model.dtype)
