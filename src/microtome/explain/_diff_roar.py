"""DiffROAR: whether the tokens that an attribution ranks first are those that a model can learn the answer from.

Formula:  every prompt keeps the share `keep` of its tokens that a map ranks first, or last, and the others become a
          blank; the last token stays. A model of the same form is trained anew on either: top and bottom are their
          accuracies on prompts that were left out, blanked in the same way; DiffROAR = top - bottom.
          Control: tokens in random order, first and last; and the whole prompts.
Trap:     maps are of the model's own answers. Where it answers rightly, which tokens become blanks depends on the
          label, and a model can learn it from that: the tokens ranked last then tell the answer too, and top - bottom
          is near 0 for a good map. Compare top with random_top.
Cost:     2 trainings an estimate and 3 more, of `steps` steps; a map a prompt and estimate.
Check:    a planted span; nothing to learn where the answer is blanked; tests/planted/test_spans.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from microtome.context import current
from microtome.errors import ArgumentError, DataError, PromptError, error
from microtome.explain._attribution_maps import MAPS, map_of, usual
from microtome.method import Argument, Column, Found, PromptText, Source, question
from microtome.model import Model, untrained_of
from microtome.training import fit

OF = ("estimate",)
FEWEST = 8
"""Prompts below which there is nothing to train on and to leave out."""


@question(
    "diff_roar",
    title="DiffROAR",
    question="Can the answer be learned from the tokens that an attribution ranks first, and not from the last?",
    columns=(
        Column("top", "share", "accuracy of a model trained anew on the tokens ranked first", "bottom", (0, 1), OF,
               title="accuracy, trained on the first and the last"),
        Column("bottom", "share", "the same on the tokens ranked last", range=(0, 1), dims=OF),
        Column("random_top", "share", "the same on tokens in random order, the first", "random_bottom", (0, 1), ()),
        Column("random_bottom", "share", "the same, the last", range=(0, 1), dims=()),
        Column("whole", "share", "accuracy of a model trained anew on whole prompts", "none: all there is to learn",
               (0, 1), ()),
        Column("own", "share", "share of the prompts that the model itself answers", "none: maps are of its answers",
               (0, 1), ()),
    ),
    source=Source(
        "Shah, Jain, Netrapalli", "Do Input Gradients Highlight Discriminative Features?", 2021, "2102.12781",
        "section 3", departs="tokens in place of pixels; maps are of the model's own answers, not of the labels; a "
        "training each, so that intervals are over prompts left out and not over trainings",
    ),
    cost="2 trainings of `steps` steps an estimate, and 3 more; one map a prompt and estimate",
    check="tests/planted/test_spans.py, tests/laws/test_attribution_check.py",
    call="mt.explain.diff_roar(model, prompts, answers=labels)",
    reading="top above random_top: the map ranks first what the answer can be learned from. top_diff is DiffROAR; near "
    "0 it decides nothing, as which tokens are blank may tell the answer beside the tokens ranked last too.",
    needs=("next token",),
)  # fmt: skip
def diff_roar(
    model: Model,
    prompts: PromptText,
    *,
    answers: Annotated[Sequence[Any], Argument("the answer of each prompt, one token", command=False)],
    estimates: Annotated[
        Sequence[str] | None,
        Argument("attributions to check; by default the usual ones that the model has", choices=tuple(MAPS)),
    ] = None,
    keep: Annotated[float, Argument("share of the tokens that a prompt keeps", "share", least=0, most=1)] = 0.25,
    blank: Annotated[str | int, Argument("the token in place of the others")] = 0,
    left_out: Annotated[float, Argument("share of the prompts to measure on", "share", least=0, most=1)] = 0.25,
    steps: Annotated[int, Argument("of each training", "steps", least=1)] = 300,
    rows: Annotated[int, Argument("prompts a step", "prompts", least=1)] = 64,
    lr: Annotated[float, Argument("learning rate", least=0)] = 3e-3,
) -> Found:
    """Train a model of the same form anew on the tokens that attributions rank first and last, and compare.

    Raises:
        PromptError: the prompts have several lengths or are too few; an answer is not one token, or one is missing.
        DataError: nothing is left out, or everything.
        ArgumentError: no token would be kept.
        ModelUnsupported: a model of the same form cannot be made.
    """  # fmt: skip
    batch = model.to_batch(prompts)
    if batch.padded or len(batch.tokens) < FEWEST:
        got = f"{len(batch.tokens)} prompts of {len(set(batch.lengths))} lengths"
        what = "a training needs prompts of one length"
        raise error(PromptError, what, got=got, allowed=f"{FEWEST} or more", do="give such prompts")
    tokens, n = batch.tokens, len(batch.tokens)
    if len(answers) != n:
        raise error(PromptError, "there must be one answer per prompt", got=len(answers), allowed=str(n))
    wanted = torch.tensor([model.to_id(a) for a in answers], device=tokens.device)
    rest = round(left_out * n)
    if not 0 < rest < n:
        got = f"{rest} of {n}"
        raise error(DataError, "some prompts must be left out, and some not", got=got, do="choose another left_out=")
    own = torch.cat([model.run(part).logits[:, -1].argmax(-1) for part in tokens.split(rows)])
    trial = _Trial(model, tokens, wanted, rest, model.to_id(blank), steps, rows, lr)
    names = list(dict.fromkeys(estimates or usual(model, tokens[0])))
    number = round(keep * (tokens.shape[1] - 1))
    if not number:
        got, allowed = f"{keep} of {tokens.shape[1] - 1}", f"{1 / (tokens.shape[1] - 1):.2g} to 1"
        raise error(ArgumentError, "no token would be kept beside the last", got=got, allowed=allowed, do="keep more")
    each: dict[str, list[Tensor]] = {"top": [], "bottom": []}
    for done, name in enumerate(names):
        maps = torch.stack([map_of(name, model, row, int(a)) for row, a in zip(tokens, own, strict=True)])
        for end, sign in (("top", -1), ("bottom", 1)):
            each[end].append(trial.right(kept_of(sign * maps, number)))
        current().report("training anew", done + 1, len(names))
    found: dict[str, Any] = {end: torch.stack(x, 1) for end, x in each.items()}
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(current().seed), dtype=torch.float64)
    found |= {f"random_{end}": trial.right(kept_of(sign * order, number)) for end, sign in (("top", -1), ("bottom", 1))}
    found["whole"] = trial.right(torch.ones_like(tokens, dtype=torch.bool).cpu())
    found["own"] = (own == wanted)[-rest:].double().cpu()
    attrs = {"kept": number, "prompts": n, "left_out": rest, "blank": model.to_words([trial.blank])[0]}
    return Found(each=found, coords={"estimate": names}, attrs=attrs)


def kept_of(order: Float[Tensor, "row pos"], number: int) -> Bool[Tensor, "row pos"]:
    """Which tokens stay: so many of the lowest of all but the last one, and the last one."""
    chosen = order[:, :-1].argsort(dim=-1, stable=True)[:, :number]
    found = torch.zeros(order.shape, dtype=torch.bool)
    found.scatter_(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    found[:, -1] = True
    return found


class _Trial:
    """Trainings of models of one form, on prompts of which some tokens are blanked."""

    def __init__(
        self, model: Model, tokens: Int[Tensor, "row pos"], wanted: Int[Tensor, " row"], rest: int, blank: int,
        steps: int, rows: int, lr: float,
    ) -> None:  # fmt: skip
        self.model, self.tokens, self.wanted, self.rest, self.blank = model, tokens, wanted, rest, blank
        self.steps, self.rows, self.lr = steps, rows, lr

    def right(self, kept: Bool[Tensor, "row pos"]) -> Float[Tensor, " left_out"]:
        """1 where a model trained on the others answers a prompt that was left out, what is not kept being blank."""
        given = self.tokens.masked_fill(~kept.to(self.tokens.device), self.blank)
        train, fresh = len(given) - self.rest, untrained_of(self.model)
        hf: Any = fresh.hf

        def batch(step: int) -> Tensor:
            rng = torch.Generator().manual_seed(1_000_003 * current().seed + step)
            return torch.randint(train, (min(self.rows, train),), generator=rng).to(given.device)

        def loss(some: Tensor) -> Tensor:
            return cross_entropy(hf(input_ids=given[some]).logits[:, -1].float(), self.wanted[some])

        fit(hf, loss, batch, self.steps, lr=self.lr, schedule="linear", warmup=10, clip=1.0, model=fresh,
            name="training anew")  # fmt: skip
        with torch.no_grad():
            first = torch.cat([hf(input_ids=x).logits[:, -1].argmax(-1) for x in given[train:].split(self.rows)])
        return (first == self.wanted[train:]).double().cpu()
