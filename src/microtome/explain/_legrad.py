"""LeGrad: which tokens a prediction forms from, by what attention to them adds in each layer.

Formula:  s_l = logit of the answer (minus the foil's) that the logit lens reads at the last position behind layer l;
          R_l(j) = mean over heads h and queries i of max(0, ds_l / dA_l,h,ij), A the attention pattern of layer l, and
          R(j) = sum_l R_l(j). Only the last query's pattern reaches the last position of its own layer, so that all
          other summands are 0.
Cost:     one forward, a lens and a gradient through one layer for every layer; a sweep of one cell a token.
Check:    the gradient of plain hooks; a planted head whose key is known; tests/laws/test_legrad.py.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.edit import KnockOut
from microtome.errors import PromptError, error
from microtome.explain._one_prompt import asked, beside, reading
from microtome.method import AnswerToken, Argument, Column, Found, PromptText, Source, question, run_sweep
from microtome.model import Model
from microtome.run import Run


@question(
    "legrad",
    command="legrad",
    title="LeGrad",
    question="Which tokens does a prediction form from, by the gradient of each layer's attention?",
    columns=(
        Column("relevance", "logits", "how much more attention to this token would raise the answer, summed over "
               "layers", "attention", (0, None), dims=("pos",)),
        Column("attention", "share", "mean attention of the last position to this token, over heads and layers",
               range=(0, 1), dims=("pos",)),
        Column("by_layer", "logits", "the same layer by layer", "none: compare the sum's control", (0, None),
               dims=("layer", "pos")),
        Column("cut", "logits", "how much the metric falls when the last position cannot attend to this token in any "
               "layer, exactly", "none: the truth that relevance stands beside", dims=("pos",)),
        Column("rank_correlation", "correlation", "between relevance and the effect of cutting",
               "rank_correlation_attention", (-1, 1), dims=()),
        Column("rank_correlation_attention", "correlation", "the same for plain attention", range=(-1, 1), dims=()),
    ),
    source=Source(
        "Bousselham, Boggust, Chaybouti, Strobelt, Kuehne",
        "LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity", 2024,
        "2404.03214", departs="for text: the score of a layer is its logit lens at the last position; not rescaled",
    ),
    cost="one forward, L lenses and L gradients through one layer, and a sweep of one cell a token",
    check="tests/laws/test_legrad.py",
    call='mt.explain.legrad(model, "The capital of France is")',
    reading="Each value says how much the answer would gain if the last position attended more to this token.",
    needs=("lens", "attn.pattern"),
)  # fmt: skip
def legrad(
    model: Model,
    prompt: PromptText,
    *,
    answer: AnswerToken = None,
    foil: Annotated[str | int | None, Argument("a token whose logit is subtracted")] = None,
) -> Found:
    """Relevance of each token to a prediction, from the gradient of every layer's attention pattern.

    Raises:
        PromptError: there are several prompts, the answer is not one token, or the foil is the answer.
        SiteError: the stream cannot be read as logits.
    """
    tokens, read, attrs = asked(model, prompt, answer, foil)
    if len(tokens) < 2:
        raise error(PromptError, "one token has no others to attend to", do="give a longer prompt")
    there = [i for i in range(model.anatomy.n_layers) if Site("attn.pattern", i) in model.anatomy.hook_points]
    capture = [f"{i}.{name}" for i in there for name in ("attn.pattern", "resid_post")]
    run = model.run(tokens.unsqueeze(0), capture=capture, grad=True)
    relevance = torch.zeros(model.anatomy.n_layers, len(tokens), dtype=torch.float64)
    attention = torch.zeros(len(tokens), dtype=torch.float64)
    for layer in there:
        slope = pattern_slope(model, run, layer, read)
        relevance[layer] = slope.clamp(min=0).mean((0, 1)).cpu()
        attention += run[f"{layer}.attn.pattern"].detach()[0, :, -1].double().mean(0).cpu() / len(there)
    metric, unit = reading(read)
    cells = [KnockOut(f"{','.join(map(str, there))}.attn.scores@-1", keys=str(p)) for p in range(len(tokens))]
    swept = run_sweep(model, tokens.unsqueeze(0), cells, metric, stage="cutting attention")
    cut, total = -swept.effects.double(), relevance.sum(0)
    values: dict[str, Any] = {"relevance": total, "attention": attention, "by_layer": relevance, "cut": cut}
    for end, own in (("", total), ("_attention", attention)):
        values[f"rank_correlation{end}"] = beside(own, cut)
    return Found(
        values, coords={"token": ("pos", model.to_words(tokens)), "layer": list(range(model.anatomy.n_layers))},
        attrs=attrs, units={"cut": unit},
    )  # fmt: skip


def pattern_slope(model: Model, run: Run, layer: int, read: list[int]) -> Float[Tensor, "head q_pos k_pos"]:
    """The gradient of a layer's own lens of the answer, at the last position, by its attention pattern."""
    stream = run[f"{layer}.resid_post"].detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model.unembed(stream[0, -1])[read].double()
        score = logits[0] if len(read) == 1 else logits[0] - logits[1]
    slope = torch.autograd.grad(score, stream)[0]
    return run.vjp(slope.unsqueeze(0), f"{layer}.resid_post", f"{layer}.attn.pattern")[0, 0].double()
