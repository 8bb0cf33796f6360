"""`microtome lens` and `microtome contributions`: one prompt explained."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from microtome.cli._model import Json, Opening, opens, out, print_json, working
from microtome.errors import SiteError, error

Prompt = Annotated[str, typer.Argument(help="The prompt, as text.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("lens")(lens)
    app.command("contributions")(contributions)


@opens()
def lens(
    prompt: Prompt,
    top: Annotated[int, typer.Option(min=1, help="Tokens a place.")] = 1,
    every: Annotated[int, typer.Option(min=1, help="Show every so many layers, from the last one down.")] = 1,
    positions: Annotated[
        str | None, typer.Option(help='Positions to show, such as "-3--1" or "0,4"; all that fit without it.')
    ] = None,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """The logit lens: the top token after every layer, at every position, coloured by its probability."""
    from microtome.anatomy import parse_indices
    from microtome.explain import logit_lens
    from microtome.view import terminal

    selection = None if positions is None else parse_indices(positions, "positions")
    opened = opening.open()
    with working("running the prompt"):
        data = logit_lens(opened, prompt, top=top).isel(batch=0)
    size = data.sizes["pos"]
    chosen = list(range(size)) if selection is None else selection.resolve(size)
    if chosen is None:
        allowed = f"0 to {size - 1}, or -{size} to -1"
        raise error(SiteError, f"no positions {positions} in this prompt", allowed=allowed, do="choose among these")
    data = data.isel(layer=sorted(range(data.sizes["layer"] - 1, -1, -every)), pos=chosen)
    if not as_json:
        out.print(terminal(data[["word", "probability"]], out.width))
        return
    names = ("layer", "prompt", "answer", "word", "probability", "answer_probability", "answer_rank", "entropy")
    print_json({"pos": chosen} | {n: data[n].values.tolist() for n in names} | {"provenance": data.attrs})


@opens()
def contributions(
    prompt: Prompt,
    answer: Annotated[str | None, typer.Option(help="Token to explain; the model's own answer without it.")] = None,
    foil: Annotated[str | None, typer.Option(help="Explain the difference to this token.")] = None,
    position: Annotated[int, typer.Option(help="Position in the prompt; negative from the end.")] = -1,
    top: Annotated[int, typer.Option(min=1, help="How many parts to show.")] = 15,
    source: Annotated[bool, typer.Option("--source", help="Say which tokens each head read from.")] = False,
    neurons: Annotated[bool, typer.Option("--neurons", help="Split MLPs into neurons.")] = False,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Who wrote the answer: every part's exact share of the logit; the parts sum to it."""
    from microtome.explain import contributions as measure
    from microtome.view import PartsList, forms, terminal

    detail: list[Any] = [*(["source"] if source else []), *(["neuron"] if neurons else [])]
    opened = opening.open()
    with working("running the prompt"):
        data = measure(opened, prompt, answer=answer, foil=foil, position=position, detail=tuple(detail))
    data = data.isel(batch=0)
    if not as_json:
        out.print(terminal(data, out.width, top=top))
        return
    (parts,) = forms(data).of(PartsList)
    rows = [{"part": p.name, "logits": p.value} | ({"reads": p.reads} if source else {}) for p in parts.parts]
    told = {"answer": str(data["answer"].values), "foil": foil, "position": position, "logit": float(data["logit"])}
    print_json(told | {"gap": float(data["gap"]), "parts": rows, "provenance": data.attrs})
