"""A shard is a safetensors file, its checksum that of its bytes, and a value kept in few bits is as near as it says."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from microtome.errors import DataError
from microtome.stream._shard import DTYPES, SCALE, Layout, ReadShard, Shard, combined, sum_of

SITES = {"0.resid_post": (6,), "1.attn.z": (2, 3), "0.mlp.scale": ()}


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_of_pieces_make_that_of_the_whole(first: bytes, second: bytes) -> None:
    assert combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def values(tokens: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: (5 * torch.randn(tokens, *shape, generator=draw)).to(dtype) for name, shape in SITES.items()}


def written(path: Path, dtype: str, given: dict[str, torch.Tensor], pieces: tuple[int, ...] = (3, 4)) -> int:
    shard = Shard(path, Layout(SITES, dtype), sum(pieces))
    for name, x in given.items():
        for piece in x.split(pieces):
            shard.put(name, piece)
    total = shard.finish()
    assert (total, shard.bytes) == (sum_of(path), path.stat().st_size)
    return total


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_here_and_by_safetensors(tmp_path: Path, dtype: str) -> None:
    given, path = values(), tmp_path / "a.safetensors"
    written(path, dtype, given)
    read, plain = ReadShard(path, path.stat().st_size), load_file(path)
    assert read.tokens == 7
    for name, x in given.items():
        found = read.take(name, slice(0, 7))
        if dtype == "int8":
            scale = plain[f"{name}{SCALE}"]
            units = tuple(range(1, x.dim()))
            assert torch.allclose(scale, (x.abs().amax(units) if units else x.abs()) / 127)
            wide = scale.reshape(-1, *[1] * len(units))
            assert torch.equal(found, plain[name] * wide)
            assert bool(((found - x).abs() <= wide / 2 * 1.0001).all())
        else:
            assert torch.equal(found, plain[name])
            assert torch.equal(found, x.to(DTYPES[dtype][0]))
        assert torch.equal(read.take(name, torch.tensor([5, 0]).numpy()), found[[5, 0]])


def test_a_token_of_zeros_is_kept_in_eight_bits(tmp_path: Path) -> None:
    given = {name: torch.zeros_like(x) for name, x in values().items()}
    written(tmp_path / "a", "int8", given)
    assert not ReadShard(tmp_path / "a").take("1.attn.z", slice(0, 7)).any()


def test_values_of_a_narrow_model_are_written_as_they_are(tmp_path: Path) -> None:
    given = values(dtype=torch.bfloat16)
    written(tmp_path / "a", "bfloat16", given)
    assert torch.equal(load_file(tmp_path / "a")["1.attn.z"], given["1.attn.z"])


def test_what_does_not_fit_into_float16_is_refused(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "a", Layout(SITES, "float16"), 2)
    with pytest.raises(ValueError, match="70000"):
        shard.put("0.resid_post", torch.full((2, 6), 7e4))
    shard.close()


def test_a_site_with_too_few_tokens_is_no_shard(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "a", Layout(SITES, "float32"), 2)
    shard.put("0.resid_post", torch.zeros(1, 6))
    with pytest.raises(DataError, match="0.resid_post gave too few tokens"):
        shard.finish()


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:6], lambda data: b"\xff" * len(data)])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "a.safetensors"
    written(path, "float32", values())
    size = path.stat().st_size
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"a\.safetensors is (truncated|damaged)"):
        ReadShard(path, size)
