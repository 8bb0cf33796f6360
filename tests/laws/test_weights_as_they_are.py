"""Models whose weights are no plain matrices here: quantised, offloaded, adapted, compiled.

Whatever is shown of them is compared with plain hooks on the very same modules; weights with the layer's own output.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor, nn

import microtome as mt
from microtome.errors import EditError, ModelBroken, SiteError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def ids(rows: int = 2, length: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(5, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain(hf: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=tokens).logits


@contextmanager
def hooked(hf: Any, path: str, change: Callable[[Tensor], Tensor]) -> Any:
    """A plain hook that changes what a module reads."""
    handle = hf.get_submodule(path).register_forward_pre_hook(lambda module, args: (change(args[0]),))
    try:
        yield
    finally:
        handle.remove()


def zeroed(first: int, last: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., first:last] = 0
        return x

    return change


# ------------------------------------------------------------------------------------------------ quantised


def whole(in_blocks: bool = False) -> Any:
    """The model that is quantised, of sizes of which 4-bit layers pack whole blocks if wanted."""
    plain: Any = families.build("llama-bias")
    if not in_blocks:
        return plain
    config = copy.deepcopy(plain.config)
    config.update({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    return families.made(config)


def dynamic() -> Any:
    return torch.ao.quantization.quantize_dynamic(families.build("llama-bias"), {nn.Linear}, dtype=torch.qint8)


def torchao(config: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    hf = families.build("llama-bias")
    quantization.quantize_(hf, getattr(quantization, config)())
    return hf


def bitsandbytes(bits: int) -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    hf = whole(bits == 4)
    for path, module in list(hf.named_modules()):
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        sizes, more = (module.in_features, module.out_features), {"bias": module.bias is not None}
        if bits == 8:
            new = bnb.nn.Linear8bitLt(*sizes, **more, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*sizes, **more, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
        new.bias = module.bias
        parent, _, own = path.rpartition(".")
        setattr(hf.get_submodule(parent), own, new.to("cpu"))
    return hf.eval()


KINDS: dict[str, Callable[[], Any]] = {
    "torch dynamic": dynamic,
    "torchao int8 weights": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes int8": lambda: bitsandbytes(8),
    "bitsandbytes 4-bit": lambda: bitsandbytes(4),
}
EXACT = {"torchao int8 weights"}


@pytest.mark.parametrize("kind", KINDS)
def test_sites_of_a_quantised_model_are_those_of_plain_hooks(kind: str) -> None:
    hf = KINDS[kind]()
    tokens = ids()
    expected = plain(hf, tokens)
    model = mt.open(hf)
    assert torch.equal(plain(hf, tokens), expected)  # opening changes no weight
    run = model.run(tokens, capture=["*.attn.z", "*.mlp.post", "*.resid_pre", "*.attn.pattern"])
    assert torch.equal(run.logits, expected)
    width, wide = model.anatomy.d_head, model.anatomy.d_mlp
    for path, site, first, last in (
        ("model.layers.1.self_attn.o_proj", "1.attn.z[2]", 2 * width, 3 * width),
        ("model.layers.1.mlp.down_proj", "1.mlp.post[7]", 7, 8),
        ("model.layers.2.mlp.down_proj", f"2.mlp.post[{wide - 1}]", wide - 1, wide),
    ):
        with hooked(hf, path, zeroed(first, last)):
            literal = plain(hf, tokens)
        assert torch.equal(model.run(tokens, edits=mt.edit.Zero(site)).logits, literal)
        assert not torch.equal(literal, expected)
    other = model.run(ids(seed=9), capture="1.resid_pre")
    patched = model.run(tokens, edits=mt.edit.Patch("1.resid_pre", other)).logits
    with hooked(hf, "model.layers.1", lambda x: other["1.resid_pre"]):
        assert torch.equal(patched, plain(hf, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_quantised_model_give_what_its_layers_give(kind: str) -> None:
    """To 1e-5 of |x| @ |W|, plus one step of 1/127 of the largest input where a layer rounds what it reads."""
    hf = KINDS[kind]()
    model = mt.open(hf)
    assert not [check for check in model.proof if check.status == "fails"]
    assert not model.anatomy.unproven.keys() - {f"{i}.sum" for i in range(model.anatomy.n_layers)}
    run = model.run(ids(), capture=["1.mlp.in", "1.mlp.up", "1.mlp.post", "1.mlp_out", "1.attn.in", "1.attn.v"])
    w = model.layers[1]
    for x, matrix, bias, seen in (
        (run["1.mlp.in"], w.W_in, w.b_in, run["1.mlp.up"]),
        (run["1.mlp.post"], w.W_out, w.b_out, run["1.mlp_out"]),
        (run["1.attn.in"], w.W_V.transpose(0, 1).flatten(1), None if w.b_V is None else w.b_V.flatten(),
         run["1.attn.v"].flatten(2)),
    ):  # fmt: skip
        made = x @ matrix + (0.0 if bias is None else bias)
        allowed = 1e-5 * (x.abs() @ matrix.abs() + (0.0 if bias is None else bias.abs()))
        if kind not in EXACT:
            allowed = allowed + x.abs().max() / 127 * matrix.abs().sum(0)
        assert bool(((made - seen).abs() <= allowed).all())
    if kind != "bitsandbytes 4-bit":  # what was quantised is near: another matrix is not
        up = whole().model.layers[1].mlp.up_proj.weight.T
        assert 0 < float((w.W_in - up).abs().max()) < float(up.abs().max()) / 50


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_says_how_its_weights_are_stored(kind: str) -> None:
    hf = KINDS[kind]()
    model = mt.open(hf)
    said = model.provenance["weights"]
    assert "quantised" in said
    assert {"torch": "of torch", "torchao": "of torchao", "bitsandbytes": "of bitsandbytes"}[kind.split()[0]] in said
    assert said in repr(model)
    assert said in model.anatomy.describe()
    assert model.run(ids(1)).provenance["weights"] == said
    assert model.n_parameters == sum(p.numel() for p in whole("4-bit" in kind).parameters())
    assert model.plan(ids(), "*.resid_post").flops > 0


def test_weights_that_differ_differ_in_the_fingerprint() -> None:
    one, same, other = dynamic(), dynamic(), dynamic()
    layer = other.model.layers[1].mlp.down_proj
    layer.set_weight_bias(torch.quantize_per_tensor(layer.weight().dequantize() * 1.5, 0.01, 0, torch.qint8), None)
    found = [mt.open(hf, prove=False).fingerprint for hf in (one, same, other)]
    assert found[0] == found[1] != found[2]
    assert mt.open(families.build("llama-bias")).provenance["weights"] == "plain"


def test_a_layer_that_does_not_what_its_weight_says_has_its_weight_left_out() -> None:
    """Twice the product is far beyond a rounding to 8 bits."""
    hf = dynamic()
    down = hf.model.layers[1].mlp.down_proj
    own = down.forward
    down.forward = lambda x: 2 * own(x)
    model = mt.open(hf)
    assert "1.W_out" in model.anatomy.unproven
    with pytest.raises(SiteError, match="no W_out in layer 1"):
        _ = model.layers[1].W_out
    assert model.layers[0].W_out.shape == (model.anatomy.d_mlp, model.anatomy.d_model)


def test_what_rounding_to_the_largest_of_all_rows_does_not_allow_is_refused() -> None:
    model = mt.open(dynamic())
    assert model.anatomy.causal
    metric = mt.metric.LogitDifference(answer=7, foil=9)
    with pytest.raises(EditError, match="would change each other; got its layers round what they read by the largest"):
        model.sweep(ids(1), [mt.edit.Zero("1.mlp_out")], metric)
    with pytest.raises(mt.errors.PromptError, match="change where they are padded"):
        model.run([[5, 6, 7], [8, 9]])
    with pytest.raises(SiteError, match="round what they read"):
        mt.explain.contributions(model, ids(1), answer=7)


def test_a_sweep_of_rows_that_are_rounded_apart_is_that_of_literal_runs() -> None:
    model = mt.open(torchao("Int8DynamicActivationInt8WeightConfig"))
    metric = mt.metric.LogitDifference(answer=7, foil=9)
    cells = [mt.edit.Zero(f"{layer}.{name}@{pos}") for layer in (0, 2) for name in ("attn.z[1]", "mlp_out")
             for pos in (2, 7)]  # fmt: skip
    swept = model.sweep(ids(1), cells, metric).run()
    runs = [model.run(ids(1), edits=cell).logits[0, -1] for cell in cells]
    literal = torch.stack([logits[7] - logits[9] for logits in runs])
    torch.testing.assert_close(swept.values, literal, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ offloaded


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bloom", "mixtral"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_is_the_model(name: str, where: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    whole, cpu = mt.open(families.build(name)), torch.device("cpu")
    hf: Any = families.build(name)
    hf = cpu_offload(hf, cpu) if where == "cpu" else disk_offload(hf, str(tmp_path), cpu)
    model = mt.open(hf)
    assert model.provenance["weights"] == "offloaded"
    assert model.fingerprint == whole.fingerprint
    assert (model.anatomy.missing, model.anatomy.unproven) == (whole.anatomy.missing, whole.anatomy.unproven)
    one, other = (m.run(ids(), capture=["*.attn.result", "*.mlp_out", "final"]) for m in (model, whole))
    assert torch.equal(one.logits, plain(whole.hf, ids()))
    assert all(torch.equal(one[site], other[site]) for site in ("1.attn.result", "2.mlp_out", "final"))
    edit = mt.edit.Zero("1.attn.z[2]")
    assert torch.equal(model.run(ids(), edits=edit).logits, whole.run(ids(), edits=edit).logits)
    for weight in ("W_Q", "W_O", "W_in", "W_out", "b_O"):
        here, there = getattr(model.layers[1], weight), getattr(whole.layers[1], weight)
        assert torch.equal(here, there) if isinstance(there, Tensor) else here is there
    assert torch.equal(model.W_E, whole.W_E)
    assert torch.equal(model.W_U, whole.W_U)
    assert next(hf.parameters()).is_meta  # nothing stays loaded
    assert torch.equal(plain(hf, ids()), one.logits)


# ------------------------------------------------------------------------------------------------- compiled


def test_what_was_given_to_torch_compile_is_opened() -> None:
    hf = families.build("llama-gqa")
    expected = plain(hf, ids())
    with pytest.warns(UserWarning, match="compiled code cannot be watched: opened what was given to torch.compile"):
        model = mt.open(torch.compile(hf))
    assert model.hf is hf
    assert torch.equal(model.run(ids()).logits, expected)


# ------------------------------------------------------------------------------------------------- adapters


def lora(folder: Path) -> tuple[Any, Path]:
    """A model with a trained adapter of peft, and the folder of the adapter, beside that of its base."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    families.build("llama-gqa").save_pretrained(folder / "base")
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    hf = peft.get_peft_model(families.build("llama-gqa"), peft.LoraConfig(r=3, target_modules=targets))
    for name, weight in hf.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    hf.peft_config["default"].base_model_name_or_path = str(folder / "base")
    hf.save_pretrained(folder / "adapter")
    return hf.eval(), folder / "adapter"


