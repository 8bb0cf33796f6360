"""What is left of a model when its gates are only on or off.

Formula:  for each neuron, a = act(gate) (of a plain MLP act(pre)) becomes the mean of its own sign over the text:
          a' = mean(a | a > 0) where a > 0, else mean(a | a <= 0). Its product with the up branch is formed anew.
          Control: the signs of each neuron shuffled over tokens, so that it is on as often, at other tokens.
Cost:     four forwards, and two a layer.
Check:    nothing changes where gates are two-valued; tests/laws/test_on_off.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Apply, Edit
from microtome.errors import PromptError, SiteError, error
from microtome.method import Column, Found, PromptText, Source, question
from microtome.model import Model

WHOLE = "none: the model as it is"


@question(
    "on_off",
    title="gates on or off",
    question="How much of a model's prediction is in which gates are on, and how much in how far they are open?",
    columns=(
        Column("loss", "nats", "mean loss of the text with all gates on or off", "loss_shuffled", (0, None), dims=()),
        Column("loss_shuffled", "nats", "the same, on at other tokens", range=(0, None), dims=()),
        Column("loss_whole", "nats", "mean loss of the text with the gates as they are", WHOLE, (0, None), dims=()),
        Column("agreement", "share", "share of the tokens with the same most likely successor, all gates on or off",
               "agreement_shuffled", (0, 1), dims=()),
        Column("agreement_shuffled", "share", "the same, on at other tokens", range=(0, 1), dims=()),
        Column("rise", "nats", "rise of the loss with the gates of one layer on or off", "rise_shuffled",
               dims=("layer",)),
        Column("rise_shuffled", "nats", "the same, on at other tokens", dims=("layer",)),
    ),
    source=Source(
        "Han et al.", "Respect the model: Fine-grained and Robust Explanation with Sharing Ratio Decomposition", 2024,
        "2402.03348", departs="activation-pattern-only prediction, for gates that are not 0 where they are off",
    ),
    cost="four forwards, and two a layer",
    check="tests/laws/test_on_off.py",
    call='mt.explain.on_off(model, "The capital of France is Paris, and that of Italy is Rome.")',
    reading="Where the loss with gates on or off stays near the whole model's, the pattern of gates carries the "
    "prediction; where it is near that of shuffled gates, it does not.",
)  # fmt: skip
def on_off(model: Model, text: PromptText) -> Found:
    """Replace each gate by the mean of its sign, in all layers or in one, and measure the loss of a text.

    Raises:
        PromptError: the text has fewer than 8 tokens, or several rows.
        SiteError: no layer has gates that are seen.
    """
    tokens = model.to_tokens(text)
    if tokens.shape[0] != 1 or tokens.shape[1] < 8:
        got = f"{tokens.shape[0]} rows of {tokens.shape[1]}"
        raise error(PromptError, "means need one text of 8 tokens or more", got=got, do="give a longer text")
    layers = {i: own for i in range(model.anatomy.n_layers) if (own := _places(model, i)) is not None}
    if not layers:
        what = f"{model.anatomy.name} has no gates that are seen"
        raise error(SiteError, what, do="use a model with plain or gated MLPs")
    names = [f"{i}.{own[0]}" for i, own in layers.items()]
    whole = model.run(tokens, capture=names)
    gates = {i: _Gates(model, i, own, whole[f"{i}.{own[0]}"]) for i, own in layers.items()}
    base, best = _loss(whole.logits, tokens), whole.logits[0].argmax(-1)
    values: dict[str, Any] = {"loss_whole": base}
    done, everything = 0, 2 * (len(layers) + 1)
    for end, shuffled in (("", False), ("_shuffled", True)):
        logits = model.run(tokens, edits=[e for own in gates.values() for e in own.edits(shuffled)]).logits
        values[f"loss{end}"] = _loss(logits, tokens)
        values[f"agreement{end}"] = float((logits[0].argmax(-1) == best).double().mean())
        rise = torch.full((model.anatomy.n_layers,), torch.nan, dtype=torch.float64)
        for i, own in gates.items():
            rise[i] = _loss(model.run(tokens, edits=own.edits(shuffled)).logits, tokens) - base
            done += 1
            current().report("switching gates", done, everything)
        values[f"rise{end}"] = rise
    return Found(values, coords={"layer": list(range(model.anatomy.n_layers))}, attrs={"tokens": tokens.shape[1]})


def _places(model: Model, layer: int) -> tuple[str, bool] | None:
    """The site before the activation of a layer, and whether its output is multiplied with an up branch."""
    points = model.anatomy.hook_points
    if model.anatomy.parts.layers[layer].act is None or Site("mlp.post", layer) not in points:
        return None
    if Site("mlp.gate", layer) in points and Site("mlp.up", layer) in points:
        return "mlp.gate", True
    return ("mlp.pre", False) if Site("mlp.pre", layer) in points else None


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:]))


class _Gates:
    """The gates of one layer: their means by sign over the text, and the edits that put these in their place."""

    def __init__(
        self, model: Model, layer: int, place: tuple[str, bool], before: Float[Tensor, "1 pos neuron"]
    ) -> None:
        self.layer, (self.site, self.gated) = layer, place
        self.act: Any = model.hf.get_submodule(str(model.anatomy.parts.layers[layer].act))
        a = self.act(before)[0].double()
        on = a > 0
        self.on = _mean(a, on)
        self.off = _mean(a, ~on)

    def edits(self, shuffled: bool) -> list[Edit]:
        """What the neurons become: each visit keeps what it sees for the one at the product."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def visit(x: Tensor) -> Tensor:
                seen[name] = x
                return x

            return visit

        def product(x: Tensor) -> Tensor:
            on = self.act(seen["before"]) > 0
            if shuffled:
                on = _shuffled(on, current().seed + self.layer)
            gate = torch.where(on, self.on.to(x), self.off.to(x))
            return gate * seen["up"] if self.gated else gate

        found: list[Edit] = [Apply(f"{self.layer}.{self.site}", function=keep("before"))]
        found += [Apply(f"{self.layer}.mlp.up", function=keep("up"))] if self.gated else []
        return [*found, Apply(f"{self.layer}.mlp.post", function=product)]


def _mean(a: Float[Tensor, "pos neuron"], where: Bool[Tensor, "pos neuron"]) -> Float[Tensor, " neuron"]:
    """The mean over the tokens of a choice; 0 for a neuron that has none."""
    return (a * where).sum(0) / where.sum(0).clamp(min=1)


def _shuffled(on: Bool[Tensor, "1 pos neuron"], seed: int) -> Bool[Tensor, "1 pos neuron"]:
    """The same tokens on for each neuron as often, in an order of its own."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.rand(on.shape, generator=rng).argsort(1).to(on.device)
    return on.gather(1, order)
