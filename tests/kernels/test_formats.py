import pytest
import torch

from kernels import formats as f


def random_matrix(out_features, in_features, seed=0):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def test_fp4_codes_are_the_nearest_value_and_ties_go_to_the_even_code():
    x = torch.tensor([0.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 99.0, -0.1, -1.0])
    expected = [0, 0, 1, 2, 2, 4, 4, 6, 6, 7, 7, 0, 10]
    assert f.round_to_fp4(x).tolist() == expected


def test_fp4_bytes_have_the_even_element_in_the_low_nibble():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    packed = f.pack_fp4(codes)
    assert packed.dtype == torch.int8
    assert packed.view(torch.uint8).tolist() == [[0x21, 0x0F]]
    assert f.unpack_fp4(packed).tolist() == codes.tolist()


def test_fp4_scale_byte_is_the_biased_exponent():
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 5] = 6.0, -6.5
    packed, scale = f.quantize_fp4(weight)
    assert scale.view(torch.uint8).tolist() == [[127], [128]]
    values = f.dequantize_fp4(packed, scale)
    assert values[0, 0] == 6.0
    assert values[1, 5] == -6.0  # 6.5 / 2 = 3.25 -> 3


def test_fp4_round_trip_is_exact_and_error_is_within_half_a_step():
    weight = random_matrix(16, 128)
    packed, scale = f.quantize_fp4(weight)
    values = f.dequantize_fp4(packed, scale)
    again, scale_again = f.quantize_fp4(values)
    assert torch.equal(f.dequantize_fp4(again, scale_again), values)
    step = scale.float().repeat_interleave(32, 1)
    assert ((weight - values).abs() <= step * 1.0 + 1e-6).all()


@pytest.mark.parametrize("exponent", [-20, -1, 0, 3])
def test_ue8m0_scale_of_an_exact_power_is_not_rounded_up(exponent):
    assert f.ue8m0_scale(torch.tensor(448.0 * 2.0**exponent), 448.0) == 2.0**exponent
    assert f.ue8m0_scale(torch.tensor(449.0 * 2.0**exponent), 448.0) == 2.0 ** (exponent + 1)


def test_fp8_block_scales_are_exact_for_a_tiny_tensor():
    weight = torch.zeros(256, 128)
    weight[0, 0], weight[128, 1] = 448.0, -1.0
    data, scale = f.quantize_fp8_block(weight)
    assert data.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float8_e8m0fnu
    assert scale.view(torch.uint8).tolist() == [[127], [127 - 8]]
    assert data.view(torch.uint8)[0, 0] == 0x7E
    assert data.view(torch.uint8)[128, 1] == 0xF8  # -256, e4m3: s1 e1111 m000
    assert torch.equal(f.dequantize_fp8_block(data, scale), weight)


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32])
@pytest.mark.parametrize("out_features", [128, 130, 512])
def test_fp8_error_is_within_one_sixteenth(scale_dtype, out_features):
    weight = random_matrix(out_features, 256)
    data, scale = f.quantize_fp8_block(weight, scale_dtype)
    assert scale.dtype == scale_dtype
    assert tuple(scale.shape) == (-(-out_features // 128), 2)
    error = (f.dequantize_fp8_block(data, scale) - weight).abs()
    assert (error <= weight.abs() / 16 + scale.float().max() * 2.0**-10).all()


def test_int4_word_holds_q_plus_8_little_end_first():
    q = torch.tensor([[-8, -7, 0, 1, 2, 3, 6, 7]], dtype=torch.int8)
    packed = f.pack_int4(q)
    assert packed.dtype == torch.int32
    assert packed.item() & 0xFFFFFFFF == 0xFEBA9810
    assert f.unpack_int4(packed).tolist() == q.tolist()


def test_int4_packing_equals_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = torch.randint(-8, 8, (6, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    theirs = helpers.pack_to_int32(q, 4)
    assert torch.equal(f.pack_int4(q), theirs)
    assert torch.equal(f.unpack_int4(theirs), q)


def test_int4_round_trip_keeps_the_codes():
    weight = random_matrix(8, 384)
    packed, scale, shape = f.quantize_int4(weight)
    assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (8, 3))
    assert (shape.dtype, shape.tolist()) == (torch.int64, [8, 384])
    values = f.dequantize_int4(packed, scale, shape)
    step = scale.float().repeat_interleave(128, 1)
    assert ((weight - values).abs() <= step * 0.56).all()
    codes = torch.round(values / step).to(torch.int8)
    assert torch.equal(f.pack_int4(codes), packed)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_size_sets_the_number_of_scales(group_size):
    _, scale, _ = f.quantize_int4(random_matrix(4, 256), group_size)
    assert scale.shape[1] == 256 // group_size


def test_zero_blocks_have_scale_one_and_value_zero():
    zero = torch.zeros(128, 128)
    for values in (
        f.dequantize_fp4(*f.quantize_fp4(zero)),
        f.dequantize_fp8_block(*f.quantize_fp8_block(zero)),
        f.dequantize_int4(*f.quantize_int4(zero)),
    ):
        assert torch.equal(values, zero)
    assert f.quantize_fp4(zero)[1].float().unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f.quantize_fp4(torch.zeros(2, 40)), "multiple of 32"),
        (lambda: f.quantize_fp4(torch.zeros(64)), "matrix"),
        (lambda: f.quantize_fp8_block(torch.zeros(128, 100)), "multiple of 128"),
        (lambda: f.quantize_fp8_block(torch.zeros(128, 128), torch.uint8), "scale_dtype"),
        (lambda: f.quantize_int4(torch.zeros(2, 100)), "multiple of 128"),
        (lambda: f.pack_int4(torch.full((1, 8), 8, dtype=torch.int8)), r"codes in \[8, 8\]"),
        (lambda: f.pack_int4(torch.zeros(1, 7, dtype=torch.int8)), "multiple of 8"),
        (lambda: f.unpack_int4(torch.zeros(1, 8)), "int32"),
        (lambda: f.unpack_fp4(torch.zeros(1, 8)), "int8"),
        (
            lambda: f.dequantize_fp4(
                torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.uint8)
            ),
            "uint8 exponents are refused",
        ),
        (
            lambda: f.dequantize_fp8_block(
                torch.zeros(128, 128, dtype=torch.float8_e4m3fn),
                torch.zeros(1, 1, dtype=torch.uint8),
            ),
            "uint8 exponents are refused",
        ),
        (
            lambda: f.dequantize_fp8_block(
                torch.zeros(128, 128, dtype=torch.float8_e4m3fn), torch.zeros(2, 1)
            ),
            "scale shape",
        ),
        (
            lambda: f.dequantize_int4(
                torch.zeros(2, 16, dtype=torch.int32), torch.ones(3, 1), None
            ),
            "weight_scale shape",
        ),
        (
            lambda: f.dequantize_int4(
                torch.zeros(2, 16, dtype=torch.int32), torch.ones(2, 1), torch.tensor([2, 256])
            ),
            "weight_shape",
        ),
    ],
)
def test_misfits_are_refused_with_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()
