"""Characters of a terminal: tokens made visible, text of a width, numbers in few characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = " ▁▂▃▄▅▆▇█"


def visible(word: str) -> str:
    """A token with its white space to be seen, and nothing in it that would move the cursor."""
    shown = word.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() else "�" for c in shown)


def printable(text: str) -> str:
    """Words as they are, with nothing in them that would move the cursor."""
    return "".join(c if c.isprintable() else "�" for c in text)


def fitted(text: str, cells: int) -> str:
    """Text of exactly so many terminal cells; cut text ends in an ellipsis."""
    return set_cell_size(text, cells) if cell_len(text) <= cells else set_cell_size(text, cells - 1) + "…"


def shortened(text: str, cells: int) -> str:
    """Text of at most so many terminal cells."""
    return text if cell_len(text) <= cells else fitted(text, cells).rstrip()


def plain_table(*columns: str) -> Table:
    """A table without lines."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name)
    return table


def short_number(value: float) -> str:
    """A value below a thousand in four characters, or nothing where it rounds to zero: ".93", "-.28", "12.3"."""
    size = abs(value)
    text = f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 or value <= -0.995 else f"{value:.2f}"
    if float(text) == 0:
        return ""
    return text.replace("0.", ".", 1) if size < 0.995 else text


def signed(value: float) -> str:
    """A value with its sign and three decimals, or as a power of ten where those say nothing; a dash if missing."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 1e5:
        return f"{value:+.3g}"
    if abs(value) >= 100:
        return f"{value:+,.1f}".removesuffix(".0")
    return f"{value:+.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:+.1e}"


def unsigned(value: float) -> str:
    """The same without a plus."""
    return signed(value).removeprefix("+")


def interval(low: float, high: float) -> str:
    """The ends of an interval with a space before, or nothing where one of them is missing."""
    return "" if math.isnan(low) or math.isnan(high) else f" [{low:+.2f}, {high:+.2f}]"


def coloured(value: float) -> Text:
    """A value in blue above zero and red below."""
    return Text(signed(value), "dim" if math.isnan(value) else "blue" if value > 0 else "red" if value < 0 else "")


def bar(share: float, cells: int) -> str:
    """A bar of a share of so many terminal cells, to an eighth of a cell; at least an eighth."""
    eighths = max(1, round(8 * cells * min(1.0, abs(share)))) if share else 0
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def histogram(counts: Sequence[float]) -> str:
    """Counts as columns of eighths; whatever is not empty shows."""
    most = max(counts, default=0) or 1
    return "".join(LEVELS[max(1, round(8 * math.sqrt(n / most))) if n else 0] for n in counts)
