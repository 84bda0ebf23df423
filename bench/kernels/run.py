"""The run: load -> make layers -> controls -> time every case -> break down -> report.

Exit status 1: an arm computes something else, a control that must fail passes, ours against itself
does not give 1, or something that is needed is not there.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import provenance
from bench.kernels import breakdown, controls, dispatch, figures, origin, report
from bench.kernels.check import WrongAnswer
from bench.kernels.config import MAX_MEMORY_BYTES, MTP_TOKENS, BenchConfig, parse_config
from bench.kernels.gpu import Gpu, Unavailable
from bench.kernels.measure import AGAIN, Bench, Case, all_steps, measure, routed_batch, summarize
from bench.kernels.problem import Layer, Shape, layers_needed, make_layers
from bench.kernels.routing import Routing
from bench.kernels.setup import HUMMING, MARLIN, MARLIN_OURS, Arms, make_arms, make_humming
from bench.report import write_result

SCHEMA_VERSION = 1
CONTROL_TOKENS = 3
BREAKDOWN_TOKENS = (1, 2, 4, 16, 64)
TAIL_S = 8.0  # copy bandwidth again, breakdown, files
TIMED_SHARE = 0.5  # of what is left for a draw; the rest is for capture and check
LEAST_S, MOST_S = 0.1, 1.0
OVERRUN_S = 20.0  # beyond the budget no case is begun; what was measured is not lost
# Issue: on an H100 at the TP 2 shape, helpers included.
TARGET_CAPABILITY, TARGET_TP = "9.0", 2
TARGET_RATIOS = {1: 1.7, 2: 1.4, 3: 1.25, 4: 1.25}
TARGET_SHARE = 0.7
TARGET_LEAST = 0.98


class Progress:
    """Lines on standard error with the time that is left, and the seconds for the next draw."""

    def __init__(self, budget_s: float, num_draws: int) -> None:
        self._start = time.monotonic()
        self._budget_s = budget_s
        self._draws_left = num_draws

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)

    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._start

    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return max(0.0, self._budget_s - self.elapsed_s())

    def is_over(self) -> bool:
        """Whether captures and checks took so long that nothing more is begun."""
        return self.elapsed_s() > self._budget_s + OVERRUN_S

    def next_draw_s(self) -> float:
        """Seconds of rounds for the next draw: an equal part of what is left."""
        share = (self.left_s() - TAIL_S) / max(1, self._draws_left)
        self._draws_left -= 1
        return min(max(TIMED_SHARE * share, LEAST_S), MOST_S)


def plan(config: BenchConfig) -> list[Case]:
    """What is measured, in this order."""
    cases = [Case(tokens, Routing.UNIFORM) for tokens in config.tokens]
    drafted = [tokens for tokens in config.tokens if 1 < tokens <= MTP_TOKENS]
    return cases + [Case(tokens, Routing.MTP) for tokens in drafted]


def run(
    config: BenchConfig,
    gpu: Any,
    make: Callable[[BenchConfig, Any], Arms],
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        keep: is given the result before the profiler runs, which can take the process with it.
    Returns:
        The result, ready to be written.
    Raises:
        WrongAnswer: an arm computes something else, or a control that must fail passes.
        Unavailable, ValueError: something that is needed is not there.
    """
    shape = Shape(config.hidden_size, config.inter_size, config.num_experts, config.top_k)
    cases = plan(config)
    progress = Progress(config.budget_s, config.draws * len(cases))
    arms = make(config, gpu)
    copies = [gpu.copy_gb_s()]
    progress.say(f"{gpu.info.name}: copy {copies[0]:.0f} GB/s, {config.budget_s:.0f} s in all")
    layers = _layers(config, gpu, shape, progress)
    humming, note = make_humming(config, gpu, shape, layers)
    bench = Bench(
        gpu, shape, layers, arms.ours, arms.baselines, config.swiglu_limit, config.separator,
        config.seed,
    )  # fmt: skip
    refused = _controls(bench, arms, progress)

    results: list[dict[str, Any]] = []
    for number, case in enumerate(cases, 1):
        if results and progress.is_over():
            break
        extra = [humming] if humming else []
        measured = measure(bench, case, config.draws, progress.next_draw_s, extra)
        entry = summarize(measured, shape, copies[0])
        results.append(entry)
        progress.say(_progress_line(number, len(cases), entry, progress))
    left_out = [f"{case.tokens} {case.routing.value}" for case in cases[len(results) :]]
    if left_out:
        arms.notes["left out, the budget was spent"] = ", ".join(left_out)
    copies.append(gpu.copy_gb_s())
    ratios = dispatch_ratios(results)
    table = dispatch.segments(ratios)
    for entry in results:
        add_dispatch(entry, table)
    result = {
        "schema_version": SCHEMA_VERSION,
        "provenance": origin.collect(gpu.info, arms.libraries, config.commit),
        "config": {
            name: provenance.recorded(value, origin.REPOSITORY)
            for name, value in asdict(config).items()
        },
        "shape": asdict(shape) | {"expert_bytes": shape.expert_bytes},
        "layers": {
            "count": len(layers),
            "bytes": shape.layer_bytes,
            "rotation_bytes": min(entry["rotation_bytes"] for entry in results),
        },
        "copy_gb_s": {"before": copies[0], "after": copies[1]},
        "controls": {
            "refused": [asdict(verdict) for verdict in refused],
            "again": {
                str(e["tokens"]): e["ratios"][AGAIN] for e in results if AGAIN in e["ratios"]
            },
        },
        "cases": results,
        "left_out": left_out,
        "dispatch": table,
        "breakdown": [],
        "targets": targets(results, gpu.info.capability, config.tp),
        "notes": arms.notes | {HUMMING: note},
        "peak_memory_bytes": gpu.peak_bytes(),
        "seconds": progress.elapsed_s(),
    }
    if config.breakdown:
        keep(result)
        result["breakdown"] = _breakdown(bench, config.tokens, arms, result["notes"])
        result["seconds"] = progress.elapsed_s()
    return result


