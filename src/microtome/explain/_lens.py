"""The logit lens: what the model would predict if it ended after each layer.

Formula:  logits_l = unembed(final_norm(resid_post_l)), l = 0 .. L - 1, so that those of the last layer are the model's
          own; and l = -1 for the stream before the first layer, the embedding.
"""

from __future__ import annotations

from typing import Annotated

import torch

from microtome.errors import PromptError, error
from microtome.method import Argument, Column, Found, PromptText, Source, question
from microtome.model import Model

PLACED = ("layer", "batch", "pos")
LAST = "none: the last layer gives the model's own output"


def _number(name: str, unit: str, meaning: str, *extra: str) -> Column:
    return Column(name, unit, meaning, LAST, dims=(*PLACED, *extra), drawn=False)


@question(
    "logit_lens",
    command="lens",
    title="logit lens",
    question="What would the model predict if it ended after each layer?",
    columns=(
        Column(
            "word", "token", "the most likely tokens, as text", LAST, dims=(*PLACED, "rank"), shade="probability",
            title="top tokens",
        ),
        _number("token", "token", "the most likely tokens, by id", "rank"),
        _number("probability", "probability", "probability of the most likely tokens", "rank"),
        _number("answer_probability", "probability", "probability of the model's own answer"),
        _number("answer_rank", "tokens", "how many tokens outrank the model's own answer"),
        _number("entropy", "nats", "entropy of the predicted distribution"),
    ),
    source=Source("nostalgebraist", "interpreting GPT: the logit lens", 2020),
    cost="one forward, and L + 1 unembeddings of every position",
    check="tests/laws/test_explain.py",
    call='mt.explain.logit_lens(model, "The capital of France is")',
    reading="Each cell is the token predicted from the stream after a layer, its resid_post; embed is the stream "
    "before the first layer, and the last layer's row is the model's output.",
    needs=("lens",),
)  # fmt: skip
def logit_lens(
    model: Model,
    prompt: PromptText,
    *,
    top: Annotated[int, Argument("tokens per position", "tokens", least=1)] = 1,
) -> Found:
    """Read the residual stream after every layer as logits.

    Raises:
        PromptError: the prompts have several lengths.
        SiteError: the stream cannot be read as logits.
    """
    batch = model.to_batch(prompt)
    if batch.padded:
        lengths = str(sorted(set(batch.lengths)))
        raise error(PromptError, "the lens reads prompts of one length", got=lengths, do="run them one by one")
    n = model.anatomy.n_layers
    run = model.run(batch.tokens, capture=["*.resid_pre", f"{n - 1}.resid_post"])
    answer = run.logits.argmax(-1, keepdim=True)
    rows: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for i in range(n + 1):
            stream = run[f"{i}.resid_pre"] if i < n else run[f"{n - 1}.resid_post"]
            log_p = model.unembed(stream).float().log_softmax(-1)
            best, own = log_p.topk(min(top, log_p.shape[-1]), dim=-1), log_p.gather(-1, answer)
            found = {
                "token": best.indices, "probability": best.values.exp(), "answer_probability": own.exp().squeeze(-1),
                "answer_rank": (log_p > own).sum(-1), "entropy": -(log_p.exp() * log_p).sum(-1),
            }  # fmt: skip
            for name, x in found.items():
                rows.setdefault(name, []).append(x)
    values = {name: torch.stack(x).cpu() for name, x in rows.items()}
    ids = values["token"]
    words = {t: model.to_words([t])[0] for t in ids.unique().tolist()}
    text = [[[[words[t] for t in p] for p in b] for b in layer] for layer in ids.tolist()]
    coords = {
        "layer": ("layer", list(range(-1, n)), {"before": "embed"}), "pos": list(range(ids.shape[2])),
        "prompt": (("batch", "pos"), run.words),
        "answer": (("batch", "pos"), [model.to_words(row) for row in answer.squeeze(-1)]),
    }  # fmt: skip
    return Found(values | {"word": text}, coords=coords, attrs={"layers": "after each layer; -1 is the embedding"})
