"""Planted cases of flow and of what an answer comes from: a copied token, one true sentence, a chain of neurons."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import microtome as mt
from microtome import planted
from microtome.planted._llama import Layout, bench, codes

SEEDS = (0, 1, 2)


def told(measure: str, what: str, found: int, of: int, false: int, among: int) -> dict[str, Any]:
    """A row of the table."""
    return {"measure": measure, "planted": what, "found": f"{found} of {of}", "false": f"{false} of {among}"}


def copied(seed: int, length: int = 6) -> tuple[planted.Planted, torch.Tensor]:
    """A model that continues what it has seen, and a prompt of tokens of which the first few come again."""
    it = planted.induction(seed)
    half = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:length]
    return it, torch.cat([half, half[:3]])


def routes() -> dict[str, Any]:
    """The copied token's route is among the largest two and carries the answer; heads that do nothing carry nothing."""
    found = false = among = 0
    for seed in SEEDS:
        it, prompt = copied(seed)
        data = mt.explain.flow(it.model, prompt, threshold=0.0, verify=8)
        heads = {kind: "{}.attn.z[{}] ".format(*it.truth[kind]) for kind in ("induction_head", "previous_token_head")}
        names, helps = [str(c) for c in data["component"].values], data["route_exact"].values
        words = it.model.to_words(prompt)
        own = names.index(f"{heads['induction_head']}@3{words[3]} > @8{words[8]}")
        by_token = data["tokens"][1].values[:7]  # but of the last token and the one before, which is always read
        found += own < 2 and helps[own] < -5 and int(by_token.argmax()) == 3
        others = [i for i, name in enumerate(names) if not name.startswith(tuple(heads.values()))]
        false += sum(abs(helps[i]) > 0.01 for i in others)
        among += len(others)
    return told("flow", "route of a copied token", found, len(SEEDS), false, among)


def untaught(seed: int = 0) -> mt.Model:
    """A Llama of random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=64, max_position_embeddings=64)  # fmt: skip
    return mt.open(LlamaForCausalLM(config), prove=False)


def sentences() -> dict[str, Any]:
    """Of several pairs of key and value, the one whose key comes again; no other pair, no other head.

    False are other pairs and heads with a tenth of what the true one has, and pairs of a model that learnt nothing.
    """
    found = false = asked = 0
    blank = untaught()
    for seed in range(12):
        it = planted.induction(seed % 3)
        rng = torch.Generator().manual_seed(seed)
        tokens = torch.randperm(1000, generator=rng)[:16]
        true = int(torch.randint(2, 8, (), generator=rng))  # without the first, the second would stand where BOS does
        prompt = torch.cat([tokens, tokens[2 * true : 2 * true + 1]])
        parts = [(2 * i, 2 * i + 2) for i in range(8)]
        data = mt.explain.context(it.model, prompt, answer=int(tokens[2 * true + 1]), sentences=parts, controls=1)
        layer, head = it.truth["induction_head"]
        scores, heads = data["score"].values, data["heads"].values
        found += int(scores.argmax()) == true and heads.argmax() == layer * heads.shape[1] + head
        none = mt.explain.context(blank, prompt, answer=11, sentences=parts, controls=1)["score"].values
        mine = (scores[true], heads[layer, head])
        for own, whole in ((scores, mine[0]), (heads.ravel(), mine[1]), (none, mine[0])):
            false += int((own > 0.1 * whole).sum())
            asked += own.size
        false, asked = false - 2, asked - 2  # the true pair and the true head
    return told("context", "the sentence that holds the answer, and its head", found, 12, false, asked)


def chain(seed: int = 0, subjects: int = 12, d_mlp: int = 40) -> planted.Planted:
    """A head that brings a subject, a neuron that reads it and writes a step, one that reads this and writes the rest.

    A prompt is BOS, a subject, `ask`; truth: `bos`, `ask`, `subjects`, `answers`, `head`, and of each subject `first`
    and `second`, (layer, neuron).
    """
    layout = Layout(subject=subjects, moved=subjects, step=subjects, is_ask=1, is_subject=1, is_bos=1, out=12)
    vocab = 2 + 2 * subjects
    it = bench(layout, vocab=vocab, layers=3, heads=4, d_head=64, d_mlp=d_mlp, seed=seed)
    s, answers = torch.arange(2, 2 + subjects), torch.arange(2 + subjects, vocab)
    it.model.W_E[s, layout["subject"]] = torch.eye(subjects)
    for token, flag in ((s, "is_subject"), (0, "is_bos"), (1, "is_ask")):
        it.model.W_E[token, layout[flag]] = 1.0
    words = codes(subjects, 12, it.rng)
    it.model.W_U[layout["out"], answers] = 20.0 * words.T
    head, ask, one = it.free_head(0), it.part("is_ask")[:, 0], it.part("one")[:, 0] / it.one
    keys = torch.cat([it.part("is_subject"), it.part("is_bos")], dim=1)
    it.match(0, head, torch.stack([2 * ask, one], dim=1), keys)
    it.move(0, head, it.part("subject"), it.part("moved").T)
    moved, step, out = it.part("moved"), it.part("step"), it.part("out")
    first = [it.neuron(1, moved[:, i] - 0.5 * one, step[:, i] + 0.2 * out @ words[i]) for i in range(subjects)]
    second = [it.neuron(2, step[:, i] - 0.5 * one, out @ words[i]) for i in range(subjects)]
    return it.finish({
        "bos": 0, "ask": 1, "subjects": s.tolist(), "answers": answers.tolist(), "head": (0, head),
        "first": [(1, n) for n in first], "second": [(2, n) for n in second],
    })  # fmt: skip


def neurons() -> dict[str, Any]:
    """The two neurons of each subject, in their order, and no others."""
    found = false = among = 0
    for seed in SEEDS:
        it = chain(seed)
        layer, head = it.truth["head"]
        for i in range(4):
            prompt = [it.truth["bos"], it.truth["subjects"][i], it.truth["ask"]]
            data = mt.explain.compare_neurons(
                it.model, [prompt], without=f"{layer}.attn.z[{head}]", answer=it.truth["answers"][i], top=2, controls=2
            )
            named = [f"{n}.mlp.post[{j}]" for n, j in (it.truth["first"][i], it.truth["second"][i])]
            found += data["component"].values.tolist() == named and float(data["loss"]) > 1
            change = data["change"].values
            for n, j in (it.truth["first"][i], it.truth["second"][i]):
                change[n, j] = float("nan")
            rest = change[~torch.from_numpy(change).isnan().numpy()]
            false += int((abs(rest) > 0.05).sum()) + int(abs(float(data["loss_random"])) > 0.05)
            among += len(rest) + 1
    return told("compare_neurons", "a chain of two neurons behind a head", found, 4 * len(SEEDS), false, among)


CASES = (routes, sentences, neurons)
