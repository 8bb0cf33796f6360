"""Whether a relation is lost with the heads whose weights compute it: the top heads of each relation left out.

Formula:  H_r = the `heads` heads with the largest maps_r - maps_shuffled_r, by weights alone (see _head_functions.py);
          a prompt of relation g: `shots` other pairs of g and a source, each put into the relation's template;
          D[r, g] = mean over prompts of g of log p(target) - log p(target | z = 0 of H_r at all positions), in nats.
          A relation is hurt most by its own heads if D[r, r] is the largest of D[r, .].
          Control: R_r, as many other heads of the same layers (of the nearest, where a layer has no more), each drawn
          from the 3 whose writing at the last token, the mean norm of z W_O, is nearest on a logarithmic scale;
          D[R_r, r], mean over `controls` draws.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from microtome.context import current
from microtome.edit import Edit
from microtome.errors import ArgumentError, DataError, error
from microtome.measurements._head_functions import FEWEST, given_pairs, relation_scores
from microtome.measurements._head_pruning import without
from microtome.measurements._head_vocabulary import writes
from microtome.measurements._relations import RELATIONS, TEMPLATES
from microtome.metric import LogProbability
from microtome.model import Model
from microtome.stream import difference_interval, mean_interval

NEAREST = 3
"""Heads of the nearest size of which a control is drawn."""
PLACE = "{}"
Pairs = Sequence[tuple[str, str]] | Sequence[tuple[int, int]]
Heads = list[tuple[int, int]]


def relation_damage(
    model: Model,
    relations: Mapping[str, Pairs] | None = None,
    templates: Mapping[str, str] | None = None,
    *,
    heads: int = 5,
    prompts: int = 16,
    shots: int = 2,
    controls: int = 4,
    top: int = 10,
) -> xr.Dataset:
    """What each relation loses without the heads whose weights compute each relation, beside matched random heads.

    Formula:  see this file's head.
    Source:   Elhelo and Geva, "Inferring Functionality of Attention Heads from their Parameters", 2024 (2412.11965).
              Departs: every relation's heads on every relation's prompts; the control is matched by layer and size.
    Cost:     that of `relation_scores`, and a sweep of prompts x relations x (relations + controls) cells.
    Check:    a planted permutation is lost with its head, and with no other; tests/laws/test_relation_damage.py.

    Args:
        model: an open causal model.
        relations: by name, pairs of words or of token ids; our own by default. Pairs that are no single tokens are left
            out.
        templates: by name of a relation, a text with ``{}`` in the place of the source, which the target follows;
            "source:" by default, and a source of token ids stands alone.
        heads: how many heads of each relation.
        prompts: of each relation, at most.
        shots: pairs of the relation before the one that is asked for.
        controls: random sets of heads for each relation.
        top: how many of the largest logits count as mapped, see `relation_scores`.

    Returns:
        A dataset of `damage` [left_out, relation]; of `damage_random` [relation] and their difference `damage_diff`, of
        the relation's own heads; each with the ends of its 95 % interval over prompts as `_lo` and `_hi`; `own_rank`
        [relation], 1 where the relation's heads hurt no other one more; `loss` and `prompts` [relation]; `layer`,
        `head` and `maps` [left_out, place]. Relations of fewer than 5 pairs are left out.

    Raises:
        ArgumentError: there are no relations, a number is not positive, a template has no place for the source, or
            the model has too few heads for controls.
        DataError: no relation has pairs enough.
        ModelUnsupported: the model does not predict the next token.

    >>> relation_damage(model)
    >>> relation_damage(model, *read_relations("relations"))
    """
    model.require_next_token()
    every = RELATIONS if relations is None else relations
    texts = dict(TEMPLATES if templates is None else templates)
    _refuse(every, texts, heads=heads, prompts=prompts, shots=shots, controls=controls)
    pairs = {name: found for name, of in every.items() if len(found := given_pairs(model, name, of)) >= FEWEST}
    if not pairs:
        got = ", ".join(every)
        raise error(DataError, f"no relation has {FEWEST} pairs of single tokens", got=got, do="give larger ones")
    scores = relation_scores(model, {name: [(s, t) for s, t in of] for name, of in pairs.items()}, top=top)
    sets = {name: _top(scores.sel(relation=name), heads) for name in pairs}
    rng = torch.Generator().manual_seed(current().seed)
    asked, answers, owners = list[list[int]](), list[int](), list[str]()
    for name, of in pairs.items():
        words = every[name][0] and isinstance(every[name][0][0], str)
        for at in torch.randperm(len(of), generator=rng)[:prompts].tolist():
            text = texts.get(name, f"{PLACE}:") if words else None
            asked.append(_prompt(model, of, at, text, shots, rng))
            answers.append(of[at][1])
            owners.append(name)
    sizes = _sizes(model, asked, scores["layer"].values.tolist())
    drawn = {name: [_matched(sizes, own, rng) for _ in range(controls)] for name, own in sets.items()}
    lost, loss = _lost(model, asked, answers, owners, sets, drawn)
    return _dataset(model, scores, sets, owners, lost, loss)


def read_relations(folder: str | os.PathLike[str]) -> tuple[dict[str, list[tuple[str, str]]], dict[str, str]]:
    """Relations and templates from JSON files of the form of the LRE data: what `relation_damage` takes.

    Source:   Hernandez et al., "Linearity of Relation Decoding in Transformer Language Models", 2023 (2308.09124):
              files with `name`, `prompt_templates` and `samples`, each a `subject` and an `object`.

    Args:
        folder: with files that end in .json.

    Returns:
        By name of a relation its pairs, and its first template.

    Raises:
        DataError: there is no such file, or one of another form.
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise error(DataError, f'no relations in "{folder}"', allowed="a folder of .json files", do="check the path")
    pairs: dict[str, list[tuple[str, str]]] = {}
    texts: dict[str, str] = {}
    for file in files:
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            name = str(told["name"])
            pairs[name] = [(str(one["subject"]), str(one["object"])) for one in told["samples"]]
            texts[name] = str(told["prompt_templates"][0])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as cause:
            allowed = "an object of name, prompt_templates and samples"
            raise error(DataError, f'"{file}" holds no relation', got=cause, allowed=allowed) from cause
    return pairs, texts


