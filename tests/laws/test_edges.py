"""An edge cell is equal to plain hooks on a model in which every head has its own keys and values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import families
from tests.agreement import Agreement, agreed, agreement
from torch import Tensor
from transformers import LlamaForCausalLM

import microtome as mt
from microtome.errors import BudgetError
from microtome.sweep._edges import bytes_of_edges

READ = mt.metric.FunctionMetric(lambda logits, prompts: logits.flatten(1), positions=(-1, 5))
FAMILIES = [
    "gpt2", "gpt_neo", "gpt_neox-parallel", "gptj", "opt-prenorm", "bloom", "falcon-gqa", "falcon-mqa",
    "falcon-onenorm", "mpt", "llama-mha", "llama-gqa", "llama-mqa", "llama-bias", "mistral", "qwen3", "gemma2",
    "gemma3", "phi", "phi3", "olmo2", "stablelm-parallel", "cohere", "granite", "mixtral", "gpt_oss",
    "deepseek_v3-qlora",
]  # fmt: skip


def ids(seed: int, length: int = 9) -> Tensor:
    return torch.randint(5, 100, (1, length), generator=torch.Generator().manual_seed(seed))


def captured(model: mt.Model, tokens: Tensor) -> mt.Run:
    return model.run(tokens, capture=["embed", "*.attn.z", "*.mlp_out"])


def read_of(run: mt.Run) -> Tensor:
    """What `READ` reads of a run."""
    return run.logits[0, [-1, 5]].flatten()


def ungrouped(hf: Any) -> LlamaForCausalLM:
    """The same Llama with the keys and values of each group written out once a head."""
    config = copy.deepcopy(hf.config)
    groups, config.num_key_value_heads = config.num_attention_heads // config.num_key_value_heads, 4
    at_least_float32 = LlamaForCausalLM(config).float().eval()
    state = hf.state_dict()
    for key in [k for k in state if "k_proj" in k or "v_proj" in k]:
        state[key] = (
            state[key].unflatten(0, (hf.config.num_key_value_heads, -1)).repeat_interleave(groups, 0).flatten(0, 1)
        )
    at_least_float32.load_state_dict(state)
    return at_least_float32


def hooked(hf: LlamaForCausalLM, tokens: Tensor, receiver: str, change: Tensor) -> Tensor:
    """Logits when one input alone reads the stream plus a change, by plain hooks."""
    address = mt.anatomy.parse(receiver)
    handles: list[Any] = []
    if address.name == "final":
        handles.append(hf.model.norm.register_forward_pre_hook(lambda m, a: (a[0] + change,)))
    else:
        block = hf.model.layers[int(str(address.layers))]
        if address.name == "mlp.in":
            handles.append(block.post_attention_layernorm.register_forward_pre_hook(lambda m, a: (a[0] + change,)))
        else:
            head, width = int(str(address.units)), block.self_attn.head_dim
            stream: list[Tensor] = []
            part = slice(head * width, (head + 1) * width)
            projection = getattr(block.self_attn, f"{address.name[-1]}_proj")

            def read(module: Any, args: Any, output: Tensor) -> Tensor:
                new = output.clone()
                bias = None if module.bias is None else module.bias[part]
                read = block.input_layernorm(stream[0] + change)
                new[..., part] = torch.nn.functional.linear(read, module.weight[part], bias)
                return new

            handles.append(block.register_forward_pre_hook(lambda m, a: stream.append(a[0])))
            handles.append(projection.register_forward_hook(read))
    with torch.no_grad():
        logits = hf(input_ids=tokens).logits
    for handle in handles:
        handle.remove()
    return logits[0, [-1, 5]].flatten()


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "llama-mqa"])
def test_edges_equal_plain_hooks(name: str) -> None:
    hf = families.build(name)
    model, at_least_float32 = mt.open(hf, prove=False), ungrouped(hf)
    clean, corrupt = ids(0), ids(1)
    base, other = captured(model, clean), captured(model, corrupt)
    senders = ["embed", "0.attn.z[1]", "0.mlp_out", "1.attn.z[3]", "embed@4"]
    receivers = ["2.attn.q[0]", "2.attn.k[1]", "2.attn.v[3]", "2.mlp.in", "1.mlp.in", "final", "2.attn.k[0]"]
    edges = [mt.sweep.Edge(s, r, source=other) for s in senders for r in receivers]
    result = model.sweep(clean, edges, READ).run()
    agree = Agreement(2e-5)
    for i, edge in enumerate(edges):
        sender = mt.anatomy.parse(edge.sender)
        site = str(mt.anatomy.Site(sender.name, None if sender.layers is None else int(str(sender.layers))))
        change = other[site][0] - base[site][0]
        if sender.name == "attn.z":
            head = int(str(sender.units))
            change = change[:, head] @ model.layers[int(str(sender.layers))].W_O[head]
        if edge.sender == "embed@4":
            change = change * (torch.arange(9) == 4).unsqueeze(1)
        expected = hooked(at_least_float32, clean, edge.receiver, change)
        agree.cell(result.values[i], expected, read_of(base), edge)
        if edge.sender == "embed@4" and edge.receiver in ("2.attn.q[0]", "2.mlp.in", "final"):
            assert result.effects[i].abs().max() < 1e-6  # in the last layer these act where they are, and are not read
    agree.stands_out(0.9)


@pytest.mark.parametrize("name", FAMILIES)
def test_into_the_logits_an_edge_adds_what_its_sender_changes_alone(name: str) -> None:
    """A head's change is that of the branch when this head alone is the other's, through whatever norm is behind it."""
    model = mt.open(families.build(name), prove=False)
    clean, corrupt = ids(0), ids(1)
    other = captured(model, corrupt)
    outs = ["embed", "1.attn_out", "1.mlp_out"]
    base = model.run(clean, capture=outs)
    end = f"{model.anatomy.n_layers - 1}.resid_post"
    agree = Agreement(2e-5)
    for sender, site in (("embed", "embed"), ("1.attn.z[2]", "1.attn_out"), ("1.mlp_out", "1.mlp_out")):
        alone = model.run(clean, capture=site, edits=[mt.edit.Patch(sender, source=other)])
        change = (alone[site] - base[site])[0]
        value = model.sweep(clean, [mt.sweep.Edge(sender, "final", source=other)], READ).run().values[0]
        expected = model.run(clean, edits=[mt.edit.Add(end, change)]).logits[0, [-1, 5]].flatten()
        agree.cell(value, expected, read_of(base), sender)
    agree.stands_out(1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_with_all_three_inputs_from_everywhere_is_the_others(name: str) -> None:
    """Layer by layer: all of a layer's input through one edge makes one head what it is on the other stream."""
    model = mt.open(families.build(name), prove=False)
    clean, corrupt = ids(0), ids(1)
    capture = [f"{i}.{s}" for i in range(3) for s in ("resid_pre", "attn.z", "attn.q", "attn.k", "attn.v", "mlp_out")]
    base, other = model.run(clean, capture=["embed", *capture]), model.run(corrupt, capture=["embed", *capture])
    change = (other["2.resid_pre"] - base["2.resid_pre"])[0]
    agree = Agreement(2e-5)
    for name_, head in (("q", 1), ("k", 2), ("v", 0)):
        edge = mt.sweep.Edge("embed", f"2.attn.{name_}[{head}]", change=change)
        got = model.sweep(clean, [edge], READ).run().values[0]
        swapped = model.run(clean, capture="2.attn.z", edits=[mt.edit.Patch(f"2.attn.{name_}", source=other)])
        z = base["2.attn.z"].clone()
        z[:, :, head] = swapped["2.attn.z"][:, :, head]
        expected = model.run(clean, edits=[mt.edit.Set("2.attn.z", z)]).logits[0, [-1, 5]].flatten()
        agree.cell(got, expected, read_of(base), name_)
    read = "2.resid_pre" if model.anatomy.parts.form == "parallel" else "2.resid_mid"
    streams = [model.run(t, capture=read)[read] for t in (clean, corrupt)]
    edge = mt.sweep.Edge("embed", "2.mlp.in", change=(streams[1] - streams[0])[0])
    got = model.sweep(clean, [edge], READ).run().values[0]
    expected = model.run(clean, edits=[mt.edit.Patch("2.mlp_out", source=other)]).logits[0, [-1, 5]].flatten()
    agree.cell(got, expected, read_of(base), "mlp")
    agree.stands_out(0.75)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda s: mt.sweep.Edge("1.attn.z", "2.mlp.in", source=s), '"1.attn.z" cannot send; allowed: embed, one head'),
        (lambda s: mt.sweep.Edge("0.mlp_out", "2.attn.q", source=s), '"2.attn.q" cannot receive'),
        (lambda s: mt.sweep.Edge("2.mlp_out", "1.attn.q[0]", source=s), "2.mlp_out does not come before 1.attn.q"),
        (lambda s: mt.sweep.Edge("2.mlp_out", "2.mlp.in", source=s), "2.mlp_out does not come before 2.mlp.in"),
        (lambda s: mt.sweep.Edge("embed", "final"), "needs a source or a change"),
        (lambda s: mt.sweep.Edge("embed", "2.attn.k[4]", source=s), r"no head \[4\] to receive"),
        (lambda s: mt.sweep.Edge("7.mlp_out", "final", source=s), "no layers 7"),
        (lambda s: mt.sweep.Edge("embed", "final", source={}), "the source of an edge has no embed"),
        (lambda s: mt.sweep.Edge("embed", "final", change=torch.zeros(3, 40)), r"does not fit; got shape \[3, 40\]"),
        (
            lambda s: mt.sweep.Edge("embed", "final", source={"embed": torch.zeros(1, 4, 40)}),
            "1 rows, 4 tokens in its own",
        ),
    ],
)
def test_edges_that_are_none_are_refused(make: Any, text: str) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    source = captured(model, ids(1))
    with pytest.raises(mt.errors.MicrotomeError, match=text):
        model.sweep(ids(0), [make(source)], READ).run()


