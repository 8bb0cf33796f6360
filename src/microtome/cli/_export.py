"""`microtome export`: a changed model as an ordinary checkpoint."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from microtome.cli._examples import shown
from microtome.cli._model import LOADING, Json, Opening, opens, out, print_json, working
from microtome.errors import ArgumentError, OutputError, error
from microtome.files import whole_file

ENDING = ".safetensors"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("export", epilog=shown("microtome export edit.safetensors -o edited"))(export)


@opens()
def export(
    files: Annotated[
        list[Path], typer.Argument(metavar="CHANGES...", help=f"Files of changes or of edits ({ENDING}), in order.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what the folder holds.")] = False,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Write a changed model as an ordinary checkpoint, which opens in transformers without Microtome.

    What a run under the edits gives is compared with what transformers gives of the checkpoint, before it is renamed.
    """
    for file in files:
        whole_file(file, (ENDING,), "as a change")
    if output.is_file():
        raise error(OutputError, f"{output} is a file", allowed="a folder", do="name another place")
    opening.check()
    with working(LOADING):
        import microtome as mt
    read: list[Any] = [mt.change.read(file) for file in files]
    changes = [one for one in read if not isinstance(one, list)]
    edits = [edit for one in read if isinstance(one, list) for edit in one]
    if any(isinstance(a, list) and not isinstance(b, list) for a, b in pairwise(read)):
        raise error(ArgumentError, "changes come before edits, which act on what they give", do="give edits last")
    opened = opening.open()
    with working("writing the checkpoint"):
        mt.change.export(opened, output, changes, edits, force=force)
    steps = [step for change in changes for step in change.steps]
    facts: dict[str, Any] = {
        "place": str(output), "model": opened.anatomy.name, "changes": [s.reason or s.method for s in steps],
        "edits": [repr(edit) for edit in edits], "bytes": sum(p.stat().st_size for p in output.iterdir()),
    }  # fmt: skip
    if as_json:
        print_json(facts)
        return
    out.print(f"written to {output}: {facts['bytes'] / 2**20:,.1f} MiB", markup=False, soft_wrap=True)
    for text in (*facts["changes"], *facts["edits"]):
        out.print(f"  {text}", markup=False, soft_wrap=True)
