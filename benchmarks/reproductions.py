"""Published causal claims, measured again on the default model, each with its interval and its control.

    python benchmarks/reproductions.py [--only facts reading induction repair] [--model MODEL] [--samples 2] [--out F]

What counts as reproduced is the sentence that each claim prints, written down before the numbers were seen, but for
repair: its first two runs failed, on a head of the last layer and on a weak one, and which heads are strong was decided
after that, on other prompts than those reported. Heads are chosen on other data than they are measured on.
Intervals are those of `mt.stream.mean_interval` over examples, p-values those of sign flips.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import microtome as mt
from microtome.method import RepeatedTokens
from microtome.stream import mean_interval, sign_flip

# Prompts whose answer the model may know, with the subject that they are about: written for this script.
FACTS = [
    ("The capital of France is", "France", " Paris"),
    ("The Colosseum is in the city of", "The Colosseum", " Rome"),
    ("The Eiffel Tower is in the city of", "The Eiffel Tower", " Paris"),
    ("The capital of Japan is the city of", "Japan", " Tokyo"),
    ("The capital of Italy is the city of", "Italy", " Rome"),
    ("The capital of Germany is the city of", "Germany", " Berlin"),
    ("The capital of Greece is the city of", "Greece", " Athens"),
    ("The capital of China is the city of", "China", " Beijing"),
    ("The capital of Austria is the city of", "Austria", " Vienna"),
    ("The capital of Portugal is the city of", "Portugal", " Lisbon"),
    ("The capital of Ireland is the city of", "Ireland", " Dublin"),
    ("The capital of Peru is the city of", "Peru", " Lima"),
    ("The capital of Cuba is the city of", "Cuba", " Havana"),
    ("The capital of Kenya is the city of", "Kenya", " Nairobi"),
    ("The capital of Hungary is the city of", "Hungary", " Budapest"),
    ("The capital of Russia is the city of", "Russia", " Moscow"),
    ("The people of Mexico mostly speak", "Mexico", " Spanish"),
    ("The people of Brazil mostly speak", "Brazil", " Portuguese"),
    ("The Great Wall is in the country of", "The Great Wall", " China"),
    ("Machu Picchu is in the country of", "Machu Picchu", " Peru"),
    ("The Taj Mahal is in the country of", "The Taj Mahal", " India"),
    ("The Louvre is in the city of", "The Louvre", " Paris"),
    ("The Sagrada Familia is in the city of", "The Sagrada Familia", " Barcelona"),
    ("The Acropolis is in the city of", "The Acropolis", " Athens"),
    ("Albert Einstein was a famous", "Albert Einstein", " physicist"),
    ("The chemical symbol for gold is", "gold", " Au"),
    ("Ferrari is a company from the country of", "Ferrari", " Italy"),
]
NAMES = ["Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Anna", "Paul", "Mark", "Kate", "Sarah"]
TEMPLATES = [
    "When {a} and {b} went to the store, {b} gave a drink to",
    "After {a} and {b} had lunch at the cafe, {b} handed the keys to",
    "While {a} and {b} were at the station, {b} passed a ticket to",
    "Then {a} and {b} sat down in the garden, and {b} read a letter to",
]


def of(values: Tensor, seed: int = 0) -> dict[str, float]:
    """Mean, interval and p-value of one number an example; examples without one (no control there) are left out."""
    values = values[~values.isnan()]
    mean, low, high = mean_interval(values)
    return {
        "mean": float(mean), "low": float(low), "high": float(high), "p": float(sign_flip(values, seed=seed)),
        "examples": len(values),
    }  # fmt: skip


def told(name: str, x: dict[str, float]) -> None:
    """One line of a result."""
    print(f"  {name:<64} {x['mean']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]  p {x['p']:.2g}  n {x['examples']:.0f}")


def summed(rows: list[dict[str, Any]], compared: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Numbers of examples, printed: each on its own, the differences that decide, and the means by layer."""
    layers = [row.pop("layers") for row in rows]
    each = {name: torch.tensor([float(row[name]) for row in rows]).double() for name in rows[0]}
    numbers = {name: of(x) for name, x in each.items()}
    tests = {name: of(each[a] - each[b]) for name, (a, b) in compared.items()}
    for name, x in (numbers | tests).items():
        told(name, x)
    profile = {name: torch.stack([x[name] for x in layers]).mean(0) for name in layers[0]}
    for name, x in profile.items():
        at = int(x.abs().argmax())
        print(f"  {name}: largest in the window around layer {at}, {float(x[at]):+.3f}")
    holds = all(x["low"] > 0 and x["p"] < 0.05 for x in tests.values())
    return {
        "numbers": numbers, "tests": tests, "by_layer": {k: x.tolist() for k, x in profile.items()},
        "known": len(rows), "asked": len(FACTS), "reproduced": holds,
    }  # fmt: skip


