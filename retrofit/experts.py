"""Policy for routed experts: which GPTQ or rounding each projection of each expert gets.

Order: w1 and w3 share their inputs and their Hessian; w2's inputs are computed from the quantized
w1 and w3, with the model's clamp, so that w2 is fitted to what it will be given.

Part of an expert's rows is held out. Candidates are compared by their output error there:
rounding to nearest (absmax and searched scales), GPTQ with several dampings, and, where rows are
few, GPTQ with its Hessian blended with that of all tokens. A tensor is therefore never worse than
rounding to nearest on the held-out rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
import torch.nn.functional as F

from kernels.formats import INT4_GROUP
from retrofit import gptq

PROJECTIONS = ("w1", "w2", "w3")
LONGEST_RUN = 32  # rows of one expert; a text of 500 tokens gives it about 12
FEWEST_RUNS = 8


class Scale(StrEnum):
    """How the scales of a group are chosen before GPTQ rounds."""

    ABSMAX = "absmax"
    MSE = "mse"


class Method(StrEnum):
    RTN = "rtn"  # absmax scales: what compressed-tensors does without data
    RTN_MSE = "rtn-mse"
    GPTQ = "gptq"


@dataclass(frozen=True)
class Settings:
    """What the choice depends on, besides weights and rows.

    GPTQ is tried with `percdamp` and with the dampings of `ladder`. An input width `in` has few
    rows below `few_rows_factor * in`; then the blends of `blends` are tried too. Below `min_rows`
    there is no GPTQ.
    `route_weight_in_h2`: w2's inputs are multiplied by the route weight, as DeepSeek's own forward
    does before w2, so that rows count as much as they do in the layer's output.
    """

    swiglu_limit: float | None
    percdamp: float = 0.01
    ladder: tuple[float, ...] = (0.1, 1.0)
    blends: tuple[float, ...] = (0.1, 0.5)
    scale: Scale = Scale.MSE
    activation_order: bool = True
    route_weight_in_h2: bool = True
    min_rows: int = 64
    few_rows_factor: int = 2
    held_out_every: int = 8
    held_out_most: int = 1024
    solve_batch: int = 1
    group_size: int = INT4_GROUP

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", Scale(self.scale))
        # NaN compares as false, and is refused.
        if not (self.percdamp > 0 and all(value > self.percdamp for value in self.ladder)):
            raise ValueError(
                f"percdamp = {self.percdamp}, ladder = {self.ladder}; percdamp must be positive "
                "and the ladder above it"
            )
        if any(not 0 < value <= 1 for value in self.blends):
            raise ValueError(f"blends = {self.blends}; each must be in (0, 1]")
        if self.group_size != INT4_GROUP:
            raise ValueError(f"group_size = {self.group_size}; the layout has {INT4_GROUP}")
        if self.held_out_every < 2 or self.min_rows < self.held_out_every:
            raise ValueError(
                f"held_out_every = {self.held_out_every}, min_rows = {self.min_rows}; at least 2, "
                "and min_rows at least held_out_every"
            )
        if self.solve_batch < 1 or self.held_out_most < 1 or self.few_rows_factor < 1:
            raise ValueError("solve_batch, held_out_most and few_rows_factor must be positive")


@dataclass(frozen=True)
class Expert:
    """One expert's weights float32 (out, in), inputs bf16 (n, hidden), route weights f32 (n)."""

    number: int
    weights: dict[str, torch.Tensor]
    rows: torch.Tensor
    route: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """What one tensor became and why.

    error, rtn_error: relative squared output error on the held-out rows of the choice and of
        rounding to nearest; None where too few rows were there to hold any out.
    weight_error: relative squared error against the source's own (FP4) values.
    """

    method: Method
    percdamp: float | None
    blend: float | None
    num_rows: int
    num_held_out_rows: int
    error: float | None
    rtn_error: float | None
    weight_error: float


@dataclass(frozen=True)
class Quantized:
    """codes int8 (out, in), scale bfloat16 (out, groups)."""

    codes: torch.Tensor
    scale: torch.Tensor
    choice: Choice

    def values(self) -> torch.Tensor:
        return gptq.dequantize(self.codes, self.scale)


