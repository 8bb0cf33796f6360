"""The logit lens: what the model would say if it stopped after each layer.

Formula:  lens_l = unembed(norm(resid_l)),  resid_l the residual stream entering layer l, and leaving the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from microtome.errors import SiteError, error
from microtome.model import Model
from microtome.run import Prompt

if TYPE_CHECKING:
    import xarray as xr


def logit_lens(model: Model, prompt: Prompt, *, top: int = 5) -> xr.Dataset:
    """Top tokens and their probabilities at every layer and position, and how the final answer rises.

    Formula:  softmax(unembed(norm(resid_l))), layers 0 to L; layer L is the model's own output.
    Source:   nostalgebraist, "interpreting GPT: the logit lens", 2020. Departs: none.
    Cost:     one forward, and an unembedding of every position a layer; memory for one layer's logits.
    Check:    layer L equals the model's logits (norm applied once, not twice); tests/laws/test_explain.py.

    Args:
        model: an open model with a final norm.
        prompt: what to run; one row or several of one length.
        top: how many tokens to keep at each place; the whole vocabulary at most.

    Returns:
        Dataset over (layer 0..L, batch, pos, rank): `token` ids, `word`, `probability`; and over (layer, batch, pos):
        `answer_probability` and `answer_rank` (0 is first) of the model's own final token, and `entropy` in nats.

    Raises:
        SiteError: the model has no final norm that the stream could be read through, or rows differ in length.
    """
    import xarray as xr

    batch = model.to_batch(prompt)
    if batch.padded:
        raise error(SiteError, "the lens reads rows of one length", got=str(list(batch.lengths)), do="run them apart")
    n = model.anatomy.n_layers
    run = model.run(prompt, capture=["*.resid_pre", f"{n - 1}.resid_post"])
    answer = run.logits.argmax(-1, keepdim=True)
    rows: dict[str, list[torch.Tensor]] = {k: [] for k in ("token", "probability", "answer", "rank", "entropy")}
    with torch.no_grad():
        for i in range(n + 1):
            resid = run[f"{i}.resid_pre"] if i < n else run[f"{n - 1}.resid_post"]
            logp = model.unembed(resid).float().log_softmax(-1)
            best = logp.topk(min(top, logp.shape[-1]), dim=-1)
            own = logp.gather(-1, answer)
            rows["token"].append(best.indices)
            rows["probability"].append(best.values.exp())
            rows["answer"].append(own.exp().squeeze(-1))
            rows["rank"].append((logp > own).sum(-1))
            rows["entropy"].append(-(logp.exp() * logp).sum(-1))
    stacked = {k: torch.stack(v).cpu() for k, v in rows.items()}
    ids = stacked["token"]
    known = {t: model.to_words([t])[0] for t in sorted(set(ids.flatten().tolist()))}
    words = [[[[known[t] for t in p] for p in b] for b in layer] for layer in ids.tolist()]
    ranked, placed = ("layer", "batch", "pos", "rank"), ("layer", "batch", "pos")
    return xr.Dataset(
        {
            "token": (ranked, ids.numpy()),
            "word": (ranked, words, {"title": "top tokens", "shade": "probability"}),
            "probability": (ranked, stacked["probability"].numpy()),
            "answer_probability": (placed, stacked["answer"].numpy(), {"unit": "probability"}),
            "answer_rank": (placed, stacked["rank"].numpy(), {"unit": "rank"}),
            "entropy": (placed, stacked["entropy"].numpy(), {"unit": "nats"}),
        },
        coords={
            "layer": ("layer", list(range(n + 1)), {"last": "out"}),
            "pos": list(range(ids.shape[2])),
            "prompt": (("batch", "pos"), run.words),
            "answer": (("batch", "pos"), [model.to_words(row) for row in answer.squeeze(-1)]),
        },
        attrs=model.provenance
        | {
            "method": "logit lens",
            "reading": "Each cell holds the tokens that the model would put first if it stopped before that layer; "
            "the last row is its output.",
            "layers": f"{n} is after the last layer",
        },
    )
