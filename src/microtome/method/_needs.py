"""What a method needs of a model: sites, weights, and what its stream is; and which methods a model can be asked."""

from __future__ import annotations

from microtome.anatomy import Site
from microtome.errors import MicrotomeError, SiteError, error
from microtome.method._declare import NEEDS, WEIGHTS, Method
from microtome.method._measure import Measure
from microtome.method._registry import declared, methods
from microtome.model import Model

BRANCHES = {"sum": "why_no_sum", "heads": "why_no_heads", "attention and MLP": "why_other_branches"}
"""What an anatomy says of why a model lacks something of this kind."""


def lacks(model: Model, method: Method) -> tuple[str, str] | None:
    """What a question needs that a model lacks, and why it does; None where it has all."""
    a = model.anatomy
    for name in method.needs:
        if name in BRANCHES and (why := getattr(a, BRANCHES[name])) is not None:
            return NEEDS[name], why
        if name in WEIGHTS:
            gone = next((why for i in range(a.n_layers) if (why := a.unproven.get(f"{i}.{name}"))), None)
            if gone is not None:
                return f"{name} in every layer", gone
        absent = _absent(model, name.removeprefix("*."))
        if name.startswith("*.") and absent:
            return f"{name[2:]} in every layer", a.missing[absent[0]]
        if absent and not any(site.name == name for site in a.hook_points):
            return name, a.missing[absent[0]]
    return None


def _absent(model: Model, name: str) -> list[Site]:
    """The sites of a name that a model lacks with a reason, layer by layer, the model's own last."""
    a = model.anatomy
    return [site for i in (*range(a.n_layers), None) if (site := Site(name, i)) in a.missing]


def require(model: Model, method: Method) -> None:
    """Refuse a model that lacks what a question needs.

    Raises:
        SiteError: it lacks a site, or its stream is not what it must be; says why.
        ModelUnsupported: it does not predict the next token.
    """
    found = lacks(model, method)
    if found is not None:
        what, why = found
        what = f'{model.anatomy.name} cannot be asked "{method.name}", which needs {what}'
        raise error(SiteError, what, got=why, do="ask another question, or open another model")
    if "lens" in method.needs:
        model.require_readable()
    if "next token" in method.needs:
        model.require_next_token()


def refused(model: Model) -> dict[str, str | None]:
    """By every method, why this model cannot be asked it; None where it can."""
    found: dict[str, str | None] = {}
    for name, method in methods().items():
        try:
            made = declared(name)
            if isinstance(made, Measure):
                made.layers(model)
            else:
                require(model, method)
            found[name] = None
        except MicrotomeError as problem:
            short = lacks(model, method)
            found[name] = str(problem).partition(" To do:")[0] if short is None else f"needs {short[0]}: {short[1]}"
    return found
