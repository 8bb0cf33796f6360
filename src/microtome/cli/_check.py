"""`microtome check` and `microtome sites`: is the map of a model true, and what is on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from microtome.cli._model import Device, Dtype, Json, ModelArgument, Opening, Revision, Trust, out, print_json
from microtome.errors import ProofError

if TYPE_CHECKING:
    from microtome.run import Check

COLOURS = {"holds": "green", "fails": "bold red", "does not apply": "dim"}


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("check")(check)
    app.command("sites")(sites)


def check(
    model: ModelArgument = None,
    every: Annotated[bool, typer.Option("--all", help="A row for every place, not for every identity.")] = False,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust: Trust = False,
) -> None:
    """Prove the map of a model: seven identities in every layer. Exit code 4 if one fails."""
    from microtome.run import prove

    opened = Opening(model, device, dtype, revision, trust).map()
    checks = prove(opened)
    failed = [c for c in checks if c.status == "fails"]
    if as_json:
        rows = [vars(c) for c in checks]
        print_json(
            {"model": opened.anatomy.name, "fingerprint": opened.fingerprint, "proven": not failed, "checks": rows}
        )
    else:
        out.print(opened.anatomy.describe(), markup=False)
        out.print(_places(checks) if every else _identities(checks))
        for c in [] if every else failed[:10]:
            out.print(
                f"[bold red]fails[/] {c.identity} at {c.where}: gap {c.gap:.3g}, allowed {c.tolerance:.3g} {c.note}"
            )
        out.print(f"{len(failed)} checks fail: the map is not proven." if failed else "The map is proven.")
    if failed:
        raise typer.Exit(ProofError.exit_code)


def _identities(checks: Sequence[Check]) -> Table:
    table = Table("identity", "places", "worst gap", "allowed", "result", box=None, pad_edge=False)
    for identity in sorted({c.identity for c in checks}):
        mine = [c for c in checks if c.identity == identity]
        for status in ("holds", "fails", "does not apply"):
            some = [c for c in mine if c.status == status]
            if not some:
                continue
            notes = "; ".join(dict.fromkeys(c.note for c in some if c.note))
            result = f"[{COLOURS[status]}]{status}[/]" + (f" [dim]({notes})[/]" if notes else "")
            gap = "" if status == "does not apply" else f"{max(c.gap for c in some):.1e}"
            allowed = "" if status == "does not apply" else f"{max(c.tolerance for c in some):.1e}"
            table.add_row(identity, str(len(some)), gap, allowed, result)
    return table


def _places(checks: Sequence[Check]) -> Table:
    table = Table("identity", "where", "gap", "allowed", "result", box=None, pad_edge=False)
    for c in checks:
        table.add_row(
            c.identity, c.where, f"{c.gap:.1e}", f"{c.tolerance:.1e}", f"[{COLOURS[c.status]}]{c.status}[/] {c.note}"
        )
    return table


def sites(
    model: ModelArgument = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust: Trust = False,
) -> None:
    """List the sites of a model: what each name means, its axes, and why some are not there."""
    from microtome.model import SITES, Site

    anatomy = Opening(model, device, dtype, revision, trust).map().anatomy
    rows: list[dict[str, object]] = []
    for name, spec in SITES.items():
        layers = [s.layer for s in anatomy.taps if s.name == name]
        absent = [why for s, why in anatomy.missing.items() if s.name == name]
        rows.append(
            {
                "site": name,
                "axes": list(spec.dims),
                "meaning": spec.meaning,
                "layers": layers,
                "why_not": "; ".join(dict.fromkeys(absent)),
            }
        )
    if as_json:
        print_json({"model": anatomy.name, "sites": rows})
        return
    table = Table("site", "axes", "meaning", "here", box=None, pad_edge=False)
    for row in rows:
        count = len([s for s in anatomy.taps if s.name == row["site"]])
        whole = count == anatomy.n_layers or Site(str(row["site"])) in anatomy.taps
        here = "yes" if whole else f"{count} of {anatomy.n_layers} layers" if count else "no"
        table.add_row(str(row["site"]), " ".join(row["axes"]), str(row["meaning"]), f"{here} [dim]{row['why_not']}[/]")  # pyright: ignore
    out.print(table)