def test_a_parallel_block_has_no_edge_from_its_attention_to_its_mlp() -> None:
    model = mt.open(families.build("gptj"), prove=False)
    with pytest.raises(mt.errors.EditError, match="does not come before 1.mlp.in in a parallel block"):
        model.sweep(ids(0), [mt.sweep.Edge("1.attn.z[0]", "1.mlp.in", source=captured(model, ids(1)))], READ).run()


def test_a_stream_with_norms_on_it_has_no_edges() -> None:
    model = mt.open(families.build("bert"), prove=False)
    with pytest.raises(mt.errors.SiteError, match="has no edges between heads and MLPs"):
        model.sweep(ids(0), [mt.sweep.Edge("embed", "final", source=captured(model, ids(1)))], READ).run()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_source_of_many_prompts_serves_each_by_its_own_row(side: str) -> None:
    model = mt.open(families.build("gemma2"), prove=False)
    prompts, others = ([ids(s, n)[0].tolist() for s, n in pairs] for pairs in (((0, 5), (2, 8)), ((1, 5), (3, 8))))
    source = model.run(others, capture=["embed", "*.attn.z", "*.mlp_out"], padding=side)
    metric = mt.metric.FunctionMetric(lambda logits, which: logits.flatten(1), positions=(-1,))
    edges = [mt.sweep.Edge(s, r, source=source) for s in ("embed", "0.attn.z[3]") for r in ("1.attn.k[1]", "2.mlp.in")]
    together = model.sweep(prompts, [*edges, *edges], metric, prompts=[0] * 4 + [1] * 4).run()
    agree = Agreement(2e-5)
    for i in range(8):
        alone = captured(model, torch.tensor([others[i // 4]]))
        edge = mt.sweep.Edge(edges[i % 4].sender, edges[i % 4].receiver, source=alone)
        expected = model.sweep([prompts[i // 4]], [edge], metric).run()
        agree.cell(together.values[i], expected.values[0], expected.base[0], edge)
    agree.stands_out(1.0)


def test_edges_of_several_prompts_and_other_cells_mix() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    prompts = torch.cat([ids(0), ids(2)])
    sources = [captured(model, ids(1)), captured(model, ids(3))]
    cells = [
        mt.sweep.Edge("embed", "1.attn.v[2]", source=sources[0]),
        mt.edit.Zero("1.mlp_out@3"),
        mt.sweep.Edge("0.mlp_out", "final", source=sources[1]),
    ]
    together = model.sweep(prompts, cells, READ, prompts=[0, 0, 1]).run()
    with agreement(2e-5, most=1.0) as agree:
        for i, (cell, prompt) in enumerate(zip(cells, (0, 0, 1), strict=True)):
            alone = model.sweep(prompts[prompt : prompt + 1], [cell], READ).run()
            agree.cell(together.values[i], alone.values[0], alone.base[0], cell)
    plan = model.sweep(prompts, cells, READ, prompts=[0, 0, 1]).plan
    assert plan.cells == 3
    assert plan.seconds * model.pace >= plan.flops > 0  # the weights that are read take time too


def test_edges_take_memory_of_their_own() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    edges = [mt.sweep.Edge("embed", f"1.attn.v[{head}]", source=captured(model, ids(1))) for head in (0, 2)]
    stream = 4 * model.anatomy.d_model * ids(0).shape[1]  # what the base run keeps of one layer alone
    one, two = (bytes_of_edges(model, [(edge, 0) for edge in some], [ids(0).shape[1]]) for some in (edges[:1], edges))
    assert two >= one > stream
    assert bytes_of_edges(model, [], [ids(0).shape[1]]) == 0


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_the_embedding_alone_is_the_whole_gap(direction: str) -> None:
    model = mt.open(families.build("llama-gqa"))
    clean, corrupt = ids(0)[0].tolist(), ids(1)[0].tolist()
    data = mt.explain.node_effects(model, clean, corrupt, answer=11, foil=13, direction=direction)
    assert data["effect"].dims == ("sender",)
    ends = {name: model.run(t).logits[0, -1, [11, 13]] for name, t in (("noise", clean), ("denoise", corrupt))}
    gap = {name: float(z[0] - z[1]) for name, z in ends.items()}
    other = {"noise": "denoise", "denoise": "noise"}[direction]
    assert float(data["base"]) == pytest.approx(gap[direction], abs=1e-5)
    agreed(data["effect"].sel(sender="embed"), gap[other] - gap[direction], 1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "gptj"])
def test_every_edge_of_the_table_is_that_edge_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microtome.explain._edges.TOGETHER", 80)  # several sweeps
    model = mt.open(families.build(name), prove=False)
    clean, corrupt = ids(0), ids(1)
    plans: list[mt.sweep.SweepPlan] = []
    told: list[tuple[int, int]] = []
    with mt.settings(on_plan=plans.append, progress=lambda stage, d, n: told.append((d, n))):
        data = mt.explain.edge_effects(model, clean, corrupt, answer=11, foil=13, direction="noise")
    table, mask = data["effect"].values, mt.explain.graph(model).mask.numpy()
    assert table.shape == mask.shape
    assert ((table == table) == mask).all()  # missing where there is no edge
    assert data.attrs["measured"] == data.attrs["n_edges"] == mask.sum() == sum(plan.cells for plan in plans)
    assert told[-1] == (mask.sum(), mask.sum())
    assert told == sorted(told)  # one progress over all of them
    assert len(plans) > 1
    other = captured(model, corrupt)
    metric = mt.metric.LogitDifference(11, foil=13)
    with agreement(1e-5, most=1.0) as agree:
        for sender, receiver in (("embed", "0.attn.k[1]"), ("1.attn.z[2]", "2.mlp.in"), ("0.mlp_out", "final")):
            alone = model.sweep(clean, [mt.sweep.Edge(sender, receiver, source=other)], metric).run().effects[0]
            agree(data["effect"].sel(sender=sender, receiver=receiver), alone, (sender, receiver))


def test_parts_of_the_embedding_are_senders_of_their_own() -> None:
    model = mt.open(families.build("gpt2"), prove=False)
    clean, corrupt = ids(0), ids(1)
    tokens = (model.W_E[corrupt] - model.W_E[clean])[0].detach()
    nothing = torch.zeros_like(tokens)
    data = mt.explain.edge_effects(
        model, clean, corrupt, answer=11, foil=13, direction="noise",
        embeddings={"tokens": tokens, "positions": nothing},
    )  # fmt: skip
    whole = mt.explain.edge_effects(model, clean, corrupt, answer=11, foil=13, direction="noise")
    agreed(data["effect"].sel(sender="tokens"), whole["effect"].sel(sender="embed"), 1e-4)
    assert abs(data["effect"].sel(sender="positions")).max() < 1e-5
    assert data.attrs["n_edges"] == whole.attrs["n_edges"] + len(mt.explain.graph(model).receivers)


def test_stopped_it_keeps_the_edges_that_were_reached() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)

    def stop(stage: str, done: int, everything: int) -> None:
        if done > 60:
            raise KeyboardInterrupt

    with mt.settings(progress=stop):
        data = mt.explain.edge_effects(model, ids(0), ids(1), answer=11, foil=13)
    finite = int((data["effect"] == data["effect"]).sum())
    assert 60 < finite == data.attrs["measured"] < data.attrs["n_edges"]


@pytest.mark.parametrize("method", [mt.explain.node_effects, mt.explain.edge_effects])
def test_what_has_no_start_or_no_end_is_refused(method: Any) -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    clean, corrupt = ids(0), ids(0)
    corrupt[0, 4] = 99
    source, two = captured(model, corrupt), captured(model, torch.cat([corrupt, ids(1)]))
    early = mt.metric.Probability(11, position=3)
    for change, text in (
        ({"direction": "sideways"}, "direction must be one of denoise, noise; got 'sideways'"),
        ({"corrupt": source, "direction": "denoise"}, "a run can only supply values, not receive them"),
        ({"corrupt": two}, "can only take values from a run of one row; got 1 prompts and a run of 2 rows"),
        ({"clean": torch.cat([clean, clean]), "corrupt": source}, "got 2 prompts and a run of 1 rows"),
        ({"metric": early, "answer": None}, r"every effect would be 0; got it reads positions \[3\]"),
    ):
        arguments: dict[str, Any] = {"clean": clean, "corrupt": corrupt, "answer": 11, "direction": "noise"} | change
        with pytest.raises(mt.errors.MicrotomeError, match=text):
            method(model, **arguments)
    noise: dict[str, Any] = {"answer": 11, "direction": "noise"}
    given = mt.explain.node_effects(model, clean, source, **noise)
    assert given["effect"].equals(mt.explain.node_effects(model, clean, corrupt, **noise)["effect"])


def test_a_plan_counts_what_edges_hold_and_a_budget_below_it_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"))
    clean, source = ids(0), captured(model, ids(1))
    edges = [mt.sweep.Edge(f"0.attn.z[{head}]", "2.attn.q[1]", source=source) for head in range(4)]
    plan = model.sweep(clean, edges, READ).plan
    cells = model.sweep(clean, [mt.edit.Zero("2.resid_pre")] * 4, READ).plan
    d, length, n = model.anatomy.d_model, clean.shape[1], model.anatomy.n_layers
    # Four changes and four outputs of all heads, and every layer of the base run, at the very least.
    assert plan.bytes - cells.bytes > 4 * length * (8 * d + 6 * n * d)
    assert model.sweep(clean, edges[:1], READ).plan.bytes < plan.bytes
    whole = model.sweep(clean, edges, READ).run()
    assert whole.plan.bytes == plan.bytes
    cut = model.sweep(clean, edges, READ, budget=plan.bytes - 1).run()
    assert cut.plan.passes > plan.passes
    agreed(cut.effects.abs().amax(1), whole.effects.abs().amax(1), 1e-5)
    ran: list[int] = []
    with pytest.raises(BudgetError, match=r"4 edges need more than memory allows.*raise budget="):
        model.sweep(clean, edges, READ, budget=1000).run(lambda done, n: ran.append(done))
    assert not ran


def test_a_part_of_the_embedding_cannot_be_called_like_a_sender() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    change = torch.ones(9, model.anatomy.d_model)
    with pytest.raises(mt.errors.EditError, match=r"has the name of another sender; got 1\.mlp_out"):
        mt.explain.edge_effects(model, ids(0), ids(1), answer=11, foil=13, embeddings={"1.mlp_out": change})


def test_the_same_prompt_twice_is_refused() -> None:
    model = mt.open(families.build("llama-gqa"), prove=False)
    for method in (
        mt.explain.node_effects,
        mt.explain.edge_effects,
        mt.explain.attribute,
        mt.explain.patch,
    ):
        with pytest.raises(mt.errors.PromptError, match="are the same, so that there is nothing to patch"):
            method(model, ids(0), ids(0), answer=11, foil=13)