def _layers(config: BenchConfig, gpu: Any, shape: Shape, progress: Progress) -> list[Layer]:
    count = layers_needed(shape, gpu.info.l2_bytes)
    needed, free = count * shape.layer_bytes, gpu.free_bytes()
    most = min(MAX_MEMORY_BYTES, int(0.85 * free))
    if needed > most:
        raise Unavailable(
            f"bench.kernels: {count} layers of {shape.layer_bytes / 2**30:.2f} GiB are needed to "
            f"keep weights out of L2; {most / 2**30:.1f} GiB may be used ({free / 2**30:.1f} free)"
        )
    generator = torch.Generator(gpu.device).manual_seed(config.seed)
    layers = make_layers(shape, count, gpu.device, generator)
    progress.say(f"{count} layers, {needed / 2**30:.1f} GiB of weights")
    return layers


def _controls(bench: Bench, arms: Arms, progress: Progress) -> list:
    order = tuple(range(min(2, len(bench.layers))))
    batch = routed_batch(bench, Case(CONTROL_TOKENS, Routing.UNIFORM), bench.seed, order, False)
    refused = controls.check_the_check(
        batch, arms.ours, arms.baselines[0], arms.broken, bench.limit
    )
    progress.say(f"controls: {len(refused)} wrong answers refused")
    return refused


def _progress_line(number: int, of: int, entry: dict[str, Any], progress: Progress) -> str:
    ours, marlin = entry["arms"]["ours"]["us"], entry["arms"][MARLIN]["us"]
    left = min(progress.left_s(), progress.elapsed_s() / number * (of - number) + TAIL_S)
    return (
        f"[{number:>2}/{of}] {entry['tokens']:>4} tokens, {entry['routing']:<7}: ours {ours:7.1f} "
        f"us, Marlin {marlin:7.1f} us, {marlin / ours:.2f} x; about {left:.0f} s left"
    )


def dispatch_ratios(results: list[dict[str, Any]]) -> dict[int, float]:
    """Marlin's time over ours by tokens, of Marlin over our w13: what the dispatcher can take."""
    return {
        entry["tokens"]: entry["ratios"][MARLIN_OURS]["ratio"]
        for entry in results
        if entry["routing"] == Routing.UNIFORM.value
    }


def add_dispatch(entry: dict[str, Any], table: list[dict[str, Any]]) -> None:
    """Say in a case which kernel serves it, and how it then stands to vLLM's Marlin."""
    entry["serves"] = dispatch.lookup(table, entry["tokens"])
    taken = "ours" if entry["serves"] == dispatch.OURS else MARLIN_OURS
    entry["dispatched_ratio"] = entry["arms"][MARLIN]["us"] / entry["arms"][taken]["us"]


