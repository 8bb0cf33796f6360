"""The fingerprint of a model: a hash of its configuration and of all weights as they are now.

Formula:  the first 16 hex digits of SHA-256 over the configuration, without what changes no number, and name, type,
          shape and CRC-32 of every tensor.
Cost:     one pass over the bytes of the weights, half a second for 135M parameters in float32.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import torch
from torch import Tensor

from microtome.anatomy import leaves, present, state

SAMPLES = 64

# Entries of configurations that change no number of a model in evaluation: where it lay, who wrote it, what training
# did, what the outputs are called, which kernel runs. All others count, those of families yet unknown too.
SILENT = frozenset({
    "_name_or_path", "name_or_path", "_commit_hash", "auto_map", "transformers_version", "transformers.js_config",
    "architectures", "dtype", "torch_dtype",  # the tensors' own names and types are hashed
    "_attn_implementation", "attn_implementation", "attn_impl", "use_cache", "chunk_size_feed_forward", "torchscript",
    "return_dict", "use_return_dict", "problem_type", "id2label", "label2id", "num_labels", "_num_labels",
    "finetuning_task", "task_specific_params", "init_std", "init_device", "gradient_checkpointing", "layerdrop",
    "router_aux_loss_coef", "router_jitter_noise", "output_attentions", "output_hidden_states", "output_router_logits",
    "output_scores", "output_logits",
})  # fmt: skip
SILENT_STARTS = ("initializer_", "summary_")
SILENT_ENDS = ("dropout", "_dropout_prob", "_pdrop")
HEARD = frozenset({"token_dropout"})  # that of ESM scales the embedding in evaluation too


class Fingerprint:
    """Fingerprints of one model.

    A run records `current`, which reads the weights again only where it can see that they changed: another tensor,
    a write that autograd counts, or another value among 64 samples of each. `exact` reads them all.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self._known, self._marks, self._seen = "", (), b""
        self._views: list[Tensor] = []

    def exact(self) -> str:
        """The fingerprint of what the weights are now."""
        done: dict[tuple[int, str, tuple[int, ...]], int] = {}
        digest = hashlib.sha256(_attributes(self._hf.config).encode())
        for name, module, entry in state(self._hf):
            for tensor in leaves(entry):
                kind = tensor.data_ptr(), str(tensor.dtype), tuple(tensor.shape)
                if tensor.is_meta or tensor is not entry:  # what is loaded or unpacked for a moment has no place
                    done[kind] = zlib.crc32(_bytes(self._loaded(name, module, tensor)))
                elif kind not in done:  # tied weights are read once
                    done[kind] = zlib.crc32(_bytes(tensor))
                digest.update(f"{name}{kind[1:]}{done[kind]};".encode())
        self._known = digest.hexdigest()[:16]
        self._look()
        return self._known

    def _loaded(self, name: str, module: Any, tensor: Tensor) -> Tensor:
        # By its name: to load one parameter of a module puts new empty ones in the place of all.
        return present(module, getattr(module, name.rpartition(".")[2])) if tensor.is_meta else tensor

    def current(self) -> str:
        """The fingerprint, read again only where the weights seem to have changed."""
        marks, seen = self._marks, self._seen
        self._look()
        return self._known if self._known and (marks, seen) == (self._marks, self._seen) else self.exact()

    def _look(self) -> None:
        tensors = tensors_of(self._hf)
        marks = tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        if [m[:2] for m in marks] != [m[:2] for m in self._marks]:
            self._views = [_samples(t) for t in tensors if t.is_contiguous() and not t.is_meta]
        self._marks = marks
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for view in self._views:
            groups.setdefault((view.device, view.dtype), []).append(view)
        self._seen = b"".join(bytes(_bytes(torch.cat(views))) for views in groups.values())


def tensors_of(module: Any) -> list[Tensor]:
    """The parameters and buffers of a module and of all inside it, each once; without names, which take most time."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        parts = vars(one)
        for held in (parts["_parameters"], parts["_buffers"]):
            for tensor in held.values():
                for leaf in leaves(tensor):
                    found[id(leaf)] = leaf
        waiting += [inner for inner in parts["_modules"].values() if inner is not None]
    return list(found.values())


def _attributes(config: Any) -> str:
    """The entries of a configuration that affect the numbers of its model, as one text in a fixed order."""
    return json.dumps(_loud(json.loads(config.to_json_string(use_diff=False))), sort_keys=True)


def _loud(part: Any) -> Any:
    """A part of a configuration without its silent entries, at any depth."""
    if isinstance(part, list):
        return [_loud(x) for x in part]
    return {k: _loud(v) for k, v in part.items() if not _silent(k)} if isinstance(part, dict) else part


def _silent(entry: str) -> bool:
    return entry not in HEARD and (entry in SILENT or entry.startswith(SILENT_STARTS) or entry.endswith(SILENT_ENDS))


def _samples(tensor: Tensor) -> Tensor:
    flat = tensor.detach().view(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
