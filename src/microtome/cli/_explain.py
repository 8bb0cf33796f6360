"""`microtome lens` and `microtome contributions`: one prompt explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from microtome.cli._model import Device, Dtype, Json, ModelOption, Opening, Revision, Trust, out, print_json

if TYPE_CHECKING:
    import xarray as xr

Prompt = Annotated[str, typer.Argument(help="The prompt, as text.")]
CELL = 10


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("lens")(lens)
    app.command("contributions")(contributions)


def visible(word: str) -> str:
    """A token with its white space to be seen."""
    return word.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


def lens(
    prompt: Prompt,
    every: Annotated[int, typer.Option(min=1, help="Show every so many layers.")] = 1,
    top: Annotated[int, typer.Option(min=1, help="Tokens a place in --json.")] = 3,
    as_json: Json = False,
    model: ModelOption = None,
    device: Device = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust: Trust = False,
) -> None:
    """The logit lens: the top token after every layer, at every position, coloured by its probability."""
    from microtome.explain import logit_lens

    data = logit_lens(Opening(model, device, dtype, revision, trust).open(), prompt, top=top).isel(batch=0)
    if as_json:
        names = ("word", "probability", "answer_probability", "answer_rank", "entropy")
        print_json(
            {
                "prompt": data["prompt"].values.tolist(),
                "answer": data["answer"].values.tolist(),
                **{n: data[n].values.tolist() for n in names},
                "provenance": data.attrs,
            }
        )
        return
    out.print(_lens_table(data, every))


def _lens_table(data: xr.Dataset, every: int) -> Table:
    positions = data.sizes["pos"]
    room = max(1, (out.width - 6) // (CELL + 1))
    first = max(0, positions - room)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_footer=first > 0)
    table.add_column("layer", justify="right", footer="")
    for pos in range(first, positions):
        note = f"{first} more to the left" if pos == first and first else ""
        table.add_column(visible(str(data["prompt"].values[pos]))[:CELL], footer=note, no_wrap=True, width=CELL)
    layers = list(range(data.sizes["layer"] - 1, -1, -every))
    for layer in layers:
        cells = [_cell(data, layer, pos) for pos in range(first, positions)]
        table.add_row("out" if layer == data.sizes["layer"] - 1 else str(layer), *cells)
    return table


def _cell(data: xr.Dataset, layer: int, pos: int) -> Text:
    word, p = str(data["word"].values[layer, pos, 0]), float(data["probability"].values[layer, pos, 0])
    shade = 236 + round(p * 6) if p < 0.5 else 28 if p < 0.8 else 34
    number = f"{p:.2f}"[1:] if p < 0.995 else "1.0"
    return Text(f"{visible(word)[: CELL - 4]:{CELL - 3}}{number}", style=f"white on color({shade})", no_wrap=True)


def contributions(
    prompt: Prompt,
    answer: Annotated[str | None, typer.Option(help="Token to explain; the model's own answer without it.")] = None,
    foil: Annotated[str | None, typer.Option(help="Explain the difference to this token.")] = None,
    position: Annotated[int, typer.Option(help="Position in the prompt; negative from the end.")] = -1,
    top: Annotated[int, typer.Option(min=1, help="How many parts to show.")] = 15,
    source: Annotated[bool, typer.Option("--source", help="Say which tokens each head read from.")] = False,
    neurons: Annotated[bool, typer.Option("--neurons", help="Split MLPs into neurons.")] = False,
    as_json: Json = False,
    model: ModelOption = None,
    device: Device = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust: Trust = False,
) -> None:
    """Who wrote the answer: every part's exact share of the logit; the parts sum to it."""
    from microtome.explain import contributions as measure

    detail: list[Any] = [*(["source"] if source else []), *(["neuron"] if neurons else [])]
    opened = Opening(model, device, dtype, revision, trust).open()
    data = measure(opened, prompt, answer=answer, foil=foil, position=position, detail=tuple(detail)).isel(batch=0)
    parts = sorted(_parts(data, neurons), key=lambda part: -abs(part[1]))
    told, logit, gap = str(data["answer"].values), float(data["logit"]), float(data["gap"])
    if as_json:
        print_json(
            {
                "answer": told,
                "foil": foil,
                "logit": logit,
                "gap": gap,
                "provenance": data.attrs,
                "parts": [{"part": n, "logits": v, "reads": r} for n, v, r in parts],
            }
        )
        return
    of = f"logit of {visible(told)!r}" + (f" minus {visible(foil)!r}" if foil else "")
    table = Table("part", "logits", "", *(["reads from"] if source else []), box=None, pad_edge=False)
    most = max(abs(v) for _, v, _ in parts)
    for name, value, reads in parts[:top]:
        bar = Text("█" * max(1, round(24 * abs(value) / most)), style="green" if value > 0 else "red")
        table.add_row(
            name, f"{value:+.3f}", bar, *([", ".join(f"{visible(w)} {x:+.2f}" for w, x in reads)] if source else [])
        )
    rest = sum(v for _, v, _ in parts[top:])
    table.add_row(f"{max(0, len(parts) - top)} more", f"{rest:+.3f}", "")
    table.add_section()
    table.add_row("sum", f"{sum(v for _, v, _ in parts):+.3f}", f"{of} {logit:+.3f}, gap {gap:.1e}")
    out.print(table)


def _parts(data: xr.Dataset, neurons: bool) -> list[tuple[str, float, list[tuple[str, float]]]]:
    parts: list[tuple[str, float, list[tuple[str, float]]]] = [
        ("embedding", float(data["embed"]), []),
        ("constant", float(data["constant"]), []),
    ]
    words = [str(w) for w in data["source"].values] if "source" in data.coords else []
    for layer in data["layer"].values.tolist():
        at = data.sel(layer=layer)
        for head, value in enumerate(at["attn"].values.tolist()):
            reads = at["attn_source"].values[head] if "attn_source" in at else []
            best = sorted(zip(words, map(float, reads), strict=False), key=lambda wx: -abs(wx[1]))[:3]
            parts.append((f"L{layer}H{head}", value, best))
        parts.append((f"L{layer} attention bias", float(at["attn_bias"]), []))
        if neurons and "mlp_neuron" in at:
            parts += [(f"L{layer}N{n}", v, []) for n, v in enumerate(at["mlp_neuron"].values.tolist())]
            parts.append((f"L{layer} MLP bias", float(at["mlp_bias"]), []))
        else:
            parts.append((f"L{layer} MLP", float(at["mlp"]), []))
    return [part for part in parts if part[1] != 0.0]
