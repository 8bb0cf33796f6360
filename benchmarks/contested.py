"""Claims that papers contradict each other on, measured on the default model with intervals and controls.

    python benchmarks/contested.py [--only corruption estimates heads] [--model MODEL] [--data FOLDER] [--out F]

    corruption  does the way in which a subject is corrupted change where tracing finds a fact?
                yes: Zhang and Nanda, 2023 (arXiv 2309.16042); taken for granted not to: Meng et al., 2022 (2202.05262)
    estimates   does attribution patching rank parts as exact patching does, MLPs too?
                yes, but for some: Kramár et al., 2024 (2403.00745); not MLPs, where RelP does: Jafari et al., 2025
                (2508.21258)
    heads       do induction heads carry few-shot learning, or heads that carry the task?
                induction: Olsson et al., 2022 (2209.11895); task: Yin and Steinhardt, 2025 (2502.14010)

What decides is the sentence that each prints before its numbers, which was written before they were seen. Heads and
means are found on other prompts than they are judged on. Intervals are those of `mt.stream.mean_interval` over
examples, p-values those of sign flips.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

import microtome as mt
from microtome.stream import mean_interval, sign_flip

ROOT = Path(__file__).resolve().parents[1]
Head = tuple[int, int]


def of(values: Any, seed: int = 0) -> dict[str, float]:
    """Mean, interval and p-value of one number an example."""
    x = torch.as_tensor(values).double()
    x = x[~x.isnan()]
    mean, low, high = mean_interval(x)
    return {"mean": float(mean), "low": float(low), "high": float(high), "p": float(sign_flip(x, seed=seed)),
            "examples": len(x)}  # fmt: skip


def told(name: str, x: dict[str, float]) -> None:
    """One line of a result."""
    print(f"  {name:<58} {x['mean']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]  p {x['p']:.2g}  n {x['examples']:.0f}")


def all_told(numbers: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Every line."""
    for name, x in numbers.items():
        told(name, x)
    return numbers


def ranked(a: Any, b: Any) -> float:
    """Spearman's correlation of two maps where both have numbers."""
    x, y = np.asarray(a).ravel(), np.asarray(b).ravel()
    there = np.isfinite(x) & np.isfinite(y)
    return float(spearmanr(x[there], y[there]).statistic)


# ----------------------------------------------------------------------------------------------------------- corruption


