"""What is timed against each other. An arm runs one MoE layer, all its helper kernels included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from bench.kernels.check import FACTOR
from bench.kernels.marlin import Activation
from bench.kernels.problem import Batch
from kernels import ops


class Arm(Protocol):
    """One way through the layer.

    Attributes:
        name: in results and tables.
        interleaved: how it reads the rows of w13: gate and up by turns of 32, or in two halves.
            Both readings of the same bytes are an MoE layer, each with its own reference.
        factor: times the error of PyTorch's BF16 that its largest error may be.
    """

    name: str
    interleaved: bool
    factor: float

    def prepare(self, batch: Batch) -> Callable[[int], None]:
        """Make the buffers of a batch; the result runs one step and can be captured."""
        ...


class Ours:
    """`dsv4_maxq::moe_w4a16`."""

    interleaved = True
    factor = FACTOR

    def __init__(self, limit: float, name: str = "ours") -> None:
        self.name = name
        self._limit = limit

    def prepare(self, batch: Batch) -> Callable[[int], None]:
        """See `Arm`."""

        def step(i: int) -> None:
            layer = batch.layer(i)
            ops.moe_w4a16(
                batch.hidden,
                batch.route(i),
                batch.weights[i],
                layer.w13,
                layer.w13_scale,
                layer.w2,
                layer.w2_scale,
                self._limit,
                out=batch.outs[i],
            )

        return step


class Separator:
    """The router's kernel alone, to be taken off the others."""

    name = "separator"
    interleaved = True
    factor = FACTOR

    def prepare(self, batch: Batch) -> Callable[[int], None]:
        """See `Arm`."""

        def step(i: int) -> None:
            batch.route(i)

        return step


def interleaved_activation(limit: float) -> Activation:
    """`dsv4_maxq::silu_interleaved`, for Marlin over our w13."""

    def run(gate_up: torch.Tensor, act: torch.Tensor) -> None:
        ops.silu_interleaved(gate_up, limit, out=act)

    return run
