"""The fingerprint of an inference: a few numbers of the last hidden states, by which another machine can check it.

Formula:  the hidden states that the unembedding reads, row by row in chunks of 32 tokens; of each chunk [32, d_model]
          the 128 entries of the largest size, with their place and value in bfloat16 (the last chunk may be shorter).
          Verified by one forward over the same tokens. Of each chunk:
          overlap   share of the places that are among the 128 largest of the new run too;
          exponent  share of the values at those common places whose sign and exponent (in bfloat16) are equal;
          mean, median   error of the 7 bits of the mantissa, in units of the last, where sign and exponent are equal.
          A chunk passes with overlap >= 0.5, exponent >= 0.7, mean <= 10 and median <= 8; a run if all its chunks do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from microtome.errors import ArgumentError, DataError, error
from microtome.files import atomic
from microtome.run import Run
from microtome.shown import shown

FORMAT = "microtome-commitment-1"
SITE = "final"
MANTISSA = 7
"""Bits of the mantissa of bfloat16."""
OVERLAP, EXPONENT, MEAN, MEDIAN = 0.5, 0.7, 10.0, 8.0
"""Bounds of a chunk that passes; those of the mantissa are as published for bfloat16, from memory."""
MASSIVE = 20.0
"""How many times the median size of all dimensions one must have at some token to be massive."""


@shown
@dataclass(frozen=True, eq=False)
class Commitment:
    """What `commit` keeps of a run.

    Attributes:
        index: [row, chunk, entry] place in the chunk, token times d_model plus dimension; -1 where a chunk has fewer.
        value: [row, chunk, entry] int16, the bits of the values in bfloat16: sign, 8 of exponent, 7 of mantissa.
        tokens: [row, pos] what was run.
        every: tokens of a chunk.
        without: dimensions that were left out.
        d_model: width of the hidden states.
        fingerprint: of the model.
    """

    index: Int[Tensor, "row chunk entry"]
    value: Int[Tensor, "row chunk entry"]
    tokens: Int[Tensor, "row pos"]
    every: int
    without: tuple[int, ...]
    d_model: int
    fingerprint: str = ""

    def _facts(self) -> dict[str, str]:
        """Its size, and what it is of."""
        rows, chunks, entries = self.index.shape
        return {
            "chunks": f"{rows} x {chunks} of {self.every} tokens",
            "entries": str(entries),
            "model": self.fingerprint,
        }

    @property
    def bytes(self) -> int:
        """What it takes to keep its values and places."""
        return int(self.index.numel() * 4 + self.value.numel() * 2)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as safetensors: to a temporary name in the same folder, then renamed.

        Raises:
            OutputError: the file cannot be written.
        """
        path = Path(path)
        said = {"every": self.every, "without": list(self.without), "d_model": self.d_model}
        metadata = {"format": FORMAT, "settings": json.dumps(said), "fingerprint": self.fingerprint}
        state = {"index": self.index.int(), "value": self.value, "tokens": self.tokens}
        with atomic(path) as partial:
            partial.write_bytes(save({name: x.contiguous() for name, x in state.items()}, metadata))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Commitment:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged, or holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise error(DataError, f'no commitment "{path}"', do="check the path")
        try:
            opened: Any = safe_open(path, framework="pt")
            with opened as file:
                metadata: dict[str, str] = file.metadata() or {}
                state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                raise ValueError(metadata.get("format") or "no format")
            said = json.loads(metadata["settings"])
            return cls(
                state["index"].long(), state["value"], state["tokens"], int(said["every"]), tuple(said["without"]),
                int(said["d_model"]), metadata.get("fingerprint", ""),
            )  # fmt: skip
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as cause:
            do = "commit the run again"
            raise error(DataError, f'"{path}" holds no commitment', got=cause, allowed=FORMAT, do=do) from cause


@shown
@dataclass(frozen=True, eq=False)
class Verdict:
    """Whether a run is the one that was committed to.

    Attributes:
        passes: all chunks do.
        chunks: a dataset of `overlap`, `exponent`, `mean`, `median` and `passes` [row, chunk].
    """

    passes: bool
    chunks: xr.Dataset = field(repr=False)

    def _facts(self) -> dict[str, str]:
        """What it says, in numbers."""
        means = {str(name): f"{float(x.mean()):.3g}" for name, x in self.chunks.data_vars.items()}
        return {"verdict": "passes" if self.passes else "fails"} | means