def _refuse(relations: Mapping[str, Pairs], templates: Mapping[str, str], **numbers: int) -> None:
    """Refuse what no model could be asked.

    Raises:
        ArgumentError: there are no relations, a number is not positive, or a template has no place for the source.
    """
    least = {"shots": 0}
    wrong = [f"{name}={n}" for name, n in numbers.items() if n < least.get(name, 1)]
    if not relations or wrong:
        got = ", ".join(wrong) or "no relation"
        raise error(ArgumentError, "relations, heads, prompts and controls are needed", got=got, do="give 1 or more")
    bad = next((name for name, text in templates.items() if text.count(PLACE) != 1), None)
    if bad is not None:
        what = f'the template of "{bad}" has no single place for the source'
        raise error(ArgumentError, what, got=templates[bad], allowed=f"a text with one {PLACE}", do="write it so")


def _top(scores: xr.Dataset, count: int) -> Heads:
    """The heads that map most of a relation's pairs above shuffled ones, the first first."""
    excess = (scores["maps"] - scores["maps_shuffled"]).transpose("layer", "head").values
    best = np.argsort(-excess, axis=None, kind="stable")[:count]
    layers, places = scores["layer"].values, np.unravel_index(best, excess.shape)
    return [(int(layers[i]), int(h)) for i, h in zip(*places, strict=True)]


def _prompt(
    model: Model, pairs: Sequence[tuple[int, int]], at: int, template: str | None, shots: int, rng: torch.Generator
) -> list[int]:
    """The tokens of one question: other pairs, then the source; of ids the source alone."""
    if template is None:
        return [pairs[at][0]]
    others = [i for i in torch.randperm(len(pairs), generator=rng).tolist() if i != at][:shots]
    source, target = (model.to_words([pair[end] for pair in pairs]) for end in (0, 1))
    told = [template.replace(PLACE, source[i].strip()) for i in (*others, at)]
    shown = [f"{text} {target[i].strip()}.\n" for text, i in zip(told, others, strict=False)]
    return model.to_batch("".join([*shown, told[-1]])).tokens[0].tolist()


def _sizes(model: Model, asked: Sequence[list[int]], layers: Sequence[int]) -> dict[int, Float[Tensor, " head"]]:
    """By layer, the mean norm of what each head writes at the last token of the prompts."""
    total: dict[int, Tensor] = {}
    for prompt in asked:
        run = model.run([prompt], capture=[f"{i}.attn.z@-1" for i in layers], logits=False)
        for i in layers:
            z, write = run[f"{i}.attn.z@-1"][0, -1], writes(model, i).detach()
            wrote = torch.einsum("hd,hdm->hm", z.to(write.dtype), write)
            total[i] = total.get(i, torch.zeros(len(wrote), dtype=torch.float64)) + wrote.norm(dim=-1).double().cpu()
    return {i: x / len(asked) for i, x in total.items()}


