"""The page on families, docs/families.md, made of what `tools/families.py` wrote down."""

import re
from typing import Any

OF_OTHER_LAYERS = re.compile("the layer is (not )?a mixture")
"""Reasons of measures of experts in models without, and of plain neurons in mixtures: they are no lack."""
STATES = {
    "in full": "opens, and has every site that its architecture has; every check holds",
    "in part": "opens without some sites that its architecture has; every check of what is there holds",
    "refused": "does not open, and says why",
    "wrong": "opens, and a check fails",
    "crashes": "an operation ends in another way than with a result or an error of Microtome",
    "cannot be built": "no tiny model of it can be made here",
}
HEAD = """# Families

Every model type for which the installed `transformers` {version} has a causal model, as `python tools/families.py`
found it. Each is built small from its configuration alone, with all parameters random, and opened. What opens is
checked against plain PyTorch hooks and plain `transformers`, on prompts of 40 tokens, which is more than every window,
top-k and chunk that it was given:

| check | what must hold |
|---|---|
{checks}

A gap is wrong above {tolerance:g} of the effect, and any gap of the first check is. Then every
[method](methods.md) is tried, and must run or refuse by name. A check does not apply where `transformers` returns
nothing to compare with.

| | | before | now |
|---|---|---|---|
{counts}

{shares}

"Before" is what the script found when it was first run. Numbers of every check and method are in
`benchmarks/results/families.json`.

| family | opens | stream | what is missing and why, or why it is refused |
|---|---|---|---|
{rows}
"""


def render(record: dict[str, Any], checks: dict[str, str], tolerance: float) -> str:
    """The page, from what was written down and from what each check says it checks."""
    now, before = record["counts"], record["before"]
    counts = [
        f"| {state} | {meaning} | {before[state]} | {now[state]} |"
        for state, meaning in [("families", "in the causal mapping"), ("built", "as tiny models"), *STATES.items()]
    ]
    opened = [row for row in record["families"] if row["checks"]]
    proven = sum(row.get("stream", False) for row in opened)
    built = max(now["built"], 1)
    shares = (
        f"Of the {now['built']} that can be built, {proven} ({proven / built:.0%}) open with the residual stream "
        f"proven, and {now['in full']} ({now['in full'] / built:.0%}) in full."
    )
    return HEAD.format(
        version=record["versions"]["transformers"],
        checks="\n".join(f"| {name} | {_cell(text)} |" for name, text in checks.items()),
        tolerance=tolerance,
        counts="\n".join(counts),
        shares=shares,
        rows="\n".join(map(_row, record["families"])),
    )


def _row(row: dict[str, Any]) -> str:
    stream = "" if not row["checks"] else "proven" if row.get("stream") else "not proven"
    return f"| {row['family']} | {row['state']} | {stream} | {_cell('; '.join(_reasons(row)))} |"


def _reasons(row: dict[str, Any]) -> list[str]:
    """Why a family is not in full: what it says itself, and what is missing, sites of one reason together."""
    said = [row["why"]] if row["why"] else []
    refused = [name for name, check in row["checks"].items() if check["state"] == "refused"]
    refused += [
        name
        for name, (state, why) in row["methods"].items()
        if state == "refused" and name not in refused and not OF_OTHER_LAYERS.search(why)
    ]
    sites: dict[tuple[str, str], list[str]] = {}
    for lack in row["missing"]:
        layers = "" if lack["layers"] == [None] else _in_layers(lack["layers"], row.get("layers", 0))
        sites.setdefault((lack["why"], layers), []).append(f"`{lack['site']}`")
    said += [f"no {', '.join(names)}{layers}: {why}" for (why, layers), names in sites.items()]
    return said + ([f"refused by name: {', '.join(refused)}"] if refused else [])


def _in_layers(layers: list[int], of: int) -> str:
    if len(layers) == of:
        return ""
    return f" in layer {layers[0]}" if len(layers) == 1 else f" in layers {', '.join(map(str, layers))}"


def _cell(text: str) -> str:
    """Text that stands in a table, of at most a few lines."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 400 else text[:400].rsplit(" ", 1)[0] + " …"
