"""DeepSeek-V4 attention: one shared key-value head, a sliding window, compressed history.

Every layer attends to the last `sliding_window` tokens one by one. Layers with a compress
ratio r also attend to one compressed key per complete group of r tokens, over the whole past:

* r = 128 (HCA): to all complete groups;
* r = 4 (CSA): to at most `index_topk` groups, chosen per query by the lightning indexer.

Keys and values are the same vectors (MLA with one head of 512 dimensions). Because a value
carries RoPE of its own position, the output is rotated back by the query's position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tiny.config import TinyConfig
from tiny.layers import Linear, RMSNorm, Rope, Storage, rms_normalize, wide
from tiny.quant import fake_fp8_groups, fake_kv_cache


def num_visible_groups(positions: torch.Tensor, compress_ratio: int) -> torch.Tensor:
    """Compressed keys that a query may see: complete groups, its own token included.

    Args:
        positions: (L,) integers. A group's key exists from the group's last token on.
    Source: vLLM `models/deepseek_v4/cpu/cpu_sparse.py`, `forward_mqa`: (pos + 1) // ratio.
    """
    return (positions + 1) // compress_ratio


class Compressor(nn.Module):
    """Pools groups of `ratio` tokens into one key each, with a softmax per channel.

    For ratio 4 the groups overlap: each token has two (value, score) halves, and the key of
    group g pools the first halves of group g - 1 and the second halves of group g (8 tokens).
    Group 0 has no predecessor; the missing scores are -inf.
    """

    def __init__(self, config: TinyConfig, ratio: int, head_dim: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.overlap = ratio == 4
        self.head_dim = head_dim
        width = (2 if self.overlap else 1) * head_dim
        self.wkv = Linear(config.hidden_size, width, Storage.BF16)
        self.wgate = Linear(config.hidden_size, width, Storage.BF16)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.norm = RMSNorm(head_dim, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Compressed keys of all complete groups.

        Args:
            x: (B, L, hidden), the normed input of the attention.
        Returns:
            (B, L // ratio, head_dim) in x's dtype, RoPE of position group * ratio applied.
            Pooling, norm and RoPE are computed wide without rounding in between.
        Source: vLLM `compressor.py`, `common/ops/save_partial_states.py` (score + ape),
            `common/ops/fused_compress_quant_cache.py` (window, softmax, norm, RoPE).
        """
        groups = x.shape[1] // self.ratio
        x = x[:, : groups * self.ratio]
        dtype = wide(x.dtype)
        value = self.wkv(x).to(dtype).unflatten(1, (groups, self.ratio))  # (B, G, r, width)
        score = self.wgate(x).to(dtype).unflatten(1, (groups, self.ratio)) + self.ape.to(dtype)
        if self.overlap:
            value = self._with_predecessor(value, 0.0)  # (B, G, 2r, head_dim)
            score = self._with_predecessor(score, float("-inf"))
        pooled = (torch.softmax(score, dim=2) * value).sum(2)  # (B, G, head_dim)
        positions = torch.arange(groups, device=x.device) * self.ratio
        return rope(self.norm(pooled), positions).to(x.dtype)

    def _with_predecessor(self, x: torch.Tensor, fill: float) -> torch.Tensor:
        """(B, G, r, 2 * head_dim) -> (B, G, 2r, head_dim): previous group's first half, own second.

        The first group's predecessor is `fill`.
        """
        first, second = x.split(self.head_dim, dim=-1)
        previous = F.pad(first, (0, 0, 0, 0, 1, 0), value=fill)[:, :-1]
        return torch.cat((previous, second), dim=2)


class Indexer(nn.Module):
    """Lightning indexer: a cheap score of every compressed key for every query.

    score(t, g) = sum_h w_h(t) relu(q_h(t) . k(g)), w scaled by index_head_dim^-1/2 *
    index_n_heads^-1/2. It has a compressor of its own with small keys. No Hadamard rotation.
    """

    def __init__(self, config: TinyConfig, ratio: int) -> None:
        super().__init__()
        self.heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.head_dim, Storage.FP8)
        self.weights_proj = Linear(config.hidden_size, self.heads, Storage.BF16)
        self.compressor = Compressor(config, ratio, self.head_dim)

    def forward(
        self,
        x: torch.Tensor,
        q_latent: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        fp8_cache: bool,
    ) -> torch.Tensor:
        """Scores (B, L, G), wide, unmasked.

        Args:
            x: (B, L, hidden); q_latent: (B, L, q_lora_rank), both normed.
            fp8_cache: round queries and keys to FP8 per 128 values, as the engine does.
        Source: vLLM `attention.py` `DeepseekV4Indexer`, `common/ops/fused_indexer_q.py`,
            `fp8_mqa_logits_torch` in `v1/attention/ops/rocm_aiter_mla_sparse.py`.
        """
        dtype = wide(x.dtype)
        query = rope(self.wq_b(q_latent).unflatten(-1, (self.heads, self.head_dim)), positions)
        key = self.compressor(x, rope)  # (B, G, head_dim)
        if fp8_cache:
            query, key = fake_fp8_groups(query, 128), fake_fp8_groups(key, 128)
        weights = self.weights_proj(x).to(dtype) * (self.head_dim**-0.5 * self.heads**-0.5)
        dots = torch.einsum("blhd,bgd->blhg", query, key).to(dtype)
        return (torch.relu(dots) * weights[..., None]).sum(2)


