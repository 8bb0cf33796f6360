"""How many dimensions of their queries, keys and values some heads need for a task.

Formula:  over half of the prompts, mu and V_r: the mean and the first r right singular vectors of (x - mu), x the
          queries of a head at the last position, or its keys or values at all positions but the first.
          On the other half, x becomes mu + (x - mu) V_r V_r' in all named heads at once:
          change(r) = log p(answer | cut) - log p(answer); its control with r random orthonormal directions for V_r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import parse
from microtome.context import current
from microtome.edit import Apply
from microtome.errors import PromptError, SiteError, error
from microtome.explain._answers import Answer, answers_of
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.run import Prompt, prompt_from_text

RANKS = (0, 1, 2, 3, 4, 8, 16)
PARTS = {"q": "queries", "k": "keys", "v": "values"}
BASE = "none: relative to the run without a cut"

Heads = Sequence[tuple[int, int]]
Basis = tuple[Float[Tensor, " d_head"], Float[Tensor, "d_head rank"]]


def _columns() -> list[Column]:
    found: list[Column] = []
    for name, what in PARTS.items():
        change = f"change of the answer's log-probability with {what} of the heads cut to a rank"
        found += [
            Column(name, "nats", f"{change}, on prompts that were not fitted", f"{name}_random", dims=("component",),
                   title=what),
            Column(f"{name}_random", "nats", f"{change} of random directions", dims=("component",)),
            Column(f"{name}_shifted", "nats", f"{change} that was fitted to the task, on other prompts",
                   f"{name}_random", dims=("component",), title=f"{what}, other prompts"),
        ]  # fmt: skip
    return found


@question(
    "head_rank",
    title="rank of heads",
    question="How many dimensions of their queries, keys and values do some heads need for a task?",
    columns=[
        *_columns(),
        Column("clean", "nats", "the answer's log-probability without a cut", BASE, (None, 0), ("example",)),
    ],
    source=Source(
        "Lieberum et al.",
        "Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in Chinchilla", 2023,
        "2307.09458", departs="directions are fitted and judged on different prompts, beside random ones",
    ),
    cost="one forward per prompt; 6 forwards per rank and prompt that is judged, and 3 per shifted one",
    check="tests/laws/test_head_rank.py",
    call='mt.explain.head_rank(model, [f"The capital of {c} is" for c in ("France", "Japan", "Italy", "Peru")], '
    'heads="20.attn.z[3]", answer=[" Paris", " Tokyo", " Rome", " Lima"])',
    reading="Near 0 from rank r on, r dimensions are enough. With grouped heads, keys and values are those of the "
    "whole group.",
    needs=("attn.q", "attn.k", "attn.v", "next token"),
)  # fmt: skip
def head_rank(
    model: Model,
    prompts: Annotated[
        Prompt,
        Argument("prompts of one task, of which every second one is judged", positional=True,
                 from_text=prompt_from_text),
    ],
    *,
    heads: Annotated[str | Sequence[str], Argument('heads, such as "20.attn.z[3]"', from_text=str)],
    answer: Annotated[Answer, Argument("one token for all prompts, or one per prompt", from_text=str)],
    ranks: Annotated[Sequence[int], Argument("ranks to cut to", "dimensions", command=False)] = RANKS,
    shifted: Annotated[Prompt | None, Argument("prompts of another kind to judge too", command=False)] = None,
    shifted_answer: Annotated[Answer | None, Argument("their answers", command=False)] = None,
) -> Found:  # fmt: skip
    """Cut queries, keys or values of some heads to few dimensions, and see what is left of the answer.

    Raises:
        SiteError: a name is not that of a head.
        PromptError: there are fewer than 3 prompts, one is of one token, or an answer does not fit.
    """
    rows, named = model.to_batch(prompts).rows, heads_of(model, heads)
    if len(rows) < 3 or min(map(len, rows)) < 2:
        got = f"{len(rows)} prompts of {min(map(len, rows))} tokens or more"
        what = "half of the prompts are fitted, the other half judged"
        raise error(PromptError, what, got=got, allowed="3 or more, of 2 tokens or more", do="give more of them")
    ids, ranks = answers_of(model, answer, len(rows)), _ranks(model, ranks)
    others = [] if shifted is None else model.to_batch(shifted).rows
    other_ids = [] if shifted_answer is None else answers_of(model, shifted_answer, len(others))
    if len(others) != len(other_ids):
        raise error(PromptError, "shifted prompts need answers", got=len(other_ids), allowed=str(len(others)))
    generator = torch.Generator().manual_seed(current().seed)
    judged = list(zip(rows[1::2], ids[1::2], strict=True))
    moved = list(zip(others, other_ids, strict=True))
    with torch.no_grad():
        clean = torch.stack([_log_p(model, *one, []) for one in judged])
        before = torch.stack([_log_p(model, *one, []) for one in moved]) if moved else None
        each: dict[str, Tensor] = {}
        for done, part in enumerate(PARTS):
            bases = {h: _basis(model, rows[::2], part, *h) for h in _units(model, part, named)}
            drawn = {h: (mu, _random(v, generator)) for h, (mu, v) in bases.items()}
            each[part] = _changes(model, judged, part, bases, ranks) - clean[:, None]
            each[f"{part}_random"] = _changes(model, judged, part, drawn, ranks) - clean[:, None]
            if before is not None:
                each[f"{part}_shifted"] = _changes(model, moved, part, bases, ranks) - before[:, None]
            current().report("cutting to ranks", done + 1, len(PARTS))
    values = {name: (("component",), x.mean(0)) for name, x in each.items() if name.endswith("_shifted")}
    return Found(
        {"clean": clean} | values,
        each={name: x for name, x in each.items() if name not in values},
        coords={"component": [f"rank {r}" for r in ranks]},
        attrs={"heads": [f"{i}.attn.z[{h}]" for i, h in named], "fitted": len(rows[::2]), "judged": len(judged),
               "shifted": len(moved), "ranks": list(ranks)},
    )  # fmt: skip


def heads_of(model: Model, heads: str | Sequence[str]) -> list[tuple[int, int]]:
    """Heads by address as (layer, head).

    Raises:
        SiteError: an address is not that of heads.
    """
    found: list[tuple[int, int]] = []
    for text in [heads] if isinstance(heads, str) else heads:
        address = parse(text)
        if address.name != "attn.z":
            raise error(SiteError, f'"{text}" is not a head', allowed='heads such as "20.attn.z[3]"', do="name heads")
        for site in model.anatomy.sites(address):
            units = address.units.resolve(model.anatomy.units(site)) or []
            found += [(site.layer, u) for u in units if site.layer is not None]
    return list(dict.fromkeys(found))


def _ranks(model: Model, ranks: Sequence[int]) -> list[int]:
    """The ranks that are asked for, of those that a head can have."""
    kept = sorted({int(r) for r in ranks if 0 <= int(r) <= model.anatomy.d_head})
    if not kept:
        allowed = f"0 to {model.anatomy.d_head}"
        raise error(PromptError, "no rank that a head can be cut to", got=str(list(ranks)), allowed=allowed)
    return kept


def _units(model: Model, part: str, heads: Heads) -> list[tuple[int, int]]:
    """The units of queries, keys or values that heads read with: of keys and values those of their groups."""
    if part == "q":
        return list(heads)
    group = model.anatomy.n_heads // max(1, model.anatomy.n_kv_heads)
    return list(dict.fromkeys((i, h // group) for i, h in heads))


def _at(part: str, length: int) -> str:
    return f"@{length - 1}" if part == "q" else f"@1-{length - 1}"


def _basis(model: Model, rows: Sequence[Tensor], part: str, layer: int, unit: int) -> Basis:
    """The mean of what a unit holds over prompts, and its directions, most variance first."""
    sites = [f"{layer}.attn.{part}[{unit}]{_at(part, len(row))}" for row in rows]
    runs = [model.run(row[None], capture=site, logits=False)[site] for row, site in zip(rows, sites, strict=True)]
    x = torch.cat([run.flatten(0, -2) for run in runs]).double()
    mean = x.mean(0)
    size, v = torch.linalg.svd(x - mean, full_matrices=False)[1:]
    v = v[size > 1e-6 * size.max().clamp(min=1e-300)].T  # what no prompt moves along is completed in a fixed order
    whole = torch.cat([v, torch.eye(x.shape[-1], dtype=v.dtype, device=v.device)], 1)
    return mean, torch.linalg.qr(whole).Q


def _random(v: Float[Tensor, "d_head _"], generator: torch.Generator) -> Float[Tensor, "d_head _"]:
    """Random orthonormal directions, as many."""
    drawn = torch.randn(v.shape, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.to(v.device)


def _cut(mean: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
    """What keeps of x only its part along some directions, from the mean."""
    return lambda x: (mean + ((x.double() - mean) @ v) @ v.T).to(x.dtype)


def _changes(
    model: Model,
    prompts: Sequence[tuple[Tensor, int]],
    part: str,
    bases: dict[tuple[int, int], Basis],
    ranks: list[int],
) -> Float[Tensor, "prompt cut"]:
    """The log-probability of each prompt's answer with the units cut to each rank."""
    found: list[Tensor] = []
    for row, answer in prompts:
        at = _at(part, len(row))
        sites = {(i, u): f"{i}.attn.{part}[{u}]{at}" for i, u in bases}
        edits = [[Apply(sites[h], function=_cut(mean, v[:, :r])) for h, (mean, v) in bases.items()] for r in ranks]
        found.append(torch.stack([_log_p(model, row, answer, some) for some in edits]))
    return torch.stack(found)


def _log_p(model: Model, row: Tensor, answer: int, edits: Sequence[Apply]) -> Tensor:
    return model.run(row[None], edits=edits).logits[0, -1].double().log_softmax(-1)[answer].cpu()
