"""What neurons are made of: their directions, the angles between them, and which tokens they promote.

Formula:  w_gate, w_in are columns of W_gate, W_in with the norm's gain folded in. w_out is what a unit of activation
          adds to the stream: a row of W_out times the branch's scale. Where a norm stands behind the branch it is drawn
          through that too (centred if it is a layer norm, times the gain), except for its divisor, which differs from
          token to token. Promoted and suppressed are the ends of (gain * w_out) W_U, relative to the mean token.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import cosine_similarity

from microtome.anatomy import Site, at_least_float32
from microtome.method import Argument, Column, Seen, Source, Weights, measure
from microtome.model import Model

PLAIN = "none: describes one neuron, to compare with others of its layer"
ANGLE = "none: unrelated directions have a cosine within about 1 / sqrt(d_model) of 0"
FOLDED = "norm gains are folded in"
RELATIVE = "relative to the mean token (the mean over the whole vocabulary), before the final norm's scale"
GATED = Source(
    "Gerstner and Schütze", "Understanding Gated Neurons in Transformers from Their Input-Output Functionality", 2025,
    "2505.17936", departs=FOLDED,
)  # fmt: skip
VOCABULARY = Source(
    "Geva et al.",
    "Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the Vocabulary Space",
    2022, "2203.14680", departs=FOLDED,
)  # fmt: skip


def neuron_directions(model: Model, layer: int) -> dict[str, Float[Tensor, "neuron d_model"]]:
    """`w_out`, `w_in` and, in gated MLPs, `w_gate` of every neuron [neuron, d_model]: see this file's head.

    In float32 at least, whatever the type of the weights.
    """
    weights = model.layers[layer]
    norm = weights.mlp_norm
    gain = 1.0 if norm is None else norm.gain
    found = {"w_out": output_directions(model, layer), "w_in": at_least_float32(weights.W_in).T * gain}
    if Site("mlp.gate", layer) in model.anatomy.hook_points:
        found["w_gate"] = at_least_float32(weights.W_gate).T * gain
    return found


def output_directions(model: Model, layer: int) -> Float[Tensor, "neuron d_model"]:
    """`w_out` of every neuron [neuron, d_model], as in `neuron_directions`."""
    weights = model.layers[layer]
    after, scale = weights.mlp_post_norm, model.anatomy.hook_points[Site("mlp_out", layer)].scale
    w_out = at_least_float32(weights.W_out)
    out = w_out if after is None else after.centre(w_out) * after.gain
    return out if scale == 1.0 else out * scale


def _cosine(name: str, meaning: str) -> Column:
    return Column(name, "cosine", f"between {meaning}", ANGLE, (-1, 1), interval=False)


@measure(
    "neuron_weights",
    of="neuron",
    on=Weights(),
    sites="mlp.post",
    title="weights of neurons",
    question="Which directions does each neuron read and write, and how are they aligned?",
    columns=(
        Column(
            "out_norm", "norm",
            "norm of what one unit of activation adds to the stream, before the divisor of any norm after the MLP",
            PLAIN, (0, None), interval=False,
        ),
        _cosine("cos_gate_in", "gate and input directions, the norm's gain folded in"),
        _cosine("cos_gate_out", "gate and output directions, the norm's gain folded in"),
        _cosine("cos_in_out", "input and output directions, the norm's gain folded in"),
    ),
    source=GATED,
    cost="3 d_model operations per neuron",
    check="tests/laws/test_measures.py",
    needs=("mlp_out", "W_in", "W_out", "mlp_norm"),
)  # fmt: skip
def neuron_weights(seen: Seen) -> dict[str, Float[Tensor, " neuron"]]:
    """Norms and cosines of every neuron's weights; those with a gate only in gated MLPs."""
    w = neuron_directions(seen.model, seen.layer or 0)
    found = {"out_norm": w["w_out"].norm(dim=-1), "cos_in_out": cosine_similarity(w["w_in"], w["w_out"], dim=-1)}
    if "w_gate" in w:
        found["cos_gate_in"] = cosine_similarity(w["w_gate"], w["w_in"], dim=-1)
        found["cos_gate_out"] = cosine_similarity(w["w_gate"], w["w_out"], dim=-1)
    return found


@measure(
    "promoted_tokens",
    of="neuron",
    on=Weights(),
    sites=("mlp.post", "final"),
    title="tokens that neurons promote",
    question="Which tokens does each neuron make more and less likely?",
    columns=tuple(
        Column(name, unit, meaning, PLAIN, extra=("rank",), interval=False)
        for name, unit, meaning in (
            ("promoted", "token", "tokens whose logits the neuron's output raises most"),
            ("promoted_logit", "logits", f"by how much per unit of activation, {RELATIVE}"),
            ("suppressed", "token", "tokens whose logits the neuron's output lowers most"),
            ("suppressed_logit", "logits", f"by how much per unit of activation, {RELATIVE}"),
        )
    ),
    source=VOCABULARY,
    cost="2 d_model vocab operations per neuron; memory for the logits of 512 neurons",
    check="tests/laws/test_measures.py",
    needs=("mlp_out", "W_in", "W_out", "mlp_norm"),
)
def promoted_tokens(
    seen: Seen, top: Annotated[int, Argument("how many tokens to list at either end", "tokens", least=1)] = 5
) -> dict[str, Shaped[Tensor, "neuron rank"]]:
    """The tokens that each neuron promotes and suppresses when its output is read as logits.

    Raises:
        SiteError: the model's residual stream cannot be read as logits.
    """
    model, norm = seen.model, seen.model.require_readable()
    unembed = at_least_float32(model.W_U) * model.anatomy.logit_scale
    unembed = unembed - unembed.mean(1, keepdim=True)
    parts: dict[str, list[Tensor]] = {}
    for chunk in (norm.centre(neuron_directions(model, seen.layer or 0)["w_out"]) * norm.gain).split(512):
        logits = chunk @ unembed
        for name, most in (("promoted", True), ("suppressed", False)):
            best = logits.topk(min(top, logits.shape[1]), largest=most)
            parts.setdefault(name, []).append(best.indices.int())
            parts.setdefault(f"{name}_logit", []).append(best.values)
    return {name: torch.cat(values) for name, values in parts.items()}
