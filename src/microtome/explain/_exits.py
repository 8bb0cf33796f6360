"""Exits: how much of some tokens each layer would say if the model ended there, beside what such an end would cost.

Formula:  p_l = softmax of the lens of layer l at the last token of a prompt; share_l = sum of p_l over a set of tokens;
          rank_l = how many tokens outrank the likeliest of the set; loss_l = mean loss of a text with layer l's lens,
          perplexity_l = exp(loss_l). The last layer is the model itself.
          Control: sets of other tokens of equal frequency, the model's own mean probability of a token over the text:
          for each token of the set one drawn from the 2 `NEAR` of nearest frequency.
          follows = rank correlation over exits of the share with the loss: what falls with the loss alone is general
          damage.
Cost:     a forward of each prompt and of the text, and L + 1 unembeddings of every token.
Check:    the last exit is the model; shares are sums of plain softmaxes; tests/laws/test_exits.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.errors import PromptError, error
from microtome.explain._causal_basis import View
from microtome.explain._lens_value import Lens
from microtome.explain._verify import rank_correlation
from microtome.method import Argument, Column, Found, PromptText, Source, Text, question
from microtome.model import Model
from microtome.run import Prompt, prompt_from_text
from microtome.stream import mean_interval

LAYER = ("layer",)
NEAR = 10
"""Tokens on either side, in the order of frequency, that a control is drawn from."""


@question(
    "exits",
    command="exits",
    title="early exits",
    question="From which layer on does a model say some tokens, and is their loss at an early exit more than damage?",
    columns=(
        Column("share", "probability", "probability of the set of tokens, if the model ended after the layer",
               "share_other", (0, 1), LAYER, title="probability of the tokens"),
        Column("share_other", "probability", "the same of other tokens that the model predicts as often on a "
               "text, on average", range=(0, 1), dims=LAYER),
        Column("rank", "tokens", "how many tokens outrank the likeliest of the set", "rank_other", (0, None), LAYER,
               title="rank of the tokens"),
        Column("rank_other", "tokens", "the same of other tokens that the model predicts as often", range=(0, None),
               dims=LAYER),
        Column("share_without", "probability", "probability of the set behind the prompts without their context",
               "none: compare share", (0, 1), LAYER),
        Column("rank_without", "tokens", "rank of the set behind the prompts without their context",
               "none: compare rank", (0, None), LAYER),
        Column("kl", "nats", "divergence of the model's own prediction from that of the exit, behind the prompts",
               "none: 0 at the last layer", (0, None), LAYER, drawn=False),
        Column("loss", "nats", "mean loss of a text with the exit", "none: the last layer's is the model's", (0, None),
               LAYER, title="loss of the exit on a text"),
        Column("perplexity", "1", "its exponential", "none: the last layer's is the model's", (1, None), LAYER,
               log=True),
        Column("follows", "correlation", "rank correlation over exits between the share and the loss",
               "follows_other", (-1, 1), ()),
        Column("follows_other", "correlation", "the same for other tokens that the model predicts as often",
               range=(-1, 1), dims=()),
    ),
    source=(
        Source(
            "Bachu et al.", "Unfair Alignment: Examining Safety Alignment Across Vision Encoder Layers in "
            "Vision-Language Models", 2024, "2411.04291", departs="exits of the language model itself, and the "
            "probability of tokens in place of judged generations; beside tokens of equal frequency",
        ),
        Source(
            "Li et al.", "The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual "
            "Information Steering", 2025, "2502.03628", departs="the ranks alone, of tokens that a text supports",
        ),
        Source(
            "Gera et al.", "The Benefits of Bad Advice: Autocontrastive Decoding across Model Layers", 2023,
            "2305.01628", departs="what late layers add is measured, not decoded with; the exit is a lens",
        ),
    ),
    cost="a forward of each prompt and of the text, and L + 1 unembeddings of each token of both",
    check="tests/laws/test_exits.py",
    call='mt.explain.exits(model, "The capital of France is", tokens=[" Paris"])',
    reading="share is how likely the model would say one of the tokens if it ended after a layer, share_other how "
    "likely tokens that it predicts as often on a text; where both fall as the loss rises, the exit is broken in "
    "general.",
    needs=("lens", "next token"),
)  # fmt: skip
def exits(
    model: Model,
    prompts: PromptText,
    *,
    tokens: Annotated[
        Sequence[Any], Argument("the set, each one token, such as \" Sorry\"; or a set for each prompt", from_text=str)
    ],
    lens: Annotated[
        Lens | str | None, Argument("a lens of `fit_lens`, or its file; by default the logit lens", from_text=str)
    ] = None,
    without: Annotated[
        Prompt | None, Argument("the prompts without what supports the tokens", from_text=prompt_from_text)
    ] = None,
    text: Annotated[
        Any, Argument("for loss and frequency, a text as a measure takes it; by default the standard library's",
                      from_text=str)
    ] = None,
    size: Annotated[int, Argument("tokens of that text", "tokens", least=2)] = 1024,
    length: Annotated[int, Argument("tokens per row of it", "tokens", least=2)] = 64,
    controls: Annotated[int, Argument("sets of other tokens", "sets", least=1)] = 8,
) -> Found:  # fmt: skip
    """Read a set of tokens off every layer as if the model ended there, beside the loss that it would have.

    Raises:
        PromptError: one of the set is not one token; there are not as many sets as prompts, or prompts without context;
            or the set is half of all tokens or more.
        DataError: the lens is of another model, or there is no text.
        ArgumentError: the lens is of heads, or of a token further ahead.
    """  # fmt: skip
    held = Lens.load(lens) if isinstance(lens, str) else lens
    held = None if held is None else held.require(model)
    n = model.anatomy.n_layers
    layers = [i for i in range(-1, n) if held is None or i in held.layers or i == n - 1]
    views = [View.of(model, held, i) for i in layers]
    rows = model.to_batch(prompts).rows
    wanted = _sets(model, tokens, len(rows))
    losses, frequency = _on_text(views, text, size, length)
    rng = torch.Generator().manual_seed(current().seed)
    others = [[_like(s, frequency, rng) for _ in range(controls)] for s in wanted]
    log_p = [_predictions(views, row) for row in rows]  # by prompt, [layer, vocab]
    each = _read(log_p, wanted, others)
    if without is not None:
        bare = model.to_batch(without).rows
        if len(bare) != len(rows):
            what = "there must be as many prompts without context as with it"
            raise error(PromptError, what, got=len(bare), allowed=str(len(rows)))
        plain = _read([_predictions(views, row) for row in bare], wanted, others)
        each |= {"share_without": plain["share"], "rank_without": plain["rank"]}
    loss, low, high = mean_interval(losses)
    values: dict[str, Any] = {"loss": loss, "loss_lo": (LAYER, low), "loss_hi": (LAYER, high), "perplexity": loss.exp()}
    for end in ("", "_other"):
        values[f"follows{end}"] = rank_correlation(each[f"share{end}"].mean(0).numpy(), loss.numpy())
    words = sorted({word for s in wanted for word in model.to_words(s)})
    coords = {"layer": ("layer", layers, {"before": "embed"})}
    return Found(values, each=each, coords=coords, attrs={"tokens": words, "prompts": len(rows)})


def _sets(model: Model, tokens: Sequence[Any], prompts: int) -> list[list[int]]:
    """The ids of the set of each prompt.

    Raises:
        PromptError: one is not one token, a set is empty, or there are not as many sets as prompts.
    """
    given: list[Any] = [tokens] if isinstance(tokens, str) else list(tokens)
    several = bool(given) and all(isinstance(s, Sequence) and not isinstance(s, str) for s in given)
    listed = given if several else [given] * prompts
    if len(listed) != prompts or not all(listed):
        got = f"{len(listed)} sets" if all(listed) else "an empty set"
        raise error(PromptError, "there must be one set of tokens for all prompts, or one each", got=got)
    return [list(dict.fromkeys(model.to_id(t) for t in s)) for s in listed]


def _on_text(
    views: Sequence[View], text: Any, size: int, length: int
) -> tuple[Float[Tensor, "row layer"], Float[Tensor, " vocab"]]:
    """The loss of each row of a text at each exit, and the mean probability of every token at the last one."""
    model, found = views[0].model, list[Tensor]()
    total, count = torch.zeros(model.anatomy.d_vocab, dtype=torch.float64, device=model.device), 0
    for batch in Text(text, tokens=size, length=length, rows=4).batches(model).parts:
        rows, lead = batch.tokens.to(model.device), batch.lead
        with torch.no_grad():
            run = model.run(rows, capture=[view.site for view in views], logits=False)
        target, by_layer = rows[:, lead + 1 :].unsqueeze(-1), list[Tensor]()
        for number, view in enumerate(views, 1):
            log_p = view.log_p(run[view.site][:, lead:-1])
            by_layer.append(-log_p.gather(-1, target).squeeze(-1).double().mean(1))
            if number == len(views):
                total += log_p.exp().double().sum((0, 1))
        count += target.numel()
        found.append(torch.stack(by_layer, -1).cpu())
    return torch.cat(found), (total / count).cpu()


def _like(tokens: Sequence[int], frequency: Float[Tensor, " vocab"], rng: torch.Generator) -> list[int]:
    """Other tokens, each about as frequent as one of these.

    Raises:
        PromptError: none is left.
    """
    order = frequency.argsort(descending=True).tolist()
    place, taken, found = {token: i for i, token in enumerate(order)}, set(tokens), list[int]()
    for token in tokens:
        at, reach = place[token], NEAR
        near = list[int]()
        while not near and reach < 2 * len(order):
            near = [t for t in order[max(0, at - reach) : at + reach + 1] if t not in taken]
            reach *= 2
        if not near:
            got = f"{len(tokens)} of {len(order)}"
            raise error(PromptError, "too many tokens to compare with as many others", got=got, do="name fewer")
        found.append(near[int(torch.randint(len(near), (), generator=rng))])
        taken.add(found[-1])
    return found


def _predictions(views: Sequence[View], row: Tensor) -> Float[Tensor, "layer vocab"]:
    """What each exit predicts behind one prompt."""
    sites = [f"{view.site}@-1" for view in views]
    with torch.no_grad():
        run = views[0].model.run(row, capture=sites, logits=False)
    return torch.stack([view.log_p(run[site][0, 0]) for view, site in zip(views, sites, strict=True)]).cpu()


def _read(
    log_p: Sequence[Float[Tensor, "layer vocab"]], wanted: Sequence[list[int]], others: Sequence[list[list[int]]]
) -> dict[str, Float[Tensor, "prompt layer"]]:
    """By prompt and exit, shares and ranks of the set and of its controls, and the divergence from the last exit."""
    rows: dict[str, list[Tensor]] = {}
    for p, own, like in zip(log_p, wanted, others, strict=True):
        final = p[-1].double()
        found = {
            "share": _share(p, own), "rank": _rank(p, own),
            "share_other": torch.stack([_share(p, s) for s in like]).mean(0),
            "rank_other": torch.stack([_rank(p, s) for s in like]).mean(0),
            "kl": (final.exp() * (final - p.double())).sum(-1).clamp(min=0),
        }  # fmt: skip
        for name, x in found.items():
            rows.setdefault(name, []).append(x)
    return {name: torch.stack(x) for name, x in rows.items()}


def _share(log_p: Float[Tensor, "layer vocab"], tokens: Sequence[int]) -> Float[Tensor, " layer"]:
    return log_p[:, list(tokens)].double().exp().sum(-1)


def _rank(log_p: Float[Tensor, "layer vocab"], tokens: Sequence[int]) -> Float[Tensor, " layer"]:
    best = log_p[:, list(tokens)].amax(-1, keepdim=True)
    return (log_p > best).sum(-1).double()