def traced(model: mt.Model, prompt: str, subject: str, answer: str, samples: int) -> dict[str, Any] | None:
    """What restores one fact, or None where the model does not answer so."""
    if int(model.run(prompt).logits[0, -1].argmax()) != model.to_id(answer):
        return None
    data = mt.explain.causal_trace(model, prompt, subject=subject, answer=answer, samples=samples)
    half, last = model.anatomy.n_layers // 2, data.sizes["pos"] - 1
    at = int(data["subject"].values.nonzero()[0][-1])
    others = [p for p in range(last) if p != at]
    mlp, attn = (torch.from_numpy(data[kind].values) for kind in ("mlp", "attn"))
    return {
        "clean": data["clean"], "corrupt": data["corrupt"],
        "mlp, subject's last, earlier half": mlp[:half, at].mean(),
        "mlp, other positions, earlier half (control)": mlp[:half, others].mean(),
        "mlp, subject's last, later half": mlp[half:, at].mean(),
        "attn, subject's last, earlier half": attn[:half, at].mean(),
        "attn, last, later half": attn[half:, last].mean(),
        "attn, last, earlier half": attn[:half, last].mean(),
        "layers": {"mlp, subject's last": mlp[:, at], "attn, last": attn[:, last]},
    }  # fmt: skip


def facts(model: mt.Model, samples: int) -> dict[str, Any]:
    """Facts are mediated by early-to-mid MLPs at the subject's last token, then by late attention at the end."""
    print("facts: reproduced if, in effects on the answer's probability, p < 0.05, MLPs of the earlier half at the")
    print(
        "  subject's last token exceed those at other positions and later ones, and attention of the later half at the"
    )
    print("  last position exceeds the earlier half's")
    rows = [x for prompt, subject, answer in FACTS if (x := traced(model, prompt, subject, answer, samples))]
    earlier = "mlp, subject's last, earlier half"
    compared = {
        "mlp: subject's last minus other positions": (earlier, "mlp, other positions, earlier half (control)"),
        "mlp: earlier minus later half": (earlier, "mlp, subject's last, later half"),
        "attn at last: later minus earlier half": ("attn, last, later half", "attn, last, earlier half"),
    }
    return summed(rows, compared) | {"samples": samples}


def cut(model: mt.Model, prompt: str, subject: str, answer: str) -> dict[str, Any] | None:
    """What one fact loses when the last position cannot read its subject, or None where it is not known."""
    data = mt.explain.attention_knockout(model, prompt, queries=-1, keys=subject, answer=answer, controls=10)
    half = model.anatomy.n_layers // 2
    logs, control = (torch.from_numpy(data[n].values) for n in ("log_probability", "log_probability_control"))
    if not data.attrs["known"]:
        return None
    return {
        "from subject, later half": logs[half:].mean(), "from subject, earlier half": logs[:half].mean(),
        "from other keys, later half (control)": control[half:].mean(), "layers": {"from subject": logs},
    }  # fmt: skip


def reading(model: mt.Model) -> dict[str, Any]:
    """Facts are read late, at the last position, from the subject."""
    print(
        "reading: reproduced if cutting the last position from the subject in the later half costs more of the answer's"
    )
    print("  log-probability than cutting it from as many other keys (where there are), or earlier, p < 0.05")
    rows = [x for fact in FACTS if (x := cut(model, *fact))]
    late = "from subject, later half"
    return summed(rows, {
        "other keys minus subject": ("from other keys, later half (control)", late),
        "earlier minus later half": ("from subject, earlier half", late),
    })  # fmt: skip


