"""What all forms of one dataset are drawn with: its tokens, the scales, the room there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from microtome.view._text import visible


@dataclass(frozen=True)
class Canvas:
    """The room and the scales.

    Attributes:
        tokens: the prompts by their role.
        limits: the end of each scale, by its unit.
        marked: the positions that matter.
        width: of a terminal in cells, or of a figure in pixels.
        top: how many of the strongest to list.
        label: the cells of the row names at the left of all maps.
    """

    tokens: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    marked: tuple[int, ...] = ()
    width: int = 80
    top: int = 5
    label: int = 0

    def token(self, pos: int) -> str:
        """The token at a place; both, clean first, where two prompts differ there."""
        words = [visible(words[pos]) for words in self.tokens.values() if pos < len(words)]
        return "/".join(dict.fromkeys(words))
