"""A network in which every first-order estimate is exact."""

from __future__ import annotations

import torch
from tests import families

import microtome as mt


def linear() -> mt.Model:
    """A GPT-2 that is linear in its embeddings: uniform attention, no activation, norms that divide by a constant."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = families.build("gpt2").config
    config = GPT2Config(**(config.to_dict() | {"layer_norm_epsilon": 1e12, "activation_function": "linear"}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        hf = GPT2LMHeadModel(config).double().eval()
        for name, parameter in hf.named_parameters():
            noise = 0.3 * torch.randn_like(parameter)
            parameter.data = 1e6 * (1 + noise) if ".ln_" in name and name.endswith("weight") else noise
        for block in hf.transformer.h:
            block.attn.c_attn.weight.data[:, : 2 * config.n_embd] = 0
            block.attn.c_attn.bias.data[: 2 * config.n_embd] = 0
    return mt.open(hf, prove=False)