def copying(model: mt.Model, tokens: Tensor, edits: list[mt.edit.Edit]) -> Tensor:
    """Mean log-probability of the repeated tokens [sequence], in nats."""
    n = tokens.shape[1] // 2
    rows = [model.run(row[None], edits=edits).logits[0, n - 1 : -1].log_softmax(-1) for row in tokens]
    return torch.stack([r[1:].gather(1, t[n + 1 :, None]).mean() for r, t in zip(rows, tokens, strict=True)]).double()


def repeated(model: mt.Model, sequences: int, seed: int) -> Tensor:
    """Random tokens that repeat once [sequence, pos]."""
    with mt.settings(seed=seed):
        return torch.cat([batch.tokens for batch in RepeatedTokens(sequences, 50).batches(model).parts])


def induction(model: mt.Model, top: int = 5, sequences: int = 16, draws: int = 10) -> dict[str, Any]:
    """Induction heads carry in-context copying."""
    print(f"induction: reproduced if ablating the {top} top induction heads costs more of the copied tokens'")
    print("  log-probability than ablating as many random heads of the same layers, with p < 0.05, on other sequences")
    scores = torch.from_numpy(mt.measure(model, "induction")["induction"].values)
    order = scores.flatten().argsort(descending=True).tolist()
    heads = model.anatomy.n_heads
    chosen = [divmod(i, heads) for i in order[:top]]
    shunned = {divmod(i, heads) for i in order[: 4 * top]}
    tokens, others = (repeated(model, sequences, seed) for seed in (1, 2))
    held = mt.change.means(model, others, "*.attn.z")

    def without(picked: list[tuple[int, int]]) -> Tensor:
        edits = [mt.edit.Mean(f"{i}.attn.z[{h}]", mean=held[f"{i}.attn.z"][h]) for i, h in picked]
        return copying(model, tokens, edits)

    whole, generator = copying(model, tokens, []), torch.Generator().manual_seed(0)
    loss = without(chosen) - whole
    controls: list[Tensor] = []
    for _ in range(draws):
        picked: list[tuple[int, int]] = []
        for layer, _head in chosen:
            free = [(layer, h) for h in range(heads) if (layer, h) not in shunned and (layer, h) not in picked]
            if free:
                picked.append(free[int(torch.randint(len(free), (1,), generator=generator))])
        controls.append(without(picked) - whole)
    control = torch.stack(controls)
    numbers = {
        "log-probability of copied tokens": of(whole), "without induction heads": of(loss),
        "without random heads (control)": of(control.mean(0)), "induction minus random": of(loss - control.mean(0)),
    }  # fmt: skip
    for name, x in numbers.items():
        told(name, x)
    named = {f"{i}.attn.z[{h}]": float(scores[i, h]) for i, h in chosen}
    print(
        f"  heads {named}; random sets from {float(control.mean(1).min()):+.3f} to {float(control.mean(1).max()):+.3f}"
    )
    test = numbers["induction minus random"]
    return {
        "numbers": numbers, "heads": named, "controls": control.mean(1).tolist(), "sequences": sequences,
        "reproduced": test["high"] < 0 and test["p"] < 0.05 and float(loss.mean()) < float(control.mean(1).min()),
    }  # fmt: skip


def pairs_of_names(model: mt.Model, seed: int, each: int) -> tuple[list[str], list[str], list[str]]:
    """Prompts with an indirect object, their answers and foils; names of one token."""
    names = [n for n in NAMES if len(model.tokenizer(" " + n, add_special_tokens=False)["input_ids"]) == 1]
    generator = torch.Generator().manual_seed(seed)
    prompts, answers, foils = [], [], []
    for template in TEMPLATES:
        for _ in range(each):
            a, b = (names[i] for i in torch.randperm(len(names), generator=generator)[:2].tolist())
            prompts.append(template.format(a=a, b=b))
            answers.append(f" {a}")
            foils.append(f" {b}")
    return prompts, answers, foils


