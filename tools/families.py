"""Try every causal family of the installed transformers: does it open, in full or in part, and is it right?

    python tools/families.py [MODEL_TYPE ...] [--json PATH] [--docs PATH] [--jobs N] [--seconds N]

A tiny random model of each (`family_configs`) is opened in a process of its own, and what opens is checked against
plain hooks and plain transformers (`family_checks`), and tried with every method (`family_methods`). A family
is one of these, the first that holds:

    cannot be built   no tiny model can be made here, and why
    refused           `open` says why it does not open
    crashes           an operation fails in another way than by an error of Microtome, or takes too long
    wrong             a check fails
    in part           sites that its architecture has are missing, and why
    in full           every site that its architecture has is there

Without names it tries all, and writes benchmarks/results/families.json and, from it, docs/families.md. With names and
--json, the rows of these families take the place of the old ones. The JSON keeps the counts of its first run, `before`.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from families_page import STATES, render
from family_checks import CHECKS, TOLERANCE, DoesNotApply, Subject, first_line, place, summary
from family_configs import FAMILIES, IMPOSSIBLE, build, limit_memory, prompt
from family_methods import Reader, outcomes

import microtome as mt
from microtome.anatomy import SITES, Site

ROOT = Path(__file__).resolve().parents[1]
JSON = ROOT / "benchmarks" / "results" / "families.json"
DOCS = ROOT / "docs" / "families.md"
SECONDS = 120

# Reasons of the engine which mean that the architecture has no such part: nothing is missing there.
NO_SUCH_PART = re.compile(
    r"parallel block|not a mixture of experts|the layer is a mixture|the MLP is (not )?gated|the block has (no|one) "
    r"|there is no norm (before|behind)|no norm stands between the stream and the head|passes the block by"
)


def trial(model_type: str, *, methods: bool = True) -> dict[str, Any]:
    """Everything about one family, in this process."""
    started = time.perf_counter()
    found: dict[str, Any] = {"family": model_type, "state": "", "why": "", "missing": [], "checks": {}, "methods": {}}
    if model_type in IMPOSSIBLE:
        return found | {"state": "cannot be built", "why": IMPOSSIBLE[model_type]}
    try:
        hf = build(model_type)
        with torch.inference_mode():
            hf(input_ids=prompt())
    except Exception as problem:  # noqa: BLE001 - any reason is one
        return found | {"state": "cannot be built", "why": first_line(problem)}
    try:
        model = mt.open(hf, tokenizer=Reader())
    except mt.errors.MicrotomeError as problem:
        return found | {"state": "refused", "why": first_line(problem)}
    except Exception as problem:  # noqa: BLE001 - every other exception is a crash
        return found | {"state": "crashes", "why": f"open: {first_line(problem)} ({place(problem)})"}
    found["layers"] = model.anatomy.n_layers
    found["missing"] = missing(model)
    found["stream"] = all(
        (site := Site(name, layer)) in model.anatomy.hook_points or "passes the block by" in model.anatomy.missing[site]
        for layer in range(model.anatomy.n_layers)
        for name in ("resid_pre", "resid_post")
    )
    subject = Subject(model, model_type)
    for name, check in CHECKS.items():
        found["checks"][name] = checked(subject, check)
    if methods:
        said = outcomes(model)
        found["methods"] = {name: list(end) for name, end in said.items() if end[0] != "runs"}
        found["methods_run"] = len(said) - len(found["methods"])
    found["seconds"] = round(time.perf_counter() - started, 1)
    return found | state_of(found)


def checked(subject: Subject, check: Any) -> dict[str, Any]:
    """What one check found."""
    try:
        gap = check(subject)
    except DoesNotApply as reason:
        return {"state": "does not apply", "why": str(reason)}
    except mt.errors.MicrotomeError as problem:
        return {"state": "refused", "why": first_line(problem)}
    except Exception as problem:  # noqa: BLE001 - every other exception is a crash
        return {"state": "crashes", "why": f"{first_line(problem)} ({place(problem)})"}
    state = "holds" if gap.holds else "wrong"
    return {"state": state, "gap": gap.gap, "effect": gap.effect, "where": gap.where}


def missing(model: mt.Model) -> list[dict[str, Any]]:
    """The sites that a model's architecture has and its map lacks: by name, the layers and the reason."""
    a, found = model.anatomy, {}
    for spec in SITES.values():
        for layer in [None] if spec.scope == "model" else range(a.n_layers):
            site = Site(spec.name, layer)
            if site in a.hook_points:
                continue
            why = a.missing.get(site) or a.missing.get(Site(spec.name)) or "no reason is given"
            mixer = spec.name.startswith("mixer") and site not in a.missing  # of models that have one somewhere
            if not mixer and not NO_SUCH_PART.search(why) and not without_norm(model, site):
                found.setdefault((spec.name, why), []).append(layer)
    return [{"site": name, "layers": layers, "why": why} for (name, why), layers in found.items()]


