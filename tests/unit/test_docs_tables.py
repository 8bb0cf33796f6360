"""The tables of the documentation are what the code says: sites, families, and columns of the atlas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests import families

import microtome as mt
from microtome import planted
from microtome.anatomy import SITES
from microtome.atlas._tables import KEYS, TABLES
from microtome.method import DIMS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def written(page: str, name: str) -> str:
    return (DOCS / page).read_text().split(f"<!-- {name}: begin -->\n")[1].split(f"<!-- {name}: end -->")[0].strip()


def table(*rows: tuple[str, ...]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def same(page: str, name: str, expected: str) -> None:
    assert written(page, name) == expected, f"docs/{page} is out of date; it should hold\n\n{expected}\n"


def test_the_table_of_sites() -> None:
    rows = [("name", "axes", "of", "what")]
    for name, spec in SITES.items():
        axes = " ".join(f"**{axis}**" if axis == spec.unit != "batch" else axis for axis in spec.dims)
        rows.append((f"`{name}`", axes, spec.scope, spec.meaning))
    same("sites.md", "sites", table(*rows))


def test_the_table_of_columns() -> None:
    parts: list[str] = []
    own = [m for m in mt.measures().values() if m.atlas and m.home.startswith("microtome.")]
    for unit, name in TABLES.items():
        rows = [("column", "unit", "meaning", "control", "measure")]
        rows += [
            (f"`{key}`", "", KEYS[key], "", "") for key in (*DIMS[unit], *(("kv_head",) if unit == "head" else ()))
        ]
        for method in (m for m in own if m.of == unit):
            for column in method.columns:
                control = f"`{column.control}`" if column.attrs["control"] else ""
                rows.append((f"`{column.name}`", column.unit, column.meaning, control, f"`{method.name}`"))
        parts.append(f"### {name}.parquet\n\n" + table(*rows))
    same("atlas.md", "columns", "\n\n".join(parts))


def test_the_table_of_circuits() -> None:
    found = json.loads((DOCS.parent / "benchmarks" / "results" / "planted_circuits.json").read_text())["programs"]
    assert set(found) == set(planted.PROGRAMS)
    rows = [("program", "edges", "true", "AUC", "tokens alone", "EAP")]
    for name, row in found.items():
        scores = (f"{row[key]:.3f}" for key in ("auc", "auc_tokens_only", "auc_eap"))
        rows.append((f"`{name}`", str(row["edges"]), str(row["true"]), *scores))
    same("planted.md", "circuits", table(*rows))


def test_the_tables_of_ravel() -> None:
    found = json.loads((DOCS.parent / "benchmarks" / "results" / "ravel.json").read_text())
    assert set(found["attributes"]) <= {a for a, x in found["known"].items() if x["share"] >= 0.2}
    best = max(found["sites"], key=lambda row: row["best"])
    assert (found["site"], found["place"]) == (best["site"], best["place"])
    known = [("attribute", "prompt", "answered")]
    for name, x in found["known"].items():
        prompts = ", ".join(f"`{text}`" for text in found["prompts"][name])
        known.append((name, prompts, f"{x['share']:.1%} [{x['low']:.1%}, {x['high']:.1%}]"))
    same("subspaces.md", "ravel-known", table(*known))
    rows = [("attribute", "found by", "rank", "cause", "isolate", "disentangle", "MDAS minus it")]
    for attribute, judged in found["attributes"].items():
        for way, x in judged["ways"].items():
            cause, isolate, whole, less = (
                f"{x[name]:.2f} [{x[name + '_lo']:.2f}, {x[name + '_hi']:.2f}]".replace("-0.00", "0.00")
                if name in x
                else ""
                for name in ("cause", "isolate", "disentangle", "mdas_minus_disentangle")
            )
            rows.append((attribute, f"`{way}`", f"{x['rank']:.0f}", cause, isolate, whole, less))
    same("subspaces.md", "ravel", table(*rows))


NOTES = {
    "queries and keys are normalised before use": "q/k norms",
    "latent attention: keys and values have no weights of their own": "latent attention",
    "attention looks both ways": "attention both ways",
    "the layer is a mixture: experts are checked by identity 4": "mixture",
    "the head has a transform of its own, or no norm precedes it": "norms on the stream",
    "model.decoder projects the stream to another width before the unembedding": "a projection before the unembedding",
}


def row_of(family: str) -> tuple[str, str, str, str, str]:
    forms, notes, attention, variants = dict[str, None](), dict[str, None](), "", 0
    for name in families.NAMES:
        if name.split("-")[0] != family:
            continue
        model = mt.open(families.build(name))
        variants, attention = variants + 1, model.anatomy.attention
        forms[{"post_norm": "norms on the stream"}.get(model.anatomy.parts.form, model.anatomy.parts.form)] = None
        left = (c for c in model.proof if c.status == "does not apply" and c.where != "long prompts")
        notes |= {NOTES[c.note]: None for c in left}
        assert not [c for c in model.proof if c.status == "fails"]
    outcome = "proven" if variants == 1 else f"proven, {variants} variants"
    return family, " or ".join(forms), attention, outcome, ", ".join(notes)


@pytest.mark.slow
def test_the_table_of_families() -> None:
    names = dict.fromkeys(name.split("-")[0] for name in families.NAMES)
    head = ("family", "block", "attention", "`microtome check`", "what the proof leaves open")
    same("models.md", "families", table(head, *map(row_of, names)))


def test_the_table_of_the_tuned_lens() -> None:
    held = json.loads((DOCS.parent / "benchmarks" / "results" / "lenses.json").read_text())["layers"]
    assert all(row["gain_lo"] > 0 for row in held.values())
    assert len(held) == 30
    rows = [("behind layer", "logit lens", "tuned lens", "gain")]
    for layer in ("-1", "0", "5", "10", "15", "20", "25", "28"):
        x = held[layer]
        ends = [f"{x[name]:.2f} [{x[f'{name}_lo']:.2f}, {x[f'{name}_hi']:.2f}]" for name in ("kl", "gain")]
        rows.append(("embedding" if layer == "-1" else layer, f"{x['kl_logit_lens']:.2f}", *ends))
    same("lenses.md", "lenses", table(*rows))