def repair(model: mt.Model, top: int = 3, each: int = 20) -> dict[str, Any]:
    """Ablating a strong head is partly repaired downstream; the last layer, which has next to none, is left out."""
    print("repair: reproduced if, for each strong head, the later components' change opposes the loss of its direct")
    print(
        "  effect, and does so more than for the other heads of its layer, p < 0.05, mean-ablated at the last position;"
    )
    print("  strong: of the largest, before the last layer, a tenth of the logit difference or more on other prompts")
    prompts, answers, foils = pairs_of_names(model, 6, each)
    found = [
        mt.explain.contributions(model, p, answer=a, foil=f) for p, a, f in zip(prompts, answers, foils, strict=True)
    ]
    direct = torch.tensor(sum(x["attn"].values[0] for x in found) / len(found))
    enough = 0.1 * sum(float(x["logit"][0]) for x in found) / len(found)
    chosen = [divmod(i, model.anatomy.n_heads) for i in direct[:-1].flatten().argsort(descending=True)[:top].tolist()]
    chosen = [head for head in chosen if float(direct[head]) >= enough]
    names = [f"{i}.attn.z[{h}]" for i, h in chosen]
    beside = [f"{i}.attn.z[{h}]" for i in sorted({i for i, _ in chosen}) for h in range(model.anatomy.n_heads)]
    prompts, answers, foils = pairs_of_names(model, 7, each)
    data = mt.explain.component_effects(
        model, prompts, answer=answers, foil=foils, components=names + [n for n in beside if n not in names],
        ablation="mean", receivers="heads",
    )  # fmt: skip
    said: dict[str, Any] = {}
    sums = torch.from_numpy(data["repair_each"].sum("receiver").values)
    for k, name in enumerate(names):
        one = data.isel(component=k)
        numbers = {
            "direct": of(torch.from_numpy(one["direct_each"].values)), "repaired later": of(sums[:, k]),
            "total": of(torch.from_numpy(one["total_each"].values)),
        }  # fmt: skip
        layer = name.split(".")[0]
        likes = [
            j for j, c in enumerate(data["component"].values) if str(c).split(".")[0] == layer and str(c) not in names
        ]
        numbers["repaired later, other heads of the layer (control)"] = of(sums[:, likes].mean(1))
        numbers["repaired minus control"] = of(sums[:, k] - sums[:, likes].mean(1))
        print(f"  {name}: direct effect {float(direct[chosen[k]]):+.2f} of {10 * enough:.2f} on the other prompts")
        for what, x in numbers.items():
            told("  " + what, x)
        slope = [float(one[f"slope{end}"]) for end in ("", "_lo", "_hi")]
        share = -numbers["repaired later"]["mean"] / numbers["direct"]["mean"]
        print(f"    slope {slope[0]:+.2f} [{slope[1]:+.2f}, {slope[2]:+.2f}], share repaired {share:.2f}")
        most = one["repair"].values.argsort()[-3:][::-1]
        late = {str(one["receiver"].values[j]): float(one["repair"].values[j]) for j in most}
        print(f"    most of it by { ({k: round(v, 3) for k, v in late.items()}) }")
        tests = [numbers[n] for n in ("repaired later", "repaired minus control")]
        held = all(x["low"] > 0 and x["p"] < 0.05 for x in tests)
        said[name] = {
            "numbers": numbers, "slope": slope, "share": share, "by": late,
            "reproduced": bool(held and numbers["direct"]["high"] < 0),
        }  # fmt: skip
    return {
        "heads": said,
        "prompts": len(prompts),
        "reproduced": bool(said) and all(x["reproduced"] for x in said.values()),
    }


def main() -> None:
    """Measure what is asked for, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=["facts", "reading", "induction", "repair"])
    parser.add_argument("--model")
    parser.add_argument("--samples", type=int, default=2, help="noises a fact")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reproductions.json")
    options = parser.parse_args()
    model = mt.open(options.model) if options.model else mt.open()
    claims: dict[str, Callable[[], dict[str, Any]]] = {
        "facts": lambda: facts(model, options.samples),
        "reading": lambda: reading(model),
        "induction": lambda: induction(model),
        "repair": lambda: repair(model),
    }
    written: dict[str, Any] = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    for name, measure in claims.items():
        if options.only and name not in options.only:
            continue
        started = time.perf_counter()
        found = measure()
        print(f"  {'reproduced' if found['reproduced'] else 'NOT reproduced'}, {time.perf_counter() - started:.0f} s\n")
        written[name] = found | {"model": model.provenance}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