@dataclass
class AttentionTrace:
    """What the trainer reads back from one attention call; empty unless asked for.

    index_loss: KL(attention over compressed keys || softmax of indexer scores), a scalar.
    """

    index_loss: torch.Tensor | None = None


def attend(
    query: torch.Tensor,
    kv: torch.Tensor,
    visible: torch.Tensor,
    sink: torch.Tensor,
    extra: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with a sink and values equal to keys.

    Args:
        query: (B, L, H, D); kv: (B, S, D), shared by the heads.
        visible: bool, broadcastable to (B, L, S).
        sink: (H,), a logit that takes part in the softmax but has no value.
        extra: keys (B, L, D) that only the query at the same place sees.
    Returns:
        output (B, L, H, D) in query's dtype; probabilities (B, L, H, S), wide, sink excluded.
    Source: vLLM `flash_mla_with_kvcache_cpu`: scale head_dim^-1/2, sink in the denominator.
    """
    dtype = wide(query.dtype)
    scale = query.shape[-1] ** -0.5
    scores = torch.einsum("blhd,bsd->blhs", query, kv).to(dtype) * scale
    scores = scores.masked_fill(~visible[..., None, :], float("-inf"))
    parts = [scores]
    parts += [torch.einsum("blhd,bld->blh", query, e)[..., None].to(dtype) * scale for e in extra]
    parts.append(sink.to(dtype)[:, None].expand(*scores.shape[:-1], 1))
    probabilities = torch.softmax(torch.cat(parts, dim=-1), dim=-1)
    seen = probabilities[..., : kv.shape[1]]
    output = torch.einsum("blhs,bsd->blhd", seen.to(query.dtype), kv)
    for i, e in enumerate(extra):
        weight = probabilities[..., kv.shape[1] + i, None].to(query.dtype)
        output = output + weight * e[..., None, :]
    return output, seen


class Attention(nn.Module):
    """One attention sublayer; which kind is decided by `compress_ratio` (0, 4 or 128)."""

    def __init__(self, config: TinyConfig, compress_ratio: int) -> None:
        super().__init__()
        self.config = config
        self.compress_ratio = compress_ratio
        heads, head_dim = config.num_attention_heads, config.head_dim
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank, Storage.FP8)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = Linear(config.q_lora_rank, heads * head_dim, Storage.FP8)
        self.wkv = Linear(config.hidden_size, head_dim, Storage.FP8)
        self.kv_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        group_width = heads * head_dim // config.o_groups
        self.wo_a = Linear(group_width, config.o_groups * config.o_lora_rank, Storage.FP8)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, config.hidden_size, Storage.FP8)
        self.rope = Rope(config, compress_ratio)
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        if compress_ratio:
            self.compressor = Compressor(config, compress_ratio, head_dim)
        if compress_ratio == 4:
            self.indexer = Indexer(config, compress_ratio)
        self.fp8_cache = False

    def queries(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (B, L, hidden) -> q (B, L, H, D) with per-head norm and RoPE, q_latent (B, L, rank).

        Source: vLLM `fused_qnorm_rope_kv_insert`: the head norm has no gain.
        """
        q_latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(q_latent).unflatten(-1, (self.config.num_attention_heads, -1))
        q = rms_normalize(q, self.config.rms_norm_eps)
        return self.rope(q, positions).to(x.dtype), q_latent

    def key_values(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x (B, L, hidden) -> kv (B, L, D), as the cache returns it."""
        return self._cached(self.rope(self.kv_norm(self.wkv(x)), positions))

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, trace: AttentionTrace | None = None
    ) -> torch.Tensor:
        """Attention over a whole sequence.

        Args:
            x: (B, L, hidden), already through `attn_norm`; positions: (L,), 0 .. L - 1.
            trace: filled when given (training of the indexer).
        Returns:
            (B, L, hidden).
        """
        q, q_latent = self.queries(x, positions)
        kv = self.key_values(x, positions)
        visible = window_mask(positions, positions, self.config.sliding_window)[None]
        if self.compressor is None:
            out, _ = attend(q, kv, visible, self.attn_sink)
            return self.project(out, positions)

        compressed = self._cached(self.compressor(x, self.rope))  # (B, G, D)
        groups = torch.arange(compressed.shape[1], device=x.device)
        reachable = groups < num_visible_groups(positions, self.compress_ratio)[:, None]  # (L, G)
        chosen = reachable[None]
        scores = None
        if self.indexer is not None and (trace is not None or len(groups) > self.config.index_topk):
            detached = (x.detach(), q_latent.detach())  # the indexer learns from its own loss only
            scores = self.indexer(*detached, positions, self.rope, self.fp8_cache)
            chosen = self._choose(scores, reachable)
        keys = torch.cat((kv, compressed), dim=1)
        visible = torch.cat((visible.expand(len(chosen), -1, -1), chosen), dim=-1)
        out, probabilities = attend(q, keys, visible, self.attn_sink)
        if trace is not None and scores is not None:
            trace.index_loss = index_loss(probabilities[..., len(positions) :], scores, chosen)
        return self.project(out, positions)

    def forward_draft(
        self, x: torch.Tensor, positions: torch.Tensor, step: int, history: DraftHistory
    ) -> torch.Tensor:
        """Attention of draft step `step` (0, 1, ...) for every place of a sequence at once.

        Place p drafts from the state after position p. Its step-s query sits at position p + s
        and sees the window's history up to p (keys of step 0) and its own keys of steps 1 .. s.

        Args:
            x: (B, L, hidden); positions: (L,), the places p, ascending from 0.
            history: keys of earlier steps; this step's are added.
        """
        q, _ = self.queries(x, positions + step)
        kv = self.key_values(x, positions + step)
        if step == 0:
            history.kv, history.own = kv, []
        else:
            history.own.append(kv)
        visible = window_mask(positions + step, positions, self.config.sliding_window)
        visible = visible & (positions[None, :] <= positions[:, None])
        out, _ = attend(q, history.kv, visible[None], self.attn_sink, tuple(history.own))
        return self.project(out, positions + step)

    def project(self, out: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, L, H, D) -> (B, L, hidden): undo RoPE, grouped low-rank output projection.

        Heads are split into o_groups; group g has its own rows of wo_a.
        Source: vLLM `cpu_sparse.py`, `_o_proj`.
        """
        config = self.config
        out = self.rope(out, positions, inverse=True)
        grouped = out.flatten(-2).unflatten(-1, (config.o_groups, -1))  # (B, L, g, H/g * D)
        wo_a = self.wo_a.matrix(out.dtype).unflatten(0, (config.o_groups, config.o_lora_rank))
        latent = torch.einsum("blgk,grk->blgr", grouped, wo_a)
        return self.wo_b(latent.flatten(-2))

    def _cached(self, kv: torch.Tensor) -> torch.Tensor:
        return fake_kv_cache(kv, self.config.qk_rope_head_dim) if self.fp8_cache else kv

    def _choose(self, scores: torch.Tensor, reachable: torch.Tensor) -> torch.Tensor:
        """bool (B, L, G): the index_topk best reachable groups of each query.

        Source: vLLM `DeepseekV4Indexer.forward`: with at most index_topk groups, all of them.
        """
        if reachable.shape[-1] <= self.config.index_topk:
            return reachable[None]
        best = scores.detach().masked_fill(~reachable, float("-inf"))
        best = best.topk(self.config.index_topk, dim=-1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        return chosen & reachable


@dataclass
class DraftHistory:
    """Keys of the MTP layer: those of step 0, and those that each place adds for itself."""

    kv: torch.Tensor | None = None
    own: list[torch.Tensor] | None = None


def window_mask(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """bool (len(queries), len(keys)): key position in (query - window, query].

    Source: vLLM `cpu_sparse.py`, `forward_mqa`: the last `sliding_window` tokens, own included.
    """
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) & (distance < window)


def index_loss(
    probabilities: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """KL divergence that teaches the indexer where attention looks.

    Args:
        probabilities: (B, L, H, G) attention on compressed keys; scores: (B, L, G);
        chosen: bool, broadcastable to (B, L, G).
    Returns:
        scalar, mean over queries with at least one chosen group.
    """
    target = probabilities.detach().sum(2)
    mass = target.sum(-1, keepdim=True)
    target = target / mass.clamp_min(1e-9)
    logits = scores.masked_fill(~chosen, -1e30)
    log_q = torch.log_softmax(logits, dim=-1)
    terms = torch.where(target > 0, target * (target.clamp_min(1e-30).log() - log_q), 0.0)
    counted = chosen.any(-1).expand(mass.shape[:-1]).to(terms.dtype)
    return (terms.sum(-1) * counted).sum() / counted.sum().clamp_min(1)
