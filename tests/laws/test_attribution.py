"""Attribution: exact where the model is linear, first order elsewhere, and what goes in comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from tests.agreement import agreed, agreement
from tests.linear import linear

import microtome as mt
from microtome.explain import RELP, graph

CLEAN, CORRUPT = [7, 20, 33, 41, 52, 28], [7, 20, 64, 41, 52, 28]
SITES = ("resid_pre", "attn_out", "mlp_out", "attn.z[head]", "attn.q[head]", "attn.k[head]", "attn.v[head]")
ALL = (*SITES, "mlp.post[neuron]")
EDGED = [
    "gpt2", "gpt_neo", "gpt_neox-parallel", "gptj", "bloom", "falcon-gqa", "falcon-onenorm", "falcon-alibi", "mpt",
    "llama-mha", "llama-gqa", "llama-mqa", "llama-bias", "mistral", "qwen3", "gemma2", "gemma3", "phi-qknorm", "phi3",
    "olmo2", "stablelm-parallel", "cohere", "granite", "mixtral", "gpt_oss", "deepseek_v3-qlora",
]  # fmt: skip


def scores(model: mt.Model, method: str = "atp", **more: Any) -> Any:
    given: dict[str, Any] = {"answer": 11, "foil": 13, "method": method, "verify": 0, "direction": "noise"}
    return mt.explain.attribute(model, CLEAN, CORRUPT, **(given | more))


def exact(model: mt.Model, **more: Any) -> Any:
    """Effects as attribution states them: what a patched run reads more than the run that is patched."""
    sites = {"sites": more.pop("sites", SITES)}
    data = mt.explain.patch(model, CLEAN, CORRUPT, answer=11, foil=13, direction="noise", **sites, **more)
    return data[list(sites["sites"])] * (data["corrupt"] - data["clean"])


def near(name: str, eps: float) -> mt.Model:
    """A model to which the corrupt prompt is the clean one, but for eps times a direction in one embedding."""
    hf = families.build(name)
    table = hf.get_input_embeddings().weight.data
    direction = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(5))
    table[64] = table[33] + eps * direction * table[33].norm() / direction.norm()
    return mt.open(hf, prove=False)


def gap(a: Any, b: Any) -> float:
    return max(float(abs(a[name] - b[name]).max()) for name in a.data_vars if name in b.data_vars)


# ------------------------------------------------------------------------------------------------------------- nodes


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_nodes_and_edges_are_exact_where_the_model_is_linear(direction: str) -> None:
    model = linear()
    plain = scores(model, sites=ALL, direction=direction)
    data = mt.explain.patch(model, CLEAN, CORRUPT, answer=11, foil=13, direction=direction, sites=ALL)
    width = (data["corrupt"] - data["clean"]) * (1 if direction == "noise" else -1)
    for end in ("clean", "corrupt"):
        assert float(plain[end]) == pytest.approx(float(data[end]), abs=1e-6 * float(abs(width)))
    with agreement(1e-5, most=0.35) as agree:  # most of the cells of streams and branches lie before the change
        for site in ALL:
            agree(plain[site] / float(abs(width)), data[site] * width / float(abs(width)), site)
    relp = scores(model, "relp", sites=ALL, direction=direction)
    assert gap(plain[list(ALL)], relp[list(ALL)]) < 1e-5 * float(abs(width))
    edges = mt.explain.verify(model, scores(model, "eap", direction=direction), top=graph(model).n_edges)
    agreed(edges["score"] / float(abs(width)), edges["score_exact"] / float(abs(width)), 1e-5, most=0.3)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "gptj"])
def test_the_error_is_of_second_order(name: str) -> None:
    errors: list[float] = []
    for eps in (0.06, 0.03):
        model = near(name, eps)
        estimate, truth = scores(model, sites=SITES), exact(model)
        size = float(abs(truth["resid_pre"]).max())
        errors.append(gap(estimate, truth))
        assert errors[-1] < 0.5 * size
    assert errors[0] / errors[1] > 2.8  # 4 for a quadratic; 2 if a term of first order were missing


@pytest.mark.parametrize("foil", [13, None])
def test_the_first_stream_is_the_directional_derivative(foil: int | None) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = scores(model, foil=foil)
    base, goal = (model.run(t, capture="embed")["embed"] for t in ([CLEAN], [CORRUPT]))

    def read(step: float) -> float:
        logits = model.run([CLEAN], edits=[mt.edit.Set("embed", base + step * (goal - base))]).logits[0, -1].double()
        return float(logits.log_softmax(-1)[11] if foil is None else logits[11] - logits[13])

    slope = (read(1e-2) - read(-1e-2)) / 2e-2
    assert float(data["resid_pre"][0].sum()) == pytest.approx(slope, rel=1e-2, abs=1e-4)
    assert abs(slope) > 1e-2
    assert [float(data["clean"]), float(data["corrupt"])] == pytest.approx([read(0), read(1)], abs=1e-5)
    assert data["resid_pre"].attrs["unit"] == ("logits" if foil else "nats")


# ------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen3", "gemma2", "phi3"])
def test_relevance_is_conserved(name: str) -> None:
    hf = families.build(name)
    for parameter_name, parameter in hf.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
    if name == "gemma2":
        hf.config.final_logit_softcapping = None
    model = mt.open(hf, prove=False)
    plain = model.run([CLEAN]).logits

    def total(rules: mt.edit.Freeze) -> float:
        run = model.run([CLEAN], capture="embed", grad=True, edits=[rules])
        assert torch.equal(run.logits, plain)  # what comes out does not change by a bit
        return float((run.grad(run.logits[0, -1, 7])["embed"] * run["embed"].detach()).sum())

    logit = float(plain[0, -1, 7])
    assert total(RELP) == pytest.approx(logit, rel=1e-4)
    assert total(mt.edit.Freeze(activations="ratio")) != pytest.approx(logit, rel=1e-3)  # products count twice


def test_gate_and_up_branch_get_half_a_product_each() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    capture = ["1.mlp.gate", "1.mlp.up", "1.mlp.post"]
    run = model.run([CLEAN], capture=capture, grad=True, edits=[RELP])
    found = run.grad(run.logits[0, -1, 7])
    whole = found["1.mlp.post"] * run["1.mlp.post"].detach()
    for name in ("1.mlp.gate", "1.mlp.up"):
        torch.testing.assert_close(found[name] * run[name].detach(), whole / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gpt_neox-parallel", "opt-prenorm"])
def test_held_parts_make_the_estimate_exact(name: str) -> None:
    """With all that a frozen pass holds put in place by edits, the model is what the frozen gradient says it is."""
    model = mt.open(families.build(name), prove=False)
    if not model.anatomy.gated:
        rules, held = mt.edit.Freeze(activations=False, mlps=True), ["attn.scale", "attn.pattern", "mlp_out"]
    else:
        rules, held = mt.edit.Freeze(), ["attn.scale", "mlp.scale", "attn.pattern", "mlp.gate"]
    base = model.run([CLEAN], capture=["embed", "final.scale", *(f"*.{site}" for site in held)])
    goal = model.run([CORRUPT], capture="embed")
    edits: list[mt.edit.Edit] = [mt.edit.Patch(f"*.{site}", source=base) for site in held]
    edits += [mt.edit.Patch("final.scale", source=base), mt.edit.Set("embed", goal["embed"])]
    logits = model.run([CLEAN], edits=edits).logits[0, -1].double()
    before = base.logits[0, -1].double()
    truth = float((logits[11] - logits[13]) - (before[11] - before[13]))
    estimate = float(scores(model, rules=rules)["resid_pre"][0].sum())
    assert estimate == pytest.approx(truth, rel=1e-3, abs=1e-5)
    assert abs(truth) > 1e-3


# ------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("rules", [None, RELP], ids=["plain", "relp"])
@pytest.mark.parametrize("name", families.some(3, EDGED))
def test_the_edges_of_a_sender_add_up_to_its_node(name: str, rules: mt.edit.Freeze | None) -> None:
    model = mt.open(families.build(name), prove=False)
    if rules is not None and model.anatomy.n_experts:
        with pytest.raises(mt.errors.EditError, match="has no activation module of its own"):
            scores(model, "eap", rules=rules)
        return
    edges = scores(model, "eap", rules=rules)["score"].sum("receiver").values
    nodes = scores(model, rules=rules, sites=("resid_pre", "mlp_out", "attn.z[head]"))
    expected = [float(nodes["resid_pre"][0].sum())]
    for layer in range(model.anatomy.n_layers):
        expected += [*nodes["attn.z[head]"][layer].values, float(nodes["mlp_out"][layer].sum())]
    scale = max(1.0, abs(edges).max())
    agreed(edges / scale, np.array(expected) / scale, 1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "falcon-gqa", "gemma2", "gpt_oss", "bloom"])
def test_heads_of_a_group_share_out_the_gradient_of_its_keys(name: str) -> None:
    from microtome.explain._first_order import by_head, captures

    model = mt.open(families.build(name), prove=False)
    run = model.run([CLEAN], capture=captures(model), grad=True)
    found = run.grad(run.logits[0, -1, 11] - run.logits[0, -1, 13])
    group = model.anatomy.n_heads // model.anatomy.n_kv_heads
    for layer in range(model.anatomy.n_layers):
        alone = by_head(run, found, layer)
        for part, x in alone.items():
            torch.testing.assert_close(x.sum(0), found[f"{layer}.attn.{part}"], rtol=1e-4, atol=1e-7)
        for head in range(model.anatomy.n_heads):
            others = [i for i in range(model.anatomy.n_kv_heads) if i != head // group]
            for part in "kv":
                assert not alone[part][head][:, :, others].any()  # a head reads the keys and values of its group alone


@pytest.mark.parametrize("name", ["llama-gqa", "gptj", "gemma2"])
def test_an_edge_is_the_first_order_of_its_exact_effect(name: str) -> None:
    errors: list[float] = []
    for eps in (0.06, 0.03):
        model = near(name, eps)
        data = mt.explain.verify(model, scores(model, "eap"), top=graph(model).n_edges)
        assert int(data["measured"][0]) == graph(model).n_edges
        errors.append(float(abs(data["score"] - data["score_exact"]).max()))
        assert errors[-1] < 0.5 * float(abs(data["score_exact"]).max())
        last = [r for r in data["receiver"].values if "attn.k" in r]
        assert float(abs(data["score_exact"].sel(receiver=last)).max()) > 1e-4
    assert errors[0] / errors[1] > 2.8


# ------------------------------------------------------------------------------------------------------ cost, bad input


@pytest.mark.parametrize("method", ["atp", "relp", "eap"])
def test_the_cost_is_two_forwards_and_one_backward(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    calls: list[str] = []
    own = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("within a layer" if kwargs.get("is_grads_batched") else "backward")
        return own(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    watched = {
        "model": model.hf,
        "layer": model.hf.model.layers[0],
        "projection": model.hf.model.layers[2].self_attn.q_proj,
    }
    handles = [m.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, m in watched.items()]
    scores(model, method)
    for handle in handles:
        handle.remove()
    assert [calls.count(name) for name in watched] == [2, 2, 2]
    assert calls.count("backward") == 1
    # In each layer: queries to the stream; scores to keys to the stream; z to values to the stream; the MLP's input.
    assert calls.count("within a layer") == (6 * model.anatomy.n_layers if method == "eap" else 0)


def test_a_result_says_what_it_is() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    data = scores(model, "eap")
    assert data["score"].dims == ("sender", "receiver")
    assert int(data["score"].notnull().sum()) == graph(model).n_edges
    assert data.attrs["fingerprint"] == model.fingerprint
    assert data.attrs["method"] == "edge attribution patching"
    assert data.attrs["rules"] == "plain"
    assert scores(model, "relp").attrs["rules"] == "Freeze(activations='ratio', half_products=True)"
    assert scores(model)["attn.z[head]"].dims == ("layer", "head")
    assert scores(model, sites=["attn.k[head]"])["attn.k[head]"].sizes == {"layer": 3, "kv_head": 2}


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("llama-gqa", {"method": "acdc"}, "method must be one of atp, relp, atp\\*, ig, eap, .*; got 'acdc'"),
        ("llama-gqa", {"foil": 11}, "the foil equals the answer"),
        ("llama-gqa", {"sites": []}, "sites names nothing; allowed: resid_pre, "),
        ("llama-gqa", {"sites": ["logits"]}, "sites must be one of resid_pre, .*; got 'logits'"),
        ("llama-gqa", {"answer": " Paris", "foil": None}, "this model was opened without a tokenizer"),
        ("llama-gqa", {"direction": "both"}, "direction must be one of denoise, noise; got 'both'"),
        ("bert", {"method": "eap"}, "has no edges between heads and MLPs"),
        ("mixtral", {"method": "relp"}, "layer 0 has no activation module of its own"),
        ("llama-gqa", {"answer": None, "foil": None}, "there is nothing to read"),
        ("llama-gqa", {"verify": -1}, r"verify must be an integer of 0 or more \(cells\); got -1"),
    ],
)
def test_what_cannot_be_attributed_is_refused(name: str, change: dict[str, Any], text: str) -> None:
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        scores(mt.open(families.build(name), prove=False), **change)


def test_prompts_that_do_not_align_are_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(mt.errors.PromptError, match="differ first at token 2; got 6 and 4 tokens"):
        mt.explain.attribute(model, CLEAN, [7, 20, 64, 41], answer=11, foil=13)


def test_rules_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(mt.errors.EditError, match="cannot halve products while the whole gate is frozen"):
        mt.edit.Freeze(half_products=True)
    with pytest.raises(mt.errors.EditError, match="cannot freeze activations this way; got 'gates'"):
        mt.edit.Freeze(activations="gates")  # type: ignore[arg-type]


def test_a_gradient_is_drawn_back_only_from_what_was_captured() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    run = model.run([CLEAN], capture=["1.mlp.in", "1.resid_mid"], grad=True)
    rows = torch.zeros(2, 1, 6, 40)
    with pytest.raises(mt.errors.SiteError, match=r"no gradient reaches 1\.attn\.q; got .*1\.mlp\.in"):
        run.vjp(rows, "1.attn.q", "1.resid_mid")
    with pytest.raises(
        mt.errors.SiteError, match=r"do not fit 1\.mlp\.in; got shape \[1, 6, 40\]; allowed: \[n, 1, 6, 40\]"
    ):
        run.vjp(rows[0], "1.mlp.in", "1.resid_mid")
    assert not run.vjp(torch.ones(2, 1, 6, 40), "1.resid_mid", "1.mlp.in").any()  # it does not come before