def test_an_adapter_is_opened_on_its_base_on_off_and_merged(tmp_path: Path) -> None:
    hf, folder = lora(tmp_path)
    expected, base = plain(hf, ids()), plain(families.build("llama-gqa"), ids())
    assert not torch.equal(expected, base)
    for model in (mt.open(hf), mt.open(folder)):
        assert torch.equal(model.run(ids()).logits, expected)
        assert not [check for check in model.proof if check.status == "fails"]
        assert model.provenance["weights"] == "adapter default on"
    model = mt.open(hf)
    with hf.disable_adapter():
        assert torch.equal(model.run(ids()).logits, base)
        assert model.provenance["weights"] == "adapter default off"
    merged = mt.open(hf.merge_and_unload())
    torch.testing.assert_close(merged.run(ids()).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    _, folder = lora(tmp_path)
    said: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    families.build("gpt2").save_pretrained(tmp_path / "other")
    config = copy.deepcopy(families.build("llama-gqa").config)
    config.update({"intermediate_size": 64})
    families.made(config).save_pretrained(tmp_path / "wider")
    for name, got in (("other", "not found in the base model"), ("wider", "size mismatch")):
        (folder / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": f"../{name}"}))
        with pytest.raises(ModelBroken, match=f"does not fit the model that it names; got .*{got}"):
            mt.open(folder)
