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
from microtome.cli._options import Budget, Field, GroupBy, Ray, Seed, Texts, Threads, Workers, cluster_of
from microtome.cli._texts import tables_of, text_of
from microtome.errors import ArgumentError, error


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("atlas", epilog=shown("microtome atlas --tokens 100000 -o atlas"))(atlas)


@opens(ModelArgument)
def atlas(
    text: Texts = None,
    field: Field = "text",
    group_by: GroupBy = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few tokens, and no measure that runs the model many times.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Many tokens, and every measure.")] = False,
    tokens: Annotated[
        int | None, typer.Option(min=100, help="How many tokens of it to read; by default 20,000.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("atlas"),
    length: Annotated[int | None, typer.Option(min=2, help="Tokens per row; by default 256.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A measure to run, one of those that `microtome measure` lists, or damage; repeatable."),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            help="A measure, or damage (what each group loses without the neurons of each), to add to the atlas that "
            "stands there, made of the same text; repeatable."
        ),
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
    """Measure every layer, head and neuron of a model, and write its atlas: tables, and pages that open from disk.

    Several texts, or a column of a table, are groups, such as languages or domains: the atlas then says which neurons
    serve each of them.
    """
    from microtome.context import settings

    _check(output, force, quick=quick, full=full, tokens=tokens, length=length, only=only, add=add)
    files = text_of(text, field, group_by)
    with settings(seed=seed, budget=budget):
        opening.check()
        with working(LOADING):
            from microtome.atlas import add_to_atlas, write_atlas
        opened = opening.open()
    profile = "quick" if quick else "full" if full else "default"
    given = tables_of(files, field, group_by)
    cluster = cluster_of(ray, workers, threads)
    with progress() as report, settings(seed=seed, budget=budget, progress=report, ray=cluster):
        if add:
            index = add_to_atlas(opened, output, add, text=given)
        else:
            index = write_atlas(
                opened, output, text=given, measures=only or None, profile=profile, tokens=tokens,
                **({} if length is None else {"length": length}),
            )  # fmt: skip
    _tell(index, output, tokens, as_json=as_json)


def _check(
    output: Path, force: bool, *, quick: bool, full: bool, tokens: int | None, length: int | None,
    only: list[str] | None, add: list[str] | None,
) -> None:  # fmt: skip
    """Refuse, before anything is loaded, what cannot be."""
    from microtome.atlas import check_out
    from microtome.method import sketch

    given = {"--quick": quick, "--full": full, "--only": only, "--add": add}
    if len(both := [name for name, value in given.items() if value]) > 1:
        what = f"{' and '.join(both)} exclude one another"
        raise error(ArgumentError, what, do="choose one of them")
    if add and (tokens is not None or length is not None or force):
        what = "--add takes the tokens and rows that the atlas was made of, and replaces nothing"
        raise error(ArgumentError, what, do="leave --tokens, --length and --force out")
    if not add:
        check_out(output, force)
    for name in (one for one in (*(only or ()), *(add or ())) if one != "damage"):  # which needs a measure, and is none
        if (found := sketch(name).method).kind != "measure":
            what = f'"{found.name}" is a {found.kind}, not a measure'
            raise error(ArgumentError, what, do="name those that `microtome measure` lists")
    if add:
        from microtome.atlas import open as open_atlas

        open_atlas(output)


def _tell(index: Path, output: Path, tokens: int | None, *, as_json: bool) -> None:
    """Say what was written."""
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
        asked = "" if tokens is None else f" the {tokens:,}"
        out.print(f"the text has fewer tokens than{asked} that were asked for")
