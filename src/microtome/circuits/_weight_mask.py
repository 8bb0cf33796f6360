"""The weights that a behaviour needs: a mask learned over frozen weights, whether it suffices, and is needed.

Formula:  W' = W gate(s), gates as in `_sparsify.py`; objective = mean over rows of KL(target || masked model), see
          `_goals.py`; kept is s > 0.
          kl      KL(target || model with W where kept, else 0): whether the kept weights suffice;
          rise    loss of the model without the kept weights, all others as they are, less that of the whole model:
                  whether they are needed;
          toward_next  cosine of resid_post and the unembedding column of the token that the target holds likeliest, of
                  the model with the kept weights alone.
          All on rows that the mask was not learned from, beside masks that keep as much of every matrix at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from microtome.circuits._goals import TARGETS, Goal, goal_of
from microtome.circuits._sparsify import Gates, Learned, Sparsification, learn
from microtome.circuits._weights import Masks, Matrices, Put, random_like
from microtome.context import current
from microtome.errors import ArgumentError, error
from microtome.files import atomic
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model

TOGETHER = 8
"""Rows that are run at once."""
WHOLE = "none: the model as it is"
Each = dict[str, Float[Tensor, " row"]]


@question(
    "weight_mask",
    command="weight-mask",
    title="weights that are kept",
    question="Which weights does a behaviour need, do they suffice for it, and what is the model without them?",
    columns=(
        Column("kept", "share", "of each matrix that the mask keeps", "none: random masks keep as much", (0, 1),
               ("component",)),
        Column("kl", "nats", "KL from the target to the model with the kept weights alone", "kl_random", (0, None),
               dims=()),
        Column("kl_random", "nats", "the same with as much of every matrix at random", range=(0, None), dims=()),
        Column("kl_whole", "nats", "the same of the whole model", WHOLE, (0, None), dims=()),
        Column("kl_none", "nats", "the same with none of these weights", "none: a mask that keeps nothing", (0, None),
               dims=()),
        Column("rise", "nats", "rise of the loss without the kept weights", "rise_random", dims=()),
        Column("rise_random", "nats", "the same without as much of every matrix at random", dims=()),
        Column("loss_whole", "nats", "loss of the whole model", WHOLE, (0, None), dims=()),
        Column("toward_next", "1", "cosine of stream and likeliest next token's unembedding, kept weights alone",
               "toward_next_random", (-1, 1), ("layer",)),
        Column("toward_next_random", "1", "the same with as much of every matrix at random", range=(-1, 1),
               dims=("layer",)),
        Column("toward_next_whole", "1", "the same in the whole model", WHOLE, (-1, 1), ("layer",)),
    ),
    source=Source(
        "Chang, Bergen", "Bigram Subnetworks: Mapping to Next Tokens in Transformer Language Models", 2025,
        "2504.15471",
        departs="the learning rate and the growth of tau are scaled to the steps of a shorter run; the objective is "
        "KL, which is cross-entropy less a constant; bigrams are those of the rows that are learned from",
    ),
    cost="a forward and a backward of `rows` rows a step, and of held-out rows 4 forwards and two a random mask; six "
    "numbers a weight are held",
    check="tests/laws/test_weight_mask.py",
    call='mt.circuits.weight_mask(model, sites="0-1.mlp_out")',
    reading="kl near that of the whole model, and below kl_random, says that the kept weights suffice; rise above "
    "rise_random says that they are needed.",
    needs="next token",
)  # fmt: skip
def weight_mask(
    model: Model,
    text: Annotated[
        Any,
        Argument("a text: a file, or what `mt.measure` takes; or a task, or its file", positional=True, from_text=str),
    ] = None,
    *,
    sites: Annotated[Sequence[str], Argument("branches whose weights are masked", from_text=str)] = ("0.mlp_out",),
    target: Annotated[
        str | None, Argument("what to say; of a text bigram, of a task answers by default", choices=TARGETS)
    ] = None,
    sparsity: Annotated[float, Argument("nats that all weights cost together", "nats", least=0)] = 1.0,
    steps: Annotated[int, Argument("of the training, at most", "steps", least=1)] = 300,
    rows: Annotated[int, Argument("rows a step", "rows", least=1)] = 4,
    tokens: Annotated[int, Argument("how many tokens of the text to read", "tokens", least=8)] = 4_096,
    length: Annotated[int, Argument("tokens per row", "tokens", least=3)] = 64,
    lr: Annotated[float | None, Argument("learning rate; 5e-5 x 15,000 / steps by default", least=0)] = None,
    growth: Annotated[float | None, Argument("of tau in a step; 1.001^(15,000 / steps) by default", least=1)] = None,
    draws: Annotated[int, Argument("random masks", "masks", least=1)] = 3,
    save: Annotated[str | None, Argument("write the mask to this safetensors file", from_text=str)] = None,
) -> Found:
    """Learn which weights of some branches suffice to say a target, and judge them on rows that were not learned from.

    Weights are as before behind it, to the bit, also after an exception or Ctrl-C. A mask that is saved has, by the
    path of each matrix, which weights are kept. Bigrams are counted in the rows that are learned from; of the judged
    rows a share, `share_read`, has tokens that are known from there, and no other is read.

    Raises:
        FitError: the mask did not decide.
        SiteError: a site is not written by one branch.
        ArgumentError: the target does not fit, or no weight is kept.
        DataError: there are too few rows.
        ModelUnsupported: the weights are quantised or have adapters, or the model is not causal.
        OutputError: the mask cannot be written.
    """
    plan = Sparsification(sparsity, steps, lr, growth)
    matrices = Matrices.of(model, sites)
    goal = goal_of(model, text, target, tokens=tokens, length=length)
    learned = kept_weights(matrices, goal, plan, rows)
    masks = learned.kept
    if not any(bool(mask.any()) for mask in masks.values()):
        raise error(ArgumentError, "the mask keeps no weight", got=f"sparsity {sparsity:g}",
                    do="choose less sparsity, or more steps")  # fmt: skip
    if save is not None:
        with atomic(save, "a mask to") as partial:
            save_file({path: mask.cpu().contiguous() for path, mask in masks.items()}, partial)
    each, stream = _judged(matrices, goal, masks, draws)
    names, shares = matrices.shares(masks)
    total = sum(mask.numel() for mask in masks.values())
    attrs = {
        "target": goal.target, "sites": list([sites] if isinstance(sites, str) else sites), "weights": total,
        "kept_weights": sum(int(mask.sum()) for mask in masks.values()), "source": goal.source,
        "rows_learned": len(goal.halves[0]), "rows_judged": len(goal.halves[1]),
        "share_read": round(goal.share_read, 4), "random": f"{draws} masks",
    }  # fmt: skip
    coords = {"component": names, "layer": list(range(model.anatomy.n_layers))}
    return Found({"kept": shares, **stream}, each, coords=coords, attrs=attrs | dict(learned.attrs))


def kept_weights(matrices: Matrices, goal: Goal, plan: Sparsification, rows: int) -> Learned:
    """Learn a mask of the weights of some matrices; the weights are as before behind it.

    Raises:
        FitError: it did not decide.
    """
    train, seed = goal.halves[0], current().seed
    like = {path: torch.zeros_like(p.detach(), dtype=torch.float32) for path, p in matrices.held.items()}

    with matrices.under() as put:

        def objective(gates: Gates, step: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed + step)
            some = [train[i] for i in torch.randperm(len(train), generator=generator)[:rows].tolist()]
            parts = [(own, _whole(matrices.model, goal, own)) for own in goal.together(some, TOGETHER)]
            put({path: g.detach() for path, g in gates.items()})
            try:
                value, slopes = _drawn_back(matrices, goal, parts, len(some))
            finally:
                put(None)
            for (path, p), slope in zip(matrices.held.items(), slopes, strict=True):
                g = gates[path]
                value = value + ((g - g.detach()) * (p.detach() * slope).float()).sum()
            return value

        return learn(plan, like, objective, "weights", model=matrices.model)


def _whole(model: Model, goal: Goal, numbers: list[int]) -> Tensor | None:
    """What the whole model says of rows, where that is the target."""
    if goal.target != "model":
        return None
    with torch.no_grad():
        return goal.predicted(model.run(goal.tokens(numbers)).logits)


def _drawn_back(
    matrices: Matrices, goal: Goal, parts: Sequence[tuple[list[int], Tensor | None]], count: int
) -> tuple[Tensor, list[Tensor]]:
    """The mean divergence of rows under the weights as they stand, and its gradient in every matrix."""
    with matrices.with_gradients() as every, torch.enable_grad():
        total, slopes = torch.zeros((), device=every[0].device), [torch.zeros_like(p) for p in every]
        for numbers, whole in parts:
            logits = matrices.model.run(goal.tokens(numbers), grad=True).logits
            value = goal.divergence(logits, numbers, whole).sum() / count
            found: Any = torch.autograd.grad(value, every, allow_unused=True)
            slopes = [a if b is None else a + b for a, b in zip(slopes, found, strict=True)]
            total = total + value.detach()
    return total, slopes


def _judged(matrices: Matrices, goal: Goal, masks: Masks, draws: int) -> tuple[Each, dict[str, Tensor]]:
    """By column, its values on the rows that are judged; and the turn of the stream by layer."""
    generator = torch.Generator().manual_seed(current().seed)
    others = [random_like(masks, generator) for _ in range(draws)]
    judged = list(goal.together(goal.halves[1], TOGETHER))
    whole = [_whole(matrices.model, goal, own) for own in judged]
    with matrices.under() as put, torch.no_grad():
        likely = [goal.likely(matrices.model.run(goal.tokens(own)).logits, own) for own in judged]

        def seen(mask: Masks | None, *, without: bool = False) -> tuple[Tensor, Tensor, Tensor]:
            return _seen(matrices, goal, put, mask, judged, whole, likely, without=without)

        whole_kl, whole_loss, whole_turn = seen(None)
        own_kl, _, own_turn = seen(masks)
        none_kl = seen({path: torch.zeros_like(mask) for path, mask in masks.items()})[0]
        random = [seen(mask) for mask in others]
        rise = seen(masks, without=True)[1] - whole_loss
        rises = [seen(mask, without=True)[1] - whole_loss for mask in others]
    each = {
        "kl": own_kl, "kl_random": torch.stack([x[0] for x in random]).mean(0), "kl_whole": whole_kl,
        "kl_none": none_kl, "rise": rise, "rise_random": torch.stack(rises).mean(0), "loss_whole": whole_loss,
    }  # fmt: skip
    stream = {
        "toward_next": own_turn, "toward_next_random": torch.stack([x[2] for x in random]).mean(0),
        "toward_next_whole": whole_turn,
    }  # fmt: skip
    return each, stream


def _seen(
    matrices: Matrices, goal: Goal, put: Put, mask: Masks | None, judged: Sequence[list[int]],
    whole: Sequence[Tensor | None], likely: Sequence[Tensor], *, without: bool,
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"], Float[Tensor, " layer"]]:  # fmt: skip
    """Divergence and loss of each row, and the cosines by layer, under a mask, or `without` what it keeps."""
    model = matrices.model
    given = {path: ~x if without else x for path, x in mask.items()} if mask is not None else None
    put(given)
    divergence, loss, turns = list[Tensor](), list[Tensor](), list[Tensor]()
    for own, predicted, next_ in zip(judged, whole, likely, strict=True):
        run = model.run(goal.tokens(own), capture="*.resid_post")
        divergence.append(goal.divergence(run.logits, own, predicted).double().cpu())
        loss.append(goal.loss(run.logits, own).double().cpu())
        turns.append(_turn(model, goal, lambda i, run=run: run[f"{i}.resid_post"], next_) * len(own))
        current().report("judging masks", len(divergence), len(judged))
    put(None)
    rows = sum(len(own) for own in judged)
    return torch.cat(divergence), torch.cat(loss), torch.stack(turns).sum(0) / rows


def _turn(model: Model, goal: Goal, stream: Callable[[int], Tensor], next_: Tensor) -> Float[Tensor, " layer"]:
    """The mean cosine of each layer's stream and the unembedding of tokens; NaN where that reads no stream."""
    n = model.anatomy.n_layers
    unembedding = model.W_U.detach()
    if unembedding.shape[0] != model.anatomy.d_model:
        return torch.full((n,), torch.nan, dtype=torch.float64)
    known = next_ >= 0
    columns = unembedding.T[next_[known].to(unembedding.device)].float()
    found: list[Tensor] = []
    for i in range(n):
        x = goal.places(stream(i))[known.to(unembedding.device)].float()
        found.append(torch.cosine_similarity(x, columns, dim=-1).double().mean().cpu())
    return torch.stack(found)
