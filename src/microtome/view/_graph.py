"""A variable over (sender, receiver) that is a circuit: its nodes by layer and head, and its strongest edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.text import Text

from microtome.shown import shown
from microtome.view import _svg
from microtome.view._dataset import beside, labels, numbers, title, unit
from microtome.view._page_values import rounded
from microtome.view._text import plain_table, printable, unsigned, visible

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import RenderableType

    from microtome.view._canvas import Canvas

MOST = 4_000
"""Edges that a page holds, the strongest."""


@shown
@dataclass(frozen=True, eq=False)
class EdgeGraph:
    """Edges between nodes, strongest first.

    Attributes:
        name, title, unit: of the variable.
        nodes: by name, with layer and column: the head, or the number of heads for an MLP; the embedding is before the
            first layer, and the logits are behind the last one.
        edges: of each, the numbers of sender and node, which input, its value, and its exact value or None.
        size: how many edges there are in all.
    """

    name: str
    title: str
    unit: str
    nodes: tuple[tuple[str, int, int], ...]
    edges: tuple[tuple[int, int, str, float, float | None], ...]
    size: int
    kind: Literal["graph"] = "graph"

    @property
    def names(self) -> tuple[str, ...]:
        """The variable."""
        return (self.name,)

    def terminal(self, canvas: Canvas) -> list[RenderableType]:
        """The strongest edges."""
        known = any(edge[4] is not None for edge in self.edges)
        table = plain_table("edge", printable(self.unit) or "value", *(["exact"] if known else []))
        for u, v, slot, value, exact in self.edges[: canvas.top]:
            cells = [f"{visible(self.nodes[u][0])} → {printable(self._into(v, slot))}", unsigned(value)]
            table.add_row(*cells, *([] if not known else ["–" if exact is None else unsigned(exact)]))
        rest = f"{self.size - min(canvas.top, len(self.edges)):,} more edges"
        return [Text(printable(self.title), "bold"), table, Text(rest, "dim"), Text()]

    def _into(self, node: int, slot: str) -> str:
        name = self.nodes[node][0]
        return name if slot == "in" else f"{name} {slot}"

    def figure(self, canvas: Canvas) -> str:
        """The strongest edges as lines between nodes."""
        columns = max((column for _, _, column in self.nodes), default=0)
        layers = [layer for _, layer, _ in self.nodes]
        top = max(layers, default=0)
        at = [(40 + 22.0 * column, 12 + 14.0 * (top - layer)) for _, layer, column in self.nodes]
        most = max((abs(edge[3]) for edge in self.edges), default=1.0) or 1.0
        parts: list[str] = []
        for u, v, _, value, _ in self.edges[: max(canvas.top, 60)]:
            (x, y), (w, z) = at[u], at[v]
            colour, share = (_svg.HOT if value >= 0 else _svg.COLD), 0.2 + 0.8 * abs(value) / most
            line = f'd="M{x:.1f} {y:.1f}L{w:.1f} {z:.1f}"'
            parts.append(f'<path {line} stroke="{colour}" stroke-opacity="{share:.2f}"/>')
        for (name, _, _), (x, y) in zip(self.nodes, at, strict=True):
            told = f"<title>{_svg.escaped(name)}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="currentColor">{told}</circle>')
        drawn = _svg.picture(60 + 22.0 * columns, 24 + 14.0 * (top + 1), parts, self.title)
        return _svg.figure(self.title, self.unit, drawn, [f"{self.size:,} edges"])

    def section(self, canvas: Canvas) -> dict[str, Any]:
        """The nodes with their places and the strongest edges."""
        edges = [[u, v, slot, rounded(x), None if e is None else rounded(e)] for u, v, slot, x, e in self.edges]
        return {
            "kind": self.kind, "title": self.title, "name": self.name, "unit": self.unit,
            "nodes": [list(node) for node in self.nodes], "edges": edges, "size": self.size,
        }  # fmt: skip


def edge_graph(data: xr.Dataset, name: str) -> EdgeGraph:
    """The edges that have a value, as a graph of the nodes that they join."""
    values, exact = numbers(data, name), beside(data, name, "_exact")
    senders, receivers = labels(data, "sender"), labels(data, "receiver")
    order = np.argsort(-np.abs(np.nan_to_num(values)), axis=None, kind="stable")
    some = [divmod(int(i), len(receivers)) for i in order if not np.isnan(values.flat[i])]
    inner = [label for label in (*senders, *receivers) if "." in label]
    layers = 1 + max((int(label.partition(".")[0]) for label in inner), default=0)
    heads = 1 + max((int(label.partition("[")[2][:-1]) for label in inner if label.endswith("]")), default=0)
    places: dict[str, int] = {}
    nodes: list[tuple[str, int, int]] = []

    def place(label: str) -> int:
        if label not in places:
            places[label] = len(nodes)
            nodes.append((label, *_place(label, heads, layers, senders)))
        return places[label]

    edges: list[tuple[int, int, str, float, float | None]] = []
    for u, v in some[:MOST]:
        node, slot = _node(receivers[v])
        known = None if exact is None or np.isnan(exact[u, v]) else float(exact[u, v])
        edges.append((place(senders[u]), place(node), slot, float(values[u, v]), known))
    return EdgeGraph(name, title(data, name), unit(data, name), tuple(nodes), tuple(edges), len(some))


def _node(receiver: str) -> tuple[str, str]:
    """The node that a receiver is an input of, by the name under which it sends, and which input."""
    layer, _, rest = receiver.partition(".")
    if rest.startswith("attn."):
        return f"{layer}.attn.z{rest[6:]}", rest[5]
    return (f"{layer}.mlp_out" if rest else receiver), "in"


def _place(label: str, heads: int, layers: int, senders: tuple[str, ...]) -> tuple[int, int]:
    """Layer and column of a node."""
    layer, _, rest = label.partition(".")
    if not rest:
        return (layers, heads // 2) if label not in senders else (-1, heads // 2 + senders.index(label))
    return int(layer), heads if rest == "mlp_out" else int(rest.partition("[")[2].rstrip("]"))