BEHIND = {"attn.scale": "attn.in", "mlp.scale": "mlp.in", "final.scale": "final"}
BEFORE = {"attn.scale": ("resid_pre",), "mlp.scale": ("resid_mid", "resid_pre"), "final.scale": ("resid_post",)}


def without_norm(model: mt.Model, site: Site) -> bool:
    """Whether a site is of a norm that is not there: what is read behind it is the stream itself."""
    if site.name not in BEHIND:
        return False
    layer = model.anatomy.n_layers - 1 if site.layer is None else site.layer
    read = Site(BEHIND[site.name], site.layer)
    streams = [x for name in BEFORE[site.name] if (x := Site(name, layer)) in model.anatomy.hook_points]
    if not streams or read not in model.anatomy.hook_points:
        return False
    run = model.run(prompt(), capture=[str(read), str(streams[0])])
    return torch.equal(run[str(read)], run[str(streams[0])])


def state_of(found: dict[str, Any]) -> dict[str, str]:
    """The state of a family that opened, and in one line why it is none better."""
    crashes = [f"{n}: {c['why']}" for n, c in found["checks"].items() if c["state"] == "crashes"]
    crashes += [f"{n}: {why}" for n, (state, why) in found["methods"].items() if state == "crashes"]
    wrong = [
        f"{n}: a gap of {c['gap']:.1e} where {c['effect']:.1e} is compared {c['where']}".rstrip()
        for n, c in found["checks"].items()
        if c["state"] == "wrong"
    ]
    if wrong:
        return {"state": "wrong", "why": "; ".join(wrong + crashes)}
    if crashes:
        return {"state": "crashes", "why": "; ".join(crashes)}
    return {"state": "in part" if found["missing"] else "in full", "why": ""}


def apart(model_type: str, seconds: float) -> dict[str, Any]:
    """A trial in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, sender))
    process.start()
    sender.close()
    found = {"family": model_type, "state": "crashes", "missing": [], "checks": {}, "methods": {}}
    try:
        if not receiver.poll(seconds):
            return found | {"why": f"it took more than {seconds:.0f} seconds"}
        return receiver.recv()
    except EOFError:
        process.join()
        return found | {"why": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _child(model_type: str, sender: Any) -> None:
    limit_memory()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sender.send(trial(model_type))
    sender.close()


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many families are in each state."""
    of = Counter(row["state"] for row in rows)
    return {"families": len(rows), "built": len(rows) - of["cannot be built"]} | {state: of[state] for state in STATES}


def table(record: dict[str, Any]) -> str:
    """The counts as lines of text."""
    before = record.get("before", {})
    return "\n".join(f"{name:16}{before.get(name, ''):>8}{n:>8}" for name, n in record["counts"].items())


def main() -> None:
    """Try what was named, or everything, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="MODEL_TYPE", choices=[*FAMILIES, []])
    parser.add_argument("--json", type=Path, help="where to write what was found; benchmarks/results for all families")
    parser.add_argument("--docs", type=Path, help="where to write the page made of it; docs for all families")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the most that one family may take")
    chosen = parser.parse_args()
    names = chosen.families or FAMILIES
    path = chosen.json or (None if chosen.families else JSON)
    page = chosen.docs or (None if chosen.families else DOCS)
    rows = []
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for row in pool.map(lambda name: apart(name, chosen.seconds), names):
            rows.append(row)
            lacks = ", ".join(dict.fromkeys(m["site"] for m in row["missing"]))
            print(f"{row['family']:28}{row['state']:16}{row['why'] or lacks}", flush=True)
    record = record_of(rows, path)
    print(f"\n{'':16}{'before':>8}{'now':>8}\n{table(record)}")
    if path is not None:
        path.write_text(written(record), encoding="utf-8")
    if page is not None:
        checks = {name: summary(check) for name, check in CHECKS.items()}
        page.write_text(render(record, checks, TOLERANCE), encoding="utf-8")


def record_of(rows: list[dict[str, Any]], path: Path | None) -> dict[str, Any]:
    """What is written down, with the counts of the first run."""
    old = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else None
    if old is not None:
        kept = {row["family"]: row for row in old["families"]} | {row["family"]: row for row in rows}
        rows = [kept[name] for name in sorted(kept) if name in FAMILIES]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    now = counts(rows)
    return {"versions": versions, "before": old["before"] if old else now, "counts": now, "families": rows}


def written(record: dict[str, Any]) -> str:
    """A record as JSON with a line for each family."""
    rows = ",\n".join(json.dumps(row) for row in record["families"])
    head = json.dumps({name: value for name, value in record.items() if name != "families"}, indent=1)
    return head.removesuffix("\n}") + f',\n "families": [\n{rows}\n]}}\n'


if __name__ == "__main__":
    sys.exit(main())
