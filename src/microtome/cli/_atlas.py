"""`microtome atlas`: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from microtome.cli._examples import shown
from microtome.cli._model import (
    LOADING,
    Json,
    ModelArgument,
    Opening,
    opens,
    out,
    print_json,
    progress,
    working,
)
from microtome.cli._options import Budget, Ray, Seed, Text, Threads, Workers, cluster_of
from microtome.errors import ArgumentError, error
from microtome.files import text_place


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("atlas", epilog=shown("microtome atlas --tokens 100000 -o atlas"))(atlas)


@opens(ModelArgument)
def atlas(
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=100, help="How many tokens of it to read.")] = 20_000,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("atlas"),
    length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 256,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="A measure to run, one of those that `microtome measure` lists; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier atlas.")] = False,
    seed: Seed = 0,
    budget: Budget = None,
    ray: Ray = None,
    workers: Workers = None,
    threads: Threads = 1,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Measure every layer, head and neuron of a model, and write its atlas: tables, and pages that open from disk."""
    from microtome.context import settings
    from microtome.method import from_source, sketch

    from_source("microtome.atlas", "check_out")(output, force)
    for name in measure or ():
        if (found := sketch(name).method).kind != "measure":
            what = f'"{found.name}" is a {found.kind}, not a measure'
            raise error(ArgumentError, what, do="name those that `microtome measure` lists")
    if text is not None:
        text_place(text)
    with settings(seed=seed, budget=budget):
        opening.check()
        with working(LOADING):
            from microtome.atlas import write_atlas
        opened = opening.open()
    cluster = cluster_of(ray, workers, threads)
    with progress() as report, settings(seed=seed, budget=budget, progress=report, ray=cluster):
        index = write_atlas(opened, output, text=text, tokens=tokens, length=length, measures=measure or None)
    manifest = json.loads((output / "manifest.json").read_text())
    tables = {name: str(output / f"{name}.parquet") for name in manifest["tables"]}
    if as_json:
        found = {"index": str(index), "manifest": str(output / "manifest.json"), "tables": tables}
        print_json(
            found | {"seconds": manifest["cost"]["seconds"], "loss": manifest.get("loss"), "thin": manifest["thin"]}
        )
        return
    read, cost = manifest["text"]["tokens"], manifest["cost"]
    out.print(f"pages   {index}", markup=False, soft_wrap=True)
    for name, path in tables.items():
        out.print(f"{name:7} {path}  ({manifest['tables'][name]['rows']:,} rows)", markup=False, soft_wrap=True)
    memory, loss = cost["peak_memory_bytes"] / 2**30, manifest.get("loss")
    loss_text = "" if loss is None else f", loss {loss:.3f} nats"
    out.print(f"read {read:,} tokens{loss_text}; {cost['seconds']:.0f} s, {memory:.1f} GiB at most")
    for sentence in manifest["thin"]:
        out.print(f"thin: {sentence}", markup=False, soft_wrap=True)
    for name, why in manifest["left_out"].items():
        out.print(f"left out {name}: {why}", markup=False, soft_wrap=True)
    if manifest["text"]["short"]:
        out.print(f"the text has fewer tokens than the {tokens:,} that were asked for")
