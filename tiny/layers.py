"""Building blocks: linear layers that know their storage format, RMSNorm, RoPE."""

from __future__ import annotations

import math
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import nn

from tiny.config import TinyConfig
from tiny.quant import fake_bf16, fake_fp4, fake_fp8_block


class Storage(StrEnum):
    """How the original checkpoint stores a weight."""

    FP4 = "fp4"
    FP8 = "fp8"
    BF16 = "bf16"
    F32 = "f32"


FAKE = {
    Storage.FP4: fake_fp4,
    Storage.FP8: fake_fp8_block,
    Storage.BF16: fake_bf16,
    Storage.F32: lambda weight: weight,
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the engine computes sensitive parts: float32, or float64 if asked."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Module):
    """`y = x W^T` with a weight that is stored in `storage`.

    With `fake_quant` set the weight is rounded to its storage format on every use (gradient
    straight through). A model read by `tiny.load` holds already rounded values.
    """

    def __init__(self, in_features: int, out_features: int, storage: Storage) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.storage = storage
        self.fake_quant = False
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out_features, in_features) as computed with."""
        weight = FAKE[self.storage](self.weight) if self.fake_quant else self.weight
        return weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        return F.linear(x, self.matrix(x.dtype))


def rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last dimension, in float32 or wider."""
    x = x.to(wide(x.dtype))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain; computed wide, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.fake_quant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = fake_bf16(self.weight) if self.fake_quant else self.weight
        return (rms_normalize(x, self.eps) * gain.to(wide(x.dtype))).to(x.dtype)


def rope_inverse_frequencies(config: TinyConfig, compress_ratio: int) -> torch.Tensor:
    """Angle per position of each of the qk_rope_head_dim / 2 pairs, float32.

    Sliding layers (and MTP) use plain RoPE with `rope_theta`. Compressed layers use
    `compress_rope_theta` with YaRN: pairs that turn more than beta_fast times within the
    original context keep their frequency, those that turn less than beta_slow times have it
    divided by `factor`, a linear ramp lies between. YaRN's attention factor is not used.

    Source: vLLM `models/deepseek_v4/common/rope.py`, `DeepseekScalingRotaryEmbedding`.
    """
    dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compress_ratio > 1 else config.rope_theta
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / theta**exponents  # (dim / 2,)
    if compress_ratio <= 1:
        return frequencies
    scaling = config.rope_scaling
    context = scaling["original_max_position_embeddings"]

    def pair_that_turns(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(scaling["beta_slow"])), dim - 1)
    span = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / scaling["factor"] * ramp + frequencies * (1 - ramp)


class Rope(nn.Module):
    """GPT-J (interleaved) rotary embedding of the last qk_rope_head_dim dimensions."""

    def __init__(self, config: TinyConfig, compress_ratio: int) -> None:
        super().__init__()
        self.dim = config.qk_rope_head_dim
        frequencies = rope_inverse_frequencies(config, compress_ratio)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False
    ) -> torch.Tensor:
        """Rotate pairs (2i, 2i + 1) of the tail by `positions * frequency_i`.

        Args:
            x: (B, L, D) or (B, L, H, D), any floating dtype.
            positions: (L,), integers.
            inverse: rotate back; undoes the query's own position in the attention output.
        Returns:
            same shape and dtype; computed wide, angles in float32 as in the engine.
        """
        dtype = wide(x.dtype)
        angles = positions.float()[:, None] * self.frequencies.float()  # (L, dim / 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        if inverse:
            sin = -sin
        if x.dim() == 4:
            cos, sin = cos[:, None, :], sin[:, None, :]
        head, tail = x[..., : -self.dim], x[..., -self.dim :].to(dtype)
        even, odd = tail[..., 0::2], tail[..., 1::2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return torch.cat((head, turned.flatten(-2).to(x.dtype)), dim=-1)
