"""The tiled layout: that of vLLM's own model of Marlin, the drawing in w4a16.h, and exact back."""

import pytest
import torch

from kernels import tiled
from kernels.formats import pack_int4, unpack_int4

# (experts, n, k); the second has several tiles each way, the third a single group
SHAPES = [((), 64, 128), ((3,), 192, 384), ((2,), 128, 128)]


def random_words(*shape, seed=0):
    """int32 of all bits: eight codes uniform in [-8, 7] each."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=g).to(torch.int32)


def random_scales(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def marlin_model(packed, scale):
    """Weight and scale of one expert as vLLM's Python code lays them out for Marlin."""
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.marlin_utils_test")
    codes = (unpack_int4(packed).int() + 8).T.contiguous()  # (k, n)
    size_k, size_n = codes.shape
    weight = utils.marlin_weights(codes, size_k, size_n, 4, utils.get_weight_perm(4))
    groups = utils.marlin_permute_scales(scale.T.contiguous(), size_k, size_n, 128)
    return weight, groups


@pytest.mark.engine
@pytest.mark.parametrize(("size_n", "size_k"), [(64, 256), (192, 384), (256, 1024)])
def test_tiles_are_bit_equal_to_what_marlin_reads(size_n, size_k):
    packed, scale = random_words(size_n, size_k // 8), random_scales(size_n, size_k // 128)
    weight, groups = marlin_model(packed, scale)
    assert torch.equal(tiled.tile_weight(packed), weight)
    assert torch.equal(tiled.tile_scale(scale), groups)


@pytest.mark.engine
def test_a_gated_weight_is_what_marlin_reads_of_the_interleaved_rows():
    packed, scale = random_words(256, 32), random_scales(256, 2)
    order = torch.cat(
        [torch.arange(b, b + 32) + half for b in range(0, 128, 32) for half in (0, 128)]
    )
    weight, groups = marlin_model(packed[order], scale[order])
    assert torch.equal(tiled.tile_weight(packed, gated=True), weight)
    assert torch.equal(tiled.tile_scale(scale, gated=True), groups)


@pytest.mark.engine
def test_with_a_single_group_marlin_reads_its_scales_in_another_order():
    packed, scale = random_words(64, 16), random_scales(64, 1)
    weight, groups = marlin_model(packed, scale)
    assert torch.equal(tiled.tile_weight(packed), weight)
    assert not torch.equal(tiled.tile_scale(scale), groups)


def test_a_tile_is_the_drawing_in_the_header():
    q = torch.randint(-8, 8, (128, 256), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    out = tiled.tile_weight(pack_int4(q))
    tiles = out.view(256 // 16, 128 // 64, 32, 4).tolist()  # (k16, block, lane, word)
    places = ((0, 0), (0, 8), (8, 0), (8, 8))  # (row, k) of nibbles i and i + 4
    for k16, block, lane, word in [(0, 0, 0, 0), (3, 1, 13, 2), (15, 1, 31, 3), (9, 0, 6, 1)]:
        g, t = lane // 4, lane % 4
        bits = tiles[k16][block][lane][word]
        for i, (row, k) in enumerate(places):
            for v in range(2):
                code = (bits >> (4 * (i + 4 * v))) & 15
                n_at, k_at = 64 * block + 16 * word + g + row, 16 * k16 + 2 * t + k + v
                assert code == q[n_at, k_at] + 8


def test_a_lane_finds_its_eight_scales_side_by_side():
    scale = torch.arange(128.0).view(128, 1).to(torch.bfloat16)
    blocks = tiled.tile_scale(scale).view(2, 8, 8)  # (block, g, j)
    assert blocks[0, 3].tolist() == [3.0 + 8 * j for j in range(8)]
    assert blocks[1, 0].tolist() == [64.0 + 8 * j for j in range(8)]


def test_interleaved_rows_are_32_gate_rows_then_their_32_up_rows():
    rows = torch.arange(128).view(128, 1)
    blocks = tiled.interleave_rows(rows).view(2, 2, 32)
    assert blocks[0, 0].tolist() == list(range(32))
    assert blocks[0, 1].tolist() == list(range(64, 96))
    assert blocks[1, 0].tolist() == list(range(32, 64))
    assert torch.equal(tiled.deinterleave_rows(tiled.interleave_rows(rows)), rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("experts", "size_n", "size_k"), SHAPES)
def test_round_trip_gives_the_same_bytes(experts, size_n, size_k, gated):
    packed = random_words(*experts, size_n, size_k // 8)
    out = tiled.tile_weight(packed, gated)
    assert (out.dtype, tuple(out.shape)) == (torch.int32, (*experts, size_k // 16, 2 * size_n))
    assert out.is_contiguous()
    back = tiled.untile_weight(out, gated)
    assert back.is_contiguous()
    assert torch.equal(back, packed)

    scale = random_scales(*experts, size_n, size_k // 128)
    out = tiled.tile_scale(scale, gated)
    assert (out.dtype, tuple(out.shape)) == (torch.bfloat16, (*experts, size_k // 128, size_n))
    assert out.is_contiguous()
    back = tiled.untile_scale(out, gated)
    assert back.is_contiguous()
    assert torch.equal(back.view(torch.int16), scale.view(torch.int16))


def test_experts_are_tiled_one_by_one_whatever_the_chunk(monkeypatch):
    packed = random_words(5, 128, 32)
    each = torch.stack([tiled.tile_weight(p, gated=True) for p in packed])
    sizes = []
    for name in ("_tile", "_untile"):
        inner = getattr(tiled, name)
        monkeypatch.setattr(tiled, name, lambda x, f=inner: sizes.append(len(x)) or f(x))
    monkeypatch.setattr(tiled, "_CHUNK_WORDS", 2 * 128 * 32)
    assert torch.equal(tiled.tile_weight(packed, gated=True), each)
    assert torch.equal(tiled.untile_weight(each, gated=True), packed)
    assert sizes == [2, 2, 1, 2, 2, 1]


def test_transposed_weights_as_vllm_keeps_them_are_tiled_too():
    packed = random_words(2, 128, 32)
    kept = packed.transpose(1, 2).contiguous()  # (experts, k / 8, n)
    assert torch.equal(tiled.tile_weight(kept.transpose(1, 2)), tiled.tile_weight(packed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiled.tile_weight(torch.zeros(64, 16)), "tile_weight: dtype = torch.float32"),
        (lambda: tiled.tile_weight(random_words(64)), r"shape = \(64,\).*two dimensions"),
        (lambda: tiled.tile_weight(random_words(96, 16)), "size_n = 96 is not a multiple of 64"),
        (lambda: tiled.tile_weight(random_words(64, 15)), "size_k = 120 is not a multiple of 128"),
        (lambda: tiled.tile_weight(random_words(64, 0)), "size_k = 0 is not a multiple of 128"),
        (lambda: tiled.untile_weight(random_words(8, 64)), "untile_weight: size_n = 32"),
        (lambda: tiled.untile_weight(random_words(8, 63)), "untile_weight: a row has 63 words"),
        (lambda: tiled.untile_weight(random_words(7, 128)), "size_k = 112"),
        (lambda: tiled.tile_scale(torch.zeros(64, 1)), "tile_scale: dtype = torch.float32"),
        (lambda: tiled.tile_scale(random_scales(32, 1)), "tile_scale: size_n = 32"),
        (lambda: tiled.untile_scale(random_scales(1, 32)), "untile_scale: size_n = 32"),
        (lambda: tiled.interleave_rows(torch.zeros(96, 1)), r"interleave_rows: shape = \(96, 1\)"),
        (lambda: tiled.deinterleave_rows(torch.zeros(64)), r"deinterleave_rows: shape = \(64,\)"),
    ],
)
def test_what_cannot_be_tiled_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
