"""Which way to find a subspace holds an attribute of a city and no other: RAVEL on a model, judged on held-out cities.

    python benchmarks/ravel.py [--data data.tgz] [--questions FILE] [--out benchmarks/results/ravel.json]

All cities are asked for each attribute, in the prompt that the model answers best among those tried on training
cities. Attributes of which at least a fifth are answered take part. Coordinates and time zones do not: the first token
of the one is a digit, that of the other ("Europe/Rome") a continent.
Cities that a model answers find subspaces (training split), choose (validation) and judge (test):

    site    of two layers, at the city's last token and at the prompt's last token: the one with the highest
            Disentangle on validation cities, the mean over attributes of the better of MDAS and PCA
    rank    of MDAS, PCA, the probe, neurons and the random rotation, for each attribute the one with the highest
            Disentangle on validation cities; DAS and the placebo have that of MDAS, boundless DAS learns its own

What is judged: Cause, Isolate and their mean on test cities, and the difference of MDAS and each other way over the
same cities, each with its interval over cities. Placebo: MDAS learned from and judged by labels drawn by chance.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import microtome as mt
from microtome import tasks
from microtome.subspaces import Subspace, Swaps, of_asked
from microtome.subspaces._exchange import Exchange, Runs
from microtome.subspaces._score import ENDS, SCORES, over_entities, placebo
from microtome.subspaces._ways import Plan, found_in
from microtome.tasks import Asked

ROOT = Path(__file__).resolve().parents[1]
ATTRIBUTES = ("Country", "Continent", "Language")
LEAST = 0.2
"""Share of an attribute's questions that must be answered."""
PLACES = ("entity", "last")
RANKS = (8, 32, 128)
FREE = ("neurons", "pca", "probe", "random")
"""Ways without a training."""
WAYS = ("mdas", "das", "boundless", "probe", "pca", "neurons", "random", "placebo")
SPLITS = ("train", "val", "test")
SITE_RANK = 32


def asked_of(model: mt.Model, data: tasks.Ravel, path: Path | None, options: argparse.Namespace) -> tuple[Asked, ...]:
    """All questions with what the model says; kept in a file if one is named."""
    if path is not None and path.exists():
        kept = json.loads(path.read_text())
        if kept["fingerprint"] == model.fingerprint:
            rows = kept["asked"]
            return tuple(
                Asked(**row | {"tokens": tuple(row["tokens"]), "answers": tuple(row["answers"])}) for row in rows
            )
    found = data.ask(
        model, options.attributes, entities=options.entities or len(data), templates=options.templates,
        tried=options.tried, trial=options.trial, seed=options.seed,
    )  # fmt: skip
    if path is not None:
        path.write_text(json.dumps({"fingerprint": model.fingerprint, "asked": [asdict(q) for q in found]}))
    return found


def limited(names: list[str], most: int, seed: int) -> list[str]:
    """At most so many names, drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(names))[: most or None]
    return [names[int(i)] for i in sorted(order)]


class Bench:
    """The swaps of every attribute, split and place, over runs that are kept."""

    def __init__(self, model: mt.Model, data: tasks.Ravel, asked: Sequence[Asked], options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.shares = tasks.shares(asked)
        self.attributes = [a for a, (share, _, _) in self.shares.items() if share >= LEAST]
        own = [q for q in asked if q.attribute in self.attributes]
        places = {"entity": own, "last": [replace(q, at=len(q.tokens) - 1) for q in own]}
        known = list(dict.fromkeys(q.entity for q in own if q.known))
        most = {"train": options.train, "val": options.val, "test": options.test}
        names = {s: limited([n for n in known if data.split[n] == s], most[s], options.seed) for s in SPLITS}
        self.counts = {s: len([n for n in known if data.split[n] == s]) for s in SPLITS}
        self.swaps: dict[tuple[str, str, str], Swaps] = {
            (a, split, place): of_asked(places[place], a, names[split], each=options.each, seed=options.seed)
            for a in self.attributes for split in SPLITS for place in PLACES
        }  # fmt: skip
        self.sites = [f"{layer}.resid_post" for layer in options.layers]
        self.runs = Runs(model, self.sites)

    def ready(self, attribute: str, split: str, site: str, place: str) -> Exchange:
        """The swaps of an attribute, ready to be run."""
        return Exchange(self.model, site, self.swaps[attribute, split, place].swaps, self.runs)

    def plan(self, rank: int, steps: int) -> Plan:
        """How a subspace is learned."""
        return Plan(rank, 1.0, steps, rows=self.options.rows, seed=self.options.seed)


def disentangled(ready: Exchange, found: Any) -> float:
    """The Disentangle score."""
    return over_entities(ready, ready.hits(found))["disentangle"]


def choose_site(bench: Bench) -> tuple[tuple[str, str], list[dict[str, Any]]]:
    """The site and place with the highest score on validation cities, and those of all."""
    rows: list[dict[str, Any]] = []
    for site in bench.sites:
        for place in PLACES:
            row: dict[str, Any] = {"site": site, "place": place}
            for attribute in bench.attributes:
                train, val = (bench.ready(attribute, s, site, place) for s in ("train", "val"))
                plan = bench.plan(SITE_RANK, bench.options.short)
                row[attribute] = {w: disentangled(val, found_in(train, w, plan, 1.0)) for w in ("mdas", "pca")}
            row["best"] = float(np.mean([max(row[a].values()) for a in bench.attributes]))
            rows.append(row)
            print(f"  {site:14} {place:7} {row['best']:.3f}", flush=True)
    best = max(rows, key=lambda row: row["best"])
    return (best["site"], best["place"]), rows


def at_rank(found: Subspace, rank: int) -> Subspace:
    """The first dimensions of a subspace whose basis comes in the order in which it was chosen."""
    return replace(found, basis=found.basis[:rank])


def judged(bench: Bench, attribute: str, site: str, place: str) -> dict[str, Any]:
    """The ways' scores on test cities, and by how much MDAS exceeds each."""
    train, val, test = (bench.ready(attribute, split, site, place) for split in SPLITS)
    short, steps = bench.options.short, bench.options.steps
    free = {way: found_in(train, way, bench.plan(max(RANKS), 0), 1.0) for way in FREE}
    ranks = {w: {r: disentangled(val, at_rank(x, r)) for r in RANKS} for w, x in free.items()}
    ranks["mdas"] = {r: disentangled(val, found_in(train, "mdas", bench.plan(r, short), 1.0)) for r in RANKS}
    best = {way: max(scores, key=lambda r: scores[r]) for way, scores in ranks.items()}
    hits: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        ready, labels = (placebo(x, bench.options.seed) if way == "placebo" else x for x in (train, test))
        if way in FREE:
            found = at_rank(free[way], best[way])
        else:
            plan = bench.plan(best["mdas"], steps)
            found = found_in(ready, "mdas" if way == "placebo" else way, plan, 1.0)
        hits[way] = labels.hits(found)
        rows[way] = over_entities(labels, hits[way]) | {"rank": found.rank}
        if way not in ("mdas", "placebo"):
            minus = over_entities(test, hits["mdas"] - hits[way])
            rows[way] |= {f"mdas_minus_{name}{end}": minus[name + end] for name in SCORES for end in ENDS}
        print(line_of(way, rows[way]), flush=True)
    counts = {"train_swaps": len(train), "val_swaps": len(val), "test_swaps": len(test)}
    return {"ways": rows, "ranks": ranks, "test_entities": len(bench.swaps[attribute, "test", place].entities)} | counts


