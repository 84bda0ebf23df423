"""The layers that are timed: sizes, weights in the tiled layout, and one batch through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kernels.weights import INT4_GROUP

BF16_BYTES = 2
COLD_FACTOR = 4  # between two visits of a layer, this many times the L2 cache is read
# Codes are uniform, about 4.6 in root mean square: at 4096 inputs these scales give gates with a
# deviation near 5, so that some of them meet the limit of 10.
SCALE_LOW, SCALE_HIGH = 0.010, 0.024


@dataclass(frozen=True)
class Shape:
    """Sizes of an MoE layer on one rank."""

    hidden_size: int
    inter_size: int
    num_experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Weights and scales of one expert."""
        weights = 3 * self.hidden_size * self.inter_size
        return weights // 2 + weights // INT4_GROUP * BF16_BYTES

    @property
    def layer_bytes(self) -> int:
        """Weights and scales of a layer."""
        return self.num_experts * self.expert_bytes

    def batch_bytes(self, num_tokens: int) -> int:
        """What a batch must move besides weights: activations in and out, ids, route weights."""
        return num_tokens * (2 * BF16_BYTES * self.hidden_size + 8 * self.top_k)


@dataclass(frozen=True)
class Layer:
    """Tiled weights of one layer; one copy serves every arm.

    w13 int32 (experts, hidden / 16, 4 inter), w2 int32 (experts, inter / 16, 2 hidden); scales
    BF16 (experts, k / 128, n).
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor


def layers_needed(shape: Shape, l2_bytes: int) -> int:
    """Layers to rotate through so that none is in L2 when its turn comes again, at any batch size.

    One token reads least; between two visits of a layer lie all the others.
    """
    least = shape.top_k * shape.expert_bytes
    return 1 + -(-COLD_FACTOR * l2_bytes // least)


def make_layers(
    shape: Shape, count: int, device: torch.device, generator: torch.Generator
) -> list[Layer]:
    """Layers of random codes and scales: every bit pattern is a weight in the tiled layout."""

    def packed(size_k: int, size_n: int) -> torch.Tensor:
        pairs = (shape.num_experts, size_k // 16, size_n)
        low, high = -(2**63), 2**63 - 1
        words = torch.randint(low, high, pairs, device=device, generator=generator)
        return words.view(torch.int32)  # (experts, k / 16, 2 n)

    def scales(size_k: int, size_n: int) -> torch.Tensor:
        rows = (shape.num_experts, size_k // INT4_GROUP, size_n)
        value = torch.rand(rows, device=device, generator=generator)
        return (SCALE_LOW + (SCALE_HIGH - SCALE_LOW) * value).to(torch.bfloat16)

    hidden, inter = shape.hidden_size, shape.inter_size
    return [
        Layer(
            packed(hidden, 2 * inter),
            scales(hidden, 2 * inter),
            packed(inter, hidden),
            scales(inter, hidden),
        )
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Batch:
    """One batch through a row of layers: what every arm reads, and where it writes.

    Attributes:
        hidden: BF16 (tokens, hidden).
        ids: int32 (steps, tokens, top_k); step i reads layer `order[i]` with its own routing.
        weights: float32 (steps, tokens, top_k).
        outs: BF16 (steps, tokens, hidden).
        router: int32 (tokens, top_k), written by a kernel of its own before each step; None: the
            steps read `ids` themselves.
    """

    shape: Shape
    layers: Sequence[Layer]
    order: tuple[int, ...]
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    outs: torch.Tensor
    router: torch.Tensor | None = field(default=None)

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch."""
        return len(self.hidden)

    @property
    def num_steps(self) -> int:
        """Layers that one replay goes through."""
        return len(self.order)

    def route(self, step: int) -> torch.Tensor:
        """The ids of a step, through the router's kernel where there is one."""
        if self.router is None:
            return self.ids[step]
        torch.add(self.ids[step], 0, out=self.router)
        return self.router

    def layer(self, step: int) -> Layer:
        """The layer of a step."""
        return self.layers[self.order[step]]


def make_batch(
    shape: Shape,
    layers: Sequence[Layer],
    order: tuple[int, ...],
    ids: torch.Tensor,
    device: torch.device,
    generator: torch.Generator,
    separator: bool,
) -> Batch:
    """A batch of random activations and route weights (they add up to 1 per token).

    Args:
        ids: int32 (steps, tokens, top_k) on any device.
    """
    steps, tokens, top_k = ids.shape
    like = {"device": device, "generator": generator}
    weights = torch.rand(steps, tokens, top_k, **like) + 0.1
    hidden = torch.randn(tokens, shape.hidden_size, **like).to(torch.bfloat16)
    ids = ids.to(device)
    return Batch(
        shape=shape,
        layers=layers,
        order=order,
        hidden=hidden,
        ids=ids,
        weights=weights / weights.sum(-1, keepdim=True),
        outs=torch.empty(steps, *hidden.shape, dtype=torch.bfloat16, device=device),
        router=torch.empty_like(ids[0]) if separator else None,
    )