class Sample:
    """Rows over all tokens, bf16 (k, in), and their Hessian, computed when first asked for."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    @cached_property
    def hessian(self) -> torch.Tensor:
        return gptq.hessian(self.rows)


@dataclass(frozen=True)
class _Problem:
    """A matrix of one expert: several projections on top of each other, with the same inputs."""

    expert: int
    parts: tuple[str, ...]
    weight: torch.Tensor  # float32 (out, in)
    fit: torch.Tensor  # bf16 (n, in)
    held_out: torch.Tensor  # bf16 (m, in)
    shared: Sample | None  # all tokens' rows, for the blend; None where rows are not few


def quantize_experts(
    experts: Sequence[Expert], sample: Sample, settings: Settings
) -> list[dict[str, Quantized]]:
    """w1, w2, w3 of each expert.

    Args:
        experts: on the device that computes.
        sample: of the layer's inputs, same device.
        settings: see there.
    Returns:
        per expert, by projection. The result depends on this call's arguments only.
    Raises:
        ValueError: a Hessian cannot be inverted; the message names the expert.
    """
    first = _solve([_first(e, sample, settings) for e in experts], settings)
    second_problems = []
    for expert, done in zip(experts, first, strict=True):
        second_problems.append(_second(expert, done, sample, settings))
    second = _solve(second_problems, settings)
    return [
        {name: (a | b)[name] for name in PROJECTIONS} for a, b in zip(first, second, strict=True)
    ]


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), in float32."""
    gate, up = gate.float(), up.float()
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def held_out_mask(num_rows: int, settings: Settings) -> torch.Tensor:
    """bool (n): one in held_out_every runs of neighbours, fewer where that gives held_out_most.

    Rows stand in order of capture, and neighbours come from the same text: rows held out one by
    one would be nearly known from those on both sides, which favours too little damping.
    """
    if num_rows < settings.min_rows:
        return torch.zeros(num_rows, dtype=torch.bool)
    every = max(settings.held_out_every, -(-num_rows // settings.held_out_most))
    run = max(1, min(LONGEST_RUN, num_rows // (every * FEWEST_RUNS)))
    return torch.arange(num_rows) // run % every == every - 1


def _first(expert: Expert, sample: Sample, settings: Settings) -> _Problem:
    mask = held_out_mask(len(expert.rows), settings).to(expert.rows.device)
    weight = torch.cat([expert.weights["w1"], expert.weights["w3"]])
    fit, held_out = expert.rows[~mask], expert.rows[mask]
    return _Problem(expert.number, ("w1", "w3"), weight, fit, held_out, sample)


def _second(
    expert: Expert, done: dict[str, Quantized], sample: Sample, settings: Settings
) -> _Problem:
    w1, w3 = done["w1"].values(), done["w3"].values()

    def inner(rows: torch.Tensor, route: torch.Tensor | float) -> torch.Tensor:
        parts = []
        for part in rows.split(gptq.ROWS_AT_ONCE):
            gate, up = gptq.product(part, w1), gptq.product(part, w3)
            parts.append(swiglu(gate, up, settings.swiglu_limit).bfloat16())
        result = torch.cat(parts) if parts else rows.new_empty(0, len(w1))
        return result if isinstance(route, float) else (result.float() * route[:, None]).bfloat16()

    weighted = settings.route_weight_in_h2
    values = inner(expert.rows, expert.route if weighted else 1.0)
    mask = held_out_mask(len(values), settings).to(values.device)
    shared = None
    if len(values) and _has_few_rows(int((~mask).sum()), len(w1), settings):
        # All tokens, through this expert: its inner units mean nothing in another expert.
        route = expert.route.square().mean().sqrt().expand(len(sample.rows))
        shared = Sample(inner(sample.rows, route if weighted else 1.0))
    return _Problem(
        expert.number, ("w2",), expert.weights["w2"], values[~mask], values[mask], shared
    )


def _has_few_rows(num_rows: int, in_features: int, settings: Settings) -> bool:
    return num_rows < settings.few_rows_factor * in_features


@dataclass(frozen=True)
class _Candidate:
    percdamp: float
    blend: float | None = None


def _candidates(problem: _Problem, settings: Settings) -> list[_Candidate]:
    total = len(problem.fit) + len(problem.held_out)
    if total < settings.min_rows:
        return []
    candidates = [_Candidate(value) for value in (settings.percdamp, *settings.ladder)]
    if _has_few_rows(len(problem.fit), problem.weight.shape[1], settings):
        candidates += [_Candidate(settings.percdamp, value) for value in settings.blends]
    return candidates


class _Best:
    """The best candidate so far, for each part of one problem."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.weights = dict(
            zip(problem.parts, problem.weight.chunk(len(problem.parts)), strict=True)
        )
        self.found: dict[str, tuple[float, Method, _Candidate | None, torch.Tensor]] = {}
        self.scales: dict[str, torch.Tensor] = {}
        self.rtn_error: dict[str, float] = {}

    def offer(
        self,
        method: Method,
        candidate: _Candidate | None,
        codes: torch.Tensor,
        scale: torch.Tensor,
    ) -> None:
        """Compare by held-out output error; without held-out rows, by weight error."""
        count = len(self.problem.parts)
        for name, part, part_scale in zip(
            self.problem.parts, codes.chunk(count), scale.chunk(count), strict=True
        ):
            weight = self.weights[name]
            values = gptq.dequantize(part, part_scale)
            if len(self.problem.held_out):
                error = gptq.output_error(weight, values, self.problem.held_out)
            else:
                error = _weight_error(weight, values)
            if method == Method.RTN:
                self.rtn_error[name] = error
            if name not in self.found or error < self.found[name][0]:
                # A copy, so that the rejected half of the matrix is not kept alive.
                self.found[name] = (error, method, candidate, part.clone())
                self.scales[name] = part_scale.clone()

    def results(self) -> dict[str, Quantized]:
        problem = self.problem
        held_out = len(problem.held_out)
        results = {}
        for name, (error, method, candidate, codes) in self.found.items():
            scale = self.scales[name]
            choice = Choice(
                method=method,
                percdamp=candidate.percdamp if candidate else None,
                blend=candidate.blend if candidate else None,
                num_rows=len(problem.fit) + held_out,
                num_held_out_rows=held_out,
                error=error if held_out else None,
                rtn_error=self.rtn_error[name] if held_out else None,
                weight_error=_weight_error(self.weights[name], gptq.dequantize(codes, scale)),
            )
            results[name] = Quantized(codes, scale, choice)
        return results


def _weight_error(weight: torch.Tensor, values: torch.Tensor) -> float:
    whole = float(weight.square().sum())
    wrong = float((weight - values).square().sum())
    return wrong / whole if whole else wrong


def _solve(problems: Sequence[_Problem], settings: Settings) -> list[dict[str, Quantized]]:
    """Offer every candidate of every problem, GPTQ in batches of solve_batch."""
    bests = [_Best(problem) for problem in problems]
    waiting: list[tuple[int, _Candidate, torch.Tensor, torch.Tensor]] = []

    def run() -> None:
        if not waiting:
            return
        numbers, candidates, hessians, scales = zip(*waiting, strict=True)
        weight = torch.stack([problems[i].weight for i in numbers])
        scale = torch.stack(scales)
        names = ", ".join(f"expert {problems[i].expert} {problems[i].parts}" for i in numbers)
        try:
            codes = gptq.quantize(weight, torch.stack(hessians), scale, settings.activation_order)
        except ValueError as error:
            raise ValueError(f"{names}: {error}") from error
        for i, candidate, part, part_scale in zip(numbers, candidates, codes, scale, strict=True):
            bests[i].offer(Method.GPTQ, candidate, part, part_scale)
        waiting.clear()

    for number, (problem, best) in enumerate(zip(problems, bests, strict=True)):
        absmax = gptq.absmax_scale(problem.weight, settings.group_size)
        best.offer(Method.RTN, None, gptq.round_to_nearest(problem.weight, absmax), absmax)
        searched = gptq.mse_scale(problem.weight, None, settings.group_size)
        best.offer(Method.RTN_MSE, None, gptq.round_to_nearest(problem.weight, searched), searched)
        candidates = _candidates(problem, settings)
        if not candidates:
            continue
        own = gptq.hessian(problem.fit)
        scale = absmax
        if settings.scale == Scale.MSE:
            scale = gptq.mse_scale(problem.weight, own.diagonal(), settings.group_size)
        for candidate in candidates:
            mixed = own
            if candidate.blend is not None and problem.shared is not None:
                mixed = torch.lerp(own, problem.shared.hessian, candidate.blend)
            waiting.append((number, candidate, gptq.damped(mixed, candidate.percdamp), scale))
            if len(waiting) == settings.solve_batch:
                run()
    run()
    return [best.results() for best in bests]
