"""`microtome check` and `microtome sites`: is the map of a model true, and what is on it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from microtome.cli._examples import shown
from microtome.cli._model import Json, ModelArgument, Opening, opens, out, print_json, working
from microtome.errors import ProofError


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("check", epilog=shown("microtome check path/to/model"))(check)
    app.command("sites", epilog=shown("microtome sites"))(sites)


@opens(ModelArgument)
def check(
    every: Annotated[bool, typer.Option("--all", help="One row per place instead of one per identity.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where any site or weight is not proven.")] = False,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Verify the map of a model, site by site: what is proven, what is missing and why, which methods can run.

    Exit code 4 if its residual stream is not proven, or, with --strict, if any identity fails.
    """
    opened = opening.open(prove=False)
    from microtome.method import refused
    from microtome.model import unproven_stream
    from microtome.view import failed_lines, methods_line, proof_table, proof_verdict

    with working("proving the map"):
        checks = opened.prove()
    failed = [c for c in checks if c.status == "fails"]
    broken, a = unproven_stream(checks), opened.anatomy
    methods = {} if broken else refused(opened)
    prompts = _prompts(opened.tokenizer)
    if as_json:
        missing = {str(site): why for site, why in a.missing.items()} | dict(a.unproven)
        print_json(
            {"model": a.name, "fingerprint": opened.fingerprint, "proven": not failed, "opens": not broken,
             "prompts": prompts, "missing": missing, "methods": methods, "checks": [vars(c) for c in checks]}
        )  # fmt: skip
    else:
        out.print(a.describe(), markup=False)
        out.print(f"prompts: {', '.join(prompts)}")
        out.print(proof_table(checks, every=every))
        if failed and not every:
            out.print(failed_lines(failed))
        if methods:
            out.print(methods_line(methods))
        out.print(proof_verdict(failed, broken))
    if broken or (strict and failed):
        raise typer.Exit(ProofError.exit_code)


def _prompts(tokenizer: Any) -> list[str]:
    """The kinds of prompts that a model takes."""
    if tokenizer is None:
        return ["token ids"]
    chats = getattr(tokenizer, "chat_template", None) is not None
    return ["text", *(["lists of chat messages (by the chat template of its tokenizer)"] if chats else [])]


@opens(ModelArgument)
def sites(
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """List the sites of a model: what each name means, its axes, and why some are missing."""
    opened = opening.open(prove=False)
    opened.prove()
    anatomy = opened.anatomy
    from microtome.anatomy import SITES
    from microtome.view import sites_table

    if not as_json:
        out.print(sites_table(anatomy))
        return
    rows: list[dict[str, object]] = []
    for name, spec in SITES.items():
        layers = [s.layer for s in anatomy.hook_points if s.name == name]
        absent = [why for s, why in anatomy.missing.items() if s.name == name]
        row: dict[str, object] = {"site": name, "axes": list(spec.dims), "meaning": spec.meaning, "layers": layers}
        rows.append(row | {"why_not": "; ".join(dict.fromkeys(absent))})
    print_json({"model": anatomy.name, "sites": rows})
