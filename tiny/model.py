"""DeepSeek-V4 in plain PyTorch: the target model and its MTP head.

A whole-sequence forward without caches, in float32, bfloat16 or float64. It computes what vLLM
0.32.0 computes, up to rounding; each part names the vLLM source that it was derived from.

    tokens -> embed -> 4 equal streams
           -> layers: mHC( attn_norm, attention ), mHC( ffn_norm, experts )
           -> streams --+--> hc_head -> norm -> head -> logits of the next token
                        |
                        +--> MTP( streams at p, token p + 1 ) -> logits of token p + 2

Parameter names are those of the original checkpoint, except that the routed experts of a layer
are stacked (`tiny.load` and `tiny.export` convert).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tiny.attention import Attention, AttentionTrace, DraftHistory
from tiny.config import TinyConfig
from tiny.hyper import HyperHead, hc_post, hc_pre
from tiny.layers import Linear, RMSNorm, Storage
from tiny.moe import MoE, Router
from tiny.quant import fake_bf16


class Block(nn.Module):
    """One decoder layer: attention and experts, each inside hyper-connections.

    Source: vLLM `models/deepseek_v4/cpu/model.py`, `_forward_unfused_post_pre`.
    """

    def __init__(self, config: TinyConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, config.compress_ratios[layer])
        self.ffn = MoE(config, is_hash=layer < config.num_hash_layers)
        hc = config.hc_mult
        rows = (2 + hc) * hc
        for name in ("attn", "ffn"):
            fn = torch.randn(rows, hc * config.hidden_size) * 0.01
            base = torch.zeros(rows)
            base[: 2 * hc] = torch.randn(2 * hc) * 0.5  # streams differ from the start
            base[2 * hc :] = (4.0 * torch.eye(hc)).flatten()  # mixing starts near the identity
            setattr(self, f"hc_{name}_fn", nn.Parameter(fn))
            setattr(self, f"hc_{name}_base", nn.Parameter(base))
            setattr(self, f"hc_{name}_scale", nn.Parameter(torch.ones(3)))

    def mix_attn(self, streams: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normed input of the attention, and the coefficients for `hc_post`."""
        x, post, comb = hc_pre(
            streams, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, self.config
        )
        return self.attn_norm(x), post, comb

    def feed_forward(self, streams: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The experts' half of the layer: streams (B, L, hc, hidden) -> same."""
        x, post, comb = hc_pre(
            streams, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, self.config
        )
        return hc_post(self.ffn(self.ffn_norm(x), tokens), streams, post, comb)

    def forward(
        self,
        streams: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        trace: AttentionTrace | None = None,
    ) -> torch.Tensor:
        """streams (B, L, hc, hidden), tokens (B, L), positions (L,) -> streams."""
        x, post, comb = self.mix_attn(streams)
        streams = hc_post(self.attn(x, positions, trace), streams, post, comb)
        return self.feed_forward(streams, tokens)

    def forward_draft(
        self,
        streams: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        step: int,
        history: DraftHistory,
    ) -> torch.Tensor:
        """As `forward`, for draft step `step`; see `Attention.forward_draft`."""
        x, post, comb = self.mix_attn(streams)
        out = self.attn.forward_draft(x, positions, step, history)
        streams = hc_post(out, streams, post, comb)
        return self.feed_forward(streams, tokens)


class MtpHead(HyperHead):
    """The multi-token-prediction layer. It has no embedding and no output matrix of its own.

    Source: vLLM `models/deepseek_v4/nvidia/mtp.py`.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps)
        self.hnorm = RMSNorm(hidden, eps)
        self.norm = RMSNorm(hidden, eps)
        self.e_proj = Linear(hidden, hidden, Storage.FP8)
        self.h_proj = Linear(hidden, hidden, Storage.FP8)
        self.block = Block(config, config.num_hidden_layers)
        self.init_hc_head(config)

    def combine(
        self, embedded: torch.Tensor, streams: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Input streams of the block.

        Args:
            embedded: (B, L, hidden), embedding of the token after each place; taken as 0 at
                position 0.
            streams: (B, L, hc, hidden), residual streams at the place, before `hc_head`.
            positions: (L,), positions of the places.
        """
        embedded = embedded * (positions != 0).to(embedded.dtype)[:, None]
        e = self.e_proj(self.enorm(embedded))
        return self.h_proj(self.hnorm(streams)) + e[..., None, :]

    def forward(
        self,
        embedded: torch.Tensor,
        streams: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        step: int = 0,
        history: DraftHistory | None = None,
    ) -> torch.Tensor:
        """One draft step for all places: the block's output streams (B, L, hc, hidden).

        They are also what the next draft step takes as `streams`. `tokens` (B, L) are the ids
        of `embedded`; positions (L,) are the places, the step's own position is place + step.
        """
        x = self.combine(embedded, streams, positions + step)
        return self.block.forward_draft(x, tokens, positions, step, history or DraftHistory())

    def hidden(self, streams: torch.Tensor) -> torch.Tensor:
        """(B, L, hc, hidden) -> (B, L, hidden), ready for the target's output matrix."""
        return self.norm(self.hc_head(streams, self.config))


class DeepseekV4(HyperHead):
    """Target model (`embed`, `layers`, `norm`, `head`) and its head (`mtp`)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.fake_quant = False
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, Storage.BF16)
        self.init_hc_head(config)
        self.mtp = nn.ModuleList([MtpHead(config)])
        self._scale_down_outputs()

    def _scale_down_outputs(self) -> None:
        """Sublayer outputs start small, so that depth does not drown the embedding."""
        factor = 1 / math.sqrt(2 * self.config.num_hidden_layers)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Attention):
                    module.wo_b.weight.mul_(factor)
                if isinstance(module, MoE):
                    module.shared_experts.w2.weight.mul_(factor)
                    module.experts.w2.mul_(factor)

    def set_quantization(self, weights: bool, caches: bool) -> None:
        """Switch fake quantization of weights and simulation of the engine's FP8 caches."""
        for module in self.modules():
            if hasattr(module, "fake_quant"):
                module.fake_quant = weights
            if isinstance(module, Attention):
                module.fp8_cache = caches

    def routers(self) -> list[tuple[Router, MoE]]:
        """Learned routers (those with a bias) and the layers they belong to."""
        moes = [m for m in self.modules() if isinstance(m, MoE)]
        return [(m.gate, m) for m in moes if m.gate.bias is not None]

    def embed_tokens(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """tokens (B, L) int64 -> (B, L, hidden)."""
        weight = fake_bf16(self.embed.weight) if self.fake_quant else self.embed.weight
        return F.embedding(tokens, weight).to(dtype)

    def trunk(
        self,
        tokens: torch.Tensor,
        dtype: torch.dtype,
        traces: list[AttentionTrace] | None = None,
    ) -> torch.Tensor:
        """Residual streams after the last layer.

        Args:
            tokens: (B, L) int64; sequences shorter than L are padded at the end, which does
                not change anything before the padding.
            dtype: of the activations (float32, bfloat16, float64).
            traces: one is appended per layer when given.
        Returns:
            (B, L, hc, hidden), the `previous_hidden_states` of the MTP head.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        streams = self.embed_tokens(tokens, dtype)[..., None, :]
        streams = streams.repeat(1, 1, self.config.hc_mult, 1)
        for layer in self.layers:
            trace = None
            if traces is not None:
                trace = AttentionTrace()
                traces.append(trace)
            streams = layer(streams, tokens, positions, trace)
        return streams

    def logits(self, streams: torch.Tensor) -> torch.Tensor:
        """Streams (B, L, hc, hidden) -> next-token logits (B, L, vocab) in the same dtype."""
        return self.head(self.norm(self.hc_head(streams, self.config)))

    def draft(
        self,
        streams: torch.Tensor,
        next_tokens: torch.Tensor,
        step: int = 0,
        history: DraftHistory | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the MTP head at every place of a sequence.

        Args:
            streams: (B, L, hc, hidden), of the target (step 0) or of the previous draft step.
            next_tokens: (B, L) int64: the token after the place, or the previous draft.
            step: how many tokens have already been drafted.
            history: carried from step to step.
        Returns:
            logits (B, L, vocab) of the token after `next_tokens`; streams for the next step.
        """
        head = self.mtp[0]
        positions = torch.arange(next_tokens.shape[1], device=next_tokens.device)
        embedded = self.embed_tokens(next_tokens, streams.dtype)
        out = head(embedded, streams, next_tokens, positions, step, history)
        return self.head(head.hidden(out)), out

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """tokens (B, L) -> logits (B, L, vocab) of the target."""
        return self.logits(self.trunk(tokens, dtype))
