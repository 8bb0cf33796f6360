"""Results in a terminal: tables of `rich`, made from the datasets and checks that the methods return.

Nothing that comes from a model or a user is read as markup, and widths are counted in terminal cells, so that any token
can be shown. Colours only repeat what the numbers say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import xarray as xr

    from microtome.anatomy import Anatomy
    from microtome.model import IdentityCheck

STATUS = {"holds": "green", "fails": "bold red", "does not apply": "dim"}
WIDEST, NARROWEST, NUMBER = 14, 4, 4  # cells of a token at most and at least, and of " .77"
UNLIKELY, LIKELY = (44, 48, 56), (16, 122, 72)  # background of probability 0 and 1
BAR = 24


def visible(word: str) -> str:
    """A token with its white space to be seen, and nothing in it that would move the cursor."""
    shown = word.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() else "�" for c in shown)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name)
    return table


# ------------------------------------------------------------------------------------------------------ proof and sites


def proof_table(checks: Sequence[IdentityCheck], *, every: bool = False) -> Table:
    """The proof of a map: a row for every identity and outcome, or for every place."""
    if every:
        table = _table("identity", "where", "gap", "allowed", "result")
        for c in checks:
            skipped = c.status == "does not apply"
            gap, allowed = ("", "") if skipped else (f"{c.gap:.1e}", f"{c.tolerance:.1e}")
            table.add_row(Text(c.identity), Text(c.where), gap, allowed, _result(c.status, [c.note]))
        return table
    table = _table("identity", "places", "worst gap", "allowed", "result")
    for identity in sorted({c.identity for c in checks}):
        for status in STATUS:
            some = [c for c in checks if c.identity == identity and c.status == status]
            if not some:
                continue
            skipped = status == "does not apply"
            gap = "" if skipped else f"{max(c.gap for c in some):.1e}"
            allowed = "" if skipped else f"{max(c.tolerance for c in some):.1e}"
            table.add_row(Text(identity), str(len(some)), gap, allowed, _result(status, [c.note for c in some]))
    return table


def _result(status: str, notes: Sequence[str]) -> Text:
    note = "; ".join(dict.fromkeys(n for n in notes if n))
    return Text.assemble((status, STATUS[status]), (f" ({note})" if note else "", "dim"))


def failed_lines(checks: Sequence[IdentityCheck], most: int = 10) -> Text:
    """The places where a proof fails, a line each."""
    lines: list[Text] = []
    for c in checks[:most]:
        told = f" {c.identity} at {c.where}: gap {c.gap:.3g}, allowed {c.tolerance:.3g} {c.note}".rstrip()
        lines.append(Text.assemble(("fails", STATUS["fails"]), told))
    if len(checks) > most:
        lines.append(Text(f"and {len(checks) - most} more: see them all with --all"))
    return Text("\n").join(lines)


def sites_table(anatomy: Anatomy) -> Table:
    """Every site name: its axes and meaning, and whether this model has it, or why not."""
    from microtome.anatomy import SITES

    table = _table("site", "axes", "meaning", "here")
    for name, spec in SITES.items():
        count = len([s for s in anatomy.hook_points if s.name == name])
        whole = count == (anatomy.n_layers if spec.scope == "layer" else 1)
        why = "; ".join(dict.fromkeys(w for s, w in anatomy.missing.items() if s.name == name))
        here = "yes" if whole else f"{count} of {anatomy.n_layers} layers" if count else "no"
        told = Text.assemble(
            (here, "green" if whole else "yellow" if count else "dim"), (f": {why}" if why else "", "dim")
        )
        table.add_row(name, " ".join(spec.dims), spec.meaning, told)
    return table


# ----------------------------------------------------------------------------------------------------------------- lens


def lens_table(data: xr.Dataset, width: int, *, every: int = 1, positions: Sequence[int] | None = None) -> Group:
    """The logit lens of one prompt: layers from the last down, positions from left to right, the top tokens in cells.

    Args:
        data: what `logit_lens` returned, for one prompt; each cell shows as many tokens as it has ranks.
        width: of the terminal, in cells. The last positions that fit are shown, and how many are left out is said.
        every: show every so many layers.
        positions: which to show; all by default.
    """
    wanted = list(range(data.sizes["pos"])) if positions is None else list(positions)
    layers = list(range(data.sizes["layer"] - 1, -1, -every))
    words, prompt = data["word"].values, [visible(str(w)) for w in data["prompt"].values]
    sizes: dict[int, int] = {}
    room = width - len("layer")
    for pos in reversed(wanted):
        shown = [cell_len(visible(str(w))) for w in words[layers, pos].reshape(-1)]
        size = min(max(*shown, cell_len(prompt[pos]) - NUMBER, len(str(pos)) - NUMBER, NARROWEST), WIDEST)
        if room < size + NUMBER + 1 and sizes:
            break
        sizes[pos], room = size, room - size - NUMBER - 1
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
    table.add_column("layer", justify="right", no_wrap=True)
    chosen = [pos for pos in wanted if pos in sizes]
    for pos in chosen:
        cells = sizes[pos] + NUMBER
        head = Text.assemble((_fit(prompt[pos], cells) + "\n", "bold"), (f"@{pos}", "dim"))
        table.add_column(head, no_wrap=True, width=cells)
    last = data.sizes["layer"] - 1
    for layer in layers:
        table.add_row("out" if layer == last else str(layer), *(_cell(data, layer, pos, sizes[pos]) for pos in chosen))
    left = len(wanted) - len(chosen)
    told = f"{left} earlier {'position' if left == 1 else 'positions'} left out: name some with --positions"
    return Group(table, Text(told, "dim")) if left else Group(table)


def _cell(data: xr.Dataset, layer: int, pos: int, size: int) -> Text:
    lines: list[Text] = []
    values = zip(data["word"].values[layer, pos], data["probability"].values[layer, pos], strict=True)
    for word, p in values:
        mixed = [round(a + (b - a) * float(p)) for a, b in zip(UNLIKELY, LIKELY, strict=True)]
        style = Style(color="white", bgcolor=f"rgb({mixed[0]},{mixed[1]},{mixed[2]})")
        number = "1.0" if p >= 0.995 else f"{float(p):.2f}"[1:]
        lines.append(Text(f"{_fit(visible(str(word)), size)} {number}", style=style))
    return Text("\n").join(lines)


def _fit(text: str, cells: int) -> str:
    """Text of exactly so many terminal cells; cut text ends in an ellipsis."""
    return set_cell_size(text, cells) if cell_len(text) <= cells else set_cell_size(text, cells - 1) + "…"


# -------------------------------------------------------------------------------------------------------- contributions


@dataclass(frozen=True)
class Part:
    """A part of the model, what it adds to the answer in logits, and the tokens that it read most from."""

    name: str
    logits: float
    reads: tuple[tuple[str, float], ...] = ()


def parts_of(data: xr.Dataset) -> list[Part]:
    """The parts of `contributions` for one prompt, largest first; those that add nothing are left out."""
    parts = [Part("embedding", float(data["embed"])), Part("constant", float(data["constant"]))]
    words = [str(w) for w in data["source"].values] if "source" in data.coords else []
    for layer in data["layer"].values.tolist():
        at = data.sel(layer=layer)
        for head, value in enumerate(at["attn"].values.tolist()):
            reads = at["attn_source"].values[head].tolist() if "attn_source" in at else []
            best = sorted(zip(words, reads, strict=False), key=lambda read: -abs(read[1]))[:3]
            parts.append(Part(f"L{layer}H{head}", value, tuple(best)))
        parts.append(Part(f"L{layer} attention bias", float(at["attn_bias"])))
        if "mlp_neuron" in at:
            parts += [Part(f"L{layer}N{n}", v) for n, v in enumerate(at["mlp_neuron"].values.tolist())]
            parts.append(Part(f"L{layer} MLP bias", float(at["mlp_bias"])))
        else:
            parts.append(Part(f"L{layer} MLP", float(at["mlp"])))
    return sorted((part for part in parts if part.logits != 0.0), key=lambda part: -abs(part.logits))


def contributions_table(data: xr.Dataset, *, top: int = 15) -> Group:
    """The largest parts of an answer with bars, what the others add together, and their sum beside the logit.

    Args:
        data: what `contributions` returned, for one prompt.
        top: how many parts to show.
    """
    parts = parts_of(data)
    sources = "attn_source" in data
    table = _table("part", "logits", "", *(["reads from"] if sources else []))
    table.columns[1].justify = "right"
    most = max((abs(part.logits) for part in parts), default=1.0)
    for part in parts[:top]:
        bar = Text("█" * max(1, round(BAR * abs(part.logits) / most)), style="green" if part.logits > 0 else "red")
        reads = Text(", ".join(f"{visible(word)} {value:+.2f}" for word, value in part.reads))
        table.add_row(part.name, f"{part.logits:+.3f}", bar, *([reads] if sources else []))
    if rest := parts[top:]:
        table.add_row(f"{len(rest):,} more", f"{sum(part.logits for part in rest):+.3f}")
    table.add_row("sum", f"{sum(part.logits for part in parts):+.3f}", style="bold")
    of = f"the logit of {visible(str(data['answer'].values))}"
    of += f" minus that of {visible(str(data['foil'].values))}" if "foil" in data.coords else ""
    return Group(table, Text(f"{of} is {float(data['logit']):+.3f}; gap {float(data['gap']):.1e}"))
