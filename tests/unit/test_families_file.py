"""The tiny models of tests/families.py do what the other tests take for granted."""

import logging
import time
from collections.abc import Iterator

import pytest
import torch
from tests import families

pytestmark = pytest.mark.filterwarnings("error")

CAUSAL = [n for n in families.NAMES if families.KIND[n] == "causal"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small run fastest on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_complaints() -> Iterator[None]:
    """Nothing at level WARNING or above in the log of transformers."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not records


def probe(length: int = 10) -> torch.Tensor:
    """Two rows of ids which are neither padding nor markers."""
    return torch.randint(3, families.VOCAB, (2, length), generator=torch.Generator().manual_seed(7))


def test_table_is_consistent() -> None:
    assert len(set(families.NAMES)) == len(families.NAMES)
    assert set(families.KIND) == set(families.NAMES)
    assert set(families.KIND.values()) == {"causal", "masked"}
    assert set(families.UNLISTED) <= set(families.NAMES)


@pytest.mark.parametrize("name", families.some(3))
@torch.no_grad()
def test_builds_fast_and_runs(name: str) -> None:
    families.build(name)  # the first build pays for the import
    before = torch.get_rng_state()
    start = time.thread_time()  # not by the clock on the wall: the machine may be busy
    model = families.build(name)
    assert time.thread_time() - start < 0.5
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training

    logits = model(probe()).logits
    assert logits.shape == (2, 10, families.VOCAB)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1
    assert torch.equal(logits, model(probe()).logits)

    other = families.build(name)
    for (key, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert torch.equal(logits, other(probe()).logits)


@pytest.mark.parametrize("name", families.some(3))
def test_no_parameter_is_trivial(name: str) -> None:
    model = families.build(name)
    for key, p in model.named_parameters():
        assert p.dtype == torch.float32, key
        assert p.std() > 0.02, key
        assert not torch.any((p == 0) | (p == 1)), key
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and getattr(m, "weight", None) is not None]
    for m in norms:
        centre = m.weight.mean().item()
        assert min(abs(centre), abs(centre - 1)) < 0.2
    assert norms or name.startswith("olmo")


@pytest.mark.parametrize("name", families.some(3, CAUSAL))
@torch.no_grad()
def test_causal_and_generates_with_cache(name: str) -> None:
    model = families.build(name)
    ids = probe()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] - 2) % (families.VOCAB - 3) + 3
    a, b = model(ids).logits, model(changed).logits
    torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a[:, -1], b[:, -1], atol=1e-3)

    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    cached = model.generate(ids, use_cache=True, **settings)
    assert cached.shape == (2, 14)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("name", [n for n in families.NAMES if families.KIND[n] == "masked"])
@torch.no_grad()
def test_masked_sees_both_sides(name: str) -> None:
    model = families.build(name)
    ids = probe()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] - 2) % (families.VOCAB - 3) + 3
    assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0], atol=1e-3)


@torch.no_grad()
def test_soft_caps_are_active() -> None:
    model = families.build("gemma2")
    capped = model(probe()).logits
    model.config.final_logit_softcapping = None
    assert (model(probe()).logits - capped).abs().max() > 0.5
    model.config.final_logit_softcapping = 2.5
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (model(probe()).logits - capped).abs().max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "starcoder2"])
@torch.no_grad()
def test_window_is_shorter_than_the_probe(name: str) -> None:
    model = families.build(name)
    model.config.num_hidden_layers = 1  # one layer sees no further than its window
    ids = probe()
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] - 2) % (families.VOCAB - 3) + 3
    a, b = model(ids).logits, model(changed).logits
    assert not torch.allclose(a[:, families.WINDOW - 1], b[:, families.WINDOW - 1], atol=1e-4)
    torch.testing.assert_close(a[:, families.WINDOW :], b[:, families.WINDOW :], rtol=1e-5, atol=1e-5)
