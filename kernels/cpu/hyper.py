"""DeepSeek-V4's hyper-connections (mHC) on a CPU, in plain PyTorch: see `attention.py`.

A token carries `hc_mult` residual streams. `pre` mixes them into one layer input and computes
how the layer's output (`post`) and the streams among themselves (`comb`, doubly stochastic by
Sinkhorn's iteration) form the next streams; `head` collapses them before the vocabulary.
"""

from __future__ import annotations

import torch


def _mixes(x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    """fn applied to the RMS-normalized streams: (t, hc, d) -> float32 (t, rows of fn)."""
    flat = x.flatten(1).float()
    return flat @ fn.T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def hc_pre_fused_cpu(
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_mult: int,
    sinkhorn_iters: int,
    rms_eps: float,
    hc_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layer input and mixing coefficients.

    Args:
        x: bfloat16 (t, hc, d), the streams.
        hc_fn: float32 ((2 + hc) * hc, hc * d); rows: pre, post, comb (row-major).
        hc_scale: float32 (3,).
        hc_base: float32 ((2 + hc) * hc,).
    Returns:
        layer input, dtype of x (t, d); post, float32 (t, hc), in (0, 2); comb, float32 (t, hc, hc).
    """
    mixes = _mixes(x, hc_fn, rms_eps)
    base_pre, base_post, base_comb = hc_base.split([hc_mult, hc_mult, hc_mult * hc_mult])
    mix_pre, mix_post, mix_comb = mixes.split([hc_mult, hc_mult, hc_mult * hc_mult], dim=1)
    pre = torch.sigmoid(mix_pre * hc_scale[0] + base_pre) + hc_eps
    post = 2 * torch.sigmoid(mix_post * hc_scale[1] + base_post)
    comb = (mix_comb * hc_scale[2] + base_comb).unflatten(1, (hc_mult, hc_mult))
    comb = torch.softmax(comb, dim=-1) + hc_eps
    comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    layer_input = (pre.unsqueeze(-1) * x.float()).sum(1).to(x.dtype)
    return layer_input, post, comb


def hc_post_fused_cpu(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """Next streams: out[j] = post[j] * x + sum_i comb[i, j] * residual[i].

    Args:
        x: bfloat16 (t, d), the layer's output.
        residual: bfloat16 (t, hc, d).
        post: float32 (t, hc); comb: float32 (t, hc, hc).
    Returns:
        dtype of residual (t, hc, d).
    """
    mixed = torch.einsum("tij,tid->tjd", comb, residual.float())
    return (mixed + post.unsqueeze(-1) * x.float().unsqueeze(1)).to(residual.dtype)


def hc_head_fused_cpu(
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_eps: float,
    norm_eps: float,
) -> torch.Tensor:
    """Collapse the streams (t, hc, d) to (t, d) with a sigmoid gate each; hc_fn is (hc, hc * d)."""
    gate = torch.sigmoid(_mixes(x, hc_fn, norm_eps) * hc_scale + hc_base) + hc_eps
    return (gate.unsqueeze(-1) * x.float()).sum(1).to(x.dtype)