def commit(run: Run, *, every: int = 32, top: int = 128, without: Sequence[int] = ()) -> Commitment:
    """Commit to an inference: the largest entries of its last hidden states, chunk by chunk of its tokens.

    Formula:  see this file's head.
    Source:   Ong et al., "TOPLOC: A Locality Sensitive Hashing Scheme for Trustless Verifiable Inference", 2025
              (2501.16007). Departs: places and values are kept as they are, not as a polynomial; bounds of the overlap
              and of the exponents are ours, and dimensions may be left out.
    Cost:     one top-k over the hidden states; 6 bytes an entry: 24 bytes a token.
    Check:    the same run passes, and each change of it fails; tests/laws/test_commit.py.

    Args:
        run: a run of a model with ``capture="final"``, of rows of one length.
        every: tokens of a chunk.
        top: entries that are kept of each chunk.
        without: dimensions to leave out, such as `massive_dimensions(run)`: they are the largest whatever is run.

    Returns:
        A `Commitment`, to be saved or sent.

    Raises:
        ArgumentError: `every` or `top` is no positive number, or too few dimensions are left.
        SiteError: the run has not captured the site.
        DataError: the run is padded, or a hidden state is not finite.

    >>> run = model.run("The capital of France is", capture="final")
    >>> verify_commit(commit(run), model.run("The capital of France is", capture="final")).passes
    True
    """
    hidden, tokens = _hidden(run)
    if every < 1 or top < 1 or len(set(without)) >= hidden.shape[-1]:
        got = f"every={every}, top={top}, without={len(set(without))} of {hidden.shape[-1]} dimensions"
        raise error(ArgumentError, "a commitment needs chunks, entries and dimensions", got=got, do="give 1 or more")
    index, value = _largest(hidden, every, top, without)
    left_out = tuple(sorted(set(without)))
    mark = str(run.provenance.get("fingerprint", ""))
    return Commitment(index.cpu(), value.cpu(), tokens.cpu(), every, left_out, hidden.shape[-1], mark)


def verify_commit(commitment: Commitment, run: Run, *, row: int | None = None) -> Verdict:
    """Whether a run could be the one that was committed to, by the entries that both have.

    Formula, source, check: see `commit`.
    Cost:     one top-k over the hidden states of the run, which is one forward over all tokens at once.

    Args:
        commitment: what `commit` gave.
        run: a run with ``capture="final"``, of as many tokens.
        row: the row of the run to look at, where it was run together with other prompts; all by default.

    Returns:
        A `Verdict`.

    Raises:
        DataError: the run is of another shape.
    """
    hidden, tokens = _hidden(run)
    if row is not None:
        hidden, tokens = hidden[row : row + 1], tokens[row : row + 1]
    if tuple(tokens.shape) != tuple(commitment.tokens.shape) or hidden.shape[-1] != commitment.d_model:
        got, allowed = f"{list(tokens.shape)} of {hidden.shape[-1]}", list(commitment.tokens.shape)
        what = "the run is not of the shape that was committed to"
        raise error(DataError, what, got=got, allowed=f"{allowed} of {commitment.d_model}", do="run the same tokens")
    index, value = (x.cpu() for x in _largest(hidden, commitment.every, commitment.index.shape[-1], commitment.without))
    told = {
        name: torch.zeros(index.shape[:2], dtype=torch.float64) for name in ("overlap", "exponent", "mean", "median")
    }
    for row in range(index.shape[0]):
        for chunk in range(index.shape[1]):
            mine = (commitment.index[row, chunk], commitment.value[row, chunk])
            for name, x in zip(told, _compared(*mine, index[row, chunk], value[row, chunk]), strict=True):
                told[name][row, chunk] = x
    fine = (told["overlap"] >= OVERLAP) & (told["exponent"] >= EXPONENT)
    fine = fine & (told["mean"] <= MEAN) & (told["median"] <= MEDIAN)
    units = {"overlap": "share", "exponent": "share", "mean": "last places", "median": "last places"}
    variables: dict[str, Any] = {n: (("row", "chunk"), x.numpy(), {"unit": units[n]}) for n, x in told.items()}
    data = xr.Dataset(variables | {"passes": (("row", "chunk"), fine.numpy())})
    return Verdict(bool(fine.all()), data)


