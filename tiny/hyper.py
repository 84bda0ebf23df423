"""Manifold-constrained hyper-connections (mHC): four residual streams instead of one.

Around every sublayer F (attention, then experts) the streams X (hc_mult, hidden) become

    x = sum_i pre_i X_i            what the sublayer sees
    y = F(norm(x))
    X'_j = sum_i comb_ij X_i + post_j y

`pre`, `post` and `comb` are computed from X itself, per token. `comb` is made (nearly) doubly
stochastic with Sinkhorn iterations, so that mixing neither grows nor shrinks the streams.
"""

from __future__ import annotations

import torch
from torch import nn

from tiny.config import TinyConfig
from tiny.layers import rms_normalize, wide

POST_FACTOR = 2.0


def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """Nearly doubly stochastic matrices.

    Args:
        logits: (..., n, n), float32 or wider.
        iterations: the softmax over the last dimension counts as half of the first one.
        eps: added after the softmax and to every denominator.
    Returns:
        (..., n, n), columns (dim -2) summing to 1 - O(eps), rows close to 1.
    Source: vLLM `model_executor/kernels/mhc/torch.py`, `mhc_pre_torch`.
    """
    mix = torch.softmax(logits, dim=-1) + eps
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


def hc_pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    config: TinyConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input of a sublayer and the coefficients with which its output is put back.

    Args:
        streams: (B, L, hc, hidden).
        fn: (2 * hc + hc * hc, hc * hidden) float32; rows: pre, post, comb.
        base: (2 * hc + hc * hc,); scale: (3,), one per kind of row.
    Returns:
        x: (B, L, hidden) in streams' dtype; post: (B, L, hc); comb: (B, L, hc, hc), both wide.
    Source: vLLM `mhc_pre_torch`; the RMS is that of all hc * hidden values, without a gain.
    """
    hc = config.hc_mult
    dtype = wide(streams.dtype)
    normed = rms_normalize(streams.flatten(-2), config.rms_norm_eps)  # (B, L, hc * hidden)
    mixes = normed @ fn.to(dtype).t()
    base, scale = base.to(dtype), scale.to(dtype)
    pre = torch.sigmoid(mixes[..., :hc] * scale[0] + base[:hc]) + config.hc_eps
    post = torch.sigmoid(mixes[..., hc : 2 * hc] * scale[1] + base[hc : 2 * hc]) * POST_FACTOR
    logits = (mixes[..., 2 * hc :] * scale[2] + base[2 * hc :]).unflatten(-1, (hc, hc))
    comb = sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps)
    x = (pre[..., None] * streams.to(dtype)).sum(-2).to(streams.dtype)
    return x, post, comb


def hc_post(
    y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """Streams after a sublayer: `X'_j = sum_i comb_ij X_i + post_j y`.

    Args:
        y: (B, L, hidden); streams: (B, L, hc, hidden); post: (B, L, hc); comb: (B, L, hc, hc).
    Returns:
        (B, L, hc, hidden) in streams' dtype, computed wide.
    Source: vLLM `mhc_post_torch`.
    """
    dtype = wide(streams.dtype)
    mixed = comb.transpose(-1, -2) @ streams.to(dtype)
    return (mixed + post[..., None] * y.to(dtype)[..., None, :]).to(streams.dtype)


class HyperHead(nn.Module):
    """Holder of `hc_head_{fn,base,scale}`; collapses the streams into one before the head.

    Used by inheriting: the parameters sit directly on the owner, as in the checkpoint.
    """

    def init_hc_head(self, config: TinyConfig) -> None:
        hc = config.hc_mult
        self.hc_head_fn = nn.Parameter(torch.randn(hc, hc * config.hidden_size) * 0.01)
        self.hc_head_base = nn.Parameter(torch.zeros(hc))
        self.hc_head_scale = nn.Parameter(torch.ones(1))

    def hc_head(self, streams: torch.Tensor, config: TinyConfig) -> torch.Tensor:
        """(B, L, hc, hidden) -> (B, L, hidden): a gated sum, gates in (0, 1).

        Source: vLLM `hc_head_reduce_triton_kernel`.
        """
        dtype = wide(streams.dtype)
        normed = rms_normalize(streams.flatten(-2), config.rms_norm_eps)
        mixes = normed @ self.hc_head_fn.to(dtype).t()
        gates = torch.sigmoid(mixes * self.hc_head_scale.to(dtype) + self.hc_head_base.to(dtype))
        gates = gates + config.hc_eps
        return (gates[..., None] * streams.to(dtype)).sum(-2).to(streams.dtype)
