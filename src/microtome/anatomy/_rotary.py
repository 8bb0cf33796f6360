"""Rotary frequencies that follow the longest row of a forward, so that the rows of a batch would change each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from microtome.errors import PromptError, error


@dataclass(frozen=True)
class RotarySwitch:
    """LongRoPE: where one row is longer than `length`, all rows are turned by other frequencies."""

    length: int

    def refuse(self, lengths: Sequence[int], name: str, new: int = 0) -> None:
        """Refuse rows that would be turned otherwise than each alone.

        Args:
            lengths: of the rows.
            name: of the model.
            new: tokens that a generation may add to each.

        Raises:
            PromptError: they would.
        """
        shortest, longest = min(lengths), max(lengths)
        if longest + new <= self.length or shortest > self.length or (shortest == longest and new):
            return
        raise error(
            PromptError,
            f"the rows of this batch would change each other: where one is longer than {self.length} tokens, {name} "
            "turns all by other frequencies (LongRoPE)",
            got=f"rows of {shortest} to {longest} tokens" + (f", and {new} new ones" if new else ""),
            allowed=f"all at most {self.length} long, or all longer",
            do="run those of either kind by themselves",
        )


def switch_of(config: Any) -> RotarySwitch | None:
    """The switch of a model by its configuration, or None where rows keep to themselves.

    The frequencies of dynamic scaling follow the longest row too, but only beyond the context that runs are held to.
    """
    rope: Any = getattr(config, "rope_parameters", None) or {}
    lengths = [
        int(part.get("original_max_position_embeddings") or config.max_position_embeddings)
        for part in (rope, *rope.values())  # one for all layers, or one for each kind of layer
        if isinstance(part, dict)
        and part.get("rope_type") == "longrope"
        and part["short_factor"] != part["long_factor"]
    ]  # fmt: skip
    return RotarySwitch(min(lengths)) if lengths else None
