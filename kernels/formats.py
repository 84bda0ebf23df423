"""Number formats of DeepSeek-V4 checkpoints, in plain PyTorch.

Three formats, each with quantize (absmax), pack, unpack and dequantize:

| format | stored weight             | stored scale                        | group            |
|--------|---------------------------|-------------------------------------|------------------|
| FP4    | int8, two e2m1 per byte   | float8_e8m0fnu [out, in / 32]       | 32 along `in`    |
| FP8    | float8_e4m3fn [out, in]   | e8m0 or float32 [out/128, in/128]   | 128 x 128 block  |
| INT4   | int32, eight codes a word | bfloat16 [out, in / 128]            | 128 along `in`   |

FP4 and FP8 are the original layout (`.weight`, `.scale`); INT4 is compressed-tensors
`pack-quantized` (`weight_packed`, `weight_scale`, `weight_shape`).
"""

from __future__ import annotations

import torch

from kernels.weights import FP4_GROUP, FP8_BLOCK, INT4_GROUP

FP4_MAX = 6.0
FP8_MAX = 448.0

# Value of each e2m1 code: bit 3 is the sign, bits 2..1 the exponent, bit 0 the mantissa.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _matrix(name: str, tensor: torch.Tensor, in_multiple: int) -> tuple[int, int]:
    _need(tensor.dim() == 2, f"{name}: shape = {tuple(tensor.shape)}; a matrix is needed")
    out_features, in_features = tensor.shape
    _need(
        in_features % in_multiple == 0,
        f"{name}: in_features = {in_features} is not a multiple of {in_multiple}",
    )
    return out_features, in_features


def ue8m0_scale(absmax: torch.Tensor, largest: float) -> torch.Tensor:
    """Smallest power of two `s` with `absmax / s <= largest`.

    Args:
        absmax: non-negative, any shape.
        largest: the greatest value of the target format (6 for e2m1, 448 for e4m3).
    Returns:
        float32, same shape, exact powers of two in [2**-127, 2**127]; 1 where absmax is 0.
    Source: DeepSeek-V4's `scale_fmt: ue8m0`, 2 ** ceil(log2(absmax / largest)).
    """
    mantissa, exponent = torch.frexp(absmax.float() / largest)  # value = mantissa * 2**exponent
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent)
    return torch.where(absmax == 0, torch.ones_like(scale), scale)


# ---------------------------------------------------------------------------- FP4 (e2m1)


