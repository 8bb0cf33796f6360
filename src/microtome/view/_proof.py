"""The proof of a model's map and its sites in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from microtome.view._text import plain_table

if TYPE_CHECKING:
    from microtome.anatomy import Anatomy
    from microtome.model import IdentityCheck

STATUS = {"holds": "green", "fails": "bold red", "does not apply": "dim"}


def proof_table(checks: Sequence[IdentityCheck], *, every: bool = False) -> Table:
    """The proof of a map: a row for every identity and outcome, or for every place."""
    if every:
        table = plain_table("identity", "where", "gap", "allowed", "result")
        for c in checks:
            skipped = c.status == "does not apply"
            gap, allowed = ("", "") if skipped else (f"{c.gap:.1e}", f"{c.tolerance:.1e}")
            table.add_row(Text(c.identity), Text(c.where), gap, allowed, _result(c.status, [c.note]))
        return table
    table = plain_table("identity", "places", "worst gap", "allowed", "result")
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
        caption = f" {c.identity} at {c.where}: gap {c.gap:.3g}, allowed {c.tolerance:.3g} {c.note}".rstrip()
        lines.append(Text.assemble(("fails", STATUS["fails"]), caption))
    if len(checks) > most:
        lines.append(Text(f"and {len(checks) - most} more: see them all with --all"))
    return Text("\n").join(lines)


def methods_line(methods: Mapping[str, str | None]) -> Text:
    """Which methods can run, and why others cannot, each a line."""
    able = [name for name, why in methods.items() if why is None]
    lines = [Text.assemble(("methods that can run", "green"), f": {len(able)} of {len(methods)}")]
    reasons: dict[str, list[str]] = {}
    for name, why in methods.items():
        if why is not None:
            reasons.setdefault(why.replace(f'the measure "{name}" needs', "needs").rstrip("."), []).append(name)
    lines += [Text.assemble((", ".join(names), "yellow"), f": {why}") for why, names in reasons.items()]
    return Text("\n").join(lines)


def proof_verdict(failed: Sequence[IdentityCheck], broken: IdentityCheck | None) -> str:
    """What a proof comes to, in a line."""
    if broken is not None:
        return f"The residual stream is not proven, so the model does not open: {broken.reason}."
    if failed:
        checks = "one check: what it vouches" if len(failed) == 1 else f"{len(failed)} checks: what they vouch"
        return f"The map is proven but for {checks} for is left out, the rest is used."
    return "The map is proven."


def sites_table(anatomy: Anatomy) -> Table:
    """Every site name: its axes and meaning, and whether this model has it, or why not."""
    from microtome.anatomy import SITES

    table = plain_table("site", "axes", "meaning", "here")
    for name, spec in SITES.items():
        count = len([s for s in anatomy.hook_points if s.name == name])
        whole = count == (anatomy.n_layers if spec.scope == "layer" else 1)
        why = "; ".join(dict.fromkeys(w for s, w in anatomy.missing.items() if s.name == name))
        here = "yes" if whole else f"{count} of {anatomy.n_layers} layers" if count else "no"
        caption = Text.assemble(
            (here, "green" if whole else "yellow" if count else "dim"), (f": {why}" if why else "", "dim")
        )
        table.add_row(name, " ".join(spec.dims), spec.meaning, caption)
    return table
