"""The induction head hears the previous-token head, and hardly anyone else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from microtome import circuits, planted


@pytest.fixture(scope="module")
def it() -> planted.Planted:
    return planted.induction()


def repeated(seed: int = 0, n: int = 6) -> list[int]:
    drawn = torch.randperm(999, generator=torch.Generator().manual_seed(seed))[:n] + 1
    return [*drawn.tolist(), *drawn[:-1].tolist()]


def test_its_keys_are_written_by_the_previous_token_head(it: planted.Planted) -> None:
    (l0, h0), (l1, h1) = it.truth["previous_token_head"], it.truth["induction_head"]
    prompt = repeated()
    found = circuits.signals(it.model, prompt, head=f"{l1}.attn.z[{h1}]", answer=prompt[5])
    assert found.attrs["key"].endswith("(5)")  # the token behind the last one's first occurrence
    writer = f"{l0}.attn.z[{h0}]"
    assert str(found["sender"].values[int(found["key"].values.argmax())]) == writer
    assert float(found["key"].sel(sender=writer)) > 0.9
    assert float(found["query"].sel(sender="embed")) > 0.9
    assert float(found["key_random"].sel(sender=writer)) < 0.5
    assert float(found["attention"]) > 0.95
    assert float(found["attention_without"]) < 0.2
    assert float(found["effect"]) < -5
    # It matches codes in all of its directions alike: no basis is better than another.
    assert float(found["agreement"]) > 0.95
    assert 20 < float(found["dimension"]) <= float(found["dimension_random"]) < 32
    assert float(found["carried_random"]) > 0.85
    assert float(found["effect_random"]) == pytest.approx(float(found["effect"]), rel=0.05)


def test_the_circuit_is_traced(it: planted.Planted) -> None:
    (l0, h0), (l1, h1) = it.truth["previous_token_head"], it.truth["induction_head"]
    clean, corrupt = repeated(0), repeated(0)
    corrupt[5] = 998 if corrupt[5] != 998 else 997
    corrupt[4] = 996 if corrupt[4] != 996 else 995
    pairs: dict[str, Any] = {"answer": clean[5], "foil": corrupt[5]}
    found = circuits.find(it.model, clean, corrupt, method="signal", edges=6, **pairs)
    edges = {(u, v) for u, v, _ in found.listed}
    assert (f"{l0}.attn.z[{h0}]", f"{l1}.attn.k[{h1}]") in edges
    assert ("embed", f"{l1}.attn.v[{h1}]") in edges
    assert (f"{l1}.attn.z[{h1}]", "final") in edges
    gradient = circuits.find(it.model, clean, corrupt, method="eap", edges=6, **pairs)
    assert (f"{l0}.attn.z[{h0}]", f"{l1}.attn.k[{h1}]") not in {(u, v) for u, v, _ in gradient.listed}
