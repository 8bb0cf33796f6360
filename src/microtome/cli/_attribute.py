"""`microtome attribute`: what every part would do to an answer, estimated from one gradient and checked."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from microtome.cli._model import Budget, Json, Opening, notes, opens
from microtome.cli._patch import Direction, Force, Page, Top, check_page, show, swept


class Method(StrEnum):
    """How the gradient is taken, and of what."""

    atp = "atp"
    relp = "relp"
    eap = "eap"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("attribute")(attribute)


@opens()
def attribute(
    clean: Annotated[str, typer.Argument(help="The prompt with the answer.")],
    corrupt: Annotated[str, typer.Argument(help="The same prompt with another answer, token for token.")],
    answer: Annotated[str, typer.Option(help='The clean answer, one token, such as " Paris".')],
    foil: Annotated[
        str | None, typer.Option(help="The corrupt answer; without it the answer's log-probability is read.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="atp: plain gradients. relp: with RelP's backward rules. eap: of every edge.")
    ] = Method.atp,
    verify: Annotated[
        int, typer.Option(min=0, help="How many of the best of each map to measure exactly, beside random others.")
    ] = 50,
    direction: Annotated[
        Direction,
        typer.Option(help="noise starts at the clean prompt and puts corrupt values in, denoise the reverse."),
    ] = Direction.noise,
    seed: Annotated[int, typer.Option(min=0, help="Of the random others.")] = 0,
    output: Page = None,
    force: Force = False,
    top: Top = 5,
    budget: Budget = None,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Estimate what every part or edge would do to the answer, from one gradient, and measure the best ones exactly."""
    from microtome.explain import attribute as estimate

    check_page(output, force)
    opened = opening.open()
    notes.print("plan: the estimates take two forwards and one backward", soft_wrap=True)
    with swept("measuring the best") as said:
        data = estimate(
            opened, clean, corrupt, answer=answer, foil=foil, method=method.value, verify=verify, seed=seed,
            direction=direction.value, budget=budget, progress=said.progress, on_plan=said.on_plan,
        )  # fmt: skip
    told = {"answer": answer} | ({} if foil is None else {"foil": foil})
    show(data.assign_attrs(told | said.cost), output, top=top, as_json=as_json)
