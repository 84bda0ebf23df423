"""Humming's indexed MoE, the way vLLM 0.32.0 drives it, from the package itself.

    align -> gate and up GEMM -> SiLU, product and clamp -> down GEMM -> weighted sum over slots

It has its own weight layout, so it holds a second copy of the layers. Source: vllm's
fused_humming_moe.py (HummingIndexedExperts) and humming 0.1.17.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.kernels.check import FACTOR_OF_OTHERS
from bench.kernels.problem import Batch, Layer, Shape
from kernels.tiled import untile_scale, untile_weight
from kernels.weights import INT4_GROUP

LOCKS = 2048  # as Humming's own layer has
COMPUTE = json.dumps(
    {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"}
)  # fmt: skip
# SiLU(min(a, limit)) * clamp(b): a is gate, b up, in C++.
ACTIVATION = (
    "[](float a, float b) {{ const float gate = fminf(a, {0}f); "
    "return gate / (1.f + expf(-gate)) * fmaxf(fminf(b, {0}f), -{0}f); }}(a, b)"
)


class Humming:
    """An arm: see `bench.kernels.arms`. It reads weights of its own, made from the same codes.

    Raises:
        ImportError: no humming-kernels.
    """

    interleaved = True  # the rows are put in order before they are handed over
    factor = FACTOR_OF_OTHERS

    def __init__(self, name: str, shape: Shape, layers: Sequence[Layer], limit: float) -> None:
        from humming.schema import HummingWeightSchema
        from humming.transform import prepare_and_transform_humming_tensors

        self.name = name
        self._shape = shape
        self._activation = ACTIVATION.format(float(limit))
        schema = HummingWeightSchema(
            b_dtype="uint4", bs_dtype="bfloat16", weight_scale_group_size=INT4_GROUP
        )
        self._places = {id(layer): i for i, layer in enumerate(layers)}

        def convert(weight: torch.Tensor, scale: torch.Tensor) -> tuple[Any, dict]:
            *_, size_n, words = weight.shape
            return prepare_and_transform_humming_tensors(
                tensors={"weight": weight, "weight_scale": scale},
                shape_n=size_n,
                shape_k=8 * words,
                pad_n_to_multiple=256,
                pad_k_to_multiple=128,
                weight_schema=schema,
                num_experts=shape.num_experts,
                torch_dtype=torch.bfloat16,
                device=weight.device,
            )

        self._up, self._down = [], []
        for layer in layers:
            self._up.append(
                convert(untile_weight(layer.w13, True), untile_scale(layer.w13_scale, True))
            )
            self._down.append(convert(untile_weight(layer.w2), untile_scale(layer.w2_scale)))
        self._sum, how = _weighted_sum()
        self.note = f"align, GEMM, its fused SiLU, GEMM, {how}; another copy of the weights"

    def prepare(self, batch: Batch) -> Callable[[int], None]:
        """See `Arm`."""
        from humming.forward import humming_forward, may_process_input
        from humming.tune import get_heuristics_config

        shape, device = self._shape, batch.hidden.device
        tokens, top_k = batch.num_tokens, shape.top_k
        rows = tokens * top_k

        def tuned(config: Any) -> tuple[str, int]:
            table = get_heuristics_config(layer_config=config, gemm_type="indexed", device=device)
            chosen = next((c for low, high, c in table if low < rows <= high), None)
            return json.dumps(table), chosen["block_shape"][0] if chosen else 64

        up_tuning, up_block = tuned(self._up[0][0])
        down_tuning, down_block = tuned(self._down[0][0])
        up_places = _Places(rows, shape.num_experts, up_block, device)
        down_places = (
            up_places
            if down_block == up_block
            else _Places(rows, shape.num_experts, down_block, device)
        )
        like = {"dtype": torch.bfloat16, "device": device}
        gate_up = torch.empty(rows, 2 * shape.inter_size, **like)
        act = torch.empty(rows, shape.inter_size, **like)
        down = torch.empty(rows, shape.hidden_size, **like)
        locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)

        def gemm(
            made: tuple[Any, dict], a: torch.Tensor, out: torch.Tensor, places: _Places, **how: Any
        ) -> None:
            config, tensors = made
            humming_forward(
                config,
                inputs=a,
                weight=tensors["weight"],
                weight_scale=tensors["weight_scale"],
                outputs=out,
                sorted_ids=places.sorted_ids,
                expert_ids=places.expert_ids,
                num_tokens_padded=places.num_padded,
                locks=locks,
                valid_shape_m=rows,
                compute_config=COMPUTE,
                **how,
            )

        def step(i: int) -> None:
            at = self._places[id(batch.layer(i))]
            ids = batch.route(i)
            up_places.align(ids)
            if down_places is not up_places:
                down_places.align(ids)
            gemm(
                self._up[at], batch.hidden, gate_up, up_places, top_k=top_k, tuning_config=up_tuning
            )
            may_process_input(
                self._down[at][0],
                inputs=gate_up,
                outputs=act,
                activation_type="binary_split",
                activation_impl=self._activation,
            )
            gemm(self._down[at], act, down, down_places, top_k=1, tuning_config=down_tuning)
            self._sum(down.view(tokens, top_k, -1), batch.weights[i], batch.outs[i])

        return step


class _Places:
    """Where vLLM's align kernel puts the rows of a batch."""

    def __init__(self, rows: int, experts: int, block: int, device: torch.device) -> None:
        padded = rows + experts * (block - 1)
        if rows < experts:
            padded = min(padded, rows * block)
        like = {"dtype": torch.int32, "device": device}
        self.sorted_ids = torch.empty(padded, **like)
        self.expert_ids = torch.empty(-(-padded // block), **like)
        self.num_padded = torch.empty(1, **like)
        self._experts, self._block = experts, block

    def align(self, ids: torch.Tensor) -> None:
        torch.ops._moe_C.moe_align_block_size(
            ids,
            self._experts,
            self._block,
            self.sorted_ids,
            self.expert_ids,
            self.num_padded,
            None,
        )


def _weighted_sum() -> tuple[Callable[..., None], str]:
    """vLLM's Triton kernel where vLLM is installed, else one batched product in PyTorch."""
    try:
        from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum
    except ImportError:

        def product(down: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
            torch.bmm(weights.to(down.dtype)[:, None], down, out=out[:, None])

        return product, "PyTorch's bmm over slots, for want of vLLM"

    def fused(down: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        moe_fused_mul_sum(inputs=down, topk_weights=weights, outputs=out)

    return fused, "vLLM's moe_fused_mul_sum"
