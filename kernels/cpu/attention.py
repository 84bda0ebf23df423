"""DeepSeek-V4 attention ops of vLLM's CPU path, in plain PyTorch.

Each function has the signature and the effect of the compiled `torch.ops._C` op of its name; it
is the reference for that op and for the CUDA kernels, and stands in where the op is absent.
Arithmetic is float32; what is stored is rounded as the caches demand.

The `fp8_ds_mla` cache, bytes of one block of B tokens (uint8, any padding behind):

    [B x 576]  per token: 448 FP8 e4m3 (no position) | 64 bfloat16 (rotated)
    [B x 8]    per token: 7 UE8M0 scales, one per 64 FP8 values | 1 unused
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kernels.formats import FP8_MAX, ue8m0_scale

NOPE_DIM = 448
ROPE_DIM = 64
HEAD_DIM = NOPE_DIM + ROPE_DIM
SCALE_GROUP = 64
TOKEN_BYTES = NOPE_DIM + 2 * ROPE_DIM
SCALE_BYTES = 8
# Smallest scale that DeepSeek-V4's quantizers use, before rounding up to a power of two.
MIN_SCALE = 1e-4
# Tokens whose keys are gathered at once; bounds memory at 2 * chunk * keys * 4 bytes per head.
TOKEN_CHUNK = 128


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Rotary embedding on interleaved pairs (GPT-J).

    Args:
        x: float32 (..., rope_dim); pairs are elements 2i and 2i + 1.
        cos_sin: float32 (..., rope_dim), cosines in the first half, sines in the second.
        inverse: rotate by the negative angle.
    Returns:
        float32, shape of x.
    """
    cos, sin = cos_sin.chunk(2, dim=-1)
    if inverse:
        sin = -sin
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _regions(cache_2d: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of an `fp8_ds_mla` cache: data (blocks, B, 576) and scales (blocks, B, 8)."""
    data_bytes = block_size * TOKEN_BYTES
    data = cache_2d[:, :data_bytes].unflatten(1, (block_size, TOKEN_BYTES))
    scales = cache_2d[:, data_bytes : data_bytes + block_size * SCALE_BYTES]
    return data, scales.unflatten(1, (block_size, SCALE_BYTES))


def write_ds_mla(
    cache_2d: torch.Tensor, block_size: int, slots: torch.Tensor, kv: torch.Tensor
) -> None:
    """Quantize and store key-value rows.

    Args:
        cache_2d: uint8 (blocks, bytes), changed in place.
        slots: int64 (n,), block * block_size + offset, all valid.
        kv: bfloat16 (n, 512), already rotated.
    """
    data, scales = _regions(cache_2d, block_size)
    nope = kv[:, :NOPE_DIM].float().unflatten(1, (-1, SCALE_GROUP))  # (n, 7, 64)
    absmax = nope.abs().amax(-1).clamp(min=MIN_SCALE * FP8_MAX)
    scale = ue8m0_scale(absmax, FP8_MAX)  # (n, 7)
    codes = (nope / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    rope = kv[:, NOPE_DIM:].bfloat16().contiguous().view(torch.uint8)
    block, offset = slots // block_size, slots % block_size
    data[block, offset] = torch.cat((codes.flatten(1).view(torch.uint8), rope), dim=1)
    exponents = scale.to(torch.float8_e8m0fnu).view(torch.uint8)
    scales[block, offset] = functional.pad(exponents, (0, 1))


def read_ds_mla(cache_2d: torch.Tensor, block_size: int, slots: torch.Tensor) -> torch.Tensor:
    """Key-value rows of valid slots (n,): float32 (n, 512), rounded to bfloat16 as readers do."""
    data, scales = _regions(cache_2d, block_size)
    block, offset = slots // block_size, slots % block_size
    rows = data[block, offset]  # (n, 576)
    codes = rows[:, :NOPE_DIM].contiguous().view(torch.float8_e4m3fn).float()
    exponents = scales[block, offset][:, : NOPE_DIM // SCALE_GROUP].contiguous()
    scale = exponents.view(torch.float8_e8m0fnu).float()
    nope = (codes.unflatten(1, (-1, SCALE_GROUP)) * scale.unsqueeze(-1)).flatten(1)
    rope = rows[:, NOPE_DIM:].contiguous().view(torch.bfloat16).float()
    return torch.cat((nope.bfloat16().float(), rope), dim=1)


def fused_qnorm_rope_kv_insert_cpu(
    q: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    swa_kv_cache_2d: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_head_padded: int,
    eps: float,
    cache_block_size: int,
) -> torch.Tensor:
    """Normalize and rotate the queries; rotate, quantize and store the keys.

    Args:
        q: bfloat16 (tokens, heads, 512).
        kv: bfloat16 (>= inserted tokens, 512).
        positions: int64 (tokens,).
        swa_kv_cache_2d: uint8 (blocks, bytes), `fp8_ds_mla`, changed in place.
        slot_mapping: int64 (inserted tokens,); -1 is skipped.
        cos_sin_cache: float32 (positions, 64).
        q_head_padded: heads of the result; the added ones are zero.
    Returns:
        bfloat16 (tokens, q_head_padded, 512): weight-free RMS norm per head, then rotation.
    """
    cos_sin = cos_sin_cache[positions]  # (tokens, 64)
    x = q.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    rope = rotate(x[..., NOPE_DIM:], cos_sin.unsqueeze(1))
    out = torch.cat((x[..., :NOPE_DIM], rope), dim=-1).to(q.dtype)
    if q_head_padded > q.shape[1]:
        out = functional.pad(out, (0, 0, 0, q_head_padded - q.shape[1]))

    keep = slot_mapping >= 0
    inserted = slot_mapping.shape[0]
    rows = kv[:inserted][keep].float()
    rope = rotate(rows[:, NOPE_DIM:], cos_sin[:inserted][keep])
    rotated = torch.cat((rows[:, :NOPE_DIM], rope), dim=-1).bfloat16()
    write_ds_mla(swa_kv_cache_2d, cache_block_size, slot_mapping[keep], rotated)
    return out


def _gather(
    cache_2d: torch.Tensor, block_size: int, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct keys behind `slots` (tokens, k) and which token reads which.

    Returns:
        keys: float32 (distinct, 512).
        reads: bool (tokens, distinct).
    """
    distinct, index = torch.unique(slots, return_inverse=True)
    reads = torch.zeros(slots.shape[0], distinct.shape[0], dtype=torch.bool)
    reads.scatter_(1, index, True)
    valid = distinct >= 0  # -1, if there, sorts first
    return read_ds_mla(cache_2d, block_size, distinct[valid]), reads[:, valid]


def flash_mla_with_kvcache_cpu(
    out: torch.Tensor,
    q: torch.Tensor,
    window_cache_2d: torch.Tensor,
    window_slots: torch.Tensor,
    window_block_size: int,
    compressed_cache_2d: torch.Tensor,
    compressed_slots: torch.Tensor,
    compressed_block_size: int,
    attn_sink: torch.Tensor,
    scale: float,
) -> None:
    """Attention of each token over its window and its compressed keys, with a sink.

    Keys and values are the same rows. The sink is a key of score `attn_sink` and value zero.

    Args:
        out: bfloat16 (tokens, heads, 512), written.
        q: bfloat16 (tokens, heads, 512).
        window_cache_2d, compressed_cache_2d: uint8 (blocks, bytes), `fp8_ds_mla`.
        window_slots: int64 (tokens, w), -1 for none.
        compressed_slots: int64 (tokens, c), -1 for none; c may be 0.
        attn_sink: float32 (heads,).
    """
    for start in range(0, q.shape[0], TOKEN_CHUNK):
        rows = slice(start, start + TOKEN_CHUNK)
        keys, reads = _gather(window_cache_2d, window_block_size, window_slots[rows])
        if compressed_slots.shape[1]:
            more = _gather(compressed_cache_2d, compressed_block_size, compressed_slots[rows])
            keys = torch.cat((keys, more[0]))
            reads = torch.cat((reads, more[1]), dim=1)
        score = q[rows].float() @ keys.T * scale  # (tokens, heads, keys)
        score.masked_fill_(~reads.unsqueeze(1), float("-inf"))
        sink = attn_sink.view(1, -1, 1).expand(score.shape[0], -1, 1)
        # The sink may be -inf (no sink); a token without any key then gives zero, not NaN.
        peak = torch.maximum(score.amax(-1, keepdim=True) if keys.shape[0] else sink, sink)
        peak = peak.clamp(min=torch.finfo(torch.float32).min)
        # Below e**-80 a weight is nothing, and as a denormal number it slows the product 20-fold.
        delta = score - peak
        weight = torch.where(delta > -80, torch.exp(delta), 0.0)
        total = weight.sum(-1, keepdim=True) + torch.exp(sink - peak)
        out[rows] = torch.nan_to_num(weight @ keys / total).to(out.dtype)


def inverse_gptj_rope_o_proj_cpu(
    o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, rope_dim: int
) -> torch.Tensor:
    """Undo the query's rotation on the attention output.

    Args:
        o: bfloat16 (tokens, heads, head_dim); the last `rope_dim` are rotated.
    Returns:
        float32 (tokens, heads, head_dim).
    """
    x = o.float()
    cos_sin = cos_sin_cache[positions].unsqueeze(1)
    rope = rotate(x[..., -rope_dim:], cos_sin, inverse=True)
    return torch.cat((x[..., :-rope_dim], rope), dim=-1)


def convert_weight_packed(weight: torch.Tensor) -> torch.Tensor:
    """The compiled op packs a weight for AMX tiles; here the packed form is the weight itself."""
    return weight.clone()


def bmm_cpu(
    out: torch.Tensor,
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    is_vnni: bool,
    scale: torch.Tensor | None,
) -> None:
    """out[b] = mat1[b] @ mat2[b].T.

    Args:
        out: bfloat16 (batch, m, n), written.
        mat1: bfloat16 (batch, m, k).
        mat2: bfloat16 (batch, n, k), from `convert_weight_packed`.
    Raises:
        ValueError: `scale` is given (FP8 weights, which DeepSeek-V4 does not use here).
    """
    if scale is not None:
        raise ValueError("bmm_cpu: scale is given; the reference takes bfloat16 weights only")
    out.copy_(mat1.float() @ mat2.float().transpose(1, 2))


def weight_packed_linear(
    out: torch.Tensor,
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    bias: torch.Tensor | None,
    is_vnni: bool,
) -> None:
    """out = mat1 @ mat2.T + bias with `mat2` from `convert_weight_packed`; out is written."""
    out.copy_(functional.linear(mat1.float(), mat2.float(), bias))