def corruption(model: mt.Model, facts: int = 16, samples: int = 1) -> dict[str, Any]:
    """Whether noise and another subject give one map."""
    print("corruption: the choice changes the map if its rank correlation between noise and another subject is below")
    print(
        "  that between two draws of noise; it leaves the claim of facts in earlier MLPs at the subject if with either"
    )
    print("  corruption these exceed both later ones there and other positions. All p < 0.05")
    task = mt.tasks.build("fact", model, 40, seed=3, fewer=True).known_by(model)
    maps: dict[str, list[float]] = {}
    places: dict[str, list[float]] = {}
    n = model.anatomy.n_layers
    for number, pair in enumerate(list(task)[:facts]):
        first, end = pair.spans["subject"]
        common: dict[str, Any] = {"subject": (first, end), "answer": pair.answer_ids[0], "kinds": ["mlp", "attn"]}
        found = []
        for seed in (0, 1):
            with mt.settings(seed=seed, progress=False):
                found.append(mt.explain.causal_trace(model, list(pair.clean_tokens), samples=samples, **common))
        with mt.settings(progress=False):
            other = mt.explain.causal_trace(model, list(pair.clean_tokens), corrupt=list(pair.corrupt_tokens), **common)
        last, at = len(pair.clean_tokens) - 1, end - 1
        rest = [p for p in range(first, last) if p != at]
        for kind in ("mlp", "attn"):
            a, b, c = (x[kind].values[:, first:] for x in (*found, other))
            maps.setdefault(f"{kind}: noise, noise again", []).append(ranked(a, b))
            maps.setdefault(f"{kind}: noise, another subject", []).append(0.5 * (ranked(a, c) + ranked(b, c)))
            drawn = np.random.default_rng(number).permutation(c.ravel()).reshape(c.shape)
            maps.setdefault(f"{kind}: noise, shuffled (control)", []).append(ranked(a, drawn))
        for name, x in (("noise", found[0]), ("another subject", other)):
            mlp, attn = (x[kind].values / float(x["clean"] - x["corrupt"]) for kind in ("mlp", "attn"))
            places.setdefault(f"{name}: mlp, subject's last, earlier half", []).append(mlp[: n // 2, at].mean())
            places.setdefault(f"{name}: mlp, subject's last, later half", []).append(mlp[n // 2 :, at].mean())
            elsewhere = mlp[: n // 2, rest].mean() if rest else np.nan
            places.setdefault(f"{name}: mlp, other positions, earlier half", []).append(elsewhere)
            places.setdefault(f"{name}: attn, last position, later half", []).append(attn[n // 2 :, last].mean())
    numbers = all_told({name: of(x) for name, x in (maps | places).items()})
    tests: dict[str, dict[str, float]] = {}
    for kind in ("mlp", "attn"):
        a, b = (np.array(maps[f"{kind}: noise, {what}"]) for what in ("noise again", "another subject"))
        tests[f"{kind}: noise again minus another subject"] = of(a - b)
    for name in ("noise", "another subject"):
        early = np.array(places[f"{name}: mlp, subject's last, earlier half"])
        for what in ("mlp, subject's last, later half", "mlp, other positions, earlier half"):
            tests[f"{name}: earlier MLPs at the subject minus {what}"] = of(early - np.array(places[f"{name}: {what}"]))
    all_told(tests)
    changed = tests["mlp: noise again minus another subject"]
    kept = [x for name, x in tests.items() if "earlier MLPs" in name]
    said = {
        "the corruption changes the map of MLPs": bool(changed["low"] > 0 and changed["p"] < 0.05),
        "earlier MLPs at the subject stand out with either": all(x["low"] > 0 and x["p"] < 0.05 for x in kept),
    }
    return {"numbers": numbers, "tests": tests, "facts": len(maps["mlp: noise, noise again"]), "verdicts": said}


# ------------------------------------------------------------------------------------------------------------ estimates

SITES = ("attn_out", "mlp_out", "attn.z[head]")


def estimates(model: mt.Model, pairs: int = 6) -> dict[str, Any]:
    """Whether estimates of one gradient rank parts as exact effects do, by site."""
    print(
        "estimates: attribution patching ranks parts of a site if its mean rank correlation with exact effects of all"
    )
    print("  cells is above 0.7, and fails on MLPs if their mean correlation is below 0.3; RelP is better if the")
    print("  difference of the correlations of MLP outputs is above 0. All by their intervals")
    found: dict[str, list[float]] = {}
    for name in ("indirect_object", "fact", "subject_verb_agreement"):
        task = mt.tasks.build(name, model, 14, seed=5, fewer=True).known_by(model)
        for number, pair in enumerate(list(task)[:pairs]):
            given: dict[str, Any] = {"answer": pair.answer_ids[0], "foil": pair.foil_ids[0], "sites": list(SITES)}
            both = [list(pair.clean_tokens), list(pair.corrupt_tokens)]
            with mt.settings(progress=False):
                exact = mt.explain.patch(model, *both, share=False, **given)
                scores = {m: mt.explain.attribute(model, *both, method=m, verify=0, **given) for m in ("atp", "relp")}
            for site in SITES:
                truth = exact[site].values.ravel()
                there = np.isfinite(truth) & (abs(truth) > 1e-4)  # what can have no effect is left out
                for method, data in scores.items():
                    x = data[site].values.ravel()
                    found.setdefault(f"{method} {site}: rank correlation", []).append(ranked(x[there], truth[there]))
                    found.setdefault(f"{method} {site}: correlation", []).append(
                        float(pearsonr(x[there], truth[there]).statistic)
                    )
                drawn = np.random.default_rng(number).permutation(truth[there])
                found.setdefault(f"shuffled {site}: rank correlation (control)", []).append(ranked(drawn, truth[there]))
    numbers = all_told({name: of(x) for name, x in found.items()})
    tests = all_told({
        f"relp minus atp, {site}, {what}": of(
            np.array(found[f"relp {site}: {what}"]) - np.array(found[f"atp {site}: {what}"])
        )
        for site in SITES for what in ("rank correlation", "correlation")
    })  # fmt: skip
    ranks = {site: numbers[f"atp {site}: rank correlation"]["low"] > 0.7 for site in SITES}
    said = {f"attribution patching ranks {site}": bool(ok) for site, ok in ranks.items()} | {
        "attribution patching fails on MLPs": numbers["atp mlp_out: correlation"]["high"] < 0.3,
        "RelP is better on MLPs": tests["relp minus atp, mlp_out, correlation"]["low"] > 0,
    }
    return {"numbers": numbers, "tests": tests, "verdicts": said}


# ---------------------------------------------------------------------------------------------------------------- heads

TASKS = (
    "abstractive__lowercase_first_letter", "abstractive__present-past", "abstractive__capitalize_first_letter",
    "extractive__choose_first_of_3", "abstractive__landmark-country", "extractive__animal_v_object_3",
    "abstractive__product-company", "abstractive__person-sport",
)  # fmt: skip


def few_shot(
    rows: list[dict[str, str]], rng: np.random.Generator, shots: int, shuffled: bool = False
) -> tuple[str, str]:
    """A prompt of examples and a question, with its answer; with labels exchanged if they are to be shuffled."""
    chosen = [rows[i] for i in rng.permutation(len(rows))[: shots + 1]]
    labels = [str(row["output"]) for row in chosen[:-1]]
    labels = [labels[i] for i in rng.permutation(shots)] if shuffled else labels
    lines = [f"Q: {row['input']}\nA: {label}\n\n" for row, label in zip(chosen[:-1], labels, strict=True)]
    return "".join(lines) + f"Q: {chosen[-1]['input']}\nA:", f" {chosen[-1]['output']}"


def prompts_of(
    model: mt.Model, rows: list[dict[str, str]], count: int, seed: int, shots: int, shuffled: bool = False
) -> tuple[list[list[int]], list[int]]:
    """Prompts of a task, and the first token of each answer."""
    rng = np.random.default_rng(seed)
    drawn = [few_shot(rows, rng, shots, shuffled) for _ in range(count)]
    return [model.to_tokens(p)[0].tolist() for p, _ in drawn], [model.continuation(a)[0] for _, a in drawn]


def read(model: mt.Model, prompts: list[list[int]], answers: list[int], edits: list[Any]) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer, and whether it comes first."""
    log_p: list[float] = []
    first: list[float] = []
    for row, answer in zip(prompts, answers, strict=True):
        x = model.run([row], edits=edits).logits[0, -1].float().log_softmax(-1)
        log_p.append(float(x[answer]))
        first.append(float(int(x.argmax()) == answer))
    return torch.tensor(log_p).double(), torch.tensor(first).double()


def mediators(model: mt.Model, tasks: dict[str, list[dict[str, str]]], shots: int, each: int) -> Tensor:
    """[layer, head] How much a head's mean over true prompts raises the answer where labels are shuffled.

    Todd et al., "Function Vectors in Large Language Models", 2023 (arXiv 2310.15213).
    """
    n, heads = model.anatomy.n_layers, model.anatomy.n_heads
    total = torch.zeros(n, heads).double()
    for seed, rows in enumerate(tasks.values()):
        true, _ = prompts_of(model, rows, each, 100 + seed, shots)
        mean = mt.change.means(model, true, "*.attn.z@-1")
        prompts, answers = prompts_of(model, rows, each, 200 + seed, shots, shuffled=True)
        cells = [mt.edit.Set(f"{i}.attn.z[{h}]@-1", mean[f"{i}.attn.z@-1"][h]) for i in range(n) for h in range(heads)]
        for row, answer in zip(prompts, answers, strict=True):
            swept = model.sweep([row], cells, mt.metric.Probability(answer)).run()
            total += swept.effects.double().reshape(n, heads)
    return total / (each * len(tasks))


def sets_of(induct: Tensor, mediate: Tensor, top: int) -> tuple[dict[str, list[Head]], set[Head]]:
    """The best heads of either kind without those of both, and random others of their layers; and those of both."""
    width = induct.shape[1]

    def best(scores: Tensor, count: int) -> list[Head]:
        return [divmod(int(i), width) for i in scores.flatten().argsort(descending=True)[:count]]

    wide = [best(x, 2 * top) for x in (induct, mediate)]
    both = set(wide[0]) & set(wide[1])
    sets = {
        name: [h for h in some if h not in both][:top] for name, some in zip(("induction", "task"), wide, strict=True)
    }
    rng = np.random.default_rng(0)
    shunned = {h for some in sets.values() for h in some} | both
    for name, some in list(sets.items()):
        picked: list[Head] = []
        for layer, _ in some:
            free = [(layer, h) for h in range(width) if (layer, h) not in shunned and (layer, h) not in picked]
            picked += [free[rng.integers(len(free))]] if free else []
        sets[f"random, layers of {name}"] = picked
    return sets, both


def heads(model: mt.Model, data: Path, shots: int = 8, top: int = 14, each: int = 6) -> dict[str, Any]:
    """Whether few-shot learning needs induction heads or heads that carry the task."""
    print(f"heads: one of both carries few-shot learning if ablating its {top} heads (5 %) costs more of the answer's")
    print(
        "  log-probability than the other's, and than random heads of the same layers, p < 0.05, on tasks on which no"
    )
    print("  head was chosen; heads that are in both sets are left out of both. Copying random tokens is shown beside")
    held = {p.stem: json.loads(p.read_text()) for name in TASKS if (p := data / "icl" / f"{name}.json").exists()}
    able = {}
    for name, rows in held.items():
        accuracy = read(model, *prompts_of(model, rows, 2 * each, 1, shots), [])[1].mean()
        print(f"  {name:<44} accuracy {float(accuracy):.2f} with {shots} examples")
        if float(accuracy) >= 0.3:
            able[name] = rows
    names = list(able)
    chosen_on, judged_on = {n: able[n] for n in names[::2]}, {n: able[n] for n in names[1::2]}
    mediate = mediators(model, chosen_on, shots, each)
    induct = torch.from_numpy(mt.measure(model, "induction")["induction"].values).double()
    sets, both = sets_of(induct, mediate, top)
    losses: dict[str, list[float]] = {name: [] for name in sets}
    drops: dict[str, list[float]] = {name: [] for name in sets}
    for seed, rows in enumerate(judged_on.values()):
        mean = mt.change.means(model, prompts_of(model, rows, each, 300 + seed, shots)[0], "*.attn.z")
        prompts, answers = prompts_of(model, rows, 2 * each, 400 + seed, shots)
        base = read(model, prompts, answers, [])
        for name, some in sets.items():
            edits = [mt.edit.Mean(f"{i}.attn.z[{h}]", mean=mean[f"{i}.attn.z"][h]) for i, h in some]
            cut = read(model, prompts, answers, edits)
            losses[name] += (base[0] - cut[0]).tolist()
            drops[name] += (base[1] - cut[1]).tolist()
    numbers = {f"log-probability lost without {name} heads": of(x) for name, x in losses.items()}
    numbers |= {f"accuracy lost without {name} heads": of(x) for name, x in drops.items()}
    copying = copied(model, sets)
    numbers |= {f"copying: log-probability lost without {name} heads": of(x) for name, x in copying.items()}
    all_told(numbers)
    tests = {
        f"{what}: {a} minus {b}": of(torch.tensor(of_[a]) - torch.tensor(of_[b]))
        for what, of_ in (("few-shot", losses), ("copying", copying))
        for a, b in (("task", "induction"), ("task", "random, layers of task"),
                     ("induction", "random, layers of induction"))
    }  # fmt: skip
    all_told(tests)

    def more(name: str) -> bool:
        return tests[name]["low"] > 0 and tests[name]["p"] < 0.05

    said = {
        "task heads carry few-shot learning, more than induction heads": more("few-shot: task minus induction")
        and more("few-shot: task minus random, layers of task"),
        "induction heads matter for it at all": more("few-shot: induction minus random, layers of induction"),
        "induction heads carry copying, more than task heads": tests["copying: task minus induction"]["high"] < 0,
    }
    named = {name: [f"{i}.attn.z[{h}]" for i, h in some] for name, some in sets.items()}
    print(f"  in both sets of {2 * top}: {len(both)}; tasks judged: {', '.join(judged_on)}")
    return {"numbers": numbers, "tests": tests, "heads": named, "in_both": len(both), "chosen_on": list(chosen_on),
            "judged_on": list(judged_on), "verdicts": said}  # fmt: skip


def copied(model: mt.Model, sets: dict[str, list[Head]], rows: int = 16, length: int = 40) -> dict[str, list[float]]:
    """What copying of random tokens loses without heads."""
    rng = torch.Generator().manual_seed(9)
    half = torch.randint(1000, model.anatomy.d_vocab - 1, (rows, length), generator=rng)
    tokens = torch.cat([half, half], dim=1)
    mean = mt.change.means(model, tokens.flip(1), "*.attn.z")

    def copying(edits: list[Any]) -> Tensor:
        found = []
        for row in tokens:
            log_p = model.run(row[None], edits=edits).logits[0, length:-1].float().log_softmax(-1)
            found.append(log_p.gather(1, row[length + 1 :, None]).mean())
        return torch.stack(found).double()

    base = copying([])
    return {
        name: (
            base - copying([mt.edit.Mean(f"{i}.attn.z[{h}]", mean=mean[f"{i}.attn.z"][h]) for i, h in some])
        ).tolist()
        for name, some in sets.items()
    }


def main() -> None:
    """Measure what is asked for, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=["corruption", "estimates", "heads"])
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder that holds icl/")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "contested.json")
    options = parser.parse_args()
    model = mt.open(options.model) if options.model else mt.open()
    claims: dict[str, Callable[[], dict[str, Any]]] = {
        "corruption": lambda: corruption(model), "estimates": lambda: estimates(model),
        "heads": lambda: heads(model, options.data),
    }  # fmt: skip
    written: dict[str, Any] = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    for name, measure in claims.items():
        if options.only and name not in options.only:
            continue
        started = time.perf_counter()
        with torch.no_grad() if name == "heads" else torch.enable_grad():
            found = measure()
        for sentence, holds in found["verdicts"].items():
            print(f"  {'yes' if holds else 'no '}  {sentence}")
        print(f"  {time.perf_counter() - started:.0f} s\n")
        written[name] = found | {"model": model.provenance}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
