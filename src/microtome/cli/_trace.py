"""`microtome trace`: where a fact about a subject is held."""

from __future__ import annotations

from typing import Annotated

import typer

from microtome.cli._model import Budget, Json, Opening, opens
from microtome.cli._patch import Force, Page, Top, check_page, show, swept


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("trace")(trace)


@opens()
def trace(
    prompt: Annotated[str, typer.Argument(help="A prompt that states a fact up to its last word.")],
    subject: Annotated[str, typer.Option(help="What the fact is about: a part of the prompt.")],
    answer: Annotated[
        str | None, typer.Option(help="The fact's last word, one token; the model's own without it.")
    ] = None,
    corrupt: Annotated[
        str | None, typer.Option(help="The prompt with another subject, token for token, instead of noise.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Layers over which a branch is given back at once.")] = 10,
    noise: Annotated[
        float, typer.Option(min=0, help="Noise, in standard deviations of the subject's embeddings.")
    ] = 3.0,
    samples: Annotated[int, typer.Option(min=1, help="How many noises.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise and the intervals.")] = 0,
    output: Page = None,
    force: Force = False,
    top: Top = 5,
    budget: Budget = None,
    as_json: Json = False,
    *,
    opening: Opening,
) -> None:
    """Trace a fact: corrupt its subject, give back one state at a time, and see which brings the answer back."""
    from microtome.explain import causal_trace

    check_page(output, force)
    opened = opening.open()
    with swept("tracing") as said:
        data = causal_trace(
            opened, prompt, subject=subject, answer=answer, corrupt=corrupt, window=window, noise=noise,
            samples=samples, seed=seed, budget=budget, progress=said.progress, on_plan=said.on_plan,
        )  # fmt: skip
    show(data.assign_attrs(said.cost), output, top=top, as_json=as_json)