def massive_dimensions(run: Run) -> tuple[int, ...]:
    """The dimensions of the last hidden states that are many times larger than the others at some token.

    Formula:  dimensions with max over tokens of |x| > 20 times the median of |x| over all; the 20 is ours.

    Args:
        run: a run with ``capture="final"``.
    """
    size = _hidden(run)[0].abs().flatten(0, 1)
    return tuple(int(i) for i in (size.amax(0) > MASSIVE * size.median()).nonzero().flatten())


def _hidden(run: Run) -> tuple[Float[Tensor, "row pos d_model"], Int[Tensor, "row pos"]]:
    """The hidden states and the tokens of a run of rows of one length.

    Raises:
        DataError: its rows have different lengths, or a hidden state is not finite.
    """
    if len({int(n) for n in run.batch.lengths}) > 1:
        what = "the rows of a commitment are of one length"
        raise error(DataError, what, got=list(map(int, run.batch.lengths)), do="commit to each prompt alone")
    hidden = run[SITE].detach()
    bad = (~torch.isfinite(hidden)).any(-1).nonzero()
    if len(bad):
        row, token = bad[0].tolist()
        what = f"the last hidden state of token {token} in row {row} is not finite"
        raise error(DataError, what, got=f"{len(bad)} such tokens", do="correct the run that produced it")
    return hidden, run.batch.tokens


def _largest(
    hidden: Float[Tensor, "row pos d_model"], every: int, top: int, without: Sequence[int]
) -> tuple[Int[Tensor, "row chunk entry"], Int[Tensor, "row chunk entry"]]:
    """Places and bits of the largest entries of every chunk, in bfloat16; -1 and 0 where there are fewer."""
    rounded = bits(hidden)
    size = (rounded % 2**15).double()  # without the sign, bits are in the order of sizes
    size[..., list(set(without))] = -1.0
    places: list[Tensor] = []
    values: list[Tensor] = []
    for part, own in zip(size.split(every, dim=1), rounded.split(every, dim=1), strict=True):
        flat = part.flatten(1)
        best = flat.topk(min(top, flat.shape[1]), dim=1)
        place = torch.where(best.values >= 0, best.indices, -1)
        value = torch.where(place >= 0, own.flatten(1).gather(1, place.clamp(min=0)), 0)
        fill = top - place.shape[1]
        places.append(torch.nn.functional.pad(place, (0, fill), value=-1))
        values.append(torch.nn.functional.pad(value, (0, fill)))
    return torch.stack(places, dim=1), _signed(torch.stack(values, dim=1))


def _compared(index: Tensor, value: Tensor, other: Tensor, found: Tensor) -> tuple[float, float, float, float]:
    """Overlap, share of equal exponents, and mean and median error of the mantissa, of one chunk."""
    mine = {int(i): x for i, x in zip(index.tolist(), value.tolist(), strict=True) if i >= 0}
    theirs = {int(i): x for i, x in zip(other.tolist(), found.tolist(), strict=True) if i >= 0}
    both = sorted(mine.keys() & theirs.keys())
    overlap = len(both) / max(1, len(mine))
    pairs = [(mine[i], theirs[i]) for i in both]
    alike = [abs(a % 2**MANTISSA - b % 2**MANTISSA) for a, b in pairs if a >> MANTISSA == b >> MANTISSA]
    exponent = len(alike) / max(1, len(pairs))
    errors = torch.tensor(alike or [2.0**MANTISSA], dtype=torch.float64)
    return overlap, exponent, float(errors.mean()), float(errors.quantile(0.5))


def bits(x: Float[Tensor, "*of"]) -> Int[Tensor, "*of"]:
    """The 16 bits that numbers have in bfloat16, from 0 to 65,535, rounded to the nearest and ties to even."""
    whole = x.float().contiguous().view(torch.int32).long() % 2**32
    return ((whole + 2**15 - 1 + (whole >> 16) % 2) >> 16) % 2**16


def _signed(x: Int[Tensor, "*of"]) -> Int[Tensor, "*of"]:
    """Numbers from 0 to 65,535 as 16 bits with a sign, in which they are kept."""
    return torch.where(x < 2**15, x, x - 2**16).short()
