"""A changed model as an ordinary checkpoint, which opens in `transformers` without Microtome.

Check:  opened again by `transformers` alone it gives the logits of the changed model; tests/laws/test_export.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from microtome.anatomy import without_bars
from microtome.change._bake import bake
from microtome.change._change import Change, applied_to
from microtome.edit import Edit
from microtome.errors import ModelUnsupported, OutputError, ProofError, SiteError, error
from microtome.files import atomic
from microtome.model import Model
from microtome.model import open as open_model

RECORD = "microtome.json"
FLAGS = ("mlp_bias", "attention_bias", "attention_out_bias", "use_bias", "bias", "add_bias_linear")
"""Entries of configurations that give projections a bias."""
TOLERANCE = 1e-4
"""How far the logits of the checkpoint may be from those of the changed model, as a share of the largest."""
PROBE = 12
"""Tokens of the prompt on which they are compared."""


def export(
    model: Model,
    out: str | os.PathLike[str],
    changes: Change | Iterable[Change] = (),
    edits: Edit | Iterable[Edit] = (),
    *,
    force: bool = False,
) -> Path:
    """Write a changed model to a folder: weights as safetensors, configuration and tokenizer; the model is unchanged.

    The folder is complete or not there at all. Before it is, it is opened with `transformers` alone, and its logits
    are compared with those of the model under the same changes and edits.

    Args:
        model: the model.
        out: a folder that does not exist or is empty.
        changes: in order.
        edits: standing edits that are baked in, see `mt.change.bake`; where their constants need biases that the
            configuration can add, it adds them.
        force: replace what the folder holds.

    Returns:
        The folder.

    Raises:
        EditError: a change is for another model, or an edit is none that can be baked.
        SiteError: the architecture has no place for an edit.
        OutputError: the folder holds something else, or cannot be written.
        ProofError: the checkpoint does not give the same logits.
        ModelUnsupported: `transformers` cannot write this model.
    """
    place = Path(out).resolve()
    if place.is_file() or (place.is_dir() and any(place.iterdir()) and not force):
        got = "a file" if place.is_file() else f"{len(list(place.iterdir()))} other things"
        do = "name a new folder" if place.is_file() else "name a new folder, or give force=True (--force)"
        raise error(OutputError, f"{out} is not an empty folder", got=got, do=do)
    listed = [changes] if isinstance(changes, Change) else list(changes)
    standing: list[Edit] = [edits] if isinstance(edits, Edit) else list(edits)
    origin, earlier = dict(model.provenance), applied_to(model)
    with ExitStack() as applied:
        for change in listed:
            applied.enter_context(change.applied(model))
        whole, tokens = model, _probe(model)
        expected = model.run(tokens, edits=standing).logits
        if standing:
            whole, change = _baked(model, standing)
            applied.enter_context(change.applied(whole))
            listed.append(change)
        with atomic(place, "the checkpoint to", folder=True) as partial:
            _write(whole, partial, [*earlier, *listed], origin)
            _compare(whole, partial, tokens, expected)
    return place


def _baked(model: Model, edits: list[Edit]) -> tuple[Model, Change]:
    """A model that has a place for edits, and what they change there."""
    try:
        return model, bake(model, edits)
    except SiteError as problem:
        try:
            wider = with_biases(model)
        except SiteError:
            raise problem from None
        return wider, bake(wider, edits)


def with_biases(model: Model) -> Model:
    """A copy of a model whose configuration gives its projections biases, all zero: it computes the same.

    Raises:
        SiteError: its configuration has no such entry, or all are on.
    """
    config = deepcopy(model.hf.config)
    flags = [flag for flag in FLAGS if getattr(config, flag, None) is False]
    for flag in flags:
        setattr(config, flag, True)
    if flags:
        with torch.random.fork_rng():
            wider = type(model.hf)(config).eval().requires_grad_(False)
        own, its = dict(model.hf.named_parameters()), dict(wider.named_parameters())
        added = its.keys() - own.keys()
        if added and own.keys() <= its.keys() and all(name.endswith("bias") for name in added):
            for name, parameter in its.items():
                parameter.data = (
                    own[name].detach().clone()
                    if name in own
                    else torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
                )
            for name, buffer in model.hf.named_buffers():
                wider.get_buffer(name).data = buffer.detach().clone()
            wider.generation_config = deepcopy(getattr(model.hf, "generation_config", None))
            return open_model(wider, tokenizer=model.tokenizer, prove=False)
    raise error(SiteError, f"the configuration of {model.anatomy.name} cannot add biases",
                allowed=f"one of {', '.join(FLAGS)} that is off", do="keep the edits as edits")  # fmt: skip


def _probe(model: Model) -> torch.Tensor:
    """A prompt of random tokens."""
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(model.anatomy.d_vocab, (1, PROBE), generator=drawn).to(model.device)


def _write(model: Model, folder: Path, changes: list[Change], origin: dict[str, Any]) -> None:
    """Weights, configuration, tokenizer, and what was changed.

    Raises:
        ModelUnsupported: `transformers` refuses to write them.
    """
    try:
        with without_bars():
            model.hf.save_pretrained(folder)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    except (ValueError, NotImplementedError, AttributeError) as problem:
        reason = " ".join(str(problem).split())
        raise error(ModelUnsupported, f"transformers cannot write {model.anatomy.name}", got=reason,
                    do="merge adapters, dequantise it, or mend its settings") from problem  # fmt: skip
    steps = [
        {"method": s.method, "reason": s.reason, "parameters": dict(s.parameters), "seed": s.seed,
         "weights": list(s.deltas), "before": s.before, "after": s.after}
        for change in changes for s in change.steps
    ]  # fmt: skip
    record = {"of": origin, "steps": steps}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _compare(model: Model, folder: Path, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Open what was written without Microtome, and compare logits.

    Raises:
        ProofError: they differ.
    """
    with without_bars():
        written: Any = type(model.hf).from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    with torch.no_grad():
        found = written(tokens).logits
    gap = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6))
    allowed = max(TOLERANCE, 8 * torch.finfo(model.dtype).eps)
    if not gap <= allowed:
        what, do = "the checkpoint does not give the logits of the changed model", "report it with the model's name"
        raise error(ProofError, what, got=f"{gap:.2g} of the largest", allowed=f"{allowed:.2g}", do=do)
