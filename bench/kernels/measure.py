"""One case, a batch size with a routing: check each arm's graph, then time them by turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.kernels import figures
from bench.kernels.arms import Arm, Separator
from bench.kernels.check import Checker, Verdict, require, run_once, step_to_compare
from bench.kernels.gpu import warm_up
from bench.kernels.problem import Batch, Layer, Shape, make_batch
from bench.kernels.routing import Routing, distinct, draw

MIN_STEPS = 24  # layers per replay for small batches: a replay's own start counts for little
SMALL_TOKENS = 64
LEAST_ROUNDS, MOST_ROUNDS, WARM_ROUNDS = 10, 60, 12
AGAIN = "again"  # ours a second time: its ratio to ours must be 1


@dataclass(frozen=True)
class Case:
    """What a row of the table is of."""

    tokens: int
    routing: Routing


@dataclass(frozen=True)
class Bench:
    """What all cases share."""

    gpu: Any
    shape: Shape
    layers: Sequence[Layer]
    ours: Arm
    baselines: Sequence[Arm]
    limit: float
    separator: bool
    seed: int


@dataclass
class Measured:
    """Microseconds per layer of every arm: by draw, then by round.

    experts: distinct ones per layer, of each step of each draw.
    warm: medians with one layer that stays in L2 if it fits.
    """

    case: Case
    arms: dict[str, list[list[float]]] = field(default_factory=dict)
    experts: list[list[int]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    warm: dict[str, float] = field(default_factory=dict)
    rotation_bytes: int | None = None


def order_for(tokens: int, num_layers: int) -> tuple[int, ...]:
    """The layers that a replay goes through: whole rotations."""
    rotations = 1 if tokens > SMALL_TOKENS else -(-MIN_STEPS // num_layers)
    return tuple(range(num_layers)) * rotations


def all_steps(arm: Arm, batch: Batch) -> Callable[[], None]:
    """A function that runs an arm through all steps of a batch."""
    step = arm.prepare(batch)

    def run() -> None:
        for i in range(batch.num_steps):
            step(i)

    return run


def routed_batch(
    bench: Bench, case: Case, seed: int, order: tuple[int, ...], separator: bool | None = None
) -> Batch:
    """A batch whose steps each have their own routing; a layer that comes again has another."""
    host = torch.Generator().manual_seed(seed)
    shape = bench.shape
    ids = [
        draw(case.routing, case.tokens, shape.num_experts, shape.top_k, host) for _ in order
    ]  # fmt: skip
    return _batch(bench, seed, order, torch.stack(ids), separator)


def _batch(
    bench: Bench,
    seed: int,
    order: tuple[int, ...],
    ids: torch.Tensor,
    separator: bool | None = None,
) -> Batch:
    device = bench.gpu.device
    generator = torch.Generator(device).manual_seed(seed)
    return make_batch(
        bench.shape,
        bench.layers,
        order,
        ids,
        device,
        generator,
        bench.separator if separator is None else separator,
    )


def measure(
    bench: Bench, case: Case, draws: int, seconds: Callable[[], float], extra: Sequence[Arm] = ()
) -> Measured:
    """Check and time one case.

    Args:
        seconds: how long the rounds of the next draw may take.
        extra: arms besides ours and the baselines; one that is wrong is left out of this case.
    Raises:
        WrongAnswer: an arm's graph does not compute the layer.
    """
    measured = Measured(case)
    order = order_for(case.tokens, len(bench.layers))
    for number in range(draws):
        seed = _seed(bench.seed, case, number)
        if number == 0:
            _measure_warm(bench, case, seed, [bench.ours, bench.baselines[0]], measured)
            bench.gpu.release()
        again = number == 0 and case.tokens <= SMALL_TOKENS and case.routing is Routing.UNIFORM
        batch = routed_batch(bench, case, seed, order)
        measured.seeds.append(seed)
        measured.experts.append(distinct(batch.ids.cpu()))
        _keep_rotation(bench, measured)
        _measure_draw(bench, batch, extra, again, seconds(), measured)
        bench.gpu.release()
    return measured


def _measure_draw(
    bench: Bench,
    batch: Batch,
    extra: Sequence[Arm],
    again: bool,
    seconds: float,
    measured: Measured,
) -> None:
    """Check and time one draw. What it allocates is gone when it returns."""
    checkers: dict[int, Checker] = {}  # one reference serves all arms
    names, graphs = [], []
    for arm in [bench.ours, *bench.baselines, *extra]:
        graph, verdict = _checked_graph(bench, arm, batch, checkers)
        measured.verdicts.append(verdict)
        if arm not in extra:
            require(verdict)
        if verdict.accepted:
            names.append(arm.name)
            graphs.append(graph)
    if again:
        names.append(AGAIN)
        graphs.append(bench.gpu.capture(all_steps(bench.ours, batch)))
    for name, rounds in zip(names, _time(bench, batch, graphs, seconds), strict=True):
        measured.arms.setdefault(name, []).append(rounds)


def _seed(seed: int, case: Case, number: int) -> int:
    kind = list(Routing).index(case.routing)
    return ((seed * 8 + number) * 8 + kind) * 65536 + case.tokens


def _keep_rotation(bench: Bench, measured: Measured) -> None:
    """Bytes of weights between two visits of a layer, the least over all of them."""
    count, experts = len(bench.layers), measured.experts[-1]
    least = min(sum(experts[i : i + count - 1]) for i in range(len(experts) - count + 2))
    num_bytes = least * bench.shape.expert_bytes
    before = measured.rotation_bytes
    measured.rotation_bytes = num_bytes if before is None else min(before, num_bytes)


def _checked_graph(
    bench: Bench, arm: Arm, batch: Batch, checkers: dict[int, Checker]
) -> tuple[Any, Verdict]:
    """Capture an arm and judge what the graph itself writes."""
    graph = bench.gpu.capture(all_steps(arm, batch))
    run_once(lambda: bench.gpu.replay(graph), batch)
    step = step_to_compare(batch)
    if step not in checkers:
        checkers[step] = Checker(batch, step, bench.limit)
    verdict = checkers[step].judge(arm.name, arm.interleaved, batch.outs[step], arm.factor)
    return graph, verdict


def _time(bench: Bench, batch: Batch, graphs: list[Any], seconds: float) -> list[list[float]]:
    """Rounds of all graphs by turns, in one order and then in the other."""
    gpu = bench.gpu
    every = [*graphs]
    if bench.separator:
        every.append(gpu.capture(all_steps(Separator(), batch)))
    round_us = warm_up(gpu, every)
    rounds = int(min(max(seconds * 1e6 / round_us, LEAST_ROUNDS), MOST_ROUNDS))
    return _rounds(gpu, every, rounds, bench.separator, batch.num_steps)


def _rounds(
    gpu: Any, every: list[Any], rounds: int, separator: bool, steps: int
) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in every]
    for number in range(rounds):
        order = list(range(len(every)))
        if number % 2:
            order.reverse()
        for i, us in zip(order, gpu.time_round([every[i] for i in order]), strict=True):
            times[i].append(us)
    alone = times.pop() if separator else None
    return [figures.per_layer(arm, alone, steps) for arm in times]


def _measure_warm(
    bench: Bench, case: Case, seed: int, arms: Sequence[Arm], measured: Measured
) -> None:
    """The same layer with the same routing over and over."""
    steps = len(order_for(case.tokens, len(bench.layers)))
    one = routed_batch(bench, case, seed, (0,))
    batch = _batch(bench, seed, (0,) * steps, one.ids.expand(steps, -1, -1).contiguous())
    every = [bench.gpu.capture(all_steps(arm, batch)) for arm in arms]
    if bench.separator:
        every.append(bench.gpu.capture(all_steps(Separator(), batch)))
    warm_up(bench.gpu, every)
    times = _rounds(bench.gpu, every, WARM_ROUNDS, bench.separator, steps)
    for arm, rounds in zip(arms, times, strict=True):
        measured.warm[arm.name] = figures.median(rounds)


def summarize(measured: Measured, shape: Shape, copy_gb_s: float) -> dict[str, Any]:
    """Return one case's entry in the result."""
    experts = [count for steps in measured.experts for count in steps]
    mean = sum(experts) / len(experts)
    tokens = measured.case.tokens
    num_bytes = mean * shape.expert_bytes + shape.batch_bytes(tokens)
    arms, ratios = {}, {}
    ours = measured.arms["ours"]
    for name, draws in measured.arms.items():
        if name != AGAIN and len(draws) < len(ours):
            continue  # an extra arm that was wrong in a draw
        us = figures.mean_of_medians(draws)
        rate = figures.gb_s(num_bytes, us)
        arms[name] = {
            "us": us,
            "us_p10": sum(figures.quantile(d, 0.1) for d in draws) / len(draws),
            "us_p90": sum(figures.quantile(d, 0.9) for d in draws) / len(draws),
            "gb_s": rate,
            "share_of_copy": rate / copy_gb_s,
            "rounds_us": [[round(us, 3) for us in rounds] for rounds in draws],
        }
        if name != "ours":
            # `again` has the first draw only.
            ratio = figures.speed_up(draws, ours[: len(draws)])
            ratios[name] = asdict(ratio)
    return {
        "tokens": tokens,
        "routing": measured.case.routing.value,
        "experts": mean,
        "bytes": num_bytes,
        "rotation_bytes": measured.rotation_bytes,
        "draws": [
            {"seed": seed, "experts": counts}
            for seed, counts in zip(measured.seeds, measured.experts, strict=True)
        ],
        "arms": arms,
        "ratios": ratios,
        "warm": measured.warm,
        "checks": [asdict(verdict) for verdict in measured.verdicts],
    }
