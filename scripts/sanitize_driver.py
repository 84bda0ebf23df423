"""Call every operator of `kernels/ops.py`, for compute-sanitizer to watch: one process per tool.

    python -m scripts.sanitize_driver all | short-output | unwritten-input | race LIB | barrier LIB

Inputs are made on the host and copied, so that the tools need to watch our kernels only: also
initcheck, to which a copy is a write. PYTORCH_NO_CUDA_MEMORY_CACHING=1 must be set: then each
tensor is an allocation of its own, of its own size, and what lies beyond it is nobody's. Results
are compared with the reference, so a case that ran is a case that computed. The others than `all`
hold one planted fault each, which their tool must find.

A line of JSON on standard output for the device, then one per case.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch

from kernels import ops, reference, tiled

NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"
LIMIT = 10.0
LARGEST_ERROR = 0.03  # of the largest value: says that it is the right product, not how exact


@dataclass(frozen=True)
class MoeCase:
    """Sizes of one MoE call."""

    num_tokens: int
    top_k: int = 2
    num_experts: int = 8
    hidden_size: int = 256
    inter_size: int = 128

    @property
    def name(self) -> str:
        """Named by its sizes."""
        sizes = f"hidden {self.hidden_size}, inter {self.inter_size}, {self.num_experts} experts"
        return f"moe_w4a16: {self.num_tokens} tokens, {sizes}, top {self.top_k}"


# Decode and its edge at 8 tokens; sorted batches of 8, 16 and 32 columns per pass; above 256 tokens
# rows are kept in BF16. Then DeepSeek-V4-Flash's sizes at TP 2, with a few of its experts.
MOE = (
    *(MoeCase(tokens) for tokens in (1, 3, 8, 9, 17, 64)),
    MoeCase(300, num_experts=5, hidden_size=128, inter_size=256),
    MoeCase(2, 6, 8, 4096, 1024),
    MoeCase(10, 6, 8, 4096, 1024),
)
# Rows, columns, k: with and without splits of k, one chunk of rows and several.
GEMM = ((1, 64, 128), (5, 192, 384), (33, 256, 512), (8, 128, 4096), (70, 64, 2048))
SILU = ((1, 128), (7, 1024))
NUM_CASES = len(MOE) + len(GEMM) + len(SILU)


def random_weight(g: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and scales as stored, shape (.., n, k); products stay near 1."""
    *experts, size_n, size_k = shape
    words = (*experts, size_n, size_k // 8)
    packed = torch.randint(-(2**31), 2**31, words, dtype=torch.int64, generator=g).int()
    groups = torch.rand(*experts, size_n, size_k // 128, generator=g) + 0.5
    return packed, (groups / (4.6 * math.sqrt(size_k))).bfloat16()


def routes(g: torch.Generator, case: MoeCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with what is legal and rare: skipped slots, ids outside, an expert named twice."""
    ids = torch.randint(0, case.num_experts, (case.num_tokens, case.top_k), generator=g).int()
    ids[-1, 0] = -1
    if case.num_tokens > 2:
        ids[1, 0] = case.num_experts
        ids[2] = 0
    weights = torch.rand(ids.shape, generator=g) + 0.1
    return ids, weights / weights.sum(-1, keepdim=True)


def moe_tensors(case: MoeCase) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Arguments of `ops.moe_w4a16` up to the scales, on the host, and the exact result."""
    g = torch.Generator().manual_seed(case.num_tokens)
    hidden = torch.randn(case.num_tokens, case.hidden_size, generator=g).bfloat16()
    w13, s13 = random_weight(g, case.num_experts, 2 * case.inter_size, case.hidden_size)
    w2, s2 = random_weight(g, case.num_experts, case.hidden_size, case.inter_size)
    ids, weights = routes(g, case)
    experts = reference.Experts(w13, s13, w2, s2)
    exact = reference.moe(hidden.double(), experts, ids, weights, LIMIT)
    tensors = [
        hidden,
        ids,
        weights,
        tiled.tile_weight(w13, gated=True),
        tiled.tile_scale(s13, gated=True),
        tiled.tile_weight(w2),
        tiled.tile_scale(s2),
    ]
    return tensors, exact


def run_moe(case: MoeCase) -> float:
    """Run a case and return its error."""
    tensors, exact = moe_tensors(case)
    return error(ops.moe_w4a16(*to_device(tensors), swiglu_limit=LIMIT), exact)


def run_gemm(size_m: int, size_n: int, size_k: int) -> float:
    """Run a product and return its error."""
    g = torch.Generator().manual_seed(size_m)
    a = torch.randn(size_m, size_k, generator=g).bfloat16()
    packed, scale = random_weight(g, size_n, size_k)
    exact = reference.gemm(a.double(), packed, scale)
    tensors = [a, tiled.tile_weight(packed), tiled.tile_scale(scale)]
    return error(ops.gemm_w4a16(*to_device(tensors)), exact)


def run_silu(num_rows: int, inter_size: int) -> float:
    """Run an activation and return its error."""
    g = torch.Generator().manual_seed(num_rows)
    gate_up = (6 * torch.randn(num_rows, 2 * inter_size, generator=g)).bfloat16()
    exact = reference.silu_interleaved(gate_up.double(), LIMIT)
    return error(ops.silu_interleaved(*to_device([gate_up]), swiglu_limit=LIMIT), exact)


def to_device(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies, each an allocation of its own."""
    return [tensor.to("cuda") for tensor in tensors]


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error over the largest value; NaN counts as infinite."""
    difference = (out.cpu().double() - exact).abs().max() / exact.abs().max()
    return math.inf if torch.isnan(difference) else float(difference)


def short_output() -> None:
    """Give the kernel an output with room for one of its 64 tokens."""
    case = MoeCase(64)
    tensors, _ = moe_tensors(case)
    tensors = to_device(tensors)
    sizes = (case.num_tokens, case.top_k, case.num_experts, case.hidden_size, case.inter_size)
    workspace = torch.empty(ops._moe_workspace_bytes(*sizes), dtype=torch.uint8, device="cuda")
    out = torch.empty(1, case.hidden_size, dtype=torch.bfloat16, device="cuda")
    pointers = [tensor.data_ptr() for tensor in (*tensors, out, workspace)]
    args = ops.MoeArgs(*pointers, *sizes, LIMIT)
    stream = torch.cuda.current_stream().cuda_stream
    ops._library().dsv4_moe(ctypes.byref(args), stream)
    torch.cuda.synchronize()


def unwritten_input() -> None:
    """Give the kernel activations that nothing was written to."""
    tensors, _ = moe_tensors(MoeCase(3))
    hidden, *others = to_device(tensors)
    ops.moe_w4a16(torch.empty_like(hidden), *others, swiglu_limit=LIMIT)
    torch.cuda.synchronize()


def planted(library: str, name: str) -> None:
    """Run a faulty kernel of a library that the caller has compiled."""
    out = torch.zeros(128, dtype=torch.int32).to("cuda")
    code = getattr(ctypes.CDLL(library), name)(ctypes.c_void_p(out.data_ptr()))
    if code:
        raise RuntimeError(f"{name}: CUDA error {code}")
    torch.cuda.synchronize()


def report(**line: Any) -> None:
    """Print a line of JSON."""
    print(json.dumps(line), flush=True)


def run_all() -> int:
    """Run every case; returns how many are wrong."""
    named = [(case.name, run_moe, (case,)) for case in MOE]
    named += [(f"gemm_w4a16: {m} x {n}, k {k}", run_gemm, (m, n, k)) for m, n, k in GEMM]
    named += [(f"silu_interleaved: {r} x {i}", run_silu, (r, i)) for r, i in SILU]
    wrong = 0
    for name, function, arguments in named:
        found = function(*arguments)
        wrong += found > LARGEST_ERROR
        report(case=name, error=found)
    return wrong


def main(argv: list[str]) -> int:
    """Run what is asked for; returns the exit status."""
    if os.environ.get(NO_CACHING) != "1":
        raise RuntimeError(f"{NO_CACHING} is not 1: PyTorch's cache would hide overruns")
    properties = torch.cuda.get_device_properties(0)
    report(device=properties.name, capability=f"{properties.major}.{properties.minor}",
           torch=torch.__version__, cuda=torch.version.cuda)  # fmt: skip
    what, *library = argv
    if what == "all":
        return 1 if run_all() else 0
    {
        "short-output": short_output,
        "unwritten-input": unwritten_input,
        "race": lambda: planted(*library, "planted_race"),
        "barrier": lambda: planted(*library, "planted_barrier"),
    }[what]()
    report(case=what)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
