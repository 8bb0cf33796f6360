"""Planted models in folders: `model.safetensors`, `config.json` and, where the inside is known, `truth.json`.

Arrays carry the standard names of TransformerLens, so that a folder made elsewhere opens here:

    embed.W_E [d_vocab, d_model]    pos_embed.W_pos [n_ctx, d_model]    unembed.W_U [d_model, d_vocab_out], b_U
    blocks.{i}.attn.W_Q, W_K, W_V [n_heads, d_model, d_head]    b_Q, b_K, b_V [n_heads, d_head]
    blocks.{i}.attn.W_O [n_heads, d_head, d_model]    b_O [d_model]
    blocks.{i}.mlp.W_in [d_model, d_mlp], b_in [d_mlp], W_out [d_mlp, d_model], b_out [d_model]
    blocks.{i}.ln1, blocks.{i}.ln2, ln_final: w [d_model] where normalised, and b [d_model] for layer norms

`config.json` holds n_layers, d_model, n_heads, d_head, d_mlp, d_vocab, d_vocab_out, n_ctx, act_fn, normalization
(none, rms or layer) and attention_dir (causal or bidirectional); attn_scale, by which scores are divided, is the root
of d_head where it is absent, and eps of the norms is 1e-5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from microtome.errors import DataError, ModelBroken, ModelNotFound, ModelUnsupported, OutputError, error, nearest
from microtome.files import atomic
from microtome.model import Model
from microtome.model import open as open_model
from microtome.planted._network import DIRECTIONS, NORMALIZATIONS, PlantedConfig, PlantedForCausalLM
from microtome.planted._truth import check_truth
from microtome.shown import shown

SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "d_vocab_out", "n_ctx")
_IGNORED = (".mask", ".IGNORE")  # buffers of TransformerLens, no weights


@shown
@dataclass(frozen=True)
class Planted:
    """A model whose inside is known.

    Attributes:
        model: the open model, its map proven.
        truth: what is inside. For circuits, `nodes` and `edges` (see `edges`); empty where none is given.
    """

    model: Model
    truth: Mapping[str, Any]

    @property
    def provenance(self) -> dict[str, Any]:
        """What every result about it records: that of its model."""
        return self.model.provenance


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Planted:
    """Open a folder of weights with the standard names of TransformerLens, and what is known of its inside.

    Args:
        folder: holds `config.json`, `model.safetensors` and perhaps `truth.json`; see the head of this file.
        dtype: of the weights.

    Returns:
        A `Planted`: the open model, whose map is proven like any other's, and its truth.

    Raises:
        ModelNotFound: there is no such folder, or a file of it is missing.
        ModelBroken: an array is missing, misshapen or unknown, or the configuration is incomplete; says which.
        DataError: the truth names nodes or edges that the model cannot have.
    """
    path = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise error(ModelNotFound, f"{path} holds no planted model: it has no {name}", do="check the path")
    config = _read_config(path / "config.json")
    arrays = _read_arrays(path / "model.safetensors", config)
    hf: Any = PlantedForCausalLM(config)
    _fill(hf, arrays)
    hf.requires_grad_(False)
    hf.config.name_or_path = path.name
    model = open_model(hf.to(dtype))
    truth: dict[str, Any] = {}
    if (path / "truth.json").is_file():
        truth = _read_json(path / "truth.json", DataError)
        check_truth(model, truth)
    return Planted(model, truth)


def save(model: Model, folder: str | Path, *, truth: Mapping[str, Any] | None = None) -> Path:
    """Write a planted model into a new folder, in the form that `load` reads.

    Args:
        model: one that `load` gave, or `open` made of a `PlantedForCausalLM`.
        folder: must not exist; nothing is left of it if writing fails.
        truth: what is inside, as JSON; for circuits with `nodes` and `edges`.

    Returns:
        The folder.

    Raises:
        ModelUnsupported: it is not a planted model.
        DataError: the truth names nodes or edges that the model cannot have.
        OutputError: the folder exists, or cannot be written.
    """
    path = Path(folder)
    if not isinstance(model.hf, PlantedForCausalLM):
        got = type(model.hf).__name__
        raise error(ModelUnsupported, "only planted models have this form", got=got, do="use hf.save_pretrained")
    if truth:
        check_truth(model, truth)
    _refuse_existing(path)
    with atomic(path, folder=True, do="name another folder") as partial:
        save_file(arrays_of(model), partial / "model.safetensors")
        _write_json(partial / "config.json", _written_config(model.hf))
        if truth:
            _write_json(partial / "truth.json", dict(truth))
        _refuse_existing(path)  # it may have come meanwhile
    return path


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise error(OutputError, f"{path} exists already", do="name a new folder")


def arrays_of(model: Model) -> dict[str, Tensor]:
    """Every weight of a planted model under its standard name, as copies."""
    found: dict[str, Tensor] = {}
    for name, (parameter, form, heads) in _parameters(model.hf).items():
        found[name] = _outward(parameter.detach(), form, heads).clone().contiguous()
    return found


def _read_json(path: Path, kind: type[ModelBroken] | type[DataError]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise error(kind, f"{path} is not JSON", got=str(problem), do="write it again") from problem
    if not isinstance(found, dict):
        raise error(kind, f"{path} is not a JSON object", got=type(found).__name__, do="write it again")
    return found


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_config(path: Path) -> PlantedConfig:
    raw = _read_json(path, ModelBroken)
    for name in SIZES:
        value = raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise error(ModelBroken, f"{path} gives no {name}", got=repr(value), allowed="a whole number, 1 or more")
    allowed = {"act_fn": sorted(ACT2FN), "normalization": NORMALIZATIONS, "attention_dir": DIRECTIONS}
    for name, values in allowed.items():
        if raw.get(name) not in values:
            raise error(
                ModelBroken, f"{path} gives no known {name}", got=repr(raw.get(name)), allowed=", ".join(values)
            )
    divisor = raw.get("attn_scale", math.sqrt(raw["d_head"]))
    eps = raw.get("eps", 1e-5)
    for name, value in (("attn_scale", divisor), ("eps", eps)):
        if not isinstance(value, int | float) or value <= 0:
            raise error(ModelBroken, f"{path} gives no usable {name}", got=repr(value), allowed="a number above 0")
    return PlantedConfig(
        num_hidden_layers=raw["n_layers"], hidden_size=raw["d_model"], num_attention_heads=raw["n_heads"],
        head_dim=raw["d_head"], intermediate_size=raw["d_mlp"], vocab_size=raw["d_vocab"],
        output_size=raw["d_vocab_out"], max_position_embeddings=raw["n_ctx"], hidden_act=raw["act_fn"],
        normalization=raw["normalization"], norm_eps=float(eps), attention_direction=raw["attention_dir"],
        attention_scale=1.0 / divisor, use_cache=raw["attention_dir"] == "causal",
    )  # fmt: skip


def _written_config(hf: Any) -> dict[str, Any]:
    config = hf.config
    return {
        "n_layers": config.num_hidden_layers, "d_model": config.hidden_size, "n_heads": config.num_attention_heads,
        "d_head": config.head_dim, "d_mlp": config.intermediate_size, "d_vocab": config.vocab_size,
        "d_vocab_out": config.output_size, "n_ctx": config.max_position_embeddings, "act_fn": config.hidden_act,
        "normalization": config.normalization, "eps": config.norm_eps, "attention_dir": config.attention_direction,
        "attn_scale": 1.0 / config.attention_scale,
    }  # fmt: skip


def _parameters(hf: Any) -> dict[str, tuple[nn.Parameter, str, int]]:
    """Every parameter by its standard name, with its layout: as it is, transposed, or split by heads."""
    n = hf.config.num_attention_heads
    found: dict[str, tuple[nn.Parameter, str, int]] = {
        "embed.W_E": (hf.model.embed_tokens.weight, "same", n),
        "pos_embed.W_pos": (hf.model.embed_positions.weight, "same", n),
        "unembed.W_U": (hf.lm_head.weight, "transposed", n),
        "unembed.b_U": (hf.lm_head.bias, "same", n),
    }
    norms: list[tuple[str, nn.Module]] = [("ln_final", hf.model.norm)]
    for i, block in enumerate(hf.model.layers):
        at = f"blocks.{i}"
        for letter in "QKV":
            projection = getattr(block.self_attn, f"{letter.lower()}_proj")
            found[f"{at}.attn.W_{letter}"] = (projection.weight, "heads out", n)
            found[f"{at}.attn.b_{letter}"] = (projection.bias, "head bias", n)
        found[f"{at}.attn.W_O"] = (block.self_attn.o_proj.weight, "heads in", n)
        found[f"{at}.attn.b_O"] = (block.self_attn.o_proj.bias, "same", n)
        for name, projection in (("in", block.mlp.up_proj), ("out", block.mlp.down_proj)):
            found[f"{at}.mlp.W_{name}"] = (projection.weight, "transposed", n)
            found[f"{at}.mlp.b_{name}"] = (projection.bias, "same", n)
        norms += [(f"{at}.ln1", block.input_layernorm), (f"{at}.ln2", block.post_attention_layernorm)]
    for name, norm in norms:
        for own, theirs in (("weight", "w"), ("bias", "b")):
            parameter = getattr(norm, own, None)
            if isinstance(parameter, nn.Parameter):
                found[f"{name}.{theirs}"] = (parameter, "same", n)
    return found


def _outward(x: Tensor, form: str, heads: int) -> Tensor:
    """A parameter in the standard orientation."""
    if form == "transposed":
        return x.T
    if form == "heads out":  # [head * d_head, d_model]
        return x.unflatten(0, (heads, -1)).transpose(1, 2)
    if form == "heads in":  # [d_model, head * d_head]
        return x.T.unflatten(0, (heads, -1))
    return x.unflatten(0, (heads, -1)) if form == "head bias" else x


def _inward(x: Tensor, form: str) -> Tensor:
    """A standard array as the parameter that holds it."""
    if form == "transposed":
        return x.T
    if form == "heads out":
        return x.transpose(1, 2).flatten(0, 1)
    if form == "heads in":
        return x.flatten(0, 1).T
    return x.flatten() if form == "head bias" else x


def _read_arrays(path: Path, config: PlantedConfig) -> dict[str, Tensor]:
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as problem:
        raise error(ModelBroken, f"{path} cannot be read", got=str(problem), do="write it again") from problem
    with torch.device("meta"):
        wanted = {
            name: list(_outward(parameter, form, heads).shape)
            for name, (parameter, form, heads) in _parameters(PlantedForCausalLM(config)).items()
        }
    for name, shape in wanted.items():
        if name not in found:
            raise error(ModelBroken, f"{path} has no array {name}", allowed=f"shape {shape}", do="add it")
        got = list(found[name].shape)
        if got != shape:
            do = "correct the array or config.json"
            raise error(ModelBroken, f"the array {name} in {path} is misshapen", got=got, allowed=shape, do=do)
    unknown = [name for name in found if name not in wanted and not name.endswith(_IGNORED)]
    if unknown:
        near = nearest(unknown[0], list(wanted))
        raise ModelBroken(f"{path} holds an array that no such model has: {unknown[0]}.{near}")
    return found


def _fill(hf: PlantedForCausalLM, arrays: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, (parameter, form, _) in _parameters(hf).items():
            parameter.copy_(_inward(arrays[name], form))
