#!/usr/bin/env python3
"""Time and memory of GPTQ on a full-size MTP block with synthetic weights and calibration rows.

    python scripts/gptq_full_size.py --device cuda --out result.json

The block has DeepSeek-V4-Flash's sizes: 256 experts, hidden 4096, intermediate 2048, FP4 weights.
The rows are correlated and have outlier channels, as residual streams do; the load is as skewed as
the reference calibration's (473k tokens, top 6, the least used expert 430, the most used 175,000).
Quantized is with the code that `retrofit mtp` runs. Needs torch, safetensors and numpy only.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from kernels.formats import dequantize_fp4, quantize_fp4  # noqa: E402
from retrofit.experts import (  # noqa: E402
    PROJECTIONS,
    Expert,
    Quantized,
    Sample,
    Settings,
    quantize_experts,
)

ROWS_AT_ONCE = 16384
RANK = 256  # of the correlated part of the rows
OUTLIER_EVERY = 512  # one channel in so many is OUTLIER_GAIN times as large
OUTLIER_GAIN = 20.0
SWIGLU_LIMIT = 10.0


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of the block and of the run."""

    experts: int = 256
    hidden: int = 4096
    inter: int = 2048
    topk: int = 6
    rows: int = 473_000
    min_load: int = 430
    max_load: int = 175_000
    run_experts: int | None = None
    experts_per_step: int = 4
    solve_batch: int = 8
    sample_rows: int = 8192
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        mean = self.rows * self.topk / self.experts
        if not self.min_load < mean < self.max_load <= self.rows:
            raise ValueError(
                f"min_load = {self.min_load}, max_load = {self.max_load}; the mean load "
                f"{mean:.0f} must lie between, and max_load must not pass rows = {self.rows}"
            )


