"""The stored bytes are those of the compressed-tensors package."""

from __future__ import annotations

import pytest
import torch

from kernels.formats import unpack_int4
from retrofit import gptq, pack

ct = pytest.importorskip("compressed_tensors.compressors.pack_quantized")


def package_functions():
    """`pack_to_int32` and `unpack_from_int32`, wherever this version keeps them."""
    helpers = ct
    if not hasattr(helpers, "pack_to_int32"):
        from compressed_tensors.compressors.pack_quantized import helpers
    return helpers.pack_to_int32, helpers.unpack_from_int32


@pytest.mark.parametrize("shape", [(1, 128), (16, 256), (48, 1024)])
def test_packing_and_unpacking_are_bit_identical_to_the_package(shape):
    pack_to_int32, unpack_from_int32 = package_functions()
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.ones(shape[0], shape[1] // 128)
    ours = pack.expert_tensors("x", codes, scale)
    assert torch.equal(ours["x.weight_packed"], pack_to_int32(codes, 4))
    assert torch.equal(unpack_from_int32(ours["x.weight_packed"], 4, codes.shape), codes)
    assert torch.equal(unpack_int4(ours["x.weight_packed"]), codes)
    assert ours["x.weight_shape"].tolist() == list(shape)


def test_rounding_is_the_packages():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    groups = weight.unflatten(1, (-1, 128))
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128)
    theirs, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scale = gptq.absmax_scale(weight)
    torch.testing.assert_close(scale.float(), theirs.float(), rtol=2**-7, atol=0)
    codes = quantize(weight, scale.float(), zero, args, dtype=torch.int8)
    assert torch.equal(gptq.round_to_nearest(weight, scale), codes)


def test_attention_keeps_its_bytes_and_its_scales_values():
    data = torch.randn(256, 256, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0**-8, 1.0], [8.0, 2.0**-20]]).to(torch.float8_e8m0fnu)
    stored = pack.attention_tensors("mtp.0.attn.wq_a", data, scale)
    assert stored["mtp.0.attn.wq_a.weight"] is data
    values = stored["mtp.0.attn.wq_a.weight_scale"]
    assert values.dtype == torch.float32
    assert values.tolist() == [[2.0**-8, 1.0], [8.0, 2.0**-20]]
