"""What every column of the atlas means: its unit and one sentence. Written into the manifest, shown on the pages."""

from __future__ import annotations

_INTERVAL = ", end of the 95 % bootstrap interval over sequences"
_SKIP = "rise of the loss when {} adds nothing: loss without it minus loss of the whole model, on the first tokens "
_SKIP += "of the first sequences of the text (how many: `skipped_on` in the manifest)"
_SCORES = ", on random tokens that repeat (how many: `scored_on` in the manifest)"

LAYERS: dict[str, tuple[str, str]] = {
    "layer": ("", "number of the block, from 0"),
    "resid_pre_norm": ("norm", "mean norm of the residual stream before the layer, without each row's first token"),
    "resid_mid_norm": ("norm", "the same between attention and MLP"),
    "resid_post_norm": ("norm", "the same after the layer"),
    "resid_post_norm_first": ("norm", "mean norm after the layer at each row's first token, where sinks live"),
    "attn_share": ("ratio", "mean norm of what attention adds, over the norm of what it is added to"),
    "mlp_share": ("ratio", "mean norm of what the MLP adds, over the norm of what it is added to"),
    "attn_cos": ("cosine", "mean cosine between what attention adds and what it is added to"),
    "mlp_cos": ("cosine", "mean cosine between what the MLP adds and what it is added to"),
    "block_cos": ("cosine", "mean cosine between a block's input and its output"),
    "block_influence": ("", "1 - block_cos: how much a block turns the stream"),
    "max_abs": ("", "largest absolute value in the residual stream after the layer, over all tokens"),
    "max_abs_dim": ("", "the dimension of d_model that holds it"),
    "median_abs": ("", "median absolute value of a token there, the mean over 32 positions a row"),
    "loss_skip_attn": ("nats", _SKIP.format("attention")),
    "loss_skip_mlp": ("nats", _SKIP.format("the MLP")),
    "loss_skip_block": ("nats", _SKIP.format("the whole block")),
}

HEADS: dict[str, tuple[str, str]] = {
    "layer": ("", "number of the block, from 0"),
    "head": ("", "number of the query head, from 0"),
    "kv_head": ("", "the key/value head that it shares"),
    "previous_token": ("share", "attention to the token before" + _SCORES),
    "duplicate": ("share", "attention to the earlier occurrence of the same token, in the second half" + _SCORES),
    "induction": ("share", "attention to the token after the earlier occurrence, in the second half" + _SCORES),
    "first_token": ("share", "attention to the first token" + _SCORES),
    "induction_control": (
        "share",
        "control of induction: attention to keys as far away, but 2 to 8 positions off" + _SCORES,
    ),
    "entropy": ("nats", "mean entropy of the pattern's rows" + _SCORES),
    "out_norm": (
        "norm",
        "mean norm of what the head adds to the residual stream, on the text, without each row's first token",
    ),
}

NEURONS: dict[str, tuple[str, str]] = {
    "layer": ("", "number of the block, from 0"),
    "neuron": ("", "number of the neuron, from 0"),
    "firing_rate": ("share", "share of tokens with a positive gate (a positive activation in plain MLPs)"),
    "mean": (
        "activation",
        "mean activation over the text (a token that begins every row is none of it, here and below)",
    ),
    "std": ("activation", "standard deviation"),
    "max": ("activation", "largest activation"),
    "min": ("activation", "smallest activation"),
    "out_norm": (
        "norm",
        "norm of what a unit of activation adds to the residual stream, before the divisor of a norm behind the MLP",
    ),
    "cos_gate_in": ("cosine", "between gate and input directions, the norm's gain folded in"),
    "cos_gate_out": ("cosine", "between gate and output directions"),
    "cos_in_out": ("cosine", "between input and output directions"),
    "promoted": ("token", "tokens whose logit the output raises most"),
    "promoted_logit": ("logits", "by how much, a unit of activation, before the final norm's scale"),
    "suppressed": ("token", "tokens whose logit the output lowers most"),
    "suppressed_logit": ("logits", "by how much, a unit of activation, before the final norm's scale"),
    "example_index": ("index", "where the activation peaks: index of the token in the text"),
    "example_value": ("activation", "the activation there"),
    "example_start": ("index", "index of the first token of that row"),
}


def meaning(table: dict[str, tuple[str, str]], column: str) -> dict[str, str]:
    """Unit and meaning of a column, also of the ends of an interval."""
    base = column.removesuffix("_lo").removesuffix("_hi")
    unit, text = table[column] if column in table else table[base]
    return {"unit": unit, "meaning": text + (_INTERVAL if column != base else "")}


_NORM, _LOSS = "Residual stream norm", "Loss when a part is skipped"
_ADDED, _COSINE, _SIZE = (
    "What a branch adds, over what it is added to", "Cosine with the residual stream", "Largest and median activation",
)  # fmt: skip

DRAWN: dict[str, dict[str, str | bool]] = {
    "resid_pre_norm": {"chart": _NORM, "title": "before", "log": True},
    "resid_mid_norm": {"chart": _NORM, "title": "between", "log": True},
    "resid_post_norm": {"chart": _NORM, "title": "after", "log": True},
    "resid_post_norm_first": {"chart": _NORM, "title": "after, first token", "log": True},
    "attn_share": {"chart": _ADDED, "title": "attention", "log": True},
    "mlp_share": {"chart": _ADDED, "title": "MLP", "log": True},
    "attn_cos": {"chart": _COSINE, "title": "attention"},
    "mlp_cos": {"chart": _COSINE, "title": "MLP"},
    "block_cos": {"chart": _COSINE, "title": "block"},
    "max_abs": {"chart": _SIZE, "title": "largest", "log": True},
    "median_abs": {"chart": _SIZE, "title": "median", "log": True},
    "loss_skip_attn": {"chart": _LOSS, "title": "attention"},
    "loss_skip_mlp": {"chart": _LOSS, "title": "MLP"},
    "loss_skip_block": {"chart": _LOSS, "title": "block"},
    "induction": {"control": "induction_control"},
}
"""How the pages draw a column: the chart it shares with others, its label there, and its control."""


def described(table: dict[str, tuple[str, str]], column: str) -> dict[str, str | bool]:
    """Unit and meaning of a column, and how the pages draw it."""
    return {**meaning(table, column), **(DRAWN.get(column, {}) if column in table else {})}
