"""Which tokens a neuron reads: the vocabulary nearest to its input and gate directions.

Formula:  e_v = the direction of the stream that raises the logit of token v above the mean token: column v of W_U, less
          the mean column, times the final norm's gain;
          in_tokens = the tokens of largest cos(w_in, e_v), in_opposite those of smallest; gate_ the same of w_gate;
          in_peak = (max_v cos - mean_v cos) / std_v cos, how far the first stands out; gate_peak, out_peak likewise.
          w_in and w_gate with the gain of the norm that they read through, as in `neuron_weights`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from microtome.anatomy import at_least_float32
from microtome.measurements._neuron_weights import neuron_directions
from microtome.method import Argument, Column, Seen, Source, Weights, measure
from microtome.model import Model

PLAIN = "none: describes one neuron, to compare with others of its layer"
NORMAL = "none: the largest of 50,000 normal numbers is 4.2 standard deviations above their mean"


def _columns() -> list[Column]:
    found: list[Column] = []
    for name, of in (("in", "input direction"), ("gate", "gate direction")):
        for end, which in (("tokens", "nearest to"), ("opposite", "farthest from")):
            meaning = f"tokens whose output direction is {which} the neuron's {of}"
            found += [
                Column(f"{name}_{end}", "token", meaning, PLAIN, extra=("rank",), interval=False),
                Column(f"{name}_{end}_cos", "cosine", "of the two", PLAIN, (-1, 1), extra=("rank",), interval=False),
            ]
    directions = (("in", "input"), ("gate", "gate"), ("out", "output"))
    return found + [
        Column(f"{name}_peak", "standard deviations", f"how far the token nearest to the neuron's {of} direction "
               "stands above all", NORMAL, interval=False)
        for name, of in directions
    ]  # fmt: skip


@measure(
    "read_tokens",
    of="neuron",
    on=Weights(),
    sites=("mlp.post", "final"),
    atlas="full",
    title="tokens that neurons read",
    question="Which tokens do the directions that each neuron reads belong to?",
    columns=_columns(),
    source=Source(
        "Geva et al.",
        "Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the Vocabulary Space",
        2022, "2203.14680", departs="input and gate directions in place of output directions; cosines",
    ),
    cost="6 d_model vocab operations per neuron; memory for the logits of 512 neurons",
    check="tests/laws/test_neuron_classes.py",
    needs=("mlp_out", "W_in", "W_out", "mlp_norm"),
)  # fmt: skip
def read_tokens(
    seen: Seen, top: Annotated[int, Argument("how many tokens to list at either end", "tokens", least=1)] = 5
) -> dict[str, Shaped[Tensor, "neuron ..."]]:
    """The tokens nearest to and farthest from what each neuron reads, and how far the nearest stand out.

    Raises:
        SiteError: the model's residual stream cannot be read as logits.
    """
    unembed = token_directions(seen.model)
    parts: dict[str, list[Tensor]] = {}
    for name, vectors in neuron_directions(seen.model, seen.layer or 0).items():
        of = name.removeprefix("w_")
        for chunk in vectors.split(512):
            cosine = torch.nn.functional.normalize(chunk, dim=-1) @ unembed
            peak = (cosine.amax(-1) - cosine.mean(-1)) / cosine.std(-1).clamp(min=1e-30)
            parts.setdefault(f"{of}_peak", []).append(peak)
            for end, most in (("tokens", True), ("opposite", False)) if of != "out" else ():
                best = cosine.topk(min(top, cosine.shape[1]), largest=most)
                parts.setdefault(f"{of}_{end}", []).append(best.indices.int())
                parts.setdefault(f"{of}_{end}_cos", []).append(best.values.clamp(-1, 1))
    return {name: torch.cat(values) for name, values in parts.items()}


def token_directions(model: Model) -> Float[Tensor, "d_model vocab"]:
    """[d_model, vocab] The direction of the stream, of norm 1, that raises each token's logit above the mean token's.

    Raises:
        SiteError: the model's residual stream cannot be read as logits.
    """
    norm = model.require_readable()
    unembed = at_least_float32(model.W_U)
    unembed = (unembed - unembed.mean(1, keepdim=True)) * torch.as_tensor(norm.gain).reshape(-1, 1)
    return torch.nn.functional.normalize(norm.centre(unembed.T).T, dim=0)
