"""What cannot be watched is refused in one line, and what a family is, is found out and not assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from tests import families
from torch import Tensor, nn

import microtome as mt

NEAR = {"rtol": 1e-4, "atol": 2e-5}


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------- attention kernels


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa"])
@pytest.mark.parametrize(
    "options",
    [
        {"capture": "1.attn.pattern"},
        {"capture": "*.attn.scores"},
        {"edits": [mt.edit.Zero("1.attn.pattern")]},
        {"edits": [mt.edit.KnockOut("1.attn.scores", keys="0")]},
    ],
)
def test_patterns_under_kernels_that_hide_their_masks_are_refused(kernel: str, options: dict[str, Any]) -> None:
    hf = families.build("llama-gqa")
    model = mt.open(hf, prove=False)
    hf.config._attn_implementation_internal = kernel  # as if it were installed
    with pytest.raises(mt.errors.SiteError, match=f"under the attention kernel {kernel}".replace("|", "[|]")) as caught:
        model.run(ids(), **options)
    assert "eager or sdpa" in str(caught.value)
    assert "\n" not in str(caught.value)
    edits = list(options.get("edits", ()))
    if edits:
        with pytest.raises(mt.errors.SiteError, match="under the attention kernel"), model.editing(*edits):
            pass
    hf.config._attn_implementation_internal = "sdpa"
    assert model.run(ids(), **options).logits.isfinite().all()


def test_a_model_under_such_a_kernel_opens_without_patterns() -> None:
    hf = families.build("llama-gqa")
    plain = mt.open(hf)
    hf.config._attn_implementation_internal = "flash_attention_2"
    model = mt.open(hf, prove=False)
    assert "1.attn.pattern" not in {str(s) for s in model.anatomy.hook_points}
    assert mt.anatomy.Site("attn.z", 1) in model.anatomy.hook_points
    with pytest.raises(mt.errors.SiteError, match="no site 1.attn.scores in .*flash_attention_2"):
        model.run(ids(), capture="1.attn.scores")
    assert mt.anatomy.Site("attn.pattern", 1) in plain.anatomy.hook_points


@contextmanager
def registered(name: str, kernel: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """A kernel that `transformers` knows for the length of a test."""
    transformers.AttentionInterface.register(name, kernel)
    transformers.AttentionMaskInterface.register(name, mask)
    try:
        yield
    finally:
        for registry in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            registry._global_mapping.pop(name, None)


SDPA = transformers.AttentionInterface._global_mapping["sdpa"]
sdpa_mask = transformers.AttentionMaskInterface._global_mapping["sdpa"]


def test_a_kernel_is_called_by_its_own_name() -> None:
    seen: list[str] = []

    def kernel(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(module.config._attn_implementation)
        return SDPA(module, *args, **kwargs)

    hf = families.build("llama-gqa")
    expected = mt.open(hf, prove=False).run(ids(), capture="1.attn.pattern")
    with registered("named_here", kernel, sdpa_mask):
        hf.set_attn_implementation("named_here")
        run = mt.open(hf).run(ids(), capture=["1.attn.pattern", "*.attn.q"])
        assert torch.equal(run.logits, expected.logits)
        assert torch.equal(run["1.attn.pattern"], expected["1.attn.pattern"])
        assert set(seen) == {"named_here"}
        assert hf.config._attn_implementation == "named_here"


def test_a_kernel_that_hides_its_masks_shows_all_else() -> None:
    def kernel(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: list[Any], **kwargs: Any) -> Any:
        return SDPA(module, q, k, v, mask[0], **kwargs)

    hf = families.build("llama-gqa")
    sites = ["1.attn.q", "1.attn.v", "1.attn.z", "1.mlp.post"]
    expected = mt.open(hf).run(ids(), capture=sites)
    with registered("hiding", kernel, lambda *args, **kwargs: [sdpa_mask(*args, **kwargs)]):
        hf.set_attn_implementation("hiding")
        model = mt.open(hf)
        run = model.run(ids(), capture=sites)
        for site in (*sites, "logits"):
            assert torch.equal(run[site], expected[site])
        note = next(c.note for c in model.proof if c.identity == "5 attention" and c.note)
        assert note == "not seen in this family: scores, pattern"
        with pytest.raises(mt.errors.SiteError, match="no site 1.attn.pattern .*kernel hiding cannot be read"):
            model.run(ids(), capture="1.attn.pattern")


# ----------------------------------------------------------------------- norms of queries and keys

WITH_NORMS = [
    "qwen3",
    "qwen3_moe",
    "olmo2",
    "gemma3",
    "cohere-qknorm",
    "phi-qknorm",
    "stablelm-qknorm",
    "deepseek_v3-qlora",
]


@pytest.mark.parametrize("name", WITH_NORMS)
def test_frozen_norms_of_queries_and_keys_are_linear(name: str) -> None:
    hf = families.build(name)
    for parameter_name, parameter in hf.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
    model = mt.open(hf, prove=False)
    freeze = mt.edit.Freeze(patterns=False, activations=False)
    sites = ["embed", "0.attn.q", "0.attn.k"]
    plain = model.run(ids(1), capture=sites)
    run = model.run(ids(1), capture=sites, grad=True, edits=[freeze])
    assert torch.equal(run.logits, plain.logits)
    for site in ("0.attn.q", "0.attn.k"):
        weight = torch.randn(run[site].shape, generator=torch.Generator().manual_seed(1))
        value = (run[site] * weight).sum()
        total = float((run.grad(value)["embed"] * run["embed"].detach()).sum())
        assert total == pytest.approx(float(value.detach()), rel=1e-3, abs=1e-3), site
        loose = model.run(ids(1), capture=sites, grad=True)
        value = (loose[site] * weight).sum()
        live = float((loose.grad(value)["embed"] * loose["embed"].detach()).sum())
        assert live != pytest.approx(float(value.detach()), rel=1e-2), site


# --------------------------------------------------------------------------------- causality


def behaves_causally(hf: nn.Module) -> bool:
    one = ids(1)
    two = torch.cat([one[:, :-1], (one[:, -1:] + 7) % 90 + 5], dim=1)
    a, b = (hf(input_ids=x).logits[:, :-1] for x in (one, two))
    return bool((a - b).abs().max() < 1e-5)


@pytest.mark.parametrize("name", families.some(3))
def test_causal_is_how_it_behaves(name: str) -> None:
    hf = families.build(name)
    assert mt.open(hf, prove=False).anatomy.causal == behaves_causally(hf) == (families.KIND[name] == "causal")


def small(kind: str, **more: object) -> transformers.PretrainedConfig:
    return getattr(transformers, f"{kind}Config")(
        hidden_size=40, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56, vocab_size=101,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip


DECODERS = ["Bert", "Roberta", "Electra", "Camembert", "XLMRoberta", "BertGeneration", "RemBert"]


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [(k, d) for k in DECODERS for d in (True, False) if d or k != "BertGeneration"],  # which has no masked head
)
def test_decoders_of_encoder_families_are_causal(kind: str, decoder: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
        hf = auto.from_config(small(kind, is_decoder=decoder)).eval()
    model = mt.open(hf)
    assert model.anatomy.causal == behaves_causally(hf) == decoder
    cells = [mt.edit.Zero(f"{layer}.attn.z[1]@{at}") for layer in range(3) for at in (0, 4)]
    found = model.sweep(ids(1), cells, mt.metric.FunctionMetric(lambda logits, prompts: logits.flatten(1))).run().values
    for cell, values in zip(cells, found, strict=True):
        torch.testing.assert_close(values, model.run(ids(1), edits=[cell]).logits[0, -1], **NEAR)
    if decoder:
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert model.hf.generate(input_ids=ids(1), **options).shape == (1, 11)


# ------------------------------------------------------------------ families that nobody knows

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DECODER = {
    "d_model": 32, "decoder_layers": 2, "num_layers": 2, "decoder_attention_heads": 4, "attention_heads": 4,
    "decoder_ffn_dim": 48, "ffn_dim": 48, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UNKNOWN = {
    "its blocks return lists": ("OpenAIGPT", SMALL, {"attn.pattern", "mlp.post", "resid_mid"}),
    "its attention has no batch": ("XGLM", DECODER, {"attn.pattern", "mlp.post", "resid_mid"}),
    "it has no attention": ("Mamba", TINY, {"mixer.in", "mixer_out"}),
    "its residual is scaled": ("HyperCLOVAX", TINY, {"attn_out", "mlp_out", "resid_mid"}),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_families_open_with_what_is_proven_of_them(what: str) -> None:
    kind, config, names = UNKNOWN[what]
    hf = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**config)).eval()
    with torch.no_grad():
        expected = hf(input_ids=ids()).logits
    model = mt.open(hf)
    for layer in range(2):
        assert names <= {site.name for site in model.anatomy.hook_points if site.layer == layer}
    run = model.run(ids(), capture=[f"*.{name}" for name in sorted(names)])
    assert torch.equal(run.logits, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())


def test_a_family_that_does_not_run_on_token_ids_is_refused_in_one_line() -> None:
    hf = transformers.AutoModelForCausalLM.from_config(transformers.XmodConfig(**TINY)).eval()
    text = "cannot run 8 tokens even without hooks; got ValueError"
    with pytest.raises(mt.errors.ModelUnsupported, match=text) as caught:
        mt.open(hf)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("To do: ") == 1


def test_parts_of_no_known_form_are_said_in_one_line() -> None:
    hf = families.build("llama-gqa")
    hf.model.layers[0].self_attn.o_proj = nn.Identity()
    with pytest.raises(mt.errors.ModelUnsupported, match="have no known form.*does not say what sizes it has"):
        mt.open(hf)


def test_a_kernel_may_be_given_its_mask_by_name() -> None:
    hf = transformers.AutoModelForCausalLM.from_config(transformers.DogeConfig(**TINY)).eval()
    model = mt.open(hf, prove=False)
    with torch.no_grad():
        expected = hf(input_ids=ids()).logits
    run = model.run(ids(), capture=["0.attn.q", "0.attn.v"])
    assert torch.equal(run.logits, expected)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_norm_that_hides_its_epsilon_is_measured(scale: float) -> None:
    hf = families.build("olmo")
    with torch.no_grad():
        hf.get_input_embeddings().weight *= scale
    model = mt.open(hf)
    norm = model.layers[0].attn_norm
    assert norm is not None
    assert norm.norm.eps == pytest.approx(1e-5)


# ------------------------------------------------------------------------------------------------ sparse attention


def test_a_model_that_chooses_its_mask_by_the_kernel_s_name_keeps_it() -> None:
    # DeepSeek-V3.2 (2025) reads its top-k keys alone, here 4 of 24, and only under kernels that it knows by name.
    settings = families._DEEPSEEK | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
    hf = families.made(transformers.DeepseekV32Config(**settings))
    tokens = ids(2, 24)
    with torch.no_grad():
        expected = hf(input_ids=tokens).logits
    model = mt.open(hf, prove=False)
    inside = [f"*.attn.{name}" for name in ("q", "k", "v", "scores", "pattern", "z")]
    run = model.run(tokens, capture=inside)
    assert torch.equal(run.logits, expected)
    assert set((run["2.attn.pattern"] > 0).sum(-1)[:, :, 4:].flatten().tolist()) == {4}
    dense = replace_topk(hf, 64)
    with torch.no_grad():
        assert (dense(input_ids=tokens).logits - expected).abs().max() > 0.01  # that mask is what is tested


def replace_topk(hf: Any, k: int) -> Any:
    hf.config.index_topk = k
    for module in hf.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = k
    return hf
