"""`python -m bench.acceptance`: how often drafts are accepted, by head, through the served model.

Makes the original, RTN and GPTQ checkpoints as the demo does, and three controls from the last;
serves each and asks it the same held-out prompts greedily, one at a time. A run is a part of the
prompts that no other run has; heads and weights do not vary. Intervals are bootstraps over prompts.
Exit status 1: GPTQ below RTN or below its share of the original, or a control not clearly below.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from bench import metrics, provenance
from bench.checkpoints import RetrofitPlan, make_checkpoints
from bench.client import Client, RequestError
from bench.controls import Control, make_control
from bench.launch import Launcher, Retrofit, Service, StepError, launch_vllm, run_retrofit
from bench.measurement import Prompt, read_prompts
from bench.report import write_result
from bench.server import ServerError

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEMA_VERSION = 1
RESAMPLES = 10_000
CONFIDENCE = 0.95
LEAST_SHARE_OF_ORIGINAL = 0.95


class AcceptanceError(RuntimeError):
    """The measurement ran and a requirement does not hold."""


@dataclass(frozen=True)
class AcceptanceConfig:
    """What is measured. Prompts: runs x prompts_per_run, in the file's order."""

    profile: str = "cpu-tiny"
    model: Path = REPOSITORY / "tiny" / "checkpoint"
    prompts: Path = REPOSITORY / "tiny" / "acceptance.jsonl"
    runs: int = 24
    prompts_per_run: int = 8
    max_tokens: int = 96
    calibration_prompts: int = 256
    calibration_max_tokens: int = 64
    seed: int = 0
    start_timeout_s: float = 240.0
    work: Path = REPOSITORY / ".demo" / "acceptance"
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.runs < 5:
            raise ValueError(f"runs = {self.runs}; an interval needs at least 5")
        for name in ("prompts_per_run", "calibration_prompts", "calibration_max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; must be at least 1")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens = {self.max_tokens}; a draft needs at least 2")


@dataclass(frozen=True)
class Counts:
    """Drafted and accepted tokens of one prompt."""

    prompt_id: str
    num_draft_tokens: int
    num_accepted_tokens: int


def rate(counts: Sequence[Counts]) -> float:
    """Accepted over drafted tokens of all prompts together."""
    accepted = sum(c.num_accepted_tokens for c in counts)
    value = metrics.acceptance_rate(accepted, sum(c.num_draft_tokens for c in counts))
    if value is None:
        raise AcceptanceError("acceptance: nothing was drafted")
    return value


