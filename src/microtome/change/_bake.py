"""Standing edits as changes of weights, where the architecture has a place for them.

Formula:  an edit of the selected units x -> x A + c; A and c are read off what the edit makes of unit vectors.
          of what a projection reads (attn.z, mlp.post):  W := A W,  b := b + c W
          of what it writes (attn_out, mlp_out):          W := W A,  b := b A + c
          of the stream behind it (resid_mid, resid_post), A = 1:     b := b + c
Cost:     one product of two matrices an edit.
Check:    logits equal those of runs under the edits; tests/laws/test_bake.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.anatomy import Site
from microtome.change._change import Change, of
from microtome.change._delta import Delta, Values
from microtome.change._weight import weight_at
from microtome.change._written import trying, write
from microtome.edit import Add, Edit, Frame, Mean, Project, Rotate, Scale, Selection, Set, SiteEdit, Zero
from microtome.errors import EditError, SiteError, error
from microtome.model import Model

AFFINE = (Add, Set, Scale, Zero, Mean, Project, Rotate)
READ = {"mlp.post": ("W_out", "b_out"), "attn.z": ("W_O", "b_O")}
WRITTEN = {"mlp_out": ("W_out", "b_out"), "attn_out": ("W_O", "b_O")}
STREAM = {"resid_post": ("W_out", "b_out"), "resid_mid": ("W_O", "b_O")}
TOLERANCE = 1e-4
"""How far an edit may be from the affine map of its unit vectors, as a share of what it makes."""


@dataclass(frozen=True)
class _Affine:
    """What an edit does to the vectors of the units it selects: x -> x A + c."""

    matrix: Float[Tensor, "width width"]
    constant: Float[Tensor, " width"]


def bake(model: Model, edits: Edit | Iterable[Edit], *, reason: str = "") -> Change:
    """The change of weights that does what standing edits do; the model is unchanged.

    Source:   projecting a direction out of what is written, Arditi et al., 2024 (arXiv 2406.11717).
              Departs: any affine edit, of what is read too, with its constant in the bias.
    Cost:     one product of two matrices an edit, and that of `of`.
    Check:    logits equal those of runs under the edits; tests/laws/test_bake.py.

    Args:
        model: the model.
        edits: affine edits of ``attn.z``, ``mlp.post``, ``attn_out`` or ``mlp_out``, or additions to ``resid_mid`` or
            ``resid_post``, of whole layers, heads or neurons at all positions; in order.
        reason: why, in a sentence.

    Returns:
        A `Change`.

    Raises:
        EditError: an edit is no affine map of such a site, or names positions or rows.
        SiteError: the architecture has no place for it, such as a bias: `with_biases` gives one, where it can.
    """
    listed: list[Edit] = [edits] if isinstance(edits, Edit) else list(edits)
    if not listed:
        raise error(EditError, "there is no edit to bake", do="give at least one")
    names: dict[str, None] = {}
    with trying(model) as kept:
        for edit in listed:
            deltas = _of_edit(model, edit)
            write(model, deltas, kept)
            names |= dict.fromkeys(deltas)
        final: Mapping[str, Delta] = {name: Values(weight_at(model, name).read()) for name in names}
    if not final:
        raise error(EditError, "these edits do nothing", got=", ".join(map(repr, listed)), do="leave them out")
    given = {"edits": [repr(edit) for edit in listed]}
    return of(model, final, reason=reason or "standing edits", method="bake", parameters=given)


def _of_edit(model: Model, edit: Edit) -> dict[str, Delta]:
    """What an edit changes, at each of its sites."""
    if not isinstance(edit, AFFINE) or (isinstance(edit, Mean) and edit.mean is None):
        raise error(EditError, f"{edit!r} is no affine map of a site", got=type(edit).__name__,
                    allowed=", ".join(kind.__name__ for kind in AFFINE), do="keep it as an edit")  # fmt: skip
    address = edit.address
    if edit.rows is not None or isinstance(address.positions, str) or not address.positions.is_all:
        do = "name the site without positions and rows, or keep it as an edit"
        raise error(EditError, f"{edit!r} acts at some rows or positions, and weights act at all", do=do)
    places = READ | WRITTEN | STREAM
    if address.name not in places:
        allowed = ", ".join(places)
        raise error(
            EditError, f"no weight does what {edit!r} does", allowed=f"edits of {allowed}", do="keep it as an edit"
        )
    found: dict[str, Delta] = {}
    for site in model.anatomy.sites(address):
        found |= _at_site(model, edit, site)
    return found


def _at_site(model: Model, edit: SiteEdit, site: Site) -> dict[str, Delta]:
    """What an edit changes at one site."""
    weight, bias = (READ | WRITTEN | STREAM)[site.name]
    layer, size = f"{site.layer}.", model.anatomy.units(site)
    _require_place(model, edit, site)
    chosen = edit.address.units.resolve(size)
    units = None if edit.address.units.is_all or chosen is None else torch.tensor(chosen)
    if site.name in READ:
        names = "" if units is None else f"[{edit.address.units}]"
        held = weight_at(model, f"{layer}{weight}{names}")
        rows = held.read().double().cpu()
        flat = rows.reshape(-1, rows.shape[-1])
        width = rows.shape[1] if rows.dim() == 3 else 1
        did = _affine(edit, site, units, len(flat) // width, width)
        deltas: dict[str, Delta] = {held.address: Values((did.matrix @ flat).view_as(rows))}
        return deltas | _with_constant(model, f"{layer}{bias}", did.constant @ flat)
    did = _affine(edit, site, units, 1, model.anatomy.d_model) if units is None else _some(edit, site, units, size)
    same = torch.allclose(did.matrix, torch.eye(len(did.matrix), dtype=torch.float64), atol=1e-12)
    if site.name in STREAM:
        if not same:
            do = "edit attn_out and mlp_out of each layer instead"
            raise error(EditError, f"{edit!r} changes a stream that several parts write", allowed="additions", do=do)
        return _with_constant(model, f"{layer}{bias}", did.constant)
    deltas, own = {}, weight_at(model, f"{layer}{weight}")
    if not same:
        deltas[own.address] = Values(own.read().double().cpu() @ did.matrix)
    there = getattr(model.layers[int(site.layer or 0)], bias)
    before = torch.zeros_like(did.constant) if there is None else there.detach().double().cpu()
    return deltas | _with_constant(model, f"{layer}{bias}", before @ did.matrix + did.constant - before)


def _require_place(model: Model, edit: SiteEdit, site: Site) -> None:
    """Refuse a site between which and its projection something stands.

    Raises:
        SiteError: it is one.
    """
    layer, a = int(site.layer or 0), model.anatomy
    parts, weights = a.parts.layers[layer], model.layers[layer]
    attention = site.name in ("attn.z", "attn_out", "resid_mid")
    between = None
    if parts.experts is not None and not attention:
        between = "experts"
    elif site.name not in READ:
        norm = weights.attn_post_norm if attention else weights.mlp_post_norm
        by = parts.attn_by if attention else parts.mlp_by
        if norm is not None or a.parts.form == "post_norm":
            between = "a norm"
        elif by != 1.0:
            between = "a factor"
    if between is not None:
        raise error(SiteError, f"{a.name} has no weight that does what {edit!r} does",
                    got=f"{between} between the projection and {site}", do="keep it as an edit")  # fmt: skip


def _with_constant(model: Model, bias: str, added: Tensor) -> dict[str, Delta]:
    """A change of a bias, if there is something to add.

    Raises:
        SiteError: there is no bias.
    """
    if not bool(added.any()):
        return {}
    layer, name = bias.split(".")
    if getattr(model.layers[int(layer)], name) is None:
        raise error(SiteError, f"{model.anatomy.name} has no {bias}, where a constant would stand",
                    do="bake into mt.change.with_biases(model), or keep it as an edit")  # fmt: skip
    return {bias: added}


def _affine(edit: SiteEdit, site: Site, units: Tensor | None, n: int, width: int) -> _Affine:
    """A and c of an edit, of the units that it selects; each unit has `width` numbers.

    Raises:
        EditError: it is not affine.
    """
    size = n * width
    drawn = torch.randn(4, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probes = torch.cat([torch.zeros(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64), drawn])
    headed = "head" in site.spec.dims
    x = probes.view(1, len(probes), n, width) if headed else probes.unsqueeze(0)
    where = Selection(site, units, Frame(((0, len(probes)),), len(probes)))
    made: Any = edit.change(x, where)
    made = made.expand_as(x).reshape(len(probes), size).double()
    constant = made[0]
    matrix = made[1 : 1 + size] - constant
    gap = float((made[1 + size :] - drawn @ matrix - constant).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(made.abs().max())):
        raise error(EditError, f"{edit!r} is no affine map", got=f"{gap:.2g} from one", do="keep it as an edit")
    return _Affine(matrix, constant)


def _some(edit: SiteEdit, site: Site, units: Tensor, size: int) -> _Affine:
    """The same of some units of a vector, the others as they are."""
    part = _affine(edit, site, units, 1, len(units))
    matrix, constant = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    matrix[units.unsqueeze(1), units] = part.matrix
    constant[units] = part.constant
    return _Affine(matrix, constant)
