"""What a model knows by heart: which texts, where their gradient is large, who looks at rare tokens, what upsets them.

Formula:  a text is a prefix and a continuation. matched = share of the continuation that the model gives greedily
          before its first other token; memorised where that is all of it.
          gradient(part) = Euclidean norm of dL/dW over all weights of a layer's attention, or of its MLP, as a share of
          the sum of these norms over both branches of all layers of the same text, L = mean -log p(token) over the
          continuation: where the gradient of a text lies, whatever its loss. (Norms themselves grow with the loss.)
          rare_attention(head) = Pearson's correlation, over the tokens of the prefix but the first, of the attention
          that the positions which predict the continuation give to a token on average, and of its rarity -log f; f as
          given, or the model's own prediction averaged over all positions of all texts. Control: rarities shuffled.
          follows(k) = share of the model's own greedy continuation that it still gives, before the first other token,
          with token k of the prefix replaced by a random one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from microtome.context import current
from microtome.errors import ModelUnsupported, PromptError, error
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.run import Prompt, prompt_from_text
from microtome.stream import mean_interval

BRANCHES = ("attn", "mlp")
ROWS = 8
"""Prefixes that are run at once."""
FACT = "none: what the columns by layer and head are compared by"


def _gradient(name: str, what: str) -> tuple[Column, Column]:
    meaning = f"share of the norms of a text's gradient that lies in the weights of {what}, of texts that are"
    return (
        Column(f"{name}_gradient", "share", f"{meaning} memorised; of all where all or none are",
               f"{name}_gradient_other", (0, 1), ("layer",), title=f"where the gradient lies: {what}"),
        Column(f"{name}_gradient_other", "share", f"{meaning} not", range=(0, 1), dims=("layer",)),
    )  # fmt: skip


@question(
    "memorised",
    title="memorised texts",
    question="Which texts does the model know by heart, where does it keep them, and what upsets them?",
    columns=(
        Column("memorised", "1", "whether the model gives the whole continuation", FACT, (0, 1), ("example",)),
        Column("matched", "share", "share of the continuation that it gives before its first other token", FACT, (0, 1),
               ("example",)),
        Column("loss", "nats", "mean loss on the continuation", FACT, (0, None), ("example",)),
        *_gradient("attn", "attention"),
        *_gradient("mlp", "MLPs"),
        Column("rare_attention", "correlation", "between the attention that a prefix token gets and its rarity",
               "rare_attention_shuffled", (-1, 1), ("layer", "head"), test=True, title="attention to rare tokens"),
        Column("rare_attention_shuffled", "correlation", "the same with shuffled rarities", range=(-1, 1),
               dims=("layer", "head")),
        Column("follows", "share", "share of the model's own continuation that is left when one token of the prefix is "
               "replaced", "none: 1 without a replacement", (0, 1), ("example", "pos")),
        Column("fragile", "share", "share of the prefix's tokens of which one replacement changes the continuation",
               "none: compare texts that are memorised with others", (0, 1), ("example",)),
    ),
    source=Source(
        "Stoehr et al.", "Localizing Paragraph Memorization in Language Models", 2024, "2403.19851",
        departs="shares of norms of gradients, not largest entries; rarity by the model's predictions by default",
    ),
    cost="one forward and one backward per text, one forward per token of its continuation, and one per prefix token",
    check="tests/laws/test_memorised.py",
    call='mt.explain.memorised(model, ["We hold these truths to be self-evident, that all men are created equal", '
    '"The cat of my neighbour was seen on a bus to the lake, with a hat and a small grey book"])',
    reading="A text counts as memorised if the model continues its prefix with it word for word. Where little follows, "
    "that token of the prefix is the key to the rest. Gradients say where the "
    "weights of a text are, against those of other texts, and not how large they are.",
    needs=("attn.pattern", "next token"),
)  # fmt: skip
def memorised(
    model: Model,
    texts: Annotated[Prompt, Argument("texts, each a prefix and its continuation", positional=True,
                                      from_text=prompt_from_text)],
    *,
    prefix: Annotated[int | None, Argument("tokens of the prefix; half of each text by default", "tokens",
                                               least=2)] = None,
    frequencies: Annotated[Float[Tensor, " vocab"] | None, Argument("how often each token occurs", command=False)]
    = None,
) -> Found:  # fmt: skip
    """Tell memorised texts from others, and where and by what the memorised ones are held.

    `follows` is NaN behind a shorter prefix.

    Raises:
        PromptError: a text has no continuation behind its prefix, or a prefix of one token.
        ModelUnsupported: its weights take no gradient.
    """
    rows = model.to_batch(texts).rows
    cuts = [len(row) // 2 if prefix is None else prefix for row in rows]
    short = next((i for i, (row, cut) in enumerate(zip(rows, cuts, strict=True)) if cut < 2 or len(row) <= cut), None)
    if short is not None:
        got = f"{len(rows[short])} tokens, a prefix of {cuts[short]}"
        raise error(PromptError, f"text {short} has no prefix of two tokens and a continuation", got=got,
                    do="give longer texts, or another prefix=")  # fmt: skip
    generator = torch.Generator().manual_seed(current().seed)
    seen = [_seen(model, row, cut) for row, cut in zip(rows, cuts, strict=True)]
    often = _often(model, seen, frequencies)
    with _gradients(model) as weights:
        slopes = [_slopes(model, weights, row, cut) for row, cut in zip(rows, cuts, strict=True)]
    rare, shuffled = (
        torch.stack([_rare(x, row, often, g) for x, row in zip(seen, rows, strict=True)]) for g in (None, generator)
    )
    left = torch.full((len(rows), max(cuts)), torch.nan, dtype=torch.float64)
    for i, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
        left[i, :cut] = _follows(model, row, cut, generator)
        current().report("replacing tokens", i + 1, len(rows))
    matched = torch.tensor([x.matched for x in seen], dtype=torch.float64)
    known = matched >= 1.0
    values: dict[str, Tensor] = {
        "memorised": known.long(), "matched": matched, "loss": torch.tensor([s[0] for s in slopes]), "follows": left,
        "fragile": torch.stack([(x[: cuts[i]] < 1).double().mean() for i, x in enumerate(left)]),
    }  # fmt: skip
    values |= _by_group(torch.stack([s[1] for s in slopes]), known)
    coords = {"layer": list(range(model.anatomy.n_layers)), "head": list(range(rare.shape[-1]))}
    return Found(
        values, each={"rare_attention": rare, "rare_attention_shuffled": shuffled}, coords=coords,
        attrs={"texts": len(rows), "known": int(known.sum()), "prefixes": cuts},
    )  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    """One text: the share that is given greedily, the mean prediction [vocab], attention [layer, head, k_pos]."""

    matched: float
    mean: Float[Tensor, " vocab"]
    attention: Float[Tensor, "layer head k_pos"]


def _seen(model: Model, row: Int[Tensor, " pos"], cut: int) -> _Seen:
    run = model.run(row[None], capture="*.attn.pattern")
    right = run.logits[0, cut - 1 : -1].argmax(-1) == row[cut:]
    a, rows = model.anatomy, list[Tensor]()
    for i, layer in enumerate(a.parts.layers):
        whole = torch.full((a.n_heads, cut), torch.nan, dtype=torch.float64)
        if layer.attn is not None:
            mean = run[f"{i}.attn.pattern"][0, :, cut - 1 : -1, :cut].double().mean(1).cpu()
            whole[: len(mean)] = mean
        rows.append(whole)
    return _Seen(_before_false(right) / len(right), run.logits[0].double().softmax(-1).mean(0).cpu(), torch.stack(rows))


def _before_false(right: Bool[Tensor, " token"]) -> int:
    """How many come before the first that is False."""
    return int(right.long().cumprod(0).sum())


def _often(model: Model, seen: list[_Seen], given: Tensor | None) -> Float[Tensor, " vocab"]:
    """How often each token occurs: as given, or as the model predicts on average."""
    if given is None:
        return torch.stack([x.mean for x in seen]).mean(0)
    if given.shape != seen[0].mean.shape:
        got, allowed = str(list(given.shape)), f"[{model.anatomy.d_vocab}]"
        raise error(PromptError, "frequencies must be one number a token", got=got, allowed=allowed)
    return (given.double().cpu() + 1) / (given.double().sum().cpu() + len(given))


def _rare(
    x: _Seen, row: Int[Tensor, " pos"], often: Float[Tensor, " vocab"], generator: torch.Generator | None
) -> Float[Tensor, "layer head"]:
    """The correlation of attention and rarity over a prefix without its first token."""
    size = x.attention.shape[-1]
    rarity = -often[row[1:size].cpu()].clamp(min=torch.finfo(often.dtype).tiny).log()
    rarity = rarity if generator is None else rarity[torch.randperm(len(rarity), generator=generator)]
    a, b = x.attention[..., 1:], rarity
    a, b = a - a.mean(-1, keepdim=True), b - b.mean()
    scale = a.norm(dim=-1) * b.norm()
    return torch.where(scale > 0, (a * b).sum(-1) / scale.clamp(min=torch.finfo(b.dtype).tiny), 0.0).clamp(-1, 1)


@contextmanager
def _gradients(model: Model) -> Iterator[list[list[list[nn.Parameter]]]]:
    """The weights of attention and MLP by layer, which take gradients in this block, and as before behind it.

    Raises:
        ModelUnsupported: some branch has no weights of floating point.
    """
    found: list[list[list[nn.Parameter]]] = []
    for layer in model.layers:
        branches = [layer.parameters(branch).values() for branch in BRANCHES]
        found.append([[p for p in held if p.is_floating_point()] for held in branches])
    every = [p for branches in found for held in branches for p in held]
    if not every:
        got = model.stored or "no weights of attention or MLPs"
        raise error(ModelUnsupported, "the weights of this model take no gradient", got=got, do="open it unquantised")
    before = [p.requires_grad for p in every]
    try:
        for p in every:
            p.requires_grad_(True)
        yield found
    finally:
        for p, flag in zip(every, before, strict=True):
            p.requires_grad_(flag)


def _slopes(
    model: Model, weights: list[list[list[nn.Parameter]]], row: Int[Tensor, " pos"], cut: int
) -> tuple[float, Float[Tensor, "branch layer"]]:
    """The loss on the continuation, and the norms of its gradient in each branch."""
    run = model.run(row[None], capture="0.resid_pre", grad=True)
    log_p = run.logits[0, cut - 1 : -1].float().log_softmax(-1)
    loss = -log_p.gather(1, row[cut:, None]).mean()
    flat = [p for branches in weights for held in branches for p in held]
    given: Any = torch.autograd.grad(loss, flat, allow_unused=True)
    slopes: dict[int, Any] = dict(zip(map(id, flat), given, strict=True))
    found = torch.full((len(BRANCHES), len(weights)), torch.nan, dtype=torch.float64)
    for i, branches in enumerate(weights):
        for k, held in enumerate(branches):
            reached = [x for p in held if (x := slopes[id(p)]) is not None]
            squares = [x.double().pow(2).sum() for x in reached]
            if squares:
                found[k, i] = torch.stack(squares).sum().sqrt()
    return float(loss.detach()), found


def _by_group(slopes: Float[Tensor, "text branch layer"], known: Bool[Tensor, " text"]) -> dict[str, Tensor]:
    """Where the gradients of memorised texts and of others lie, with intervals; of all where these are not told apart.

    Of fewer than 8 texts an interval is NaN.
    """
    shares = slopes / slopes.nansum((1, 2), keepdim=True).clamp(min=torch.finfo(slopes.dtype).tiny)
    alike = bool(known.all()) or not bool(known.any())
    groups = {"": shares} if alike else {"": shares[known], "_other": shares[~known]}
    found: dict[str, Tensor] = {}
    for end, own in groups.items():
        for edge, x in zip(("", "_lo", "_hi"), mean_interval(own), strict=True):
            found |= {f"{name}_gradient{end}{edge}": x[k] for k, name in enumerate(BRANCHES)}
    return found


def _follows(model: Model, row: Int[Tensor, " pos"], cut: int, generator: torch.Generator) -> Float[Tensor, " prefix"]:
    """What share of its own continuation the model still gives with each token of the prefix replaced.

    Teacher forcing gives the greedy continuation up to its first other token, which is all that counts.
    """
    own = row[:cut]
    for _ in range(len(row) - cut):
        own = torch.cat([own, model.run(own[None]).logits[0, -1].argmax().reshape(1)])
    changed = own.expand(cut, -1).clone()
    step = torch.randint(1, model.anatomy.d_vocab, (cut,), generator=generator).to(row.device)
    at = torch.arange(cut, device=row.device)
    changed[at, at] = (changed[at, at] + step) % model.anatomy.d_vocab
    found: list[int] = []
    for rows in changed.split(ROWS):
        right = model.run(rows).logits[:, cut - 1 : -1].argmax(-1) == own[cut:]
        found += [_before_false(x) for x in right]
    return torch.tensor(found, dtype=torch.float64) / (len(row) - cut)
