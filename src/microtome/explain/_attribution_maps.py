"""Attribution maps by name: how much each token of a prompt counts for an answer, whatever the sign.

Formula:  gradient        |dz/de_t|, the length of the gradient of the answer's logit by the token's embedding;
          gradient_input  |e_t . dz/de_t|;
          relp            the same with the backward rules of RelP;
          ig, legrad, linear   |score| of `integrated_gradients`, `legrad` and `linear_map`;
          embedding       |e_t|, which no layer changes, and random, a control each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.context import current
from microtome.edit import Freeze
from microtome.errors import EditError
from microtome.explain._attribution import RELP
from microtome.explain._legrad import legrad
from microtome.explain._linear_map import HELD, linear_map
from microtome.explain._token_gradients import integrated_gradients
from microtome.model import Model

Map = Callable[[Model, Tensor, int], Tensor]


def _slope(model: Model, tokens: Tensor, answer: int, rules: Sequence[Freeze] = ()) -> tuple[Tensor, Tensor]:
    """The embeddings [pos, d_model] of a prompt, and the gradient of the answer's logit by them."""
    run = model.run(tokens.unsqueeze(0), capture="embed", edits=list(rules), grad=True)
    return run["embed"].detach()[0].double(), run.grad(run.logits[0, -1, answer])["embed"][0].double()


def _product(model: Model, tokens: Tensor, answer: int, rules: Sequence[Freeze] = ()) -> Tensor:
    embed, slope = _slope(model, tokens, answer, rules)
    return (embed * slope).sum(-1)


def _random(model: Model, tokens: Tensor, answer: int) -> Tensor:
    seed = (current().seed * 1_000_003 + int(tokens.sum()) * 31 + answer) % 2**31
    return torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MAPS: dict[str, Map] = {
    "gradient": lambda m, t, a: _slope(m, t, a)[1].norm(dim=-1),
    "gradient_input": _product,
    "relp": lambda m, t, a: _product(m, t, a, [RELP]),
    "ig": lambda m, t, a: torch.tensor(integrated_gradients(m, t, answer=a, most=128)["score"].values),
    "legrad": lambda m, t, a: torch.tensor(legrad(m, t, answer=a)["relevance"].values),
    "linear": lambda m, t, a: torch.tensor(linear_map(m, t, answer=a)["logit"].values),
    "embedding": lambda m, t, a: _slope(m, t, a)[0].norm(dim=-1),
    "random": _random,
}
USUAL = ("gradient", "gradient_input", "relp", "ig", "legrad", "linear")
RULES = {"relp": RELP, "linear": HELD}
"""What some hold while they are made; a mixture of experts has no activations of its own to hold."""


def usual(model: Model, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """The usual maps, without those whose rules do not fit the model."""

    def fits(rule: Freeze) -> bool:
        try:
            model.run(tokens[:2].unsqueeze(0), edits=[rule], logits=False)
        except EditError:
            return False
        return True

    return tuple(name for name in USUAL if name not in RULES or fits(RULES[name]))


def map_of(name: str, model: Model, tokens: Int[Tensor, " pos"], answer: int) -> Float[Tensor, " pos"]:
    """How much each token counts, 0 or more, in float64."""
    return MAPS[name](model, tokens, answer).abs().double().cpu()
