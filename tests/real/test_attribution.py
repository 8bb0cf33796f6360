"""Attribution on the default model: its edges are counted, and its best candidates are what patching finds."""

from __future__ import annotations

import pytest

import microtome as mt

pytestmark = pytest.mark.real

CLEAN, CORRUPT = "The capital of France is", "The capital of Italy is"


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open()


@pytest.mark.parametrize("method", ["atp", "relp", "eap"])
def test_the_best_candidates_matter(model: mt.Model, method: str) -> None:
    data = mt.explain.attribute(
        model,
        CLEAN,
        CORRUPT,
        answer=" Paris",
        foil=" Rome",
        method=method,
        direction="noise",
        sites=["mlp_out", "attn.z[head]"],
        verify=20,
    )
    if method == "eap":
        assert int(data["score"].notnull().sum()) == 123_211
    assert float(data["clean"]) > 0 > float(data["corrupt"])
    for site in data.attrs["sites"]:
        # In noising the answer loses: the largest effects are negative, and scored so.
        exact = data[f"{site}_exact"]
        assert float(exact.min()) < -0.5
        assert float(data[site].where(exact == exact.min()).min()) < 0
        assert float(data["recall"].sel(site=site)) > 0.5
        best = abs(exact).where(abs(data[site]) >= sorted(abs(data[site]).values[data[site].notnull()])[-20])
        others = abs(exact).where(best.isnull())
        assert float(best.mean()) > 5 * float(others.mean())  # the control: random cells of the same site
