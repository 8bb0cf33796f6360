"""A GGUF file opens as the model that was written into it, or is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families, gguf_files
from torch import Tensor

import microtome as mt
from microtome.errors import ModelBroken, ModelUnsupported

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def llama(rope: dict[str, Any], **more: Any) -> Any:
    """A tiny llama of two layers; attention far from uniform, so that positions matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = (
        families._MHA | {"hidden_size": 64, "num_hidden_layers": 2, "rope_parameters": copy.deepcopy(rope)} | more
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = LlamaForCausalLM(LlamaConfig(**settings)).eval()
        families._randomise(hf)
    return hf


def divisors(hf: Any) -> Tensor:
    """By what llama.cpp's converter divides the frequencies, as they are with the plain kind of rotation."""
    rope = hf.config.rope_parameters
    d = hf.config.head_dim
    return rope["rope_theta"] ** (-torch.arange(0, d, 2) / d) / hf.model.rotary_emb.inv_freq


def logits(hf: Any) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=ids()).logits


def ids() -> Tensor:
    return torch.randint(3, families.VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["plain", "linear", "deprecated linear", "llama3", "llama3 with grouped heads"])
def test_it_computes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    rope = LLAMA3 if "llama3" in kind else LINEAR if "linear" in kind else LINEAR | {"rope_type": "default"}
    heads = {"num_key_value_heads": 2} if "grouped" in kind else {}
    hf = llama(rope, **heads)
    keys: dict[str, Any] = {
        "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        "deprecated linear": {"rope.scale_linear": 4.0},
    }.get(kind, {})
    more = {"rope_freqs.weight": divisors(hf)} if "llama3" in kind else {}
    if more:
        assert len(torch.unique(more["rope_freqs.weight"].round(decimals=3))) > 1
    model = mt.open(gguf_files.write(hf, tmp_path / "it.gguf", keys=keys, more=more))
    expected = logits(hf)
    torch.testing.assert_close(model.run(ids()).logits, expected, rtol=1e-4, atol=2e-5)
    # What it would be without the scaling is further off than the comparison allows.
    plain = llama({"rope_type": "default", "rope_theta": rope["rope_theta"]}, **heads)
    plain.load_state_dict(hf.state_dict())
    assert kind == "plain" or float((logits(plain) - expected).abs().max()) > 0.02
    torch.testing.assert_close(model.hf.model.rotary_emb.inv_freq, hf.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)


def test_both_scalings_at_once(tmp_path: Path) -> None:
    hf = llama(LLAMA3)
    file = gguf_files.write(
        hf, tmp_path / "it.gguf", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        more={"rope_freqs.weight": divisors(hf)},
    )  # fmt: skip
    own = mt.open(file).hf.model.rotary_emb.inv_freq
    torch.testing.assert_close(own, hf.model.rotary_emb.inv_freq / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "got yarn; allowed: linear, none, or rope_freqs"),
        ({"rope.scaling.attn_factor": 1.2}, "got linear, attn_factor 1.2"),
        ({"attention.scale": 0.5}, "does not read llama.attention.scale of it.gguf, .* got 0.5"),
        ({"attention.sliding_window": 8}, "llama.attention.sliding_window"),
        ({"attention.clamp_kqv": 3.0}, "llama.attention.clamp_kqv"),
        ({"logit_scale": 0.25}, "llama.logit_scale"),
        ({"residual_scale": 0.2}, "llama.residual_scale"),
        ({"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping"),
        ({"attention.causal": False}, "llama.attention.causal"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused(keys: dict[str, Any], text: str, tmp_path: Path) -> None:
    file = gguf_files.write(llama(LINEAR | {"rope_type": "default"}), tmp_path / "it.gguf", keys=keys)
    with pytest.raises(
        ModelUnsupported, match=text + r".*To do: open the model's own folder of safetensors instead\.$"
    ):
        mt.open(file)


def test_values_without_effect_are_not(tmp_path: Path) -> None:
    keys = {
        "rope.scaling.type": "none", "rope.scaling.factor": 8.0, "attention.sliding_window": 64, "logit_scale": 1.0,
        "attention.causal": True, "attention.clamp_kqv": 0.0, "attention.key_length": 16,
    }  # fmt: skip
    hf = llama(LINEAR | {"rope_type": "default"})
    model = mt.open(gguf_files.write(hf, tmp_path / "it.gguf", keys=keys))
    torch.testing.assert_close(model.run(ids()).logits, logits(hf), rtol=1e-4, atol=2e-5)


def test_frequencies_that_are_read_wrong_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for families whose base transformers does not read."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    file = gguf_files.write(llama(LLAMA3 | {"rope_type": "default"}), tmp_path / "it.gguf")
    assert mt.open(file).anatomy.n_layers == 2
    monkeypatch.delitem(GGUF_TO_TRANSFORMERS_MAPPING["config"]["llama"], "rope.freq_base")
    with pytest.raises(
        ModelUnsupported, match=r"rotary positions that transformers reads from it.gguf \(llama\) are not"
    ):
        mt.open(file)
    short = gguf_files.write(llama(LINEAR), tmp_path / "short.gguf", more={"rope_freqs.weight": torch.ones(3)})
    with pytest.raises(mt.errors.ModelError):
        mt.open(short)


@pytest.mark.parametrize(
    ("more", "got"),
    [
        ({"blk.2.attn_norm.weight": torch.ones(64), "blk.2.ffn_up.weight": torch.ones(56, 64)}, "2: blk.2.attn_norm"),
        ({"blk.0.attn_q.bias": torch.ones(64)}, "1: blk.0.attn_q.bias"),
        ({"rope_factors_long.weight": torch.ones(8)}, "linear, rope_factors_long.weight"),
    ],
    ids=["a third layer", "a bias", "LongRoPE"],
)  # fmt: skip
def test_tensors_without_a_place_are_refused(more: dict[str, Tensor], got: str, tmp_path: Path) -> None:
    file = gguf_files.write(llama(LINEAR | {"rope_type": "default"}), tmp_path / "it.gguf", more=more)
    with pytest.raises((ModelBroken, ModelUnsupported), match=f"it.gguf .*got {got}"):
        mt.open(file)
