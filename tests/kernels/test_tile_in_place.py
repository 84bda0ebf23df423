"""Weights laid out where they lie: the same as a copy, in the same memory, a few at a time."""

import pytest
import torch

from kernels.nvidia import tile_in_place
from kernels.tiled import tile_scale, tile_weight

EXPERTS, SIZE_N, SIZE_K = 5, 192, 256


def weight():
    g = torch.Generator().manual_seed(0)
    shape = (EXPERTS, SIZE_N, SIZE_K // 8)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=g).to(torch.int32)


def scale():
    g = torch.Generator().manual_seed(0)
    return torch.randn(EXPERTS, SIZE_N, SIZE_K // 128, generator=g).bfloat16()


CASES = [
    (tile_in_place.tile_weight_in_place, tile_weight, weight),
    (tile_in_place.tile_scale_in_place, tile_scale, scale),
]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("in_place", "copying", "make"), CASES, ids=["weight", "scale"])
@pytest.mark.parametrize("chunk_experts", [1, 2, 100])
def test_it_is_what_a_copy_would_be_in_the_same_memory(
    monkeypatch, in_place, copying, make, gated, chunk_experts
):
    stored = make()
    expert_bytes = stored[0].numel() * stored.element_size()
    monkeypatch.setattr(tile_in_place, "CHUNK_BYTES", chunk_experts * expert_bytes)
    expected, address = copying(stored, gated), stored.data_ptr()
    tiled = in_place(stored, gated)
    assert torch.equal(tiled, expected)
    assert tiled.is_contiguous()
    assert tiled.data_ptr() == address


def test_no_more_than_a_chunk_is_converted_at_a_time(monkeypatch):
    seen = []

    def tile(rows, gated):
        seen.append(len(rows))
        return tile_weight(rows, gated)

    monkeypatch.setattr(tile_in_place, "tile_weight", tile)
    monkeypatch.setattr(tile_in_place, "CHUNK_BYTES", 2 * SIZE_N * SIZE_K // 2 + 1)
    tile_in_place.tile_weight_in_place(weight(), gated=False)
    assert seen == [2, 2, 1]


def test_an_expert_larger_than_a_chunk_is_converted_alone(monkeypatch):
    monkeypatch.setattr(tile_in_place, "CHUNK_BYTES", 1)
    stored = weight()
    expected = tile_weight(stored)
    assert torch.equal(tile_in_place.tile_weight_in_place(stored, gated=False), expected)


@pytest.mark.parametrize(("in_place", "_", "make"), CASES, ids=["weight", "scale"])
def test_what_is_not_contiguous_is_refused(in_place, _, make):
    with pytest.raises(
        ValueError, match=r"_in_place: shape = .* a contiguous \(experts, n, \.\.\)"
    ):
        in_place(make().transpose(0, 1), gated=False)
    with pytest.raises(ValueError, match=r"_in_place: shape = "):
        in_place(make()[0], gated=False)


def test_a_refusal_leaves_the_weights_as_they_were():
    stored = weight()[:, :100].contiguous()
    before = stored.clone()
    with pytest.raises(ValueError, match="size_n = 100 is not a multiple of 64"):
        tile_in_place.tile_weight_in_place(stored, gated=False)
    assert torch.equal(stored, before)
