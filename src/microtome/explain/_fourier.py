"""Numbers as waves: which frequencies the logits of the numbers are made of, after each layer and of each branch.

Formula:  z_l(n) = the logit of number n that the stream after layer l, or what a branch writes, would give, the scale
          of the final norm held; F_k its discrete Fourier transform along n = 0 .. N - 1;
          power_l(k) = mean over prompts of (|F_k|^2 + |F_{N-k}|^2) / sum_{j > 0} |F_j|^2.
          An outlier is a frequency whose power after the last layer is above the largest of `controls` shuffles of the
          axis. A band filter projects out of what a branch writes at the last token, in every layer, the directions
          g * W_U[:, n] weighted by the waves of the band: the logits of the numbers lose that band and nothing else.
          Control: the same with the numbers in a random order, of the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.anatomy import Site
from microtome.context import current
from microtome.edit import Edit, Project
from microtome.errors import ArgumentError, error
from microtome.explain._waves import (
    SUM,
    Answers,
    Prompts,
    integers,
    places_of_sums,
    rows_of,
    spectrum,
    tokens_of_numbers,
    waves,
)
from microtome.method import Argument, Column, Found, Source, question
from microtome.model import Model
from microtome.run import Prompt

SPECTRUM = ("layer", "frequency")
BRANCHES = ("attn_out", "mlp_out")
TURNED = "the same with the numbers in a random order"


@question(
    "fourier",
    command="fourier",
    title="numbers as waves",
    question="Which frequencies along the numbers are the logits made of, and which of them are used?",
    columns=(
        Column("power", "share", "share of a frequency in the logits after a layer", "shuffled_power", (0, 1),
               SPECTRUM, title="spectrum of the stream"),
        Column("shuffled_power", "share", TURNED, range=(0, 1), dims=SPECTRUM),
        Column("attn_power", "share", "share of a frequency in what attention adds to the logits",
               "shuffled_attn_power", (0, 1), SPECTRUM, title="spectrum of attention"),
        Column("shuffled_attn_power", "share", TURNED, range=(0, 1), dims=SPECTRUM),
        Column("mlp_power", "share", "share of a frequency in what the MLP adds to the logits", "shuffled_mlp_power",
               (0, 1), SPECTRUM, title="spectrum of the MLP"),
        Column("shuffled_mlp_power", "share", TURNED, range=(0, 1), dims=SPECTRUM),
        Column("outlier", "1", "whether the frequency stands out after the last layer", "none: a decision; see power",
               (0, 1), ("frequency",)),
        Column("accuracy", "share", "how often the answer has the largest logit of the numbers",
               "none: what a filter takes away is beside it", (0, 1), ()),
        Column("lost", "share", "accuracy that is lost when a band is filtered out of a branch, in every layer",
               "shuffled_lost", (-1, 1), ("site", "band_group")),
        Column("shuffled_lost", "share", TURNED + ", and so of the same rank", range=(-1, 1),
               dims=("site", "band_group")),
    ),
    source=Source(
        "Zhou et al.", "Pre-trained Large Language Models Use Fourier Features to Compute Addition", 2024, "2406.03445",
        departs="outliers are told by shuffles of the axis; the filter is the projection that takes a band from the "
        "logits and changes the rest least, at the last token and in all layers at once",
    ),
    cost="one forward of each prompt, and 4 + 4 controls more where there are answers",
    check="tests/planted/test_waves.py",
    call='mt.explain.fourier(model, "{0-4} + {0-4} = ", "0-9", answers="sum")',
    reading="power is the share of one frequency along the numbers; lost is what accuracy a branch loses without a "
    "band, beside a band of the numbers in random order.",
    needs=("next token", "lens", "*.attn_out", "*.mlp_out"),
)  # fmt: skip
def fourier(
    model: Model,
    prompts: Prompts,
    numbers: Annotated[
        Sequence[str | int] | str,
        Argument('tokens of the numbers in their order, as "0-9" or "mon,tue,wed,thu"', positional=True),
    ],
    *,
    answers: Answers = None,
    controls: Annotated[int, Argument("random orders of the numbers", "orders", least=1)] = 5,
) -> Found:
    """Transform the logits of numbers along the numbers, and filter bands out of what the branches write.

    The bands are "low", the frequencies up to N / 4, "high", the others, and "outliers".

    Raises:
        ArgumentError: too few numbers, an answer that is none of them, or a text of prompts without ranges.
        PromptError: a number is several tokens, or there are too few prompts.
        SiteError: the stream cannot be read as logits.
    """  # fmt: skip
    ids, rows = tokens_of_numbers(model, numbers), rows_of(model, prompts)
    n, layers = len(ids), model.anatomy.n_layers
    generator = torch.Generator().manual_seed(current().seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(controls)]
    names = [*(f"*.{site}@-1" for site in BRANCHES), "*.resid_post@-1"]
    shares: dict[str, list[Tensor]] = {name: [] for name in ("", "attn_", "mlp_")}
    mixed: dict[str, list[Tensor]] = {name: [] for name in shares}
    right: list[Tensor] = []
    for row in rows:
        run = model.run(row, names)
        scale = model.require_readable().scale(run[f"{layers - 1}.resid_post@-1"][0, 0])
        for name, site in (("", "resid_post"), ("attn_", "attn_out"), ("mlp_", "mlp_out")):
            z = _numbers(model, run[f"*.{site}@-1"][:, 0, 0], scale, ids)
            shares[name].append(spectrum(z))
            mixed[name].append(torch.stack([spectrum(z[:, order]) for order in orders]))
        right.append(run.logits[0, -1, ids].argmax())
    each = {f"{name}power": torch.stack(x) for name, x in shares.items()}
    every = {name: torch.stack(x) for name, x in mixed.items()}  # [prompt, order, layer, frequency]
    each |= {f"shuffled_{name}power": x.mean(1) for name, x in every.items()}
    outlier = each["power"].mean(0)[-1] > every[""].mean(0)[:, -1].amax()
    frequencies = list(range(1, each["power"].shape[-1] + 1))
    values: dict[str, Any] = {"outlier": outlier.double()}
    found = [k for k, out in zip(frequencies, outlier.tolist(), strict=True) if out]
    coords: dict[str, Any] = {"layer": list(range(layers)), "frequency": frequencies}
    if answers is not None:
        wanted = answers_of(model, answers, prompts, len(rows), ids)
        each["accuracy"] = (torch.stack(right).cpu() == wanted).double()
        bands = {"low": [k for k in frequencies if 4 * k <= n], "high": [k for k in frequencies if 4 * k > n]}
        bands |= {"outliers": found} if found else {}
        lost, other = _lost(model, rows, ids, bands, orders, wanted, each["accuracy"])
        each |= {"lost": lost, "shuffled_lost": other}
        coords |= {"site": list(BRANCHES), "band_group": list(bands)}
    attrs = {"numbers": n, "prompts": len(rows), "outliers": ", ".join(map(str, found)) or "none"}
    return Found(values, each=each, coords=coords, attrs=attrs)


@torch.no_grad()
def directions_of(model: Model, ids: Sequence[int]) -> Float[Tensor, "number d_model"]:
    """By number, what is multiplied with the stream over the final scale to give its logit, its bias left out."""
    norm = model.require_readable()
    rows = (model.W_U[:, list(ids)].T.double() * norm.gain).double()
    return rows - rows.mean(-1, keepdim=True) if norm.norm.centred else rows


def _numbers(model: Model, x: Float[Tensor, "layer d_model"], scale: Tensor, ids: Sequence[int]) -> Tensor:
    """[layer, number] what a part of the stream adds to the logits of the numbers, the scale held."""
    return (x.double() / scale.double()) @ directions_of(model, ids).T


def _lost(
    model: Model,
    rows: Sequence[Tensor],
    ids: Sequence[int],
    bands: dict[str, list[int]],
    orders: Sequence[Tensor],
    wanted: Tensor,
    before: Tensor,
) -> tuple[Tensor, Tensor]:
    """[prompt, site, band] accuracy lost to each filter, and to those of shuffled numbers on average."""
    directions = directions_of(model, ids)

    def lost(site: str, band: list[int], order: Tensor | None) -> Tensor:
        along = directions if order is None else directions[order.to(directions.device)]
        basis = (waves(len(ids), band).to(along.device) @ along).to(model.dtype)
        layers = range(model.anatomy.n_layers)
        edits: list[Edit] = [
            Project(f"{i}.{site}@-1", basis) for i in layers if Site(site, i) in model.anatomy.hook_points
        ]
        first = [int(model.run(row, edits=edits).logits[0, -1, list(ids)].argmax()) for row in rows]
        return before - (torch.tensor(first) == wanted).double()

    own = [[lost(site, band, None) for band in bands.values()] for site in BRANCHES]
    other = [
        [torch.stack([lost(site, band, o) for o in orders]).mean(0) for band in bands.values()] for site in BRANCHES
    ]
    first, second = (torch.stack([torch.stack(of) for of in table]).permute(2, 0, 1) for table in (own, other))
    return first, second


def answers_of(
    model: Model, answers: Any, prompts: Sequence[Prompt] | str, count: int, ids: Sequence[int]
) -> Int[Tensor, " prompt"]:
    """The place of each prompt's answer among the numbers; of "sum", that of what the choices of its text add up to.

    Raises:
        ArgumentError: not one for each prompt, one is none of the numbers, or there is nothing to add up.
    """
    if isinstance(answers, str) and answers == SUM:
        return torch.tensor(places_of_sums(model.to_words(ids), prompts))
    listed = integers(answers, "answers")
    if len(listed) != count:
        raise error(ArgumentError, "there must be one answer for each prompt", got=len(listed), allowed=str(count))
    outside = [x for x in listed if not 0 <= x < len(ids)]
    if outside:
        do = "give its place among the numbers"
        raise error(
            ArgumentError, "an answer is none of the numbers", got=outside[0], allowed=f"0 to {len(ids) - 1}", do=do
        )
    return torch.tensor(listed)
