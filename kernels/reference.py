"""What the W4A16 kernels compute, in plain PyTorch on the weights as they are stored.

The dtype of the activations chooses the arithmetic:

- float64: no rounding anywhere, scales and codes included. The exact result.
- bfloat16: what PyTorch gives on weights dequantized to BF16. Linears take and give BF16, what lies
  between them is float32, slots are added in float32. Its distance from the exact result is the bar
  that the kernels are held to.

Runs on the device of its arguments. One expert is dequantized at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.formats import dequantize_int4
from kernels.tiled import INTERLEAVE

DTYPES = (torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Experts:
    """INT4 experts in compressed-tensors pack-quantized form, as `kernels/formats.py` has it.

    Attributes:
        w13_packed: int32 (experts, 2 * inter, hidden / 8), all gate rows, then all up rows.
        w13_scale: BF16 (experts, 2 * inter, hidden / group_size).
        w2_packed: int32 (experts, hidden, inter / 8).
        w2_scale: BF16 (experts, hidden, inter / group_size).
    """

    w13_packed: torch.Tensor
    w13_scale: torch.Tensor
    w2_packed: torch.Tensor
    w2_scale: torch.Tensor


def moe(
    hidden: torch.Tensor,
    experts: Experts,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    swiglu_limit: float | None = None,
) -> torch.Tensor:
    """Sum over a token's slots of weight * w2(silu(gate) * up).

    Args:
        hidden: float64 or bfloat16 (tokens, hidden_size).
        topk_ids: int (tokens, top_k); ids outside 0 .. experts - 1 are skipped.
        topk_weights: float32 (tokens, top_k).
        swiglu_limit: gate <= limit and |up| <= limit before SiLU; None for no limit.
    Returns:
        (tokens, hidden_size) in hidden's dtype; zeros for a token without experts.
    Raises:
        ValueError: another dtype of hidden.
    Source: DeepSeek-V4 `Expert.forward` and `MoE.forward`.
    """
    dtype = _arithmetic("moe", hidden)
    between = torch.promote_types(dtype, torch.float32)  # float64 stays
    out = torch.zeros(hidden.shape, dtype=between, device=hidden.device)
    num_experts = len(experts.w13_packed)
    # One pass over the ids, so that a GPU is waited for once and not once per expert.
    slots: dict[int, list[tuple[int, int]]] = {}
    for token, row in enumerate(topk_ids.tolist()):
        for slot, expert in enumerate(row):
            if 0 <= expert < num_experts:
                slots.setdefault(expert, []).append((token, slot))
    for expert, places in sorted(slots.items()):
        token, slot = torch.tensor(places, device=hidden.device).T
        w13 = dequantize_int4(experts.w13_packed[expert], experts.w13_scale[expert], dtype=dtype)
        gate, up = functional.linear(hidden[token], w13).to(between).chunk(2, dim=-1)
        act = swiglu(gate, up, swiglu_limit).to(dtype)
        w2 = dequantize_int4(experts.w2_packed[expert], experts.w2_scale[expert], dtype=dtype)
        down = functional.linear(act, w2).to(between)
        weight = topk_weights[token, slot].to(between)
        # accumulate, because a token may name an expert twice
        out.index_put_((token,), down * weight[:, None], accumulate=True)
    return out.to(dtype)


def gemm(a: torch.Tensor, weight_packed: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """`a` times the transposed weight.

    Args:
        a: float64 or bfloat16 (m, k).
        weight_packed: int32 (n, k / 8).
        weight_scale: BF16 (n, k / group_size).
    Returns:
        (m, n) in a's dtype.
    Raises:
        ValueError: another dtype of a, or shapes that do not fit each other.
    """
    dtype = _arithmetic("gemm", a)
    return functional.linear(a, dequantize_int4(weight_packed, weight_scale, dtype=dtype))


def silu_interleaved(gate_up: torch.Tensor, swiglu_limit: float | None = None) -> torch.Tensor:
    """SiLU(gate) * up of features that lie interleaved by 32.

    Args:
        gate_up: float64 or bfloat16 (rows, 2 * inter): 32 gate features, their 32 up features, ...
        swiglu_limit: as in `moe`.
    Returns:
        (rows, inter) in gate_up's dtype.
    Raises:
        ValueError: another dtype.
    """
    dtype = _arithmetic("silu_interleaved", gate_up)
    between = torch.promote_types(dtype, torch.float32)
    pairs = gate_up.to(between).unflatten(-1, (-1, 2, INTERLEAVE))  # (rows, inter / 32, 2, 32)
    return swiglu(pairs[..., 0, :], pairs[..., 1, :], swiglu_limit).flatten(-2).to(dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), in the dtype of its arguments."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return functional.silu(gate) * up


def _arithmetic(operation: str, x: torch.Tensor) -> torch.dtype:
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{operation}: dtype = {x.dtype}; float64 (exact) or bfloat16 (as PyTorch) is needed"
        )
    return x.dtype
