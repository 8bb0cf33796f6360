"""What families of models do differently, as data.

A record holds only what the module tree does not show: how a fused projection is laid out, and which entries of the
configuration scale a branch or the logits. A `model_type` without a record gets `DEFAULT`, and opens if its proof
passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Fused = Literal["blocks", "per_head", "grouped", "quarters"]
LAYOUTS: tuple[Fused, ...] = ("blocks", "per_head", "grouped", "quarters")


@dataclass(frozen=True)
class Family:
    """How one family departs from the common block.

    Attributes:
        fused_qkv: order of a fused q/k/v projection: ``blocks`` is all q, all k, all v; ``per_head`` is q, k, v of
            each head in turn; ``grouped`` is the queries of a group, then its key and value; ``quarters`` is four
            blocks, each the queries, values and keys of a quarter of the heads.
        branch_scale: configuration entry by which a branch is multiplied before it is added.
        sums_in_place: a parallel block adds the attention branch into the MLP's own output tensor.
        logit_multiply: configuration entry by which logits are multiplied.
        logit_divide: configuration entry by which logits are divided.
        logit_softcap: configuration entry c of ``c * tanh(logits / c)``.
        note: what a user should know of this family.
    """

    fused_qkv: Fused = "blocks"
    branch_scale: str | None = "residual_multiplier"
    sums_in_place: bool = False
    logit_multiply: str | None = None
    logit_divide: str | None = None
    logit_softcap: str | None = "final_logit_softcapping"
    note: str = ""


DEFAULT = Family()

FAMILIES: Mapping[str, Family] = {
    "bloom": Family(fused_qkv="per_head", note="ALiBi: keys and queries carry no position"),
    "codegen": Family(fused_qkv="quarters"),
    "cohere": Family(logit_multiply="logit_scale"),
    "cohere2": Family(logit_multiply="logit_scale"),
    "falcon": Family(fused_qkv="grouped", sums_in_place=True),
    "gpt_bigcode": Family(fused_qkv="grouped"),
    "gpt_neox": Family(fused_qkv="per_head"),
    "gpt_oss": Family(note="each head has a learned sink: rows of the pattern sum to less than 1"),
    "granite": Family(logit_divide="logits_scaling"),
    "mpt": Family(note="ALiBi: keys and queries carry no position"),
    "persimmon": Family(fused_qkv="per_head"),
}


def family_of(model_type: str) -> Family:
    """The record of a family, or the default."""
    return FAMILIES.get(model_type, DEFAULT)


def number(config: Any, entry: str | None) -> float | None:
    """A configuration entry as a number; None if it is absent or switched off."""
    value = getattr(config, entry, None) if entry else None
    return None if value is None else float(value)
