"""What cannot be asked of which tiny model, by name."""

from __future__ import annotations

from tests import families

import microtome as mt

NO_HEAD = {
    "causal_basis", "exits", "fourier_neurons",
    "compare_neurons", "component_effects", "confidence_neurons", "context", "contributions", "false_demonstrations",
    "flow", "fourier", "head_functions", "head_sources", "legrad", "lens", "lens_groups", "linear_map", "logit_lens",
    "mlp_roles", "ov_copying",
    "prior_and_context", "promoted_tokens", "read_tokens", "roles", "row_lens", "token_lens",
}  # fmt: skip
NO_EDGES = {
    "circuit", "completeness", "condition_heads", "edge_effects", "faithfulness", "node_effects", "referee", "roles",
    "sharing", "signals",
}  # fmt: skip
NO_LOSS = {
    "ablation_loss", "group_gradient", "head_ablation", "head_importance", "head_rank", "in_context", "loss",
    "massive_effect", "memorised",
}  # fmt: skip
NO_NEURONS = {name for name, method in mt.methods("measure").items() if method.of == "neuron"}
NO_DENSE = {"compare_neurons", "context_update", "excite", "linear_map", "row_lens", "split_direction"}
NO_NEURONS |= NO_DENSE | {"fourier_neurons", "io_classes", "on_off", "sparsity"}
NO_NEXT = {
    "attribution_check",
    "assess",
    "context_update",
    "cross_task",
    "das",
    "diff_roar",
    "excite",
    "forward_tuning",
    "function_vector",
    "helix",
    "interchange",
    "repair",
    "split_direction",
    "task_vectors",
    "token_interchange",
    "weight_mask",
}
NO_VALUES = {"head_functions", "ov_copying"}
PARALLEL = (
    "gpt_neox-parallel", "gptj", "falcon-mqa", "falcon-gqa", "falcon-onenorm", "phi", "phi-qknorm",
    "stablelm-parallel", "cohere", "cohere-qknorm", "codegen",
)  # fmt: skip
REFUSED = {
    **{key: {"mlp_roles"} for key in PARALLEL},
    "opt-proj": NO_HEAD | {"excite"},
    "bloom": {"excite"},
    "gemma2": {"signals"},
    "olmo-clip": {"signals"},
    "qwen3_moe": {"linear_map"},
    "opt-postnorm": NO_HEAD | NO_EDGES | {"context_update"},
    **dict.fromkeys(families.MASKED, NO_HEAD | NO_EDGES | NO_LOSS | NO_NEXT),
    **dict.fromkeys(("mixtral", "gpt_oss"), NO_NEURONS),
    **dict.fromkeys(("deepseek_v3-qlora", "deepseek_v3-noqlora"), NO_VALUES | NO_DENSE),
}
"""What cannot be asked: logits that are no sum over parts, a stream that is none, a loss, neurons of experts, values
without weights of their own, MLPs that do not read the heads of their layer."""