def bootstrap(
    statistic: Callable[[list[int]], float], size: int, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of a statistic of indices 0..size-1, drawn with replacement."""
    rng = random.Random(seed)
    values = sorted(statistic(rng.choices(range(size), k=size)) for _ in range(resamples))
    tail = (1 - CONFIDENCE) / 2
    return values[int(tail * resamples)], values[min(int((1 - tail) * resamples), resamples - 1)]


def head_summary(counts: Sequence[Counts], runs: int, seed: int) -> dict[str, Any]:
    """One head's entry in the result."""
    size = len(counts) // runs
    parts = [counts[i * size : (i + 1) * size] for i in range(runs)]
    low, high = bootstrap(lambda drawn: rate([counts[i] for i in drawn]), len(counts), seed)
    return {
        "acceptance_rate": rate(counts),
        "interval": [low, high],
        "acceptance_length": 1 + rate(counts),
        "runs": [rate(part) for part in parts],
        "prompts": [asdict(c) for c in counts],
    }


def compare(
    a: Sequence[Counts], b: Sequence[Counts], how: Callable[[float, float], float], seed: int
) -> dict[str, Any]:
    """A statistic of two heads over the same prompts, with its interval (paired)."""

    def statistic(drawn: Sequence[int]) -> float:
        return how(rate([a[i] for i in drawn]), rate([b[i] for i in drawn]))

    return {
        "value": statistic(range(len(a))),
        "interval": list(bootstrap(statistic, len(a), seed)),
    }


def judge(counts: dict[str, list[Counts]], seed: int) -> dict[str, Any]:
    """The comparisons that the requirements are about, and whether each holds.

    GPTQ is below RTN when the whole interval of the difference is below 0. Its share of the
    original counts by its lower end; a control is clearly below when the whole interval of its
    difference to GPTQ is.
    """
    gptq = counts["gptq"]
    entries = {
        "gptq - rtn": compare(gptq, counts["rtn"], lambda x, y: x - y, seed),
        "gptq / original": compare(gptq, counts["original"], lambda x, y: x / y, seed),
        "rtn / original": compare(counts["rtn"], counts["original"], lambda x, y: x / y, seed),
    }
    entries["gptq - rtn"]["holds"] = entries["gptq - rtn"]["interval"][1] >= 0
    share = entries["gptq / original"]
    share["holds"] = share["interval"][0] >= LEAST_SHARE_OF_ORIGINAL
    for control in Control:
        entry = compare(counts[control], gptq, lambda x, y: x - y, seed)
        entries[f"{control} - gptq"] = entry | {"holds": entry["interval"][1] < 0}
    return entries


async def ask(url: str, config: AcceptanceConfig, prompts: list[Prompt]) -> list[Counts]:
    """One prompt after the other, with the counters read in between."""
    counts = []
    async with aiohttp.ClientSession() as session:
        client = Client(session, url)
        model = await client.model_name()
        before = await client.counters()
        for prompt in prompts:
            await client.chat(model, prompt.text, config.max_tokens)
            now = await client.counters()
            moved = now.since(before)
            before = now
            if moved.num_draft_tokens is None or moved.num_accepted_tokens is None:
                raise AcceptanceError("acceptance: the server has no speculation counters")
            counts.append(Counts(prompt.id, moved.num_draft_tokens, moved.num_accepted_tokens))
    return counts


def load_prompts(config: AcceptanceConfig) -> list[Prompt]:
    """The prompts of all runs.

    Raises:
        AcceptanceError: fewer than that in the file.
    """
    prompts = read_prompts(config.prompts)
    count = config.runs * config.prompts_per_run
    if len(prompts) < count:
        raise AcceptanceError(f"acceptance: {config.prompts} holds {len(prompts)}; {count} needed")
    return prompts[:count]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(
    config: AcceptanceConfig, launch: Launcher = launch_vllm, retrofit: Retrofit = run_retrofit
) -> dict[str, Any]:
    """make checkpoints, controls -> serve and ask each -> judge -> write -> print.

    Raises:
        AcceptanceError: a requirement does not hold; after the result is written.
    """
    prompts = load_prompts(config)
    plan = RetrofitPlan(
        config.model, config.work, config.profile, config.calibration_prompts,
        config.calibration_max_tokens, config.start_timeout_s,
    )  # fmt: skip
    checkpoints: dict[str, Path] = dict(make_checkpoints(plan, launch, retrofit, say))
    del checkpoints["base"]
    for control in Control:
        target = plan.folder / control.replace(" ", "-")
        checkpoints[control] = make_control(checkpoints["gptq"], target, control)
    counts: dict[str, list[Counts]] = {}
    for number, (name, folder) in enumerate(checkpoints.items(), 1):
        say(f"{number}/{len(checkpoints)} {name}: starting the server")
        log = config.work / f"serve-{folder.name}.log"
        start = time.monotonic()
        with launch(Service(config.profile, folder, 1, log, config.start_timeout_s)) as url:
            counts[name] = asyncio.run(ask(url, config, prompts))
        seconds = time.monotonic() - start
        left = (len(checkpoints) - number) * seconds
        say(f"  {rate(counts[name]):.3f} after {seconds:.0f} s; about {left:.0f} s left")
    result = {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance.collect(REPOSITORY, config.model),
        "config": {
            name: provenance.recorded(value, REPOSITORY)
            for name, value in asdict(config).items()
            if name not in ("output", "work")
        },
        "what_varies_between_runs": "the held-out prompts: each run has its own",
        "interval": f"bootstrap over prompts, {CONFIDENCE:.0%}, {RESAMPLES} resamples",
        "checkpoints": {k: provenance.checkpoint_sha256(v) for k, v in checkpoints.items()},
        "heads": {k: head_summary(v, config.runs, config.seed) for k, v in counts.items()},
        "comparisons": judge(counts, config.seed),
    }
    output = config.output or default_output()
    write_result(output, result)
    table = render(result)
    output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    print(table)
    failed = [k for k, v in result["comparisons"].items() if not v.get("holds", True)]
    if failed:
        raise AcceptanceError(f"acceptance: does not hold: {', '.join(failed)}")
    return result


def default_output() -> Path:
    date = datetime.now(UTC).date().isoformat()
    return REPOSITORY / "results" / f"retrofit-acceptance-{date}.json"


def render(result: dict[str, Any]) -> str:
    """Two Markdown tables: heads, comparisons."""
    config = result["config"]
    lines = [
        f"{config['runs']} runs of {config['prompts_per_run']} held-out prompts, "
        f"{config['max_tokens']} tokens each, greedy, k = 1; intervals: {result['interval']}.",
        "",
        "| head | acceptance rate | interval | lowest and highest run |",
        "|---|---|---|---|",
    ]
    for name, head in result["heads"].items():
        low, high = head["interval"]
        lines.append(
            f"| {name} | {head['acceptance_rate']:.4f} | {low:.4f} to {high:.4f} "
            f"| {min(head['runs']):.3f}, {max(head['runs']):.3f} |"
        )
    lines += ["", "| comparison | value | interval | holds |", "|---|---|---|---|"]
    for name, entry in result["comparisons"].items():
        low, high = entry["interval"]
        holds = {True: "yes", False: "**no**"}.get(entry.get("holds"), "")
        lines.append(f"| {name} | {entry['value']:+.4f} | {low:+.4f} to {high:+.4f} | {holds} |")
    return "\n".join(lines)


def parse_config(argv: list[str] | None) -> AcceptanceConfig:
    """Build the configuration from the command line; a bad value ends with exit status 2."""
    default = AcceptanceConfig()
    parser = argparse.ArgumentParser(
        prog="python -m bench.acceptance", description=(__doc__ or "").partition("\n")[0]
    )
    for field in ("profile", "runs", "prompts_per_run", "max_tokens", "calibration_prompts",
                  "calibration_max_tokens", "seed", "start_timeout_s"):  # fmt: skip
        value = getattr(default, field)
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value)
    for field in ("model", "prompts", "work", "output"):
        parser.add_argument(f"--{field}", type=Path, default=getattr(default, field))
    try:
        return AcceptanceConfig(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return its exit status."""
    config = parse_config(argv)
    try:
        run(config)
    except (AcceptanceError, RequestError, ServerError, StepError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("acceptance: interrupted; the server was stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
