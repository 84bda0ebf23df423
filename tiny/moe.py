"""Mixture of experts: router, routed experts, one shared expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tiny.config import TinyConfig
from tiny.layers import FAKE, Linear, Storage, wide
from tiny.quant import fake_bf16


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)`, computed wide, in gate's dtype.

    Source: vLLM `SiluAndMulWithClamp`.
    """
    dtype = wide(gate.dtype)
    g = gate.to(dtype).clamp(max=limit)
    u = up.to(dtype).clamp(-limit, limit)
    return (F.silu(g) * u).to(gate.dtype)


class Router(nn.Module):
    """Chooses experts and their weights.

    weight_e = sqrt(softplus(logit_e)). The experts chosen are the top num_experts_per_tok of
    weight + bias (the bias, adjusted in training to even out the load, has no part in the
    weights), or, in a hash layer, the entry of the token in the table `tid2eid`. Weights of the
    chosen are divided by their sum and multiplied by routed_scaling_factor.

    Source: vLLM `fused_moe/router/dsv4_topk.py`, `cpu_router.py`.
    """

    def __init__(self, config: TinyConfig, is_hash: bool) -> None:
        super().__init__()
        self.config = config
        self.fake_quant = False
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)
        self.bias: nn.Parameter | None = None
        if is_hash:
            self.register_buffer("tid2eid", make_hash_table(config))
        else:
            bias = torch.zeros(config.n_routed_experts)
            self.bias = nn.Parameter(bias, requires_grad=False)
            self.tid2eid = None

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, hidden), tokens (T,) -> weights (T, k) wide, expert ids (T, k) int64.

        Logits are computed and kept wide from inputs of the model's dtype.
        """
        config = self.config
        dtype = wide(x.dtype)
        weight = fake_bf16(self.weight) if self.fake_quant else self.weight
        logits = F.linear(x.to(dtype), weight.to(x.dtype).to(dtype))
        scores = F.softplus(logits).sqrt()
        if self.tid2eid is not None:
            ids = self.tid2eid[tokens]
        else:
            ids = (scores.detach() + self.bias).topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor
        return weights, ids


def make_hash_table(config: TinyConfig) -> torch.Tensor:
    """`tid2eid`, int64 (vocab_size, num_experts_per_tok): distinct experts for every token id.

    Token ids are spread evenly: the first expert of token t is t mod n, the others follow at
    distances that change every n tokens.
    """
    experts = config.n_routed_experts
    token = torch.arange(config.vocab_size)
    columns = [token % experts]
    for i in range(1, config.num_experts_per_tok):
        step = (token // experts + i - 1) % (experts - 1) + 1
        columns.append((token + step) % experts)
    return torch.stack(columns, dim=-1)


class RoutedExperts(nn.Module):
    """All experts of a layer, stacked: w1 and w3 (E, inter, hidden), w2 (E, hidden, inter)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        experts, hidden = config.n_routed_experts, config.hidden_size
        inter = config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.randn(experts, inter, hidden) * hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, inter) * inter**-0.5)
        self.w3 = nn.Parameter(torch.randn(experts, inter, hidden) * hidden**-0.5)
        self.storage = Storage.FP4
        self.fake_quant = False

    def matrices(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """w1, w2, w3 as computed with."""
        weights = (self.w1, self.w2, self.w3)
        if self.fake_quant:
            weights = tuple(FAKE[self.storage](w) for w in weights)
        return [w.to(dtype) for w in weights]

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x (T, hidden), weights and ids (T, k) -> (T, hidden), the weighted sum of k experts."""
        if x.is_cuda and torch.is_grad_enabled():
            return self._all_experts(x, weights, ids)
        return self._chosen_experts(x, weights, ids)

    def _chosen_experts(self, x, weights, ids) -> torch.Tensor:
        """Each expert on the tokens routed to it: what an engine does."""
        w1, w2, w3 = self.matrices(x.dtype)
        out = torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device)
        for expert in range(len(w1)):
            row, slot = (ids == expert).nonzero(as_tuple=True)
            if len(row):
                inputs = x[row]
                y = clamped_swiglu(inputs @ w1[expert].t(), inputs @ w3[expert].t(), self.limit)
                y = (y @ w2[expert].t()).to(out.dtype) * weights[row, slot, None]
                out.index_add_(0, row, y)
        return out.to(x.dtype)

    def _all_experts(self, x, weights, ids) -> torch.Tensor:
        """Every expert on every token, weight 0 where not chosen: three plain matrix products.

        More arithmetic, but no data-dependent shapes: faster to train on a GPU at this size.
        """
        w1, w2, w3 = self.matrices(x.dtype)
        experts, inter, _ = w1.shape
        gates = torch.zeros(len(x), experts, dtype=weights.dtype, device=x.device)
        gates = gates.scatter(-1, ids, weights)  # (T, E)
        y = clamped_swiglu(x @ w1.flatten(0, 1).t(), x @ w3.flatten(0, 1).t(), self.limit)
        y = y.unflatten(-1, (experts, inter)) * gates[..., None].to(x.dtype)
        return y.flatten(-2) @ w2.transpose(1, 2).flatten(0, 1)  # (T, E * inter) x (E * inter, H)


class SharedExpert(nn.Module):
    """The expert that every token uses: one SwiGLU of the same width."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        hidden, inter = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.limit = config.swiglu_limit
        self.w1 = Linear(hidden, inter, Storage.FP8)
        self.w2 = Linear(inter, hidden, Storage.FP8)
        self.w3 = Linear(hidden, inter, Storage.FP8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(clamped_swiglu(self.w1(x), self.w3(x), self.limit))


class MoE(nn.Module):
    """Routed experts plus the shared expert.

    `shared_dropout` (training only) drops the shared expert's output for a random part of the
    tokens, so that the routed experts carry weight; the trainer sets it on the MTP layer.
    """

    def __init__(self, config: TinyConfig, is_hash: bool) -> None:
        super().__init__()
        self.gate = Router(config, is_hash)
        self.experts = RoutedExperts(config)
        self.shared_experts = SharedExpert(config)
        self.shared_dropout = 0.0
        load = torch.zeros(config.n_routed_experts)
        self.register_buffer("load", load, persistent=False)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """x (B, L, hidden) after `ffn_norm`, tokens (B, L) -> (B, L, hidden).

        While training, `load` counts the tokens that went to each expert.
        """
        flat = x.flatten(0, 1)
        weights, ids = self.gate(flat, tokens.flatten())
        if self.training:
            self.load.add_(F.one_hot(ids, len(self.load)).sum((0, 1)).to(self.load.dtype))
        shared = self.shared_experts(flat)
        if self.training and self.shared_dropout > 0:
            keep = torch.rand(len(flat), 1, device=x.device) >= self.shared_dropout
            shared = shared * keep.to(shared.dtype)
        return (self.experts(flat, weights, ids) + shared).view(x.shape)
