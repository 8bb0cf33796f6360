"""`microtome sql`: questions to an atlas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from microtome.cli._examples import shown
from microtome.cli._model import Json, out, print_json, working
from microtome.errors import DataError, error


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    example = 'microtome sql "select layer, head, induction from heads order by 3 desc limit 5"'
    app.command("sql", epilog=shown(example))(sql)


def sql(
    query: Annotated[str, typer.Argument(help="SQL, as DuckDB reads it.")],
    atlas: Annotated[Path, typer.Option("--atlas", "-a", help="Folder of the atlas.")] = Path("atlas"),
    rows: Annotated[int, typer.Option(min=1, help="Print at most this many rows.")] = 50,
    as_json: Json = False,
) -> None:
    """Ask an atlas in SQL: its tables layers, heads, neurons and groups, and model, examples, tokens and labels.

    Where they were measured there are group_layers, group_neurons, damage and relations too.
    """
    if not query.strip():
        raise error(DataError, "the query is empty", do='write one, such as "select * from heads limit 5"')
    with working("reading the atlas"):
        from microtome.atlas import open as open_atlas

        found = open_atlas(atlas).sql(query)
    if as_json:
        print_json(json.loads(str(found.to_json(orient="records"))))
        return
    from microtome.view import frame_table

    out.print(frame_table(found, rows))
    if len(found) > rows:
        out.print(f"{len(found) - rows:,} more rows; --rows shows more, --json all")