def round_to_fp4(x: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest e2m1 values, ties to the even code.

    Args:
        x: any floating dtype and shape, already divided by its scale.
    Returns:
        uint8 codes in [0, 15]; values beyond +-6 saturate; negative zero is never made.
    Source: OCP Microscaling Formats 1.0, section 5.3.3.
    """
    magnitude = x.abs().float()
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for i in range(7):
        middle = (FP4_VALUES[i] + FP4_VALUES[i + 1]) / 2
        above = magnitude > middle if i % 2 == 0 else magnitude >= middle
        code += above.to(torch.uint8)
    return torch.where((x < 0) & (code > 0), code + 8, code)


def pack_fp4(codes: torch.Tensor) -> torch.Tensor:
    """Pack e2m1 codes two to a byte.

    Args:
        codes: uint8 in [0, 15], shape (out_features, in_features).
    Returns:
        int8, shape (out_features, in_features // 2); element 2*i is the low nibble of byte i.
    Raises:
        ValueError: not a matrix, or in_features is odd.
    Source: original DeepSeek-V4 checkpoint, `ffn.experts.E.w*.weight`.
    """
    _matrix("pack_fp4", codes, 2)
    codes = codes.to(torch.uint8)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8).contiguous()


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_fp4`: int8 (out, in // 2) -> uint8 codes (out, in)."""
    _need(
        packed.dtype in (torch.int8, torch.uint8) and packed.dim() == 2,
        f"unpack_fp4: dtype = {packed.dtype}, shape = {tuple(packed.shape)}; "
        "an int8 matrix is needed",
    )
    data = packed.view(torch.uint8)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1)  # (out, in)


def quantize_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Absmax FP4 with one E8M0 scale per 32 values along `in`.

    Args:
        weight: floating, shape (out_features, in_features), in_features a multiple of 32.
    Returns:
        packed: int8 (out_features, in_features // 2).
        scale: float8_e8m0fnu (out_features, in_features // 32).
    Raises:
        ValueError: not a matrix, or in_features is not a multiple of 32.
    """
    out_features, in_features = _matrix("quantize_fp4", weight, FP4_GROUP)
    groups = weight.float().reshape(out_features, in_features // FP4_GROUP, FP4_GROUP)
    scale = ue8m0_scale(groups.abs().amax(dim=-1), FP4_MAX)  # (out, in / 32)
    codes = round_to_fp4(groups / scale[..., None]).reshape(out_features, in_features)
    return pack_fp4(codes), scale.to(torch.float8_e8m0fnu)


def dequantize_fp4(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Values of an FP4 tensor.

    Args:
        packed: int8 (out_features, in_features // 2).
        scale: float8_e8m0fnu or floating (out_features, in_features // 32).
        dtype: of the result; float32 and bfloat16 are exact for scales of normal size.
    Returns:
        shape (out_features, in_features).
    Raises:
        ValueError: the scale's shape or dtype does not fit.
    """
    codes = unpack_fp4(packed)
    out_features, in_features = codes.shape
    _need(
        tuple(scale.shape) == (out_features, in_features // FP4_GROUP),
        f"dequantize_fp4: scale shape = {tuple(scale.shape)}; weight "
        f"({out_features}, {in_features}) needs ({out_features}, {in_features // FP4_GROUP})",
    )
    _need(
        scale.dtype.is_floating_point,
        f"dequantize_fp4: scale dtype = {scale.dtype}; raw uint8 exponents are refused, "
        "view them as float8_e8m0fnu",
    )
    table = torch.tensor(
        FP4_VALUES + tuple(-v for v in FP4_VALUES), dtype=torch.float32, device=packed.device
    )
    values = table[codes.long()].view(out_features, -1, FP4_GROUP)
    return (values * scale.float()[..., None]).view(out_features, in_features).to(dtype)


# ------------------------------------------------------------------- FP8 (e4m3) 128 x 128


def _expand_blocks(scale: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    full = scale.float().repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return full[:out_features, :in_features]  # (out, in)


def quantize_fp8_block(
    weight: torch.Tensor, scale_dtype: torch.dtype = torch.float8_e8m0fnu
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absmax FP8 e4m3 in blocks of 128 x 128.

    Args:
        weight: floating, shape (out_features, in_features); in_features a multiple of 128,
            the last block row may be short.
        scale_dtype: float8_e8m0fnu (power of two, rounded up) or float32 (absmax / 448).
    Returns:
        data: float8_e4m3fn (out_features, in_features).
        scale: scale_dtype (ceil(out_features / 128), in_features // 128).
    Raises:
        ValueError: not a matrix, in_features not a multiple of 128, other scale dtype.
    """
    out_features, in_features = _matrix("quantize_fp8_block", weight, FP8_BLOCK)
    _need(
        scale_dtype in (torch.float8_e8m0fnu, torch.float32),
        f"quantize_fp8_block: scale_dtype = {scale_dtype}; float8_e8m0fnu or float32 are stored",
    )
    rows = -(-out_features // FP8_BLOCK)
    padded = weight.float().new_zeros(rows * FP8_BLOCK, in_features)
    padded[:out_features] = weight
    blocks = padded.view(rows, FP8_BLOCK, in_features // FP8_BLOCK, FP8_BLOCK)
    absmax = blocks.abs().amax(dim=(1, 3))  # (out / 128, in / 128)
    if scale_dtype == torch.float32:
        scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax / FP8_MAX)
    else:
        scale = ue8m0_scale(absmax, FP8_MAX)
    scaled = weight.float() / _expand_blocks(scale, out_features, in_features)
    data = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return data, scale.to(scale_dtype)


def dequantize_fp8_block(
    data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Values of a block-FP8 tensor.

    Args:
        data: float8_e4m3fn (out_features, in_features).
        scale: float8_e8m0fnu or floating (ceil(out_features / 128), ceil(in_features / 128)).
        dtype: of the result.
    Raises:
        ValueError: wrong dtype or shape; uint8 scales are refused because their bytes would be
            read as the numbers 119, 127, 130 instead of 2**-8, 1, 8.
    """
    _need(
        data.dtype == torch.float8_e4m3fn and data.dim() == 2,
        f"dequantize_fp8_block: dtype = {data.dtype}, shape = {tuple(data.shape)}; "
        "a float8_e4m3fn matrix is needed",
    )
    out_features, in_features = data.shape
    expected = (-(-out_features // FP8_BLOCK), -(-in_features // FP8_BLOCK))
    _need(
        tuple(scale.shape) == expected,
        f"dequantize_fp8_block: scale shape = {tuple(scale.shape)}; weight "
        f"({out_features}, {in_features}) needs {expected}",
    )
    _need(
        scale.dtype.is_floating_point,
        f"dequantize_fp8_block: scale dtype = {scale.dtype}; raw uint8 exponents are refused, "
        "view them as float8_e8m0fnu",
    )
    return (data.float() * _expand_blocks(scale, out_features, in_features)).to(dtype)


# ---------------------------------------------------------------------- INT4 pack-quantized


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Pack signed 4-bit codes into int32 words.

    Args:
        q: int8 codes in [-8, 7], shape (out_features, in_features).
    Returns:
        `weight_packed`, int32, shape (out_features, in_features // 8);
        code i of a word is q + 8 in bits 4*i .. 4*i + 3.
    Raises:
        ValueError: not a matrix, in_features is not a multiple of 8, a code out of range.
    Source: compressed-tensors `pack_to_int32`, num_bits = 4.
    """
    out_features, in_features = _matrix("pack_int4", q, 8)
    if q.numel():
        low, high = int(q.min()), int(q.max())
        _need(low >= -8 and high <= 7, f"pack_int4: codes in [{low}, {high}]; 4 bits hold [-8, 7]")
    nibbles = (q.to(torch.int64) + 8).view(out_features, in_features // 8, 8)
    shifts = torch.arange(0, 32, 4, device=q.device)
    words = (nibbles << shifts).sum(dim=-1)  # (out, in / 8), in [0, 2**32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_int4`: int32 (out, in // 8) -> int8 codes in [-8, 7], (out, in)."""
    _need(
        packed.dtype == torch.int32 and packed.dim() == 2,
        f"unpack_int4: dtype = {packed.dtype}, shape = {tuple(packed.shape)}; "
        "an int32 matrix is needed",
    )
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    nibbles = (packed[..., None] >> shifts) & 15  # (out, in / 8, 8)
    return (nibbles - 8).to(torch.int8).flatten(1)


def quantize_int4(
    weight: torch.Tensor, group_size: int = INT4_GROUP
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Absmax symmetric INT4 with one bfloat16 scale per group along `in`.

    Args:
        weight: floating, shape (out_features, in_features).
        group_size: values per scale; divides in_features.
    Returns:
        weight_packed: int32 (out_features, in_features // 8).
        weight_scale: bfloat16 (out_features, in_features // group_size), absmax / 7.5.
        weight_shape: int64 [2], (out_features, in_features).
    Raises:
        ValueError: not a matrix, or in_features is not a multiple of group_size.
    Source: compressed-tensors `calculate_qparams` (symmetric) and `pack_to_int32`.
    """
    out_features, in_features = _matrix("quantize_int4", weight, group_size)
    groups = weight.float().reshape(out_features, in_features // group_size, group_size)
    absmax = groups.abs().amax(dim=-1)
    scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax / 7.5).to(torch.bfloat16)
    q = torch.round(groups / scale.float()[..., None]).clamp(-8, 7).to(torch.int8)
    shape = torch.tensor([out_features, in_features], dtype=torch.int64)
    return pack_int4(q.view(out_features, in_features)), scale, shape


def dequantize_int4(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_shape: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Values of a pack-quantized INT4 tensor.

    Args:
        weight_packed: int32 (out_features, in_features // 8).
        weight_scale: floating (out_features, in_features // group_size).
        weight_shape: int64 [2]; checked when given.
        dtype: of the result.
    Raises:
        ValueError: shapes do not fit each other.
    """
    q = unpack_int4(weight_packed)
    out_features, in_features = q.shape
    if weight_shape is not None:
        _need(
            weight_shape.tolist() == [out_features, in_features],
            f"dequantize_int4: weight_shape = {weight_shape.tolist()}; weight_packed holds "
            f"[{out_features}, {in_features}]",
        )
    groups = weight_scale.shape[-1]
    _need(
        weight_scale.dim() == 2
        and weight_scale.shape[0] == out_features
        and groups > 0
        and in_features % groups == 0,
        f"dequantize_int4: weight_scale shape = {tuple(weight_scale.shape)}; weight "
        f"({out_features}, {in_features}) needs ({out_features}, in_features / group_size)",
    )
    values = q.float().view(out_features, groups, in_features // groups)
    return (values * weight_scale.float()[..., None]).view(out_features, in_features).to(dtype)
