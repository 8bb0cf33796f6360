"""Ten statements about the model of an atlas, each with effect, control and interval, as docs/atlas-of-smollm2.md.

    python tools/atlas_statements.py atlas --docs

Every number is read from the atlas: a statement names a table, a column and which unit of it, and nothing is written
about a column without a control and an interval of the difference.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import microtome as mt

PAGE = Path(__file__).resolve().parents[1] / "docs" / "atlas-of-smollm2.md"


@dataclass(frozen=True)
class Statement:
    """A column, and the unit of it that stands out.

    Attributes:
        says: the sentence, with {unit} and {value}.
        table, column: where it is.
        order: which unit: the first by this; the whole model has one.
        control: in words.
        percent: whether values are shares to be written in per cent.
    """

    says: str
    table: str
    column: str
    control: str
    order: str = ""
    percent: bool = False


STATEMENTS = (
    Statement("The model predicts a token of the text with a loss of {value} nats", "model", "loss",
              "a model that knows nothing: every token as likely"),
    Statement("Head {unit} sends {value} of its attention to the token behind an earlier occurrence", "heads",
              "induction", "keys at a similar distance", "induction_diff DESC", True),
    Statement("Head {unit} sends {value} of its attention to the previous token of random text", "heads",
              "previous_token", "uniform attention", "previous_token_diff DESC", True),
    Statement("Head {unit} sends {value} of its attention to an earlier occurrence of the same token", "heads",
              "duplicate", "keys at a similar distance", "duplicate_diff DESC", True),
    Statement("Head {unit} sends {value} of its attention to the first token of a row", "heads", "sink_attention",
              "uniform attention", "sink_attention_diff DESC", True),
    Statement("Head {unit} sends {value} of its attention to punctuation and line breaks", "heads",
              "delimiter_attention", "uniform attention", "delimiter_attention_diff DESC", True),
    Statement("What layer {unit} writes with its MLP is at a cosine of {value} with the stream", "layers", "mlp_cos",
              "what it writes half a row away", "mlp_cos_diff DESC"),
    Statement("Layer {unit} turns the stream most: 1 - cosine is {value}", "layers", "block_influence",
              "the stream half a row away", "block_influence DESC"),
    Statement("In layer {unit} the largest activation of a row is {value} times the median one of its token", "layers",
              "massive_ratio", "the same ratio at another token of the row", "massive_ratio DESC"),
    Statement("Head {unit} sends {value} of its attention to the token itself", "heads", "self_attention",
              "uniform attention", "self_attention_diff DESC", True),
)  # fmt: skip


def rows(atlas: mt.atlas.Atlas) -> list[dict[str, Any]]:
    """The statements that the atlas can make, with their numbers; what lacks its columns is left out."""
    found: list[dict[str, Any]] = []
    for one in STATEMENTS:
        if one.table == "model":
            manifest = atlas.manifest
            row = {name: manifest.get(name) for name in (one.column, f"{one.column}_uniform", f"{one.column}_diff",
                                                         f"{one.column}_diff_lo", f"{one.column}_diff_hi")}  # fmt: skip
            control, unit = row[f"{one.column}_uniform"], ""
        else:
            told = atlas.manifest["tables"].get(one.table, {}).get("columns", {})
            if f"{one.column}_diff_lo" not in told:
                continue
            row = atlas.sql(f"SELECT * FROM {one.table} ORDER BY {one.order} NULLS LAST LIMIT 1").iloc[0].to_dict()
            control = row[told[one.column]["control"]]
            unit = f"{int(row['layer'])}.{int(row['head'])}" if one.table == "heads" else str(int(row["layer"]))
        ends = row[f"{one.column}_diff_lo"], row[f"{one.column}_diff_hi"]
        found.append({
            "statement": one, "unit": unit, "value": row[one.column], "control": control,
            "difference": row[f"{one.column}_diff"], "low": ends[0], "high": ends[1],
        })  # fmt: skip
    return found


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def page(atlas: mt.atlas.Atlas) -> str:
    """The page."""
    m, text = atlas.manifest, atlas.manifest["text"]
    lines = [
        f"# The atlas of {m['model']['name']}",
        "",
        "Ten statements, written by `python tools/atlas_statements.py ATLAS --docs` from an atlas of "
        f"{text['tokens']:,} tokens of {text['source']} (seed {m['seed']}, model {m['model']['fingerprint']}). The "
        "interval is the 95 % interval of effect minus control over rows of the text; units were chosen on the same "
        "rows, so that the strongest of many is a little too strong.",
        "",
        "| statement | effect | control | effect minus control |",
        "|---|---|---|---|",
    ]
    for row in rows(atlas):
        one = row["statement"]
        value, control, difference, low, high = (
            _number(float(row[key]), one.percent) for key in ("value", "control", "difference", "low", "high")
        )
        says = one.says.format(unit=row["unit"], value=value)
        lines.append(f"| {says} | {value} | {control} ({one.control}) | {difference} [{low}, {high}] |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("atlas", help="folder of the atlas")
    parser.add_argument("--docs", action="store_true", help=f"write {PAGE.name} instead of printing")
    given = parser.parse_args()
    made = page(mt.atlas.open(given.atlas))
    if given.docs:
        PAGE.write_text(made)
    else:
        print(made)