def _matched(sizes: Mapping[int, Float[Tensor, " head"]], own: Heads, rng: torch.Generator) -> Heads:
    """As many other heads, each of the layer of one of the set and of about its size; of the nearest layer with one.

    Raises:
        ArgumentError: the model has too few heads.
    """
    found: Heads = []
    tiny = torch.finfo(torch.float64).tiny
    for layer, head in own:
        taken = {*own, *found}
        free = [(i, h) for i, of in sizes.items() for h in range(len(of)) if (i, h) not in taken]
        if not free:
            what = "the model has too few heads outside of a set to draw controls from"
            got = f"{sum(map(len, sizes.values()))} heads, of which {len(own)} are in the set"
            raise error(ArgumentError, what, got=got, do="give fewer heads=")
        nearest = min(abs(i - layer) for i, _ in free)
        free = [one for one in free if abs(one[0] - layer) == nearest]
        size = float(sizes[layer][head].clamp(min=tiny).log())
        free.sort(key=lambda one: abs(float(sizes[one[0]][one[1]].clamp(min=tiny).log()) - size))
        found.append(free[int(torch.randint(min(NEAREST, len(free)), (), generator=rng))])
    return found


def _lost(
    model: Model,
    asked: Sequence[list[int]],
    answers: Sequence[int],
    owners: Sequence[str],
    sets: Mapping[str, Heads],
    drawn: Mapping[str, Sequence[Heads]],
) -> tuple[dict[str, Float[Tensor, " prompt"]], Float[Tensor, " prompt"]]:
    """What each prompt loses without each set, and "" without the control of its own relation; and its loss."""
    cells: list[list[Edit]] = []
    which: list[int] = []
    for number, owner in enumerate(owners):
        mine = [without(heads) for heads in (*sets.values(), *drawn[owner])]
        cells += mine
        which += [number] * len(mine)
    metric = LogProbability(answer=list(answers))
    result = model.sweep(asked, cells, metric, prompts=which).run(  # pyright: ignore[reportArgumentType]
        lambda done, everything: current().report("leaving heads out", done, everything)
    )
    effects = -result.whole().effects.double().reshape(len(owners), -1)
    found = {name: effects[:, at] for at, name in enumerate(sets)}
    return found | {"": effects[:, len(sets) :].mean(1)}, -result.base.double()


def _dataset(
    model: Model,
    scores: xr.Dataset,
    sets: Mapping[str, Heads],
    owners: Sequence[str],
    lost: Mapping[str, Float[Tensor, " prompt"]],
    loss: Float[Tensor, " prompt"],
) -> xr.Dataset:
    """The matrix with its intervals."""
    names = list(sets)
    rows = {name: torch.tensor([owner == name for owner in owners]) for name in names}
    damage = [[mean_interval(lost[s][rows[g]]) for g in names] for s in names]
    chance = [mean_interval(lost[""][rows[g]]) for g in names]
    above = [difference_interval(lost[g][rows[g]], lost[""][rows[g]]) for g in names]
    variables: dict[str, Any] = {}
    for at, end in enumerate(("", "_lo", "_hi")):
        matrix = [[float(x[at]) for x in row] for row in damage]
        variables[f"damage{end}"] = ("left_out", "relation"), matrix, {"unit": "nats"}
        variables[f"damage_random{end}"] = "relation", [float(x[at]) for x in chance], {"unit": "nats"}
        variables[f"damage_diff{end}"] = "relation", [float(x[at]) for x in above], {"unit": "nats"}
    means = np.array(variables["damage"][1])
    variables["own_rank"] = "relation", (means > means.diagonal()[:, None]).sum(1) + 1, {"unit": "place"}
    variables["loss"] = "relation", [float(loss[rows[g]].mean()) for g in names], {"unit": "nats"}
    variables["prompts"] = "relation", [int(rows[g].sum()) for g in names], {"unit": "prompts"}
    axes = ("left_out", "place")
    variables["layer"] = axes, [[i for i, _ in own] for own in sets.values()]
    variables["head"] = axes, [[h for _, h in own] for own in sets.values()]
    maps = [[float(scores["maps"].sel(relation=s, layer=i, head=h)) for i, h in own] for s, own in sets.items()]
    variables["maps"] = axes, maps, {"unit": "share"}
    coords = {"left_out": names, "relation": names}
    told = {"method": "relation_damage", "seed": current().seed}
    return xr.Dataset(variables, coords=coords, attrs=dict(model.provenance) | told)
