"""Opening proves the map of every family, refuses a false one, and whatever happens leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tests import families
from torch import Tensor

import microtome as mt
from microtome.anatomy import LayerWeights, Site, anatomy_of
from microtome.anatomy._family import DEFAULT
from microtome.model import _map, _open
from microtome.run.hook import _attention

IDENTITIES = ("1 inert", "2 residual", "3 heads", "4 neurons", "5 attention", "6 unembed", "7 weights")
NORMED = {"qwen3", "gemma3", "phi-qknorm", "olmo2", "stablelm-qknorm", "cohere-qknorm", "qwen3_moe", "persimmon"}
POST_NORM = {"opt-postnorm", "bert", "roberta"}
LATENT = {"deepseek_v3-qlora", "deepseek_v3-noqlora"}
MIXTURES = {"mixtral", "qwen3_moe", "gpt_oss"} | LATENT
# What a proof may leave open: which identity, in which families, and why.
OPEN: dict[tuple[str, str], set[str]] = {
    ("6 unembed", "the head has a transform of its own, or no norm precedes it"): {
        "opt-postnorm",
        "bert",
        "roberta",
    },
    ("6 unembed", "model.decoder projects the stream to another width before the unembedding"): {"opt-proj"},
    ("7 weights", "queries and keys are normalised before use"): NORMED,
    ("7 weights", "latent attention: keys and values have no weights of their own"): LATENT,
    ("7 weights", "the layer is a mixture: experts are checked by identity 4"): MIXTURES,
    ("5 attention", "attention looks both ways"): set(families.MASKED),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def opened(name: str) -> mt.Model:
    return mt.open(families.build(name))


def ids(rows: int = 2, length: int = 10, seed: int = 7) -> Tensor:
    return torch.randint(3, families.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain(hf: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=tokens).logits


def everything(model: mt.Model) -> list[str]:
    return [str(site) for site in model.anatomy.hook_points]


# ---------------------------------------------------------------------------------------------------- the proof holds


@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_opens_and_every_check_holds(name: str) -> None:
    proof = opened(name).proof
    assert {c.identity for c in proof} == set(IDENTITIES)
    assert not [c for c in proof if c.status == "fails"]
    left_open = {(c.identity, c.note) for c in proof if c.status == "does not apply" and c.where != "long prompts"}
    assert left_open == {reason for reason, where in OPEN.items() if name in where}
    for layer in range(families.N_LAYERS):
        held = {c.where for c in proof if c.status == "holds" and c.where.startswith(f"{layer}.")}
        experts = f"{layer}.mlp.experts" in held
        assert {f"{layer}.resid_post", f"{layer}.attn.result", f"{layer}.attn.z", f"{layer}.attn.pattern"} <= held
        assert experts != (f"{layer}.mlp.post" in held)
        assert experts or f"{layer}.W_in" in held
        assert name in LATENT or f"{layer}.W_V" in held
        assert name in NORMED | LATENT or {f"{layer}.W_Q", f"{layer}.W_K"} <= held
    # The gaps are those of rounding, ten times below what is allowed.
    assert all(c.gap <= c.tolerance / 10 for c in proof)


@pytest.mark.parametrize("name", families.NAMES)
def test_logits_with_every_site_captured_are_those_of_transformers(name: str) -> None:
    hf = families.build(name)
    tokens = ids()
    expected = plain(hf, tokens)
    model = opened(name)
    run = model.run(tokens, capture=everything(model))
    assert torch.equal(run.logits, expected)
    assert len(run.captured) == len(model.anatomy.hook_points)
    assert torch.equal(run["logits"], expected)
    assert torch.equal(plain(model.hf, tokens), expected)


@pytest.mark.parametrize("name", families.some(3))
def test_every_family_takes_a_prompt_as_long_as_its_context(name: str) -> None:
    model = opened(name)
    length = min(model.anatomy.n_ctx, 200)
    tokens = ids(1, length)
    assert torch.equal(model.run(tokens).logits, plain(families.build(name), tokens))
    if length == model.anatomy.n_ctx:
        with pytest.raises(mt.errors.PromptError, match=f"got {length + 1} tokens; allowed: at most {length}"):
            model.run(ids(1, length + 1))


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_expert_weights_are_those_that_the_experts_use(name: str) -> None:
    # The proof takes an expert's output as it is; its weight views are checked here.
    model = opened(name)
    layer = next(i for i, part in enumerate(model.anatomy.parts.layers) if part.experts)
    weights = model.layers[layer]
    experts: Any = model.hf.get_submodule(model.anatomy.parts.layers[layer].experts or "")
    x = torch.randn(5, families.D_MODEL, generator=torch.Generator().manual_seed(0))
    for expert in range(model.anatomy.n_experts):
        with torch.no_grad():
            expected = experts(x, torch.full((5, 1), expert), torch.ones(5, 1))
        gate, up = x @ weights.W_gate[expert], x @ weights.W_in[expert]
        if name == "gpt_oss":  # its activation and biases: Agarwal et al. 2025, gpt-oss model card, section 2.1
            bias = experts.gate_up_proj_bias[expert]
            gate, up = (gate + bias[::2]).clamp(max=7.0), (up + bias[1::2]).clamp(-7.0, 7.0)
            hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            got = hidden @ weights.W_out[expert] + experts.down_proj_bias[expert]
        else:
            got = (torch.nn.functional.silu(gate) * up) @ weights.W_out[expert]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", families.some(3))
def test_every_family_that_runs_in_float64_opens_in_it(name: str) -> None:
    hf = families.build(name).double()
    try:
        plain(hf, ids())
    except RuntimeError:
        assert name in MIXTURES  # grouped products of transformers take no float64
        with pytest.raises(mt.errors.ModelUnsupported, match=r"\d tokens in float64.*open it in float32\.$"):
            mt.open(hf)
        return
    assert {c.tolerance for c in mt.open(hf).proof} <= {0.0, 1e-6, 3e-6, 5 * 1e-6}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "falcon-gqa", "mixtral", "gpt_oss", "opt-postnorm"])
def test_families_open_in_narrow_types(name: str, dtype: torch.dtype) -> None:
    assert {c.status for c in mt.open(families.build(name).to(dtype)).proof} <= {"holds", "does not apply"}


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mistral", "bert"])
def test_a_pattern_in_float64_is_that_of_the_kernel(name: str) -> None:
    hf = families.build(name).double()
    same = mt.open(hf, prove=False).run(ids(), edits=[mt.edit.Scale("*.attn.pattern", 1.0)]).logits
    assert float((same - plain(hf, ids())).abs().max()) < 1e-12


# ---------------------------------------------------------------------------------------- a false map is refused


def _swap_tap(anatomy: mt.anatomy.Anatomy, site: Site, like: Site) -> mt.anatomy.Anatomy:
    return replace(anatomy, hook_points={**anatomy.hook_points, site: anatomy.hook_points[like]})


def _part(anatomy: mt.anatomy.Anatomy, index: int, **new: Any) -> mt.anatomy.Anatomy:
    layers = list(anatomy.parts.layers)
    layers[index] = replace(layers[index], **new)
    return replace(anatomy, parts=replace(anatomy.parts, layers=tuple(layers)))


def _other_o(anatomy: mt.anatomy.Anatomy) -> mt.anatomy.Anatomy:
    return _part(anatomy, 1, o=anatomy.parts.layers[2].o)


def _family(**new: Any) -> Callable[[mt.anatomy.Anatomy], mt.anatomy.Anatomy]:
    return lambda a: replace(a, parts=replace(a.parts, family=replace(a.parts.family, **new)))


MLP_OUT = Site("mlp_out", 1)
FALSE_MAPS: list[tuple[str, Callable[[mt.anatomy.Anatomy], mt.anatomy.Anatomy], str, str]] = [
    ("llama-gqa", _other_o, "3 heads", "1.W_O"),
    ("llama-gqa", lambda a: _swap_tap(a, Site("attn.z", 1), Site("attn.z", 2)), "3 heads", "1.W_O"),
    ("llama-gqa", lambda a: _swap_tap(a, Site("resid_mid", 1), Site("resid_mid", 0)), "2 residual", "1.resid_mid"),
    ("llama-gqa", lambda a: _swap_tap(a, Site("resid_post", 0), Site("resid_post", 1)), "2 residual", "0.resid_post"),
    ("llama-gqa", lambda a: _swap_tap(a, Site("mlp_out", 2), Site("mlp_out", 1)), "2 residual", "2.resid_post"),
    ("llama-gqa", lambda a: _swap_tap(a, Site("mlp.post", 2), Site("mlp.up", 2)), "4 neurons", "2.mlp.post"),
    ("llama-gqa", lambda a: _swap_tap(a, Site("mlp.gate", 0), Site("mlp.up", 0)), "7 weights", "0.W_gate"),
    ("llama-gqa", lambda a: _swap_tap(a, Site("attn.in", 2), Site("attn.in", 1)), "7 weights", "2.attn.in"),
    ("llama-gqa", lambda a: _swap_tap(a, Site("final"), Site("resid_post", 2)), "6 unembed", "final"),
    ("llama-gqa", lambda a: _part(a, 1, q=a.parts.layers[1].o), "7 weights", "1.W_Q"),
    ("gpt2", lambda a: _part(a, 0, down=a.parts.layers[1].down), "4 neurons", "0.mlp.post"),
    ("gpt_neox-parallel", _family(fused_qkv="blocks"), "7 weights", "0.W_V"),
    ("falcon-gqa", _family(fused_qkv="blocks"), "7 weights", "0.W_V"),
    ("codegen", _family(fused_qkv="per_head"), "7 weights", "0.W_V"),
    ("gpt_neox-sequential", lambda a: replace(a, parts=replace(a.parts, form="parallel")), "7 weights", "0.mlp.in"),
    ("granite", lambda a: replace(a, logit_scale=1.0), "6 unembed", "logits"),
    ("gemma2", lambda a: replace(a, logit_softcap=None), "6 unembed", "logits"),
    (
        "granite",
        lambda a: replace(a, hook_points={**a.hook_points, MLP_OUT: replace(a.hook_points[MLP_OUT], scale=1.0)}),
        "2 residual",
        "1.resid_post",
    ),
]  # fmt: skip


def falsified(monkeypatch: pytest.MonkeyPatch, falsify: Callable[[mt.anatomy.Anatomy], mt.anatomy.Anatomy]) -> None:
    """Let every map be false, however it is found."""
    monkeypatch.setattr(_map, "LAYOUTS", ())
    for where in (_open, _map):
        monkeypatch.setattr(where, "anatomy_of", lambda *args: falsify(anatomy_of(*args)))


@pytest.mark.parametrize(
    ("name", "falsify", "identity", "where"),
    [pytest.param(*c, marks=[pytest.mark.slow] * (i % 2)) for i, c in enumerate(FALSE_MAPS)],
)
def test_false_map_is_refused_with_place_and_numbers(
    name: str,
    falsify: Callable[[mt.anatomy.Anatomy], mt.anatomy.Anatomy],
    identity: str,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _open.anatomy_of
    falsified(monkeypatch, falsify)
    hf = families.build(name)
    with pytest.raises(mt.errors.ProofError) as caught:
        mt.open(hf, strict=True)
    text = str(caught.value)
    assert f'it fails "{identity}" at {where} (gap ' in text
    assert re.search(r"allowed (1e-05|0\.000[13])\)", text)
    assert "To do: open it without strict=True, and it has what is proven" in text
    assert mt.open(hf).anatomy.missing != found(hf, "").missing or mt.open(hf).anatomy.unproven


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scale", [pytest.param(0.0, marks=pytest.mark.slow), -1.0, pytest.param(0.8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_a_huge_activation_hides_no_false_map(
    site: str, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As real models have them: one residual dimension of thousands, beside which all else is small."""
    hf = families.build("llama-gqa").to(dtype)
    with torch.no_grad():
        hf.model.embed_tokens.weight[:, 7] = 2e4
    assert {check.status for check in mt.open(hf).proof} <= {"holds", "does not apply"}
    found, at = _open.anatomy_of, Site(site, 1)

    def falsify(anatomy: mt.anatomy.Anatomy) -> mt.anatomy.Anatomy:
        return replace(anatomy, hook_points={**anatomy.hook_points, at: replace(anatomy.hook_points[at], scale=scale)})

    falsified(monkeypatch, falsify)
    place = "1.resid_mid" if site == "attn_out" else "1.resid_post"
    with pytest.raises(mt.errors.ProofError, match=f'fails "2 residual" at {place}'):
        mt.open(hf, strict=True)
    model = mt.open(hf)
    assert {str(s) for s in model.anatomy.missing} - {str(s) for s in found(hf, "").missing} >= {f"1.{site}"}


