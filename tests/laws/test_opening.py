"""What is opened is what the files hold, all of it; what cannot be is refused with the right advice."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import families
from torch import Tensor, nn

import microtome as mt
from microtome.errors import ModelBroken, ModelError, ModelNotFound, ModelUnsupported

TOKENS = [5, 9, 23, 41, 60]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    families.build("llama-gqa").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def refused(subject: Any, kind: type[ModelError], *texts: str) -> str:
    with pytest.raises(kind) as caught:
        mt.open(subject)
    said = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in said
    for text in texts:
        assert text in said
    return said


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------- weights that have no place


def test_a_layer_that_the_configuration_does_not_know_is_refused(folder: Path) -> None:
    configure(folder, num_hidden_layers=2)
    what = "the files of tiny hold weights that have no place in the model of its config.json"
    refused(folder, ModelBroken, what, "got 9 left over: model.layers.2.", "To do: mend config.json, or load")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.gate_proj.weight_scale", "v_head.weight"]
)
def test_any_other_tensor_is_refused_by_name(folder: Path, name: str) -> None:
    rewrite(folder, lambda held: held | {name: torch.ones(40)})
    refused(folder, ModelBroken, f"got 1 left over: {name}")


def test_what_takes_no_part_in_the_model_is_not(folder: Path, tmp_path: Path) -> None:
    buffers = ("self_attn.rotary_emb.inv_freq", "self_attn.rotary_emb.original_inv_freq", "attn.causal_mask")
    spare = [*(f"model.layers.1.{name}" for name in buffers), "model.embed_positions.weights", "model.decoder.version"]
    rewrite(folder, lambda held: held | {name: torch.ones(5) for name in spare})
    mt.open(folder)
    gpt2 = tmp_path / "gpt2"
    families.build("gpt2").save_pretrained(gpt2)
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.ones(())}
    rewrite(gpt2, lambda held: held | mask | {"lm_head.weight": held["transformer.wte.weight"].clone()})
    expected = mt.open(families.build("gpt2")).run(TOKENS).logits
    assert torch.equal(mt.open(gpt2).run(TOKENS).logits, expected)


def test_a_head_of_its_own_beside_a_tied_one_is_used(tmp_path: Path) -> None:
    """A configuration may say that the head is tied while the file holds another one."""
    hf = families.build("gpt2")
    hf.save_pretrained(tmp_path)
    head = torch.randn(families.VOCAB, families.D_MODEL, generator=torch.Generator().manual_seed(0))
    rewrite(tmp_path, lambda held: held | {"lm_head.weight": head})
    model = mt.open(tmp_path)
    assert torch.equal(model.W_U, head.T)
    assert torch.equal(model.W_E, hf.get_input_embeddings().weight)


def test_the_other_heads_of_bert_are_left_aside(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    hf: Any = BertForPreTraining(BertConfig(**families._HF)).eval()
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = hf(input_ids=torch.tensor([TOKENS])).prediction_logits
    torch.testing.assert_close(mt.open(tmp_path).run(TOKENS).logits, expected)


@pytest.mark.parametrize("name", families.some(6))
def test_every_family_opens_from_what_it_saved(name: str, tmp_path: Path) -> None:
    """Nothing that a family saves is taken for a tensor without a place."""
    hf = families.build(name)
    hf.save_pretrained(tmp_path)
    same = mt.open(tmp_path, prove=False).hf.state_dict()
    assert all(torch.equal(x, same[key]) for key, x in hf.state_dict().items())


# ------------------------------------------------------------------------------------------------ adapters


def test_an_adapter_beside_its_base_is_not_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "."}))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    what = "holds an adapter beside its base, which would be left out without peft; got adapter_config.json"
    refused(folder, ModelUnsupported, what, "To do: install peft, or merge it into its base")


def test_an_adapter_alone_is_called_one(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").unlink()
    refused(folder, ModelNotFound, "holds an adapter without the model that it adapts", "merge it into its base")


# ------------------------------------------------------------------------------------------- code of its own

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open({mark!r}, "a").close()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected, ran = mt.open(folder).run(TOKENS).logits, tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(mark=str(ran)))
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    configure(folder, model_type="own", auto_map=own)
    refused(folder, ModelUnsupported, "comes with its own code", "pass trust_remote_code=True if you trust it")
    assert not ran.exists()
    model = mt.open(folder, trust_remote_code=True)
    assert ran.exists()
    assert type(model.hf).__name__ == "OwnForCausalLM"
    assert not model.anatomy.unproven
    torch.testing.assert_close(model.run(TOKENS).logits, expected)


# ------------------------------------------------------------------------------------------------- pickles


def pickled(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the advice makes a folder that opens, with the same weights."""
    expected = mt.open(folder).run(TOKENS).logits
    pickled(folder)
    load, read = torch.load, list[Any]()
    monkeypatch.setattr(torch, "load", lambda *args, **more: read.append(args) or load(*args, **more))
    said = refused(
        folder, ModelUnsupported, "are pickles, which may run code when they are read; got pytorch_model.bin"
    )
    assert not read
    code = re.search(r'python -c "(.*)"`', said)
    assert code
    exec(code[1], {})
    assert torch.equal(mt.open(f"{folder}-safetensors").run(TOKENS).logits, expected)


