"""`microtome harvest`: activations on a text, to disk."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from microtome.cli._examples import shown
from microtome.cli._model import LOADING, Json, ModelArgument, Opening, opens, out, print_json, progress, working
from microtome.cli._options import Field, GroupBy, Ray, Threads, Workers, cluster_of
from microtome.cli._texts import check_columns
from microtome.errors import OutputError, error
from microtome.files import text_place

DATASETS = "datasets:"


class Kept(StrEnum):
    """How values can be kept."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    example = 'microtome harvest --sites "*.resid_post,*.mlp.post" --tokens 100000 -o harvest'
    app.command("harvest", epilog=shown(example))(harvest)


@opens(ModelArgument)
def harvest(
    sites: Annotated[
        str, typer.Option(help='Addresses to keep, with commas between them; "0.mlp.post\\[0-99]" keeps some units.')
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write, or a URL such as s3://bucket/name.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text, JSONL, Parquet or CSV file, a folder of these, or datasets:NAME; "
            "by default the standard library's text."
        ),
    ] = None,
    field: Field = "text",
    group_by: GroupBy = None,
    kept: Annotated[Kept | None, typer.Option("--as", help="How values are kept; by default as the model's.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="How many tokens of the text to read; all if left out.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens per row; no row holds two documents.")] = 256,
    shuffle: Annotated[int | None, typer.Option(min=0, help="Seed by which the documents are shuffled.")] = None,
    shard_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per shard; by default 512 MiB of them.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the checksums of what is there already.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a harvest of something else.")] = False,
    ray: Ray = None,
    workers: Workers = None,
    threads: Threads = 1,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Write the activations of sites on every token of a text to disk. Run again, it goes on where it was ended."""
    from microtome.anatomy import parse_list

    parse_list(sites)
    check_columns(text, field, group_by)
    if text is not None and not text.startswith(DATASETS):
        text_place(text)
    if "://" not in output and Path(output).is_file():
        raise error(OutputError, f"{output} is a file", allowed="a folder", do="name another place")
    opening.check()
    with working(LOADING):
        from microtome.context import settings
        from microtome.stream import corpus_of
        from microtome.stream import harvest as write
    opened, began, read = opening.open(), time.perf_counter(), None
    if text is not None:
        read = corpus_of(text if text.startswith(DATASETS) else Path(text), field=field, group=group_by)
    with progress() as report, settings(progress=report, ray=cluster_of(ray, workers, threads)):
        made = write(
            opened, sites=sites, out=output, text=read, dtype=None if kept is None else kept.value, tokens=tokens,
            length=length, seed=shuffle, shard_tokens=shard_tokens, force=force, verify=verify,
        )  # fmt: skip
    facts = {
        "place": output, "tokens": len(made), "documents": made.manifest["documents"], "shards": len(made.shards),
        "bytes": made.bytes, "dtype": made.dtype, "sites": {name: list(shape) for name, shape in made.sites.items()},
        "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip
    if as_json:
        print_json(facts)
        return
    out.print(f"written to {output}", markup=False, soft_wrap=True)
    size = f"{made.bytes / 2**20:,.1f} MiB of {made.dtype} in {facts['shards']:,} shards"
    out.print(f"{facts['tokens']:,} tokens of {facts['documents']:,} documents, {len(made.sites)} sites; {size}")