def test_a_false_map_is_mended_by_what_a_forward_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_open, "anatomy_of", lambda hf, name: _other_o(anatomy_of(hf, name)))
    hf = families.build("llama-gqa")
    mended, expected = mt.open(hf, strict=True).anatomy.parts, anatomy_of(hf, "").parts
    # A forward also shows what reads the stream between the branches.
    assert [replace(layer, mid=None) for layer in mended.layers] == list(expected.layers)
    assert replace(mended, layers=expected.layers) == expected


def test_families_without_a_record_open_too() -> None:
    for name in ("glm4", "nemotron", "ernie4_5"):
        assert opened(name).anatomy.parts.family is DEFAULT


@pytest.mark.parametrize("matrix", ["W_Q", "W_K", "W_V"])
def test_weight_view_with_heads_in_another_order_is_refused(matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(LayerWeights, matrix).fget
    monkeypatch.setattr(LayerWeights, matrix, property(lambda self: own(self).flip(0)))
    hf = families.build("llama-gqa")
    with pytest.raises(mt.errors.ProofError, match=rf'fails "7 weights" at 0\.{matrix} \(gap \d.*2 more checks fail'):
        mt.open(hf, strict=True)
    model = mt.open(hf)
    assert set(model.anatomy.unproven) == {f"{i}.{matrix}" for i in range(families.N_LAYERS)}
    with pytest.raises(
        mt.errors.SiteError, match=rf'no {matrix} in layer 1 of .*: it fails "7 weights" at 1\.{matrix}'
    ):
        getattr(model.layers[1], matrix)


def test_hooks_that_change_something_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = _attention.AttentionHooks.visit

    def clumsy(self: Any, slot: str, x: Tensor) -> Tensor:
        return own(self, slot, x) * (1 + 1e-6) if slot == "v" else own(self, slot, x)

    monkeypatch.setattr(_attention.AttentionHooks, "visit", clumsy)
    hf = families.build("llama-gqa")
    with pytest.raises(mt.errors.ProofError, match=r'fails "1 inert" at 0.attn.v \(gap \d.*, allowed 0\)'):
        mt.open(hf, strict=True)
    model = mt.open(hf)
    new = {site.name for site in model.anatomy.missing} - {site.name for site in anatomy_of(hf, "").missing}
    assert new == {"attn.v"}
    assert torch.equal(model.run(ids(), capture=everything(model)).logits, plain(hf, ids()))


def test_map_opens_what_the_proof_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    falsified(monkeypatch, _other_o)
    model = mt.open(families.build("llama-gqa"), prove=False)
    assert model.proof == []
    failed = [c for c in model.prove() if c.status == "fails"]
    assert failed
    assert all(c.where.startswith("1.") for c in failed)
    assert all(c.gap > c.tolerance for c in failed)


# ---------------------------------------------------------------------------------------- nothing is left behind

FORMS = ["llama-gqa", "gpt2", "gpt_neo", "falcon-gqa", "mixtral", "gemma2", "opt-postnorm", "bert"]


def traces(hf: Any) -> list[str]:
    """Everything that an unwatched model does not have."""
    found = [f"watches on {key}" for key in _attention._ACTIVE]
    for path, module in hf.named_modules():
        found += [
            f"{kind} at {path!r}"
            for kind in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_backward_hooks",
                "_backward_pre_hooks",
                "_forward_hooks_with_kwargs",
                "_forward_pre_hooks_with_kwargs",
            )
            if getattr(module, kind)
        ]
        found += [f"{name} at {path!r}" for name in ("forward", "generate") if name in module.__dict__]
        config = getattr(module, "config", None)
        if "microtome" in str(getattr(config, "_attn_implementation", "")):
            found.append(f"attention of {path!r}")
    return found  # fmt: skip


