"""What is measured, read from the command line once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

# Decode and MTP verification, the edges of the kernels' tiles, then prefill.
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048)
MTP_TOKENS = 16  # MTP-like routing is measured up to here: verification of a few streams
INTER_SIZE = 2048  # of DeepSeek-V4-Flash, before tensor parallelism cuts it
MAX_MEMORY_BYTES = 36 << 30  # of weights


@dataclass(frozen=True)
class BenchConfig:
    """Sizes are DeepSeek-V4-Flash's by default.

    Attributes:
        tokens: batch sizes, ascending.
        tp: ranks that the experts' inner size is cut into.
        draws: independent routings per batch size, each with its own seed.
        separator: a small kernel before each layer that writes the ids, as a router does; its
            time is measured and taken off. Without it layers follow each other directly.
        budget_s: the timing loop fits into what this leaves of the whole run.
        marlin, vllm_c: vLLM's `_moe_C_stable_libtorch.abi3.so` and `_C_stable_libtorch.abi3.so`;
            None takes the installed vLLM's, where there is one.
        out: the result; a plot goes beside it. None: nothing is written.
        dispatch_table: where the measured choice of kernel is written.
        commit: recorded where the folder is no git checkout.
    Raises:
        ValueError: a value outside of what is said above.
    """

    tokens: tuple[int, ...] = TOKENS
    tp: int = 2
    hidden_size: int = 4096
    inter_size: int = 0  # 0: from tp
    num_experts: int = 256
    top_k: int = 6
    swiglu_limit: float = 10.0
    draws: int = 2
    seed: int = 0
    separator: bool = True
    budget_s: float = 90.0
    marlin: Path | None = None
    vllm_c: Path | None = None
    humming: bool = False
    breakdown: bool = True
    out: Path | None = None
    dispatch_table: Path | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        if not self.tokens or list(self.tokens) != sorted(set(self.tokens)) or self.tokens[0] < 1:
            raise ValueError(f"tokens = {self.tokens}; ascending numbers from 1 on are needed")
        if self.tp < 1 or INTER_SIZE % self.tp or INTER_SIZE // self.tp % 128:
            raise ValueError(f"tp = {self.tp}; it must divide {INTER_SIZE} into multiples of 128")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k = {self.top_k}; there are {self.num_experts} experts")
        if self.draws < 1:
            raise ValueError(f"draws = {self.draws}; at least 1 is needed")
        if self.budget_s <= 0:
            raise ValueError(f"budget_s = {self.budget_s}; seconds above 0 are needed")
        if not self.inter_size:
            object.__setattr__(self, "inter_size", INTER_SIZE // self.tp)


def parse_config(argv: list[str] | None) -> BenchConfig:
    """Build the configuration from the command line; a bad value ends with exit status 2."""
    default = BenchConfig()
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description="Time the W4A16 MoE layer: our kernels beside vLLM's Marlin, one GPU.",
    )
    parser.add_argument(
        "--tokens", type=_numbers, default=default.tokens, metavar="M,M,..", help="batch sizes"
    )
    parser.add_argument("--tp", type=int, default=default.tp, help="tensor-parallel ranks (2)")
    parser.add_argument("--draws", type=int, default=default.draws, help="routings per batch size")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--budget-s", type=float, default=default.budget_s, help="whole run")
    parser.add_argument(
        "--marlin", type=Path, metavar="SO", help="vLLM's _moe_C_stable_libtorch.abi3.so"
    )
    parser.add_argument(
        "--vllm-c", type=Path, metavar="SO", help="vLLM's _C_stable_libtorch.abi3.so (its SiLU)"
    )
    parser.add_argument(
        "--humming", action="store_true", help="Humming too; holds a second copy of the weights"
    )
    parser.add_argument(
        "--no-separator", dest="separator", action="store_false", help="layers back to back"
    )
    parser.add_argument(
        "--no-breakdown", dest="breakdown", action="store_false", help="no time per launch"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="the result, and .svg beside it")
    parser.add_argument("--dispatch-table", type=Path, metavar="JSON")
    parser.add_argument("--commit", help="recorded where this is no git checkout")
    try:
        return BenchConfig(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
