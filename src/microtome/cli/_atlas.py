"""`microtome atlas`: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from microtome.cli._model import Json, ModelArgument, Opening, opens, out, print_json, progress


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("atlas")(atlas)


@opens(ModelArgument)
def atlas(
    text: Annotated[
        Path | None, typer.Option(help="Text, JSONL or Parquet file; the standard library's text without it.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of it to read.")] = 20_000,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("atlas"),
    length: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of random tokens and intervals.")] = 0,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Measure every layer, head and neuron of a model, and write its atlas: tables, and pages that open from disk."""
    from microtome.atlas import check_out, write_atlas
    from microtome.stream import read_text

    check_out(output)
    corpus = None if text is None else read_text(text)
    opened = opening.open()
    with progress() as report:
        index = write_atlas(opened, output, corpus=corpus, tokens=tokens, length=length, seed=seed, progress=report)
    manifest = json.loads((output / "manifest.json").read_text())
    tables = {name: str(output / f"{name}.parquet") for name in manifest["tables"]}
    if as_json:
        print_json(
            {
                "index": str(index),
                "manifest": str(output / "manifest.json"),
                "tables": tables,
                "seconds": manifest["cost"]["seconds"],
                "loss": manifest["loss"],
            }
        )
        return
    read, cost = manifest["text"]["tokens"], manifest["cost"]
    out.print(f"pages   {index}", markup=False, soft_wrap=True)
    for name, path in tables.items():
        out.print(f"{name:7} {path}  ({manifest['tables'][name]['rows']:,} rows)", markup=False, soft_wrap=True)
    memory = cost["peak_memory_bytes"] / 2**30
    out.print(
        f"read {read:,} tokens, loss {manifest['loss']:.3f} nats; {cost['seconds']:.0f} s, {memory:.1f} GiB at most"
    )
    if manifest["text"]["short"]:
        out.print(f"the text has fewer tokens than the {tokens:,} that were asked for")
