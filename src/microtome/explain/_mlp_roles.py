"""What an MLP does to each head of its layer: keep it, erase it, or add what no head brings.

Formula:  over prompts n, at the position read: mlp_out_n = sum_h c_h r_nh + b + rest, r_nh = z_nh W_O^h what head h of
          the layer writes, c one number a head, b a vector: c > 0 keeps or amplifies, c < 0 erases, b is the task
          vector. Least squares over all numbers of all prompts: with x, y minus their means over prompts,
          c = (sum_n X_n X_n')^-1 sum_n X_n y_n, b = mean y - sum_h c_h mean r_h.
          r2 = 1 - sum |y - fit|^2 / sum |y - mean y|^2 over prompts that the fit, and the mean, have not seen (folds);
          its control fits and judges with each head's writes taken from other prompts at random.
          A head whose writes vary over prompts less than a thousandth as much as the MLP's output, in squares, is left
          out: NaN. `coefficient` is the mean of the jackknife's pseudo-values n c - (n - 1) c(without e), of examples.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site, at_least_float32
from microtome.context import current
from microtome.errors import ModelUnsupported, PromptError, error
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.run import Prompt, prompt_from_text

LEAST = 3
"""Prompts below which there is nothing to fit."""
VARIED = 1e-3
"""Variance of a head's writes, as a share of that of the MLP's output, below which no coefficient of it is known."""


@question(
    "mlp_roles",
    title="roles of MLPs",
    question="Does an MLP keep or erase what each head of its layer writes, and what does it add itself?",
    columns=(
        Column("coefficient", "1", "how much of what a head writes the MLP adds again (above 0) or takes away (below)",
               "none: 0 is neither", dims=("layer", "head"), test=True, title="what the MLP does to each head"),
        Column("r2", "share", "share of the variance of the MLP's output over prompts that heads explain, on prompts "
               "that were not fitted", "r2_shuffled", (None, 1), ("layer",), title="explained by heads, held out"),
        Column("r2_shuffled", "share", "the same with each head's writes taken from other prompts", range=(None, 1),
               dims=("layer",)),
        Column("task", "share", "size of the task vector, as a share of the root mean square of the MLP's output",
               "none: 1 is an MLP that adds the same to every prompt", (0, None), ("layer",), title="task vector"),
        Column("word", "token", "the tokens that the task vector raises most", "none: the words of one vector",
               dims=("layer", "rank")),
    ),
    source=Source(
        "Lv et al.", "Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models", 2024,
        "2403.19521", departs="of the heads of the layer; held-out fit, its control, and intervals are ours",
    ),
    cost="one forward per prompt; least squares of one number a head in every layer, `folds` times",
    check="tests/laws/test_mlp_roles.py",
    call='mt.explain.mlp_roles(model, [f"The capital of {c} is" for c in ("France", "Japan", "Italy", "Peru")])',
    reading="Above 0, the MLP adds what a head writes once more; below 0 it takes it back. The task vector is what it "
    "adds whatever the heads bring.",
    needs=("sum", "lens", "heads", "attention and MLP"),
)  # fmt: skip
def mlp_roles(
    model: Model,
    prompts: Annotated[Prompt, Argument("prompts of one task", positional=True, from_text=prompt_from_text)],
    *,
    position: Annotated[int, Argument("position to read, counted from the end of each prompt if negative")] = -1,
    folds: Annotated[int, Argument("parts, each judged by a fit to the others", "parts", least=2)] = 5,
    top: Annotated[int, Argument("how many tokens of the task vector to name", "tokens", least=1)] = 5,
) -> Found:
    """Regress what each MLP writes on what the heads of its layer write, over prompts of one task.

    Raises:
        PromptError: there are fewer than 3 prompts, or one of them lacks the position.
        SiteError: the logits are not a sum over parts.
        ModelUnsupported: blocks are parallel, so that their MLPs do not read their heads.
    """
    rows = model.to_batch(prompts).rows
    if len(rows) < LEAST:
        raise error(PromptError, "roles are fitted over prompts", got=f"{len(rows)}", allowed=f"{LEAST} or more",
                    do="give more of them")  # fmt: skip
    parallel = [i for i in range(model.anatomy.n_layers) if Site("resid_mid", i) not in model.anatomy.hook_points]
    if parallel:
        what, got = "the MLP does not read what the heads of its layer write", f"parallel blocks in layer {parallel[0]}"
        raise error(ModelUnsupported, what, got=got, do="take a model whose MLPs come after attention")
    norm, n, at = model.require_readable(), model.anatomy.n_layers, f"@{position}"
    runs = [model.run(row[None], [f"*.attn.z{at}", f"*.mlp_out{at}"], logits=False) for row in rows]
    generator = torch.Generator().manual_seed(current().seed)
    fold = torch.randperm(len(rows), generator=generator) % min(folds, len(rows))
    found: dict[str, list[Tensor]] = {}
    words: list[list[str]] = []
    with torch.no_grad():
        for i in range(n):
            w = at_least_float32(model.layers[i].W_O)
            z = torch.stack([run[f"{i}.attn.z{at}"][0, 0] for run in runs]).to(w.dtype)
            x = torch.einsum("nhd,hdm->nhm", z, w).double().cpu()
            y = torch.stack([run[f"{i}.mlp_out{at}"][0, 0] for run in runs]).double().cpu()
            varied = (x - x.mean(0)).pow(2).sum((0, 2)) >= VARIED * (y - y.mean(0)).pow(2).sum()
            coefficient = x.new_full(x.shape[:2], torch.nan)
            x = x[:, varied]
            orders = [torch.randperm(len(x), generator=generator) for _ in range(x.shape[1])]
            mixed = torch.stack([x[order, h] for h, order in enumerate(orders)], dim=1) if orders else x
            fit, task = solved(x, y)
            coefficient[:, varied] = _pseudo(x, y, fit)
            values = {
                "coefficient": coefficient, "r2": held_out(x, y, fold), "r2_shuffled": held_out(mixed, y, fold),
                "task": task.norm() / y.pow(2).sum(1).mean().sqrt(),
            }  # fmt: skip
            for name, value in values.items():
                found.setdefault(name, []).append(value)
            logits = (norm.centre(task.to(model.W_U)) * norm.gain).to(model.W_U) @ model.W_U
            words.append(model.to_words(logits.topk(min(top, len(logits))).indices))
            current().report("fitting MLPs", i + 1, n)
    heads = max(c.shape[1] for c in found["coefficient"])
    each = torch.stack([torch.nn.functional.pad(c, (0, heads - c.shape[1]), value=torch.nan)
                        for c in found.pop("coefficient")], dim=1)  # fmt: skip
    return Found(
        {name: torch.stack(x) for name, x in found.items()} | {"word": words},
        each={"coefficient": each},
        coords={"layer": list(range(n)), "head": list(range(heads))},
        attrs={"prompts": len(rows), "position": position, "folds": int(fold.max()) + 1},
    )


def solved(
    x: Float[Tensor, "prompt head d_model"], y: Float[Tensor, "prompt d_model"]
) -> tuple[Float[Tensor, " head"], Float[Tensor, " d_model"]]:
    """One number a head and the vector besides, by least squares over all numbers of all prompts."""
    if not x.shape[1]:
        return y.new_zeros(0), y.mean(0)
    a, b = x - x.mean(0), y - y.mean(0)
    gram, target = torch.einsum("nhm,ngm->hg", a, a), torch.einsum("nhm,nm->h", a, b)
    c = torch.linalg.lstsq(gram, target.unsqueeze(1), driver="gelsd").solution[:, 0]
    return c, y.mean(0) - torch.einsum("h,hm->m", c, x.mean(0))


def held_out(
    x: Float[Tensor, "prompt head d_model"], y: Float[Tensor, "prompt d_model"], fold: Int[Tensor, " prompt"]
) -> Float[Tensor, ""]:
    """The share of variance that is explained on prompts of each fold by a fit to the others."""
    rest = whole = y.new_zeros(())
    for k in fold.unique().tolist():
        seen, new = fold != k, fold == k
        c, b = solved(x[seen], y[seen])
        rest = rest + (y[new] - torch.einsum("h,nhm->nm", c, x[new]) - b).pow(2).sum()
        whole = whole + (y[new] - y[seen].mean(0)).pow(2).sum()
    return 1 - rest / whole


def _pseudo(
    x: Float[Tensor, "prompt head d_model"], y: Float[Tensor, "prompt d_model"], whole: Float[Tensor, " head"]
) -> Float[Tensor, "prompt head"]:
    """The jackknife's pseudo-values of the coefficients."""
    n = len(x)
    every = torch.arange(n)
    return torch.stack([n * whole - (n - 1) * solved(x[every != e], y[every != e])[0] for e in range(n)])