def line_of(way: str, row: Mapping[str, float]) -> str:
    """One line of a way."""
    parts = [f"{name} {row[name]:.2f} [{row[name + '_lo']:.2f}, {row[name + '_hi']:.2f}]" for name in SCORES]
    name = "mdas_minus_disentangle"
    less = (
        f"  MDAS more by {row[name]:+.2f} [{row[name + '_lo']:+.2f}, {row[name + '_hi']:+.2f}]" if name in row else ""
    )
    return f"  {way:10} rank {row['rank']:3.0f}  {'  '.join(parts)}{less}"


def main() -> None:
    """Ask, choose, judge, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    default = Path(os.environ.get("MICROTOME_DATA", ROOT.parent / "shared" / "data")) / "ravel" / "data.tgz"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16", help="four times as fast as float32 where the CPU knows it")
    parser.add_argument("--questions", type=Path, help="keeps the questions with their answers")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ravel.json")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 18])
    parser.add_argument("--attributes", nargs="+", default=list(ATTRIBUTES))
    numbers = {
        "entities": 0, "templates": 1, "tried": 8, "trial": 16, "train": 200, "val": 40, "test": 200,
        "each": 2, "rows": 16, "steps": 60, "short": 15, "seed": 0,
    }  # fmt: skip
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    started = time.perf_counter()
    dtype = getattr(torch, options.dtype)
    exact = dtype == torch.float32  # coarser numbers round otherwise beside pads, which the proof would refuse
    given: dict[str, Any] = {"dtype": dtype, "prove": exact}
    model = mt.open(options.model, **given) if options.model else mt.open(**given)
    data = tasks.ravel(options.data)
    asked = asked_of(model, data, options.questions, options)
    bench = Bench(model, data, asked, options)
    for name, (share, low, high) in bench.shares.items():
        template = next(q.template for q in asked if q.attribute == name)
        print(f"{name:10} answered {share:.1%} [{low:.1%}, {high:.1%}]  {template!r}", flush=True)
    (site, place), sites = choose_site(bench)
    print(f"site {site} at the {place} token", flush=True)
    prompts = {a: list(dict.fromkeys(q.template for q in asked if q.attribute == a)) for a in bench.shares}
    report: dict[str, Any] = {
        "model": model.provenance,
        "options": {name: getattr(options, name) for name in (*numbers, "layers", "attributes")},
        "known": {a: dict(zip(("share", "low", "high"), x, strict=True)) for a, x in bench.shares.items()},
        "prompts": prompts, "entities": len({q.entity for q in asked}), "entities_known": bench.counts,
        "sites": sites, "site": site, "place": place, "attributes": {},
    }  # fmt: skip
    for attribute in bench.attributes:
        print(attribute, flush=True)
        report["attributes"][attribute] = judged(bench, attribute, site, place)
        report["seconds"] = time.perf_counter() - started
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