def test_safetensors_beside_pickles_are_read(folder: Path) -> None:
    expected = mt.open(folder).run(TOKENS).logits
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    (folder / "training_args.bin").write_bytes(b"anything")
    assert torch.equal(mt.open(folder).run(TOKENS).logits, expected)


def test_a_masked_model_is_converted_as_one(tmp_path: Path) -> None:
    families.build("bert").save_pretrained(tmp_path)
    refused(pickled(tmp_path), ModelUnsupported, "from transformers import AutoModelForMaskedLM as M")


# ----------------------------------------------------------------------- models that are compiled or empty


def compiled(how: str) -> Any:
    hf: Any = families.build("llama-gqa")
    if how == "in place":
        hf.compile()
    elif how == "one layer":
        hf.model.layers[1] = torch.compile(hf.model.layers[1])
    elif how == "one layer in place":
        hf.model.layers[1].compile()
    else:
        hf.forward = torch.compile(hf.forward)
    return hf


@pytest.mark.slow  # torch.compile imports for seconds
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
@pytest.mark.parametrize("how", ["in place", "one layer", "one layer in place", "its forward"])
def test_a_model_compiled_in_place_is_refused(how: str) -> None:
    hf = compiled(how)
    said = refused(hf, ModelUnsupported, "is compiled, and what a compiled forward computes inside cannot be watched")
    assert said.endswith("To do: load it again, and do not compile it.")
    assert ("model.layers.1" in said) == ("layer" in how)


def test_a_model_without_weights_is_refused() -> None:
    refused(families.build("llama-gqa").to("meta"), ModelUnsupported, "has no weights", "from_pretrained")


@pytest.mark.parametrize(
    "method", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "gptq", "bits": 4}]
)
def test_quantised_files_say_which_package_is_missing(method: dict[str, Any], folder: Path) -> None:
    configure(folder, quantization_config=method)
    said = refused(folder, ModelUnsupported, f"the weights of tiny are quantised ({method['quant_method']})")
    assert "and a package that reads them is not installed" in said


def test_a_model_inside_of_a_wrapper_is_named() -> None:
    refused(nn.DataParallel(families.build("gpt2")), ModelUnsupported, "got DataParallel", "To do: open its .module.")


def test_a_folder_that_was_removed_meanwhile_is_said_to_lack_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, ModelBroken, "has no weights", "copy the model's files again")
    shutil.rmtree(folder)
    with pytest.raises(ModelNotFound):
        mt.open(folder)
