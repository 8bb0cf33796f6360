"""A frozen pass holds the divisor of every norm that runs, wherever it is in a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.scripts import script
from torch import Tensor
from torch.overrides import TorchFunctionMode

import microtome as mt

configs = script("tools/family_configs.py")
FREEZE = mt.edit.Freeze(norms=True, patterns=False, activations=False)


class Held(TorchFunctionMode):
    """Detaches what norms divide by: all of these models form it as a reciprocal root."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.paths = "", set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.inside or getattr(func, "__name__", "") not in ("rsqrt", "rsqrt_"):
            return found
        self.paths.add(self.inside)
        return found.detach()


@contextmanager
def held(hf: Any) -> Iterator[Held]:
    """Plain hooks, by the names of classes: nothing here knows the form of a norm."""
    mode = Held()

    def within(path: str) -> Any:
        return lambda module, args: setattr(mode, "inside", path)

    handles = []
    for path, module in hf.named_modules():
        if "Norm" in type(module).__name__:
            handles.append(module.register_forward_pre_hook(within(path)))
            handles.append(module.register_forward_hook(lambda module, args, output: setattr(mode, "inside", "")))
    try:
        with mode:
            yield mode
    finally:
        for handle in handles:
            handle.remove()


def gradient(model: mt.Model, tokens: list[int], edits: list[mt.edit.Edit]) -> tuple[Tensor, Tensor]:
    run = model.run(tokens, capture="0.resid_pre", grad=True, edits=edits)
    return run.grad(run.logits[0, -1, 7])["0.resid_pre"], run.logits.detach()


INSIDE = {
    "llama": ("0.input_layernorm", "2.post_attention_layernorm"),
    "lfm2": ("0.operator_norm", "1.ffn_norm"),
    "mamba2": ("0.norm", "1.mixer.norm"),
    "bitnet": ("0.mlp.ffn_sub_norm", "1.self_attn.attn_sub_norm"),
    "qwen3_next": ("0.linear_attn.norm", "3.self_attn.q_norm"),
    "jamba": ("0.mamba.dt_layernorm", "0.input_layernorm"),
    "falcon_mamba": ("0.norm", "1.mixer.dt_layernorm"),
    "zamba2": ("0.mamba.norm", "1.shared_transformer.pre_ff_layernorm"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_the_gradient_is_that_with_every_divisor_detached(name: str) -> None:
    hf = configs.build(name)
    generator = torch.Generator().manual_seed(0)
    for module in hf.modules():
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            module.weight.data += 0.3 * torch.randn(module.weight.shape, generator=generator)
    model, tokens = mt.open(hf, prove=False), configs.prompt(1, 9).tolist()
    plain, logits = gradient(model, tokens, [])
    frozen, same = gradient(model, tokens, [FREEZE])
    with held(hf) as mode:
        literal, _ = gradient(model, tokens, [])
    assert torch.equal(logits, same)
    for where in INSIDE[name]:
        assert any(path.endswith(f".{where}") for path in mode.paths), (where, sorted(mode.paths))
    size = float(literal.abs().max())
    assert float((frozen - literal).abs().max()) < 1e-4 * size
    assert float((plain - literal).abs().max()) > 1e-2 * size


def test_a_norm_of_no_known_form_is_refused_by_name() -> None:
    model, tokens = mt.open(configs.build("xlstm"), prove=False), configs.prompt(1, 9).tolist()
    text = r"the norm backbone\.blocks\.0\.mlstm_layer\.multihead_norm has no known form"
    with pytest.raises(mt.errors.EditError, match=text):
        model.run(tokens, edits=[FREEZE])


def test_norms_are_known_while_they_are_edited() -> None:
    model, tokens = mt.open(configs.build("llama"), prove=False), configs.prompt(1, 9).tolist()
    edit = mt.edit.Set("1.attn.scale", 2.0)
    want, logits = gradient(model, tokens, [edit, FREEZE])
    with model.editing(edit, FREEZE):
        run = model.hf(torch.tensor(tokens))
        torch.testing.assert_close(run.logits, logits, rtol=1e-5, atol=1e-5)
    with model.editing(edit):
        found = model.run(tokens, capture="0.resid_pre", grad=True, edits=[FREEZE])
        torch.testing.assert_close(found.grad(found.logits[0, -1, 7])["0.resid_pre"], want, rtol=1e-4, atol=1e-5)
