"""A GPU and arms on the CPU: results are computed, times are made up."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import torch

from bench.kernels.check import FACTOR, stored
from bench.kernels.gpu import DeviceInfo
from bench.kernels.marlin import UINT4B8
from bench.kernels.problem import Batch, Shape, make_batch, make_layers
from bench.kernels.routing import Routing, draw
from kernels import reference
from kernels.formats import dequantize_int4
from kernels.tiled import untile_scale, untile_weight

SHAPE = Shape(hidden_size=128, inter_size=128, num_experts=8, top_k=2)
LIMIT = 10.0
CPU = torch.device("cpu")


def random_batch(tokens: int = 3, steps: int = 2, shape: Shape = SHAPE, separator=False) -> Batch:
    """Two layers by turns, each step with its own uniform routing."""
    generator = torch.Generator().manual_seed(0)
    layers = make_layers(shape, 2, CPU, generator)
    ids = torch.stack(
        [
            draw(Routing.UNIFORM, tokens, shape.num_experts, shape.top_k, generator)
            for _ in range(steps)
        ]
    )
    order = tuple(i % 2 for i in range(steps))
    return make_batch(shape, layers, order, ids, CPU, generator, separator)


class FakeGpu:
    """Replays run on the CPU; a round's times are what the arms say a step costs, within 1 %.

    Args:
        drift: factor on the time of a graph that was captured after another of the same arm.
    """

    def __init__(self, capability: str = "9.0", drift: float = 1.0) -> None:
        self.device = CPU
        self.info = DeviceInfo("Fake GPU", capability, 4, 50_000, 1 << 30)
        self.spent_us = 0.0
        self._random = random.Random(0)
        self._drift = drift
        self._seen: dict[float, int] = {}

    def free_bytes(self) -> int:
        return 1 << 30

    def peak_bytes(self) -> int:
        return 1 << 20

    def copy_gb_s(self) -> float:
        return 100.0

    def release(self) -> None:
        self._seen.clear()

    def capture(self, run: Callable[[], None]) -> SimpleNamespace:
        before = self.spent_us
        run()
        cost = self.spent_us - before
        again = self._seen.get(cost, 0)
        self._seen[cost] = again + 1
        return SimpleNamespace(run=run, cost=cost * (self._drift if again else 1.0))

    def replay(self, graph: SimpleNamespace) -> None:
        graph.run()

    def time_round(self, graphs: list[SimpleNamespace]) -> list[float]:
        return [graph.cost * self._random.uniform(0.995, 1.005) for graph in graphs]


class FakeArm:
    """The exact layer, rounded, at a price per step. `spoil(out)` makes it wrong."""

    factor = FACTOR

    def __init__(self, gpu, name, us, interleaved=True, spoil=None) -> None:
        self.name, self.interleaved = name, interleaved
        self._gpu, self._us, self._spoil = gpu, us, spoil

    def prepare(self, batch: Batch) -> Callable[[int], None]:
        every = torch.arange(batch.shape.num_experts)
        experts = {i: stored(batch.layers[i], every, self.interleaved) for i in set(batch.order)}

        def step(i: int) -> None:
            weights = experts[batch.order[i]]
            hidden, route = batch.hidden.double(), batch.weights[i]
            out = reference.moe(hidden, weights, batch.route(i), route, LIMIT).bfloat16()
            batch.outs[i] = self._spoil(out) if self._spoil else out
            tokens = batch.num_tokens
            self._gpu.spent_us += self._us(tokens) if callable(self._us) else self._us

        return step


# As vLLM 0.32.0's libraries declare them.
SCHEMAS = {
    "moe_align_block_size": "moe_align_block_size(Tensor topk_ids, int num_experts, int block_size,"
    " Tensor! sorted_token_ids, Tensor! experts_ids, Tensor! num_tokens_post_pad,"
    " Tensor? maybe_expert_map, Tensor(a!)? scatter_idx=None) -> ()",
    "moe_wna16_marlin_gemm": "moe_wna16_marlin_gemm(Tensor! a, Tensor? c_or_none,"
    " Tensor! b_q_weight, Tensor? b_bias_or_none, Tensor! b_scales, Tensor? a_scales,"
    " Tensor? global_scale, Tensor? b_zeros_or_none, Tensor! workspace, Tensor sorted_token_ids,"
    " Tensor! expert_ids, Tensor! num_tokens_past_padded, Tensor! topk_weights,"
    " int moe_block_size, int top_k, bool mul_topk_weights, int b_type_id, int size_m, int size_n,"
    " int size_k, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float, int thread_k,"
    " int thread_n, int blocks_per_sm) -> Tensor",
    "moe_sum": "moe_sum(Tensor input, Tensor! output, Tensor? topk_ids=None,"
    " Tensor? expert_map=None) -> ()",
    "silu_and_mul_with_clamp": "silu_and_mul_with_clamp(Tensor! result, Tensor input, float limit,"
    " float alpha=1.0, float beta=0.0) -> ()",
}


def bound(name: str, arguments: tuple) -> dict:
    """Arguments by the name that the real operator gives them; refuses what it would refuse."""
    kinds = {"Tensor": torch.Tensor, "int": int, "bool": bool, "float": float}
    declared = torch._C.parse_schema(SCHEMAS[name]).arguments
    values = dict(zip([a.name for a in declared], arguments, strict=False))
    assert len(arguments) <= len(declared)
    for argument in declared:
        if argument.name not in values:
            assert argument.has_default_value(), f"{name}: {argument.name} is missing"
            continue
        value, kind = values[argument.name], str(argument.type)
        optional = kind.startswith("Optional")
        kind = kind.removeprefix("Optional[").removesuffix("]")
        assert (optional and value is None) or type(value) is kinds[kind], (name, argument.name)
    return values


class FakeMoeC:
    """What `torch.ops._moe_C` does, slowly. `calls`: names in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.locks: list[int] = []

    def moe_align_block_size(self, *arguments) -> None:
        self.calls.append("align")
        a = bound("moe_align_block_size", arguments)
        flat, block, rows = a["topk_ids"].flatten().tolist(), a["block_size"], []
        blocks = []
        for expert in range(a["num_experts"]):
            mine = [row for row, e in enumerate(flat) if e == expert]
            mine += [len(flat)] * (-len(mine) % block)
            rows += mine
            blocks += [expert] * (len(mine) // block)
        a["sorted_token_ids"][: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        a["experts_ids"][: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        a["num_tokens_post_pad"][0] = len(rows)

    def moe_wna16_marlin_gemm(self, *arguments) -> torch.Tensor:
        self.calls.append("gemm")
        g = bound("moe_wna16_marlin_gemm", arguments)
        self.locks.append(len(g["workspace"]))
        assert g["b_type_id"] == UINT4B8
        assert g["use_fp32_reduce"]
        assert g["a"].shape == (g["size_m"], g["size_k"])
        assert g["c_or_none"].shape == (g["size_m"] * g["top_k"], g["size_n"])
        weight, scale = untile_weight(g["b_q_weight"]), untile_scale(g["b_scales"])
        block, out, route = g["moe_block_size"], g["c_or_none"], g["topk_weights"].flatten()
        for i in range(int(g["num_tokens_past_padded"]) // block):
            expert = int(g["expert_ids"][i])
            values = dequantize_int4(weight[expert], scale[expert], dtype=torch.bfloat16)
            for row in g["sorted_token_ids"][i * block : (i + 1) * block].tolist():
                if row < len(out):
                    product = values @ g["a"][row // g["top_k"]]
                    out[row] = product * route[row] if g["mul_topk_weights"] else product
        return out

    def moe_sum(self, *arguments) -> None:
        self.calls.append("sum")
        s = bound("moe_sum", arguments)
        s["output"].copy_(s["input"].float().sum(dim=1))


class FakeC:
    """The one operator of `torch.ops._C` that is used."""

    def silu_and_mul_with_clamp(self, *arguments) -> None:
        s = bound("silu_and_mul_with_clamp", arguments)
        assert (s["alpha"], s["beta"]) == (1.0, 0.0)
        gate, up = s["input"].float().chunk(2, dim=-1)
        s["result"].copy_(reference.swiglu(gate, up, s["limit"]))