def targets(results: list[dict[str, Any]], capability: str, tp: int) -> list[dict[str, Any]]:
    """The issue's targets, where they apply and what they are of was measured."""
    if (capability, tp) != (TARGET_CAPABILITY, TARGET_TP):
        return []
    uniform = {e["tokens"]: e for e in results if e["routing"] == Routing.UNIFORM.value}
    rows = []

    def add(what: str, wanted: float, reached: float) -> None:
        rows.append({"what": what, "wanted": wanted, "reached": reached, "met": reached >= wanted})

    for tokens, wanted in TARGET_RATIOS.items():
        if entry := uniform.get(tokens):
            share = entry["arms"]["ours"]["share_of_copy"]
            ratio = entry["ratios"][MARLIN]["ratio"]
            add(f"{wanted} x Marlin at {tokens} tokens", wanted, ratio)
            add(f"{TARGET_SHARE:.0%} of copy bandwidth at {tokens} tokens", TARGET_SHARE, share)
    least = min(entry["dispatched_ratio"] for entry in results)
    add(f"after dispatch never below {TARGET_LEAST} x Marlin", TARGET_LEAST, least)
    return rows


def _breakdown(
    bench: Bench, tokens_measured: Sequence[int], arms: Arms, notes: dict[str, str]
) -> list[dict[str, Any]]:
    """Launches of ours and of Marlin. Last, because the profiler slows what comes after it."""
    entries = []
    for tokens in (size for size in tokens_measured if size in BREAKDOWN_TOKENS):
        order = tuple(range(len(bench.layers)))
        batch = routed_batch(bench, Case(tokens, Routing.UNIFORM), bench.seed, order)
        for arm in (arms.ours, arms.baselines[0]):
            try:
                rows = breakdown.profile(bench.gpu, all_steps(arm, batch), batch.num_steps)
            except RuntimeError as error:
                notes["breakdown"] = str(error).splitlines()[0]
                return entries
            launches = [asdict(row) for row in rows]
            entries.append({"tokens": tokens, "arm": arm.name, "launches": launches})
    return entries


def require_again(result: dict[str, Any]) -> None:
    """Refuse a run in which ours against ours is not 1.

    Raises:
        WrongAnswer: it is not.
    """
    for tokens, ratio in result["controls"]["again"].items():
        if not figures.is_one(figures.Ratio(**ratio)):
            raise WrongAnswer(
                f"timing control: at {tokens} tokens ours took {ratio['ratio']:.3f} times as long "
                f"as itself ({ratio['low']:.3f}-{ratio['high']:.3f}); the times mean nothing"
            )


def write(config: BenchConfig, result: dict[str, Any]) -> None:
    """Write the result and its plot, where they are asked for."""
    if config.out is not None:
        write_result(config.out, result)
        _write_text(config.out.with_suffix(".svg"), report.plot(result))


def write_dispatch(config: BenchConfig, result: dict[str, Any]) -> None:
    """Write the dispatch table, where it is asked for.

    Raises:
        ValueError: the file that is there is of another device, or a batch size was left out.
    """
    if config.dispatch_table is not None:
        if missing := [name for name in result["left_out"] if name.endswith(Routing.UNIFORM.value)]:
            raise ValueError(
                f"--dispatch-table {config.dispatch_table}: not written, for want of "
                f"{', '.join(missing)}; give more than --budget-s {config.budget_s:g}"
            )
        where = result["provenance"]
        dispatch.write_table(
            config.dispatch_table,
            where["device"],
            where["capability"],
            Shape(**{name: result["shape"][name] for name in Shape.__dataclass_fields__}),
            dispatch_ratios(result["cases"]),
            {name: where[name] for name in ("commit", "dirty", "kernel_sources_sha256", "date")},
        )


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Run and return the exit status."""
    config = parse_config(argv)
    try:
        result = run(config, Gpu(), make_arms, keep=functools.partial(write, config))
        print(report.render(result))
        write(config, result)
        require_again(result)
        write_dispatch(config, result)
    except (WrongAnswer, Unavailable, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{result['seconds']:.0f} s, {result['peak_memory_bytes'] / 2**30:.1f} GiB at most")
    return 0
