"""Whether the last digit of a number is a direction that a successor head reads: a probe, and the direction added.

Formula:  series of words (days, numbers, letters, ...); the word at place n = 1, 2, ... (0, 1, ... where the first is
          "0" or "zero") has the class c = n mod 10; x is the stream behind the MLP of layer 0 with the token alone (see
          _head_vocabulary.py). Each series is left out once; from the others, each minus its mean:
          probe    ridge regression of x on the one-hot classes; accuracy = share of the words of the series left out
                   whose class has the largest value, over the classes of that series;
          v_c      the mean of x over the words of class c.
          For each word of the series left out, of class a, and each other class b of that series:
          x' = x + scale (v_b - v_a); moved = share of (word, b) for which the logit that the head adds is the largest,
          among the words of the series but itself and those of b, for a word that follows one of class b; stayed = the
          same for the word that follows the word itself. Control: classes shuffled within each series.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from microtome.context import current
from microtome.errors import ArgumentError, DataError, error
from microtome.measurements._head_functions import successors
from microtome.measurements._head_vocabulary import alone, read, single_tokens, unembedding, values, writes
from microtome.measurements._relations import SERIES
from microtome.method import Measure, declared
from microtome.model import Model

PERIOD = 10
NAMES = ("accuracy", "moved", "stayed")


def ordinal_direction(
    model: Model,
    head: tuple[int, int] | None = None,
    series: Mapping[str, Sequence[str] | Sequence[int]] | None = None,
    *,
    scale: float = 1.0,
    ridge: float = 1.0,
    draws: int = 5,
) -> xr.Dataset:
    """Whether n mod 10 of the words of one series can be read and changed by directions learned on other series.

    Formula:  see this file's head.
    Source:   Gould et al., "Successor Heads: Recurring, Interpretable Attention Heads In The Wild", 2023 (2312.09230),
              section 3. Departs: class means and a ridge probe on the series that are left in, no sparse autoencoder.
    Cost:     some 100 tokens through layer 0, and the head's logits of the series.
    Check:    a planted code of n mod 10 is read and moved, and no other; tests/laws/test_head_functions.py.

    Args:
        model: an open model.
        head: (layer, head) that is read; the one with the highest successor score by default.
        series: by name, words in their order, or token ids; our own by default. Series
            that are no single tokens are left out.
        scale: how much of the difference of two classes is added.
        ridge: penalty of the probe, as a share of the mean squared norm of a word, its series' mean taken off.
        draws: how many times the classes are shuffled.

    Returns:
        A dataset of `accuracy`, `moved` and `stayed` [series], each with its control `_shuffled`, shares; `words`
        [series]; and the `layer` and `head` that were read.

    Raises:
        ArgumentError: the head does not exist, or a number is not positive.
        DataError: fewer than two series are single tokens.
        SiteError: no layer has heads with W_V and W_O, or the residual stream cannot be read as logits.
    """
    if not (scale > 0 and ridge > 0 and draws >= 1):
        got = f"scale={scale}, ridge={ridge}, draws={draws}"
        raise error(ArgumentError, "scale, ridge and draws must be above 0", got=got, do="leave them out")
    given = SERIES if series is None else series
    tokens = _tokens(model, given)
    if len(tokens) < 2:
        got = ", ".join(tokens) or "none"
        raise error(DataError, "two series of single tokens are needed", got=got, do="give longer series=")
    with torch.no_grad():
        layer, which = _head(model, head, list(tokens.values()))
        parts = {name: alone(model, ids, layer).double() for name, ids in tokens.items()}
        logits = unembedding(model)
        columns = {name: logits[:, ids] for name, ids in tokens.items()}
        first = {name: 0 if words[0] in ("0", "zero") else 1 for name, words in given.items()}
        classes = {name: (torch.arange(len(ids)) + first[name]) % PERIOD for name, ids in tokens.items()}
        rng = torch.Generator().manual_seed(current().seed)
        found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        for turn in range(1 + draws):
            told = [_one(model, layer, which, parts, classes, columns, name, (scale, ridge), rng if turn else None)
                    for name in tokens]  # fmt: skip
            for name in NAMES:
                found[name].append(torch.tensor([one[name] for one in told], dtype=torch.float64))
    variables: dict[str, Any] = {"words": ("series", [len(ids) for ids in tokens.values()], {"unit": "words"})}
    for name, every in found.items():
        variables[name] = "series", every[0].numpy(), {"unit": "share"}
        variables[f"{name}_shuffled"] = "series", torch.stack(every[1:]).mean(0).numpy(), {"unit": "share"}
    variables |= {"layer": ((), layer), "head": ((), which)}
    told_of = {"method": "ordinal_direction", "seed": current().seed, "scale": scale}
    return xr.Dataset(variables, coords={"series": list(tokens)}, attrs=dict(model.provenance) | told_of)


def _tokens(model: Model, series: Mapping[str, Sequence[str] | Sequence[int]]) -> dict[str, Int[Tensor, " word"]]:
    """The series whose words are all single tokens, of three words or more."""
    found: dict[str, Tensor] = {}
    for name, words in series.items():
        ids = [w for w in words if isinstance(w, int)] or single_tokens(model, [str(w) for w in words])
        if None not in ids and len(ids) > 2:
            found[name] = torch.tensor(ids, device=model.device)
    return found


def _head(model: Model, head: tuple[int, int] | None, series: Sequence[Int[Tensor, " word"]]) -> tuple[int, int]:
    """The head that is read.

    Raises:
        ArgumentError: there is none such.
    """
    measured: Measure = declared("head_functions")  # pyright: ignore[reportAssignmentType]
    layers: list[int] = measured.layers(model)  # pyright: ignore[reportAssignmentType]
    if head is not None:
        if head[0] not in layers or not 0 <= head[1] < model.anatomy.n_heads:
            allowed = f"layers {layers[0]} to {layers[-1]}, heads 0 to {model.anatomy.n_heads - 1}"
            raise error(ArgumentError, "there is no such head to read", got=head, allowed=allowed)
        return head
    lists = [ids.tolist() for ids in series]
    scores = torch.stack([successors(model, layer, lists)["successor"] for layer in layers])
    at = int(scores.flatten().argmax())
    return layers[at // scores.shape[1]], at % scores.shape[1]


def _one(
    model: Model,
    layer: int,
    head: int,
    parts: Mapping[str, Float[Tensor, "word d_model"]],
    classes: Mapping[str, Int[Tensor, " word"]],
    columns: Mapping[str, Float[Tensor, "d_model word"]],
    name: str,
    by: tuple[float, float],
    rng: torch.Generator | None,
) -> dict[str, float]:
    """What is read and moved in one series by what the others teach; with a generator their classes are shuffled."""
    scale, ridge = by
    learned = [x - x.mean(0) for other, x in parts.items() if other != name]
    taught = [c for other, c in classes.items() if other != name]
    if rng is not None:
        taught = [c[torch.randperm(len(c), generator=rng)] for c in taught]
    x, hot = torch.cat(learned), torch.nn.functional.one_hot(torch.cat(taught), PERIOD).to(learned[0])
    means = (hot.T @ x) / hot.sum(0).clamp(min=1).unsqueeze(1)
    own, mine = parts[name], classes[name]
    there = mine.unique()
    # The ridge in its dual form: there are fewer words than dimensions.
    gram = x @ x.T
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    guess = ((own - own.mean(0)) @ x.T @ torch.linalg.solve(damped, hot - hot.mean(0)))[:, there]
    accuracy = float((there[guess.argmax(1).cpu()] == mine).double().mean())
    moved = list[bool]()
    stayed = list[bool]()
    value, write = values(model, layer)[head], writes(model, layer)[head]
    for b in there.tolist():
        follow = torch.cat([torch.zeros(1, dtype=torch.bool), mine[:-1] == b])
        rows = (mine != b).nonzero().flatten()
        barred = (mine == b).unsqueeze(0) | (torch.arange(len(mine)) == rows.unsqueeze(1))
        possible = (follow & ~barred).any(1)  # else what follows b's word is the word itself, or nothing
        rows, barred = rows[possible], barred[possible]
        if not len(rows):
            continue
        changed = own[rows] + scale * (means[b] - means[mine[rows]])
        logits = read(model, layer, changed.to(value.dtype)) @ value @ write @ columns[name]
        said = logits.masked_fill(barred.to(logits.device), -torch.inf).argmax(1).cpu()
        moved += follow[said].tolist()
        stayed += (said == rows + 1).tolist()
    count = max(1, len(moved))
    return {"accuracy": accuracy, "moved": sum(moved) / count, "stayed": sum(stayed) / count}
