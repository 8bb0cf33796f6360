"""What a GGUF file says and `transformers` does not read: put into the configuration, or refused by name.

Rotary frequencies are base^(-2i/n) / (factor * divisor_i), for the n turned dimensions of a head: `rope.freq_base`,
`rope.dimension_count`, `rope.scaling.factor` where `rope.scaling.type` is linear, and the tensor `rope_freqs.weight`,
in which llama.cpp keeps the divisors of Llama 3.1 and later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ModelBroken, ModelUnsupported, error

DO = "open the model's own folder of safetensors instead"
DIVISORS = "rope_freqs.weight"
_NORM_EPS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
NUMBERS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "attention.layer_norm_epsilon": (_NORM_EPS, ()),
    "attention.layer_norm_rms_epsilon": (_NORM_EPS, ()),
    "attention.scale": (("attention_multiplier",), (0.0,)),
    "attention.clamp_kqv": (("clip_qkv",), (0.0,)),
    "attention.max_alibi_bias": ((), (0.0, 8.0)),
    "attention.causal": ((), (1.0,)),
    "attention.sliding_window": (("sliding_window",), (0.0,)),
    "attn_logit_softcapping": (("attn_logit_softcapping",), (0.0,)),
    "final_logit_softcapping": (("final_logit_softcapping",), (0.0,)),
    "logit_scale": (("logit_scale", "logits_scaling"), (0.0, 1.0)),
    "embedding_scale": (("embedding_multiplier",), (0.0, 1.0)),
    "residual_scale": (("residual_multiplier",), (0.0, 1.0)),
    "use_parallel_residual": (("use_parallel_residual",), ()),
    "expert_weights_scale": (("routed_scaling_factor",), (0.0, 1.0)),
    "expert_weights_norm": (("norm_topk_prob",), ()),
    "expert_used_count": (("num_experts_per_tok",), ()),
}
"""Keys that change what a model computes: entries of a configuration that may hold them, and values without effect."""


class GGUF:
    """The header of a GGUF file.

    Attributes:
        arch: the architecture, with which its keys begin.
        tensors: what it holds, by name.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        reader: Any = GGUFReader(path)
        self._fields = reader.fields
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self.arch = str(self._fields["general.architecture"].contents())

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of its architecture."""
        field = self._fields.get(f"{self.arch}.{key}")
        return default if field is None else field.contents()

    def divisors(self) -> Tensor | None:
        """What each rotary frequency is divided by beyond the factor [n / 2], or None."""
        tensor = self.tensors.get(DIVISORS)
        return None if tensor is None else torch.tensor(tensor.data, dtype=torch.float32).flatten()

    def factor(self) -> float:
        """What all rotary frequencies are divided by.

        Raises:
            ModelUnsupported: they are scaled in another way.
        """
        kind = str(self.get("rope.scaling.type", "linear"))
        attention = float(self.get("rope.scaling.attn_factor", 1.0) or 1.0)
        parts = sorted(name for name in self.tensors if name.startswith("rope_factors_"))
        if kind not in ("linear", "none") or attention != 1.0 or parts:
            got = ", ".join([kind, *parts]) + (f", attn_factor {attention:g}" if attention != 1.0 else "")
            what = f"the rotary positions of {self.path.name} are scaled in a way that is not read from GGUF files"
            raise error(ModelUnsupported, what, got=got, allowed=f"linear, none, or {DIVISORS}", do=DO)
        factor = float(self.get("rope.scaling.factor", self.get("rope.scale_linear", 0.0)) or 1.0)
        return 1.0 if kind == "none" else factor


def scaled(config: Any, file: GGUF) -> Any:
    """The configuration with the file's scaling of rotary positions, which `transformers` leaves out.

    Raises:
        ModelUnsupported: this scaling is not read, or the family has several kinds of rotary positions.
    """
    factor, divisors = file.factor(), file.divisors()
    if factor == 1.0 and divisors is None:
        return config
    rope: Any = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        got = f"factor {factor:g}" + ("" if divisors is None else f", {DIVISORS}")
        what = f"the rotary positions of {file.path.name} ({file.arch}) are scaled, and this family has no one scale"
        raise error(ModelUnsupported, what, got=got, do=DO)
    if divisors is None:
        config.rope_parameters = rope | {"rope_type": "linear", "factor": factor}
        return config
    # Of the kinds that transformers has, the one that divides each frequency by a number of its own.
    each = (divisors * factor).tolist()
    config.rope_parameters = rope | {
        "rope_type": "longrope", "short_factor": each, "long_factor": each, "factor": 1.0, "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }  # fmt: skip
    return config


def refuse_unread(model: Any, file: GGUF) -> None:
    """Refuse a model that is not what its file says.

    Raises:
        ModelUnsupported: the file has a number that the model has not, or turns queries and keys otherwise.
        ModelBroken: it has tensors that the model has not.
    """
    _refuse_numbers(model.config, file)
    _refuse_frequencies(model, file)
    left = sorted(set(file.tensors) - _read(model, file) - {DIVISORS})
    if left:
        what = f"{file.path.name} holds tensors that have no place in the model that its header describes"
        got = f"{len(left)}: " + ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        raise error(ModelBroken, what, got=got, do=DO)


def _refuse_numbers(config: Any, file: GGUF) -> None:
    for key, (entries, silent) in NUMBERS.items():
        value = file.get(key)
        if value is None:
            continue
        number = float(value)
        held = [float(own) for name in entries if (own := getattr(config, name, None)) is not None]
        wide = key == "attention.sliding_window" and number >= float(file.get("context_length", float("inf")))
        if wide or number in silent or any(abs(number - own) <= 1e-5 * abs(own) for own in held):
            continue
        what = f"transformers does not read {file.arch}.{key} of {file.path.name}, without which the model is another"
        raise error(ModelUnsupported, what, got=f"{number:g}", do=DO)


def _refuse_frequencies(model: Any, file: GGUF) -> None:
    rotary = next((m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)), None)
    if rotary is None:
        return
    own = rotary.inv_freq.detach().float().cpu()
    turned = int(file.get("rope.dimension_count", 2 * len(own)))
    base = float(file.get("rope.freq_base", 10000.0))
    made = base ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned) / file.factor()
    divisors = file.divisors()
    if divisors is not None and divisors.shape != made.shape:
        what = f"{DIVISORS} of {file.path.name} does not fit its turned dimensions"
        raise error(ModelBroken, what, got=f"{len(divisors)}", allowed=f"{len(made)}", do=DO)
    made = made if divisors is None else made / divisors
    if own.shape != made.shape or not torch.allclose(own.double(), made, rtol=1e-4, atol=0):
        what = f"the rotary positions that transformers reads from {file.path.name} ({file.arch}) are not those of it"
        got = f"frequencies {_first_few(own)}"
        raise error(ModelUnsupported, what, got=got, allowed=_first_few(made), do=DO)


def _first_few(frequencies: Tensor) -> str:
    return "[" + ", ".join(f"{x:.4g}" for x in frequencies[:4].tolist()) + (", ...]" if len(frequencies) > 4 else "]")


def _read(model: Any, file: GGUF) -> set[str]:
    """The tensors of the file that have a place in the model."""
    from transformers import modeling_gguf_pytorch_utils as own

    processors: Any = own.TENSOR_PROCESSORS
    processor = processors.get(file.arch, own.TensorProcessor)(config={})
    names = set(own.get_gguf_hf_weights_map(model, processor))
    names |= {name for name in file.tensors if "_exps." in name}  # stacks of experts, which are taken apart
    return names | ({"output.weight"} if file.arch == "gpt2" else set())
