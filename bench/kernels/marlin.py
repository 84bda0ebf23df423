"""vLLM 0.32.0's Marlin MoE as five calls, without vLLM: only its two kernel libraries.

    align -> gate and up GEMM -> SiLU, product and clamp -> down GEMM -> sum over slots

As `fused_marlin_moe` does it: the same block sizes, buffers and switches. The libraries load in any
PyTorch from 2.11 on. Source: vllm/model_executor/layers/fused_moe/experts/marlin_moe.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.kernels.check import FACTOR_OF_OTHERS
from bench.kernels.problem import Batch

MOE_LIBRARY = "_moe_C_stable_libtorch.abi3.so"
C_LIBRARY = "_C_stable_libtorch.abi3.so"
UINT4B8 = 1125899907892224  # vllm.scalar_type.scalar_types.uint4b8.id: a code is q + 8
BLOCK_SIZES = (8, 16, 32, 48, 64)
BLOCKS_PER_SM = 4

# (gate_up BF16 (rows, 2 inter), act BF16 (rows, inter)) -> None
Activation = Callable[[torch.Tensor, torch.Tensor], None]


def find_library(name: str, given: Path | None) -> Path | None:
    """The library that was named, else that of an installed vLLM, which is not imported.

    Raises:
        ValueError: the one that was named does not exist.
    """
    if given is not None:
        if not given.is_file():
            raise ValueError(f"bench.kernels: {given}: no such file")
        return given
    spec = importlib.util.find_spec("vllm")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / name).is_file():
            return path
    return None


def block_size(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Rows that Marlin gives an expert at a time, as vLLM chooses it."""
    mean = num_tokens * top_k / num_experts
    return next((size for size in BLOCK_SIZES if mean / size < 0.9), BLOCK_SIZES[-1])


class Marlin:
    """An arm: see `bench.kernels.arms`.

    Args:
        name: of the arm.
        interleaved: what `activation` takes for the rows of w13: gate and up rows interleaved by
            32, or all gate rows before all up rows.
        ops: torch.ops._moe_C, or what stands for it.
        skip_down: leave the second GEMM out; for a control that must fail.
    """

    factor = FACTOR_OF_OTHERS

    def __init__(
        self,
        name: str,
        activation: Activation,
        interleaved: bool,
        multiprocessors: int,
        ops: Any,
        skip_down: bool = False,
    ) -> None:
        self.name = name
        self.interleaved = interleaved
        self._activation = activation
        self._locks = BLOCKS_PER_SM * multiprocessors
        self._ops = ops
        self._skip_down = skip_down

    def prepare(self, batch: Batch) -> Callable[[int], None]:
        """Make the buffers of a batch; the result runs one step."""
        shape, ops, device = batch.shape, self._ops, batch.hidden.device
        tokens, top_k = batch.num_tokens, shape.top_k
        hidden, inter = shape.hidden_size, shape.inter_size
        rows = tokens * top_k
        block = block_size(tokens, top_k, shape.num_experts)
        padded = rows + shape.num_experts * (block - 1)
        if rows < shape.num_experts:
            padded = min(padded, rows * block)

        def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(*sizes, dtype=dtype, device=device)

        sorted_ids = empty(padded, dtype=torch.int32)
        expert_ids = empty(-(-padded // block), dtype=torch.int32)
        num_padded = empty(1, dtype=torch.int32)
        shared = empty(rows * max(2 * inter, hidden))  # the GEMMs' outputs follow each other
        gate_up = shared[: rows * 2 * inter].view(rows, 2 * inter)
        down = shared[: rows * hidden].view(rows, hidden)
        act = empty(rows, inter)
        locks = torch.zeros(self._locks, dtype=torch.int32, device=device)

        def gemm(
            a: torch.Tensor,
            c: torch.Tensor,
            weight: torch.Tensor,
            scale: torch.Tensor,
            route: torch.Tensor,
            slots: int,
            scaled: bool,
        ) -> None:
            ops.moe_wna16_marlin_gemm(
                a,
                c,
                weight,
                None,  # bias
                scale,
                None,  # scales of a
                None,  # global scale
                None,  # zero points
                locks,
                sorted_ids,
                expert_ids,
                num_padded,
                route,
                block,
                slots,
                scaled,
                UINT4B8,
                len(a),
                c.shape[1],
                a.shape[1],
                False,  # atomic add
                True,  # FP32 reduction
                False,  # floating zero points
                -1,
                -1,
                -1,
            )

        def step(i: int) -> None:
            layer, route = batch.layer(i), batch.weights[i]
            ops.moe_align_block_size(
                batch.route(i), shape.num_experts, block, sorted_ids, expert_ids, num_padded, None
            )
            gemm(batch.hidden, gate_up, layer.w13, layer.w13_scale, route, top_k, False)
            self._activation(gate_up, act)
            if not self._skip_down:
                gemm(act, down, layer.w2, layer.w2_scale, route, 1, True)
            ops.moe_sum(down.view(tokens, top_k, hidden), batch.outs[i])

        return step


def vllm_activation(limit: float, ops: Any) -> Activation:
    """vLLM's own fused kernel, from `_C_stable_libtorch.abi3.so`. `ops`: torch.ops._C."""

    def run(gate_up: torch.Tensor, act: torch.Tensor) -> None:
        ops.silu_and_mul_with_clamp(act, gate_up, limit, 1.0, 0.0)

    return run


def torch_activation(limit: float, inter_size: int, device: torch.device) -> Activation:
    """The same in PyTorch: three kernels, where vLLM's library is not at hand."""
    low = torch.full((2 * inter_size,), -float("inf"), device=device, dtype=torch.bfloat16)
    low[inter_size:] = -limit
    high = torch.full_like(low, limit)

    def run(gate_up: torch.Tensor, act: torch.Tensor) -> None:
        clamped = torch.clamp(gate_up, low, high)
        gate, up = clamped.chunk(2, dim=-1)
        torch.mul(functional.silu(gate, inplace=True), up, out=act)

    return run
