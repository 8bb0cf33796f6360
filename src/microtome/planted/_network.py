"""A small transformer whose inside may be anything: with or without norms, causal or not, any head and output size.

    x_0     = W_E[token] + W_pos[position]
    x_mid   = x + sum_h softmax(scale (n(x) W_Q + b_Q)(n(x) W_K + b_K)^T) (n(x) W_V + b_V) W_O + b_O
    x_next  = x_mid + act(n(x_mid) W_in + b_in) W_out + b_out
    logits  = n(x_last) W_U + b_U

n is the identity, a root-mean-square norm or a layer norm. It is a `PreTrainedModel` like any other, with attention by
the interface of `transformers`, so that the engine needs to know nothing about it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

Normalization = Literal["none", "rms", "layer"]
Direction = Literal["causal", "bidirectional"]
NORMALIZATIONS: tuple[Normalization, ...] = ("none", "rms", "layer")
DIRECTIONS: tuple[Direction, ...] = ("causal", "bidirectional")


class PlantedConfig(PreTrainedConfig):
    """Sizes of a planted model, by the names of `transformers`; `planted.load` reads those of TransformerLens."""

    model_type = "microtome_planted"
    vocab_size: int = 8
    output_size: int = 8
    hidden_size: int = 16
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    head_dim: int = 16
    intermediate_size: int = 16
    max_position_embeddings: int = 16
    hidden_act: str = "relu"
    normalization: str = "none"
    norm_eps: float = 1e-5
    attention_direction: str = "bidirectional"
    attention_scale: float = 0.25
    use_cache: bool = False
    tie_word_embeddings: bool = False


def _norm(config: PlantedConfig) -> nn.Module:
    if config.normalization == "none":
        return nn.Identity()
    if config.normalization == "rms":
        return LlamaRMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class PlantedAttention(nn.Module):
    """Attention whose heads may be of any width, with biases."""

    num_key_value_groups = 1

    def __init__(self, config: PlantedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.attention_scale
        self.is_causal = config.attention_direction == "causal"
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)
        self.o_proj = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Any = None) -> Tensor:
        """What the heads add to the stream [batch, pos, d_model]."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        kind = self.config._attn_implementation or "eager"  # pyright: ignore[reportPrivateUsage]
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
        z, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, is_causal=self.is_causal)
        return self.o_proj(z.reshape(*hidden_states.shape[:-1], -1))


class PlantedMLP(nn.Module):
    """An ungated MLP."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn: nn.Module = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """What the neurons add to the stream [batch, pos, d_model]."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


class PlantedBlock(nn.Module):
    """Attention, then the MLP, each added to the stream."""

    def __init__(self, config: PlantedConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = PlantedAttention(config, layer_idx)
        self.mlp = PlantedMLP(config)
        self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None
    ) -> Tensor:
        """The stream after the block [batch, pos, d_model]."""
        read = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(read, attention_mask, past_key_values)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PlantedTrunk(nn.Module):
    """Embeddings, blocks and final norm."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([PlantedBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = _norm(config)

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """What the unembedding reads [batch, pos, d_model]."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device).unsqueeze(0)
        x = x + self.embed_positions(position_ids)
        # Position ids are kept from the mask: shuffled ones would be taken for several packed texts.
        if self.config.attention_direction == "causal":
            mask: Any = create_causal_mask(self.config, x, attention_mask, past_key_values)
        else:
            mask = create_bidirectional_mask(self.config, x, attention_mask)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, past_key_values=past_key_values)
        return self.norm(x)


class PlantedForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model, from tokens to logits [batch, pos, output_size]."""

    config_class = PlantedConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.model = PlantedTrunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.output_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the cache where one is used; positions may be given, shuffled ones too."""
        cached = self.config.use_cache if use_cache is None else use_cache
        if self.config.attention_direction != "causal":
            past_key_values = None
        elif cached and past_key_values is None:
            past_key_values = DynamicCache()
        x = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
