"""By layer: does the stream still say what usually follows the last token, or what follows in this context?

Formula:  p_l = lens of resid_post_l at the last position; p_prior = the model's prediction behind the last `last`
          tokens alone (behind the token that begins a text, where there is one), p_context = that of the whole prompt;
          b, c their likeliest tokens, over the prompts where these differ:
          prior = p_l(b), context = p_l(c), share = p_l(c) / (p_l(b) + p_l(c)); the controls of the first two with the
          tokens of the next prompt; to_prior, to_context: Jensen-Shannon divergence of p_l from either, in nats.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from microtome.errors import PromptError, error
from microtome.explain._divergence import jensen_shannon
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.run import Prompt, prompt_from_text
from microtome.stream import bos_id

BY_LAYER = ("layer",)
ENDS = "none: to_context ends at 0, and to_prior where the whole model is"


def _likely(name: str, whose: str) -> tuple[Column, Column]:
    meaning = f"probability, after each layer, of {whose}"
    return (
        Column(name, "probability", meaning, f"{name}_other", (0, 1), BY_LAYER, chart="Prior and context"),
        Column(f"{name}_other", "probability", f"{meaning}, of the next prompt", range=(0, 1), dims=BY_LAYER),
    )


@question(
    "prior_and_context",
    title="prior and context by layer",
    question="From which layer on does the stream say what follows in this context, and not what usually follows?",
    columns=(
        *_likely("prior", "the token that is likeliest behind the last token alone"),
        *_likely("context", "the token that the whole model predicts"),
        Column("share", "share", "probability of the context's token among the two", "none: 0.5 is neither", (0, 1),
               BY_LAYER, test=False, title="share of the context"),
        Column("to_prior", "nats", "Jensen-Shannon divergence from the prediction behind the last token alone", ENDS,
               (0, None), BY_LAYER, chart="Distance from prior and context"),
        Column("to_context", "nats", "Jensen-Shannon divergence from the prediction of the whole model", ENDS,
               (0, None), BY_LAYER, chart="Distance from prior and context"),
    ),
    source=Source(
        "Dutta et al.", "How to think step-by-step: A mechanistic understanding of chain-of-thought reasoning", 2024,
        "2402.18312", departs="the prior is the model's own prediction without the context; divergences are added",
    ),
    cost="two forwards per prompt, and L unembeddings of one position",
    check="tests/laws/test_prior.py",
    call='mt.explain.prior_and_context(model, ["Mary gave John a drink. John thanked", "Tom met Amy. Tom kissed"])',
    reading="Where the share passes one half, the stream has turned from what usually follows to what follows here.",
    needs=("lens", "next token"),
)  # fmt: skip
def prior_and_context(
    model: Model,
    prompts: Annotated[Prompt, Argument("prompts", positional=True, from_text=prompt_from_text)],
    *,
    last: Annotated[int, Argument("how many last tokens the prior sees", "tokens", least=1)] = 1,
) -> Found:
    """Compare the stream after each layer with what the model predicts with and without the context.

    Raises:
        PromptError: no prompt is longer than what the prior sees, or the two predictions agree in all of them.
    """
    rows, n = model.to_batch(prompts).rows, model.anatomy.n_layers
    kept = [_of_prompt(model, row, last) for row in rows if len(row) > last]
    found = [x for x in kept if x[0] != x[1]]
    if not found:
        got = f"{len(rows)} prompts, {len(kept)} of more than {last} tokens"
        what = "in no prompt does the context change the likeliest token"
        raise error(PromptError, what, got=got, do="give longer prompts, in which the context matters")
    b, c = (torch.tensor([x[k] for x in found]) for k in (0, 1))
    p = torch.stack([x[2] for x in found])  # [prompt, layer, vocab]

    def of(tokens: Tensor) -> Tensor:
        """[prompt, layer] the probability of a token of each prompt."""
        return p.gather(-1, tokens.to(p.device).reshape(-1, 1, 1).expand(-1, n, 1)).squeeze(-1)

    each = {"prior": of(b), "context": of(c)}
    each["share"] = each["context"] / (each["prior"] + each["context"])
    each |= {"to_prior": torch.stack([x[3] for x in found]), "to_context": torch.stack([x[4] for x in found])}
    if len(found) > 1:
        each |= {"prior_other": of(b.roll(1)), "context_other": of(c.roll(1))}
    turned = (each["share"].mean(0) > 0.5).nonzero().flatten().tolist()
    return Found(
        each=each,
        coords={"layer": list(range(n))},
        attrs={"prompts": len(rows), "differ": len(found), "turns_at": turned[0] if turned else -1}
        | {"prior_tokens": model.to_words(b), "context_tokens": model.to_words(c)},
    )


def _of_prompt(model: Model, row: Tensor, last: int) -> tuple[int, int, Tensor, Tensor, Tensor]:
    """The prior's token, the context's, the lens [layer, vocab], and its divergences from both [layer]."""
    bos = bos_id(model.tokenizer)
    begins = row[:1] if bos is not None and int(row[0]) == bos else row[:0]
    alone = torch.cat([begins, row[max(len(begins), len(row) - last) :]])
    run = model.run(row[None], capture="*.resid_post@-1")
    with torch.no_grad():
        lens = model.unembed(run["*.resid_post@-1"][:, 0, 0]).double().log_softmax(-1)
        prior = model.run(alone[None]).logits[0, -1].double().log_softmax(-1)
        context = run.logits[0, -1].double().log_softmax(-1)
        a, b = (jensen_shannon(lens, x.expand_as(lens)) for x in (prior, context))
        return int(prior.argmax()), int(context.argmax()), lens.exp().float(), a, b