def expert_loads(config: BlockConfig) -> list[int]:
    """Rows of each expert: min_load to max_load, log-spaced along a power that gives the sum."""
    total = config.rows * config.topk
    span = math.log(config.max_load / config.min_load)
    places = [i / (config.experts - 1) for i in range(config.experts)]

    def loads(power: float) -> list[int]:
        return [round(config.min_load * math.exp(span * p**power)) for p in places]

    low, high = 0.01, 100.0
    for _ in range(100):
        power = math.sqrt(low * high)
        low, high = (power, high) if sum(loads(power)) > total else (low, power)
    result = loads(high)
    middle = config.experts // 2
    while (rest := total - sum(result)) != 0:  # rounding, spread over the middle
        for i in range(middle, middle + min(abs(rest), config.experts // 4)):
            result[i] += 1 if rest > 0 else -1
    return result


def expert_rows(
    config: BlockConfig, loads: list[int], generator: torch.Generator
) -> list[torch.Tensor]:
    """Row numbers of each expert: every row has exactly topk distinct experts."""
    device = generator.device
    order = torch.randperm(config.rows, generator=generator, device=device)
    starts = [0]
    for load in loads:
        starts.append(starts[-1] + load)
    return [
        order[torch.arange(a, b, device=device) % config.rows].sort().values
        for a, b in zip(starts, starts[1:], strict=False)
    ]


def make_rows(config: BlockConfig, generator: torch.Generator) -> torch.Tensor:
    """bf16 (rows, hidden): a decaying low-rank part, noise, and outlier channels."""
    device = generator.device
    rank = min(RANK, config.hidden // 2)
    decay = torch.arange(1, rank + 1, device=device).float() ** -0.5
    mix = torch.randn(rank, config.hidden, generator=generator, device=device) * decay[:, None]
    gain = torch.ones(config.hidden, device=device)
    gain[:: min(OUTLIER_EVERY, config.hidden // 2)] = OUTLIER_GAIN
    out = torch.empty(config.rows, config.hidden, dtype=torch.bfloat16, device=device)
    for part in out.split(ROWS_AT_ONCE):
        low = torch.randn(len(part), rank, generator=generator, device=device) @ mix
        noise = torch.randn(part.shape, generator=generator, device=device)
        part.copy_((low + 0.5 * noise) * gain * 0.3)
    return out


def make_weights(
    config: BlockConfig, generator: torch.Generator
) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Packed FP4 and E8M0 scale of each expert's projections."""
    shapes = {
        "w1": (config.inter, config.hidden),
        "w2": (config.hidden, config.inter),
        "w3": (config.inter, config.hidden),
    }
    return [
        {
            name: quantize_fp4(
                torch.randn(shape, generator=generator, device=generator.device) * shape[1] ** -0.5
            )
            for name, shape in shapes.items()
        }
        for _ in range(config.run_experts or config.experts)
    ]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def summary(results: list[dict[str, Quantized]]) -> dict[str, object]:
    """What was chosen, and the mean held-out error beside that of rounding to nearest."""
    figures: dict[str, object] = {}
    for name in PROJECTIONS:
        choices = [r[name].choice for r in results]
        scored = [c for c in choices if c.error is not None and c.rtn_error]
        figures[name] = {
            "methods": dict(Counter(str(c.method) for c in choices)),
            "percdamp": dict(Counter(str(c.percdamp) for c in choices)),
            "blend": dict(Counter(str(c.blend) for c in choices)),
            "mean_error": sum(c.error for c in scored) / max(len(scored), 1),
            "mean_rtn_error": sum(c.rtn_error for c in scored) / max(len(scored), 1),
            "worst_ratio_to_rtn": max((c.error / c.rtn_error for c in scored), default=None),
        }
    return figures


def run(config: BlockConfig, out: Path | None, commit: str | None) -> dict[str, object]:
    """make weights and rows -> quantize step by step -> report."""
    generator = torch.Generator(config.device).manual_seed(config.seed)
    started = time.perf_counter()
    loads = expert_loads(config)
    rows_of = expert_rows(config, loads, generator)
    weights = make_weights(config, generator)
    hidden = make_rows(config, generator)
    route = torch.rand(max(loads), generator=generator, device=config.device) * 0.5
    synchronize(config.device)
    setup_s = time.perf_counter() - started
    print(f"setup: {setup_s:.1f} s; loads {min(loads)} to {max(loads)}", flush=True)

    settings = Settings(swiglu_limit=SWIGLU_LIMIT, solve_batch=config.solve_batch)
    started = time.perf_counter()
    results: list[dict[str, Quantized]] = []
    every = max(1, config.rows // config.sample_rows)
    sample = Sample(hidden[::every][: config.sample_rows])
    report: dict[str, object] = {}
    for first in range(0, len(weights), config.experts_per_step):
        numbers = range(first, min(first + config.experts_per_step, len(weights)))
        experts = [
            Expert(
                number,
                {name: dequantize_fp4(*weights[number][name]) for name in PROJECTIONS},
                hidden[rows_of[number]],
                route[: loads[number]],
            )
            for number in numbers
        ]
        for result in quantize_experts(experts, sample, settings):
            results.append(
                {
                    name: Quantized(q.codes.cpu(), q.scale.cpu(), q.choice)
                    for name, q in result.items()
                }
            )
        del experts
        synchronize(config.device)
        elapsed = time.perf_counter() - started
        report = {
            "schema_version": 1,
            "what": "GPTQ of one MTP block, synthetic weights and rows",
            "config": asdict(config),
            "settings": asdict(settings),
            "num_experts_done": len(results),
            "num_tensors_done": len(results) * len(PROJECTIONS),
            "setup_s": round(setup_s, 2),
            "quantize_s": round(elapsed, 2),
            "peak_device_bytes": torch.cuda.max_memory_allocated()
            if config.device.startswith("cuda")
            else None,
            "peak_reserved_device_bytes": torch.cuda.max_memory_reserved()
            if config.device.startswith("cuda")
            else None,
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "loads": loads[: len(results)],
            "figures": summary(results),
            "provenance": provenance(config.device, commit),
        }
        print(f"{len(results)} of {len(weights)} experts, {elapsed:.1f} s", flush=True)
        if out is not None:
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def provenance(device: str, commit: str | None) -> dict[str, object]:
    """Where the figures come from."""
    if commit is None:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        commit = done.stdout.strip() or None
    cuda = device.startswith("cuda")
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "command": " ".join(Path(a).name if "/" in a else a for a in sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gptq_full_size", description=__doc__.split("\n")[0])
    for name in BlockConfig.__dataclass_fields__:
        default = getattr(BlockConfig, name)
        kind = int if default is None else type(default)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default)
    parser.add_argument("--out", type=Path, help="JSON, written after each step")
    parser.add_argument("--memory-cap-gb", type=float, help="more of the card than this is refused")
    parser.add_argument("--commit", help="recorded; asked from git when absent")
    options = vars(parser.parse_args(argv))
    out, commit, cap_gb = (options.pop(name) for name in ("out", "commit", "memory_cap_gb"))
    try:
        config = BlockConfig(**options)
    except ValueError as error:
        parser.error(str(error))
    if cap_gb is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * 1e9 / total))
    with torch.inference_mode():
        report = run(config, out, commit)
    print(json.dumps({k: report[k] for k in report if k not in ("loads", "settings")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
