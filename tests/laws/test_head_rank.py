"""A cut to all dimensions changes nothing, one to none leaves the mean, and a planted rank is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import families

import microtome as mt
from microtome import planted

PROMPTS = torch.randint(5, families.VOCAB, (6, 7), generator=torch.Generator().manual_seed(1)).tolist()


def test_a_cut_to_all_dimensions_changes_nothing_and_one_to_none_leaves_the_mean() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    size = it.anatomy.d_head
    data = mt.explain.head_rank(it, PROMPTS, heads="1.attn.z[2]", answer=11, ranks=(0, 2, size))
    for name in ("q", "k", "v", "q_random", "k_random", "v_random"):
        assert abs(float(data[name][-1])) < 1e-5
    assert abs(float(data["q"][0] - data["q_random"][0])) < 1e-9  # no direction is left of either
    mean = it.run([PROMPTS[i] for i in (0, 2, 4)], capture="1.attn.q[2]@-1")["1.attn.q[2]@-1"].mean((0, 1))
    held = mt.edit.Set("1.attn.q[2]@-1", mean)
    runs = [[it.run([PROMPTS[i]], edits=e).logits[0, -1].log_softmax(-1)[11] for i in (1, 3, 5)] for e in ((), held)]
    changes = [float(b - a) for a, b in zip(*runs, strict=True)]
    assert np.allclose(data["q_each"][:, 0], changes, atol=1e-5)
    assert abs(data["v"][0]) > 1e-4


def test_keys_and_values_are_those_of_the_group_of_a_head() -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    for part in ("k", "v"):
        one, two = (
            mt.explain.head_rank(it, PROMPTS, heads=f"1.attn.z[{h}]", answer=11, ranks=(1,))[part] for h in (2, 3)
        )
        assert float(one[0]) == float(two[0])


def test_as_many_dimensions_as_a_planted_head_reads_are_enough() -> None:
    it = planted.fact_memory(0, relations=2)
    truth = it.truth
    prompts = [[truth["bos"], truth["fillers"][n % 8], s, truth["relations"][0]] for n, s in
               enumerate(truth["subjects"][:16])]  # fmt: skip
    answers = [row[0] for row in truth["facts"][:16]]
    layer, head = truth["heads"][0]
    data = mt.explain.head_rank(
        it.model, prompts, heads=f"{layer}.attn.z[{head}]", answer=answers, ranks=(0, 2, 12),
        shifted=[[truth["bos"], s, truth["relations"][1]] for s in truth["subjects"][:2]],
        shifted_answer=[row[1] for row in truth["facts"][:2]],
    )  # fmt: skip
    assert float(data["v"][0]) < -2  # the mean value says nothing of the subject
    assert float(data["v"][2]) > -0.1  # a code of 12
    assert float(data["v"][2]) > float(data["v_random"][2]) + 0.3
    assert float(data["q"][0]) > -0.05  # the question is the same in all prompts
    assert abs(float(data["v_shifted"][2])) < 0.1  # another relation is another head's


@pytest.mark.parametrize(
    ("given", "problem", "match"),
    [
        ({"heads": "1.mlp_out"}, mt.errors.SiteError, '"1.mlp_out" is not a head'),
        ({"prompts": PROMPTS[:2]}, mt.errors.PromptError, "half of the prompts are fitted, the other half judged"),
        ({"ranks": (99,)}, mt.errors.PromptError, "no rank that a head can be cut to"),
        ({"shifted": PROMPTS[:1]}, mt.errors.PromptError, "shifted prompts need answers"),
    ],
)
def test_what_cannot_be_cut_is_refused(given: dict[str, object], problem: type[Exception], match: str) -> None:
    it = mt.open(families.build("llama-gqa"), prove=False)
    with pytest.raises(problem, match=match):
        mt.explain.head_rank(it, **({"prompts": PROMPTS, "heads": "1.attn.z[0]", "answer": 11} | given))  # type: ignore[arg-type]
