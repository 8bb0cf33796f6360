"""The tuned lens of the default model: divergence from the model's own output by layer, beside the logit lens.

    python benchmarks/lenses.py --text valid.txt [--tokens 200000] [--share 0.05] [--scale 1.0] [--state FOLDER]

Fits on the first tokens of a text (the repository's figures are of the validation set of WikiText-2), measures on those
behind them, and writes `benchmarks/results/lenses.json`: mean divergence in nats by place with its 95 % interval over
held-out rows, of both lenses, and what the fitted one gains; -1 is the embedding. With --state, a run that was stopped
goes on where its checkpoint stands, and the lens is kept there as `lens.safetensors`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import microtome as mt
from microtome.explain import Lens

OUT = Path(__file__).parent / "results" / "lenses.json"
EVERY = 10
"""Steps between two checkpoints, and between two lines of progress."""


def report(stage: str, done: int, everything: int) -> None:
    """A line of progress now and then."""
    if done % EVERY == 0 or done == everything:
        print(f"{time.strftime('%H:%M:%S')} {stage} {done} of {everything}", flush=True)


def summary(lens: Lens) -> dict[str, Any]:
    """What is written of a lens: how it was fitted, and its divergences by place."""
    kept = ("model", "fingerprint", "text", "tokens", "share", "scale", "optimizer", "lr", "steps", "seed")
    places = {
        str(int(layer)): {str(name): round(float(x), 5) for name, x in lens.kl.sel(layer=layer).data_vars.items()}
        for layer in lens.kl["layer"].values
    }
    return {name: lens.attrs.get(name) for name in kept} | {"held_out_rows": lens.kl.attrs["rows"], "layers": places}


def main() -> None:
    """Fit, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--held-out", type=int, default=8_000)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    model = mt.open()
    state = None if given.state is None else given.state / "state.safetensors"
    with mt.settings(progress=report):
        lens = mt.explain.fit_lens(
            model, given.text, tokens=given.tokens, share=given.share, scale=given.scale, held_out=given.held_out,
            checkpoint=state, every=EVERY,
        )  # fmt: skip
    if given.state is not None:
        lens.save(given.state / "lens.safetensors")
    found = summary(lens)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