def _fail(problem: BaseException) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        raise problem

    return function


LAST = ("final", "final.scale", "logits")


def _busy(model: mt.Model, *more: mt.edit.Edit, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A run that watches everything, edits everything, and takes a path of its own."""
    names = [n for n in dict.fromkeys(site.name for site in model.anatomy.hook_points) if n not in without]
    sites = [name if name in ("embed", *LAST) else f"*.{name}" for name in names]
    edits = [mt.edit.Scale(site) for site in sites]
    return {"capture": sites, "edits": [*edits, mt.edit.ScaleBlock(1, 0.5), mt.edit.Skip(1 if without else 2), *more]}


@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_left_behind(name: str) -> None:
    model = mt.open(families.build(name), prove=False)
    hf, tokens = model.hf, ids()
    expected, before = plain(hf, tokens), hf.config._attn_implementation

    def check() -> None:
        assert traces(hf) == []
        assert hf.config._attn_implementation == before
        assert torch.equal(plain(hf, tokens), expected)

    seen: list[list[str]] = []
    model.run(tokens, **_busy(model), observe={"1.attn.z": lambda site, x: seen.append(traces(hf))})
    assert seen
    assert seen[0]
    check()
    model.run(tokens, **_busy(model), grad=True)
    check()
    model.run(tokens, **_busy(model, without=LAST), stop_at=2)
    check()
    model.run(tokens, **_busy(model, without=("logits",)), logits=False)
    check()
    for problem in (ValueError("mine"), KeyboardInterrupt(), SystemExit(3), torch.OutOfMemoryError("full")):
        for site in ("1.attn.pattern", "1.mlp_out", "0.attn.v"):
            with pytest.raises(type(problem)):
                model.run(tokens, **_busy(model, mt.edit.Apply(site, function=_fail(problem))))
            check()
    with pytest.raises(KeyboardInterrupt):
        model.run(tokens, observe={"2.resid_post": lambda site, x: _fail(KeyboardInterrupt())(x)})
    check()
    with pytest.raises(mt.errors.EditError):
        model.run(tokens, capture="*.resid_pre", edits=[mt.edit.Set("2.resid_post", torch.zeros(3))])
    check()
    with pytest.raises(KeyboardInterrupt), model.editing(mt.edit.Scale("*.attn.pattern", 0.5), mt.edit.Skip(1)):
        _fail(KeyboardInterrupt())(tokens)
    check()


def test_a_rig_that_cannot_be_installed_is_taken_back() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    layers = list(model.anatomy.parts.layers)
    broken = _part(model.anatomy, 2, block=layers[2].block + ".nowhere")
    hook_points = {
        **broken.hook_points,
        Site("resid_post", 2): replace(broken.hook_points[Site("resid_post", 2)], module="nowhere"),
    }
    model.anatomy = replace(broken, hook_points=hook_points)
    with pytest.raises(mt.errors.SiteError, match="the model no longer has nowhere"):
        model.run(ids(), capture=["*.resid_post", "*.attn.q"])
    assert traces(model.hf) == []


def test_forward_that_the_user_replaced_is_put_back() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    block = model.hf.model.layers[1]
    own = block.forward

    def mine(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    block.forward = mine
    handle = block.register_forward_hook(lambda *_: None)
    model.run(ids(), edits=[mt.edit.Repeat(1)])
    assert block.__dict__["forward"] is mine
    assert len(block._forward_hooks) == 1
    handle.remove()


@pytest.mark.parametrize("name", [*FORMS, "deepseek_v3-qlora", "gpt_oss", "phi3", "roberta"])
def test_opening_and_running_change_no_parameter(name: str) -> None:
    hf, fresh = families.build(name), families.build(name)
    model = mt.open(hf)
    run = model.run(ids(), **_busy(model), grad=True)
    run.grad(run.logits.square().mean())
    for (key, a), (_, b) in zip(hf.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert all(p.grad is None and p.requires_grad for p in hf.parameters())
