"""`python -m bench.demo`: an MTP head lost and put back, and what it is worth, on this CPU.

Takes the tiny checkpoint's head away, puts it back rounded to nearest, captures what its experts
see from the running server, quantizes the head with GPTQ and verifies it. Then serves the base
without MTP, both heads, and the original, and asks each the same held-out prompts greedily. On one
trunk the answers must be the same; they may part where the two best tokens are closer than that
gap's own noise, which is measured. Exit status 1: a step or a server failed, answers differ beyond
that, or no drafted token of a head was accepted.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp

from bench import provenance
from bench.checkpoints import RetrofitPlan, make_checkpoints
from bench.client import Client, RequestError
from bench.launch import Launcher, Retrofit, Service, StepError, launch_vllm, run_retrofit
from bench.measurement import Difference, Measurement, Prompt, find_differences, read_prompts
from bench.near_ties import GapStudy, study_gaps, with_gaps
from bench.report import render_sample, render_table, summarize, write_result
from bench.server import ServerError

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEMA_VERSION = 1
WARM_UP_PROMPTS = 2
STUDY_CONCURRENCY = 4  # another batch shape than one request at a time


class DemoError(RuntimeError):
    """The demo ran and did not show what it must."""


@dataclass(frozen=True)
class DemoConfig:
    """What is asked of whom. Counts are of measured requests; warm-up comes on top.

    calibration_*: prompts that `retrofit capture` sends, and tokens of each answer at most.
    """

    profile: str = "cpu-tiny"
    model: Path = REPOSITORY / "tiny" / "checkpoint"
    prompts: Path = REPOSITORY / "tiny" / "heldout.jsonl"
    num_prompts: int = 8
    max_tokens: int = 96
    num_speculative_tokens: int = 1
    calibration_prompts: int = 128
    calibration_max_tokens: int = 32
    start_timeout_s: float = 240.0
    output: Path = REPOSITORY / ".demo"

    def __post_init__(self) -> None:
        for name in ("num_prompts", "calibration_prompts", "calibration_max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; must be at least 1")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens = {self.max_tokens}; a rate needs at least 2")
        if not 1 <= self.num_speculative_tokens <= 3:
            raise ValueError(
                f"num_speculative_tokens = {self.num_speculative_tokens}; must be in 1..3"
            )


@dataclass(frozen=True)
class Variant:
    """One row of the table. trunk: rows with the same one must give the same text."""

    name: str
    checkpoint: str
    num_speculative_tokens: int
    trunk: str = "base"


def variants(config: DemoConfig) -> list[Variant]:
    """Return what is served, the one without MTP first."""
    k = config.num_speculative_tokens
    return [
        Variant(f"{config.profile} (no MTP)", "base", 0),
        Variant(f"{config.profile} MTP k={k}, RTN head", "rtn", k),
        Variant(f"{config.profile} MTP k={k}, GPTQ head", "gptq", k),
        Variant(f"{config.profile} MTP k={k}, original", "original", k, trunk="original"),
    ]


class Progress:
    """Lines on standard error, with the time that is left once a request has been timed."""

    def __init__(self, num_requests: int) -> None:
        self._left = num_requests
        self._done = 0
        self._spent_s = 0.0

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)

    def request_done(self, name: str, number: int, of: int, seconds: float) -> None:
        """Count one request and print how far the demo is."""
        self._left -= 1
        self._done += 1
        self._spent_s += seconds
        left_s = self._left * self._spent_s / self._done
        self.say(f"  {name}: {number}/{of} answered, about {left_s:.0f} s of requests left")


def load_prompts(path: Path, count: int) -> list[Prompt]:
    """The first `count` prompts.

    Raises:
        DemoError: fewer prompts than that, or no such file.
    """
    if not path.exists():
        raise DemoError(f"demo: {path} does not exist")
    prompts = read_prompts(path)
    if len(prompts) < count:
        raise DemoError(f"demo: {path} holds {len(prompts)} prompts; {count} are asked for")
    return prompts[:count]


async def measure(
    url: str,
    config: DemoConfig,
    variant: Variant,
    prompts: list[Prompt],
    progress: Progress,
) -> tuple[Measurement, GapStudy | None]:
    """Warm up with other prompts, then ask the measured ones one after the other.

    Without MTP the same prompts are asked again, untimed, for the gaps of their best tokens.
    """
    warm_up, measured = prompts[:WARM_UP_PROMPTS], prompts[WARM_UP_PROMPTS:]
    completions = []
    async with aiohttp.ClientSession() as session:
        client = Client(session, url)
        model = await client.model_name()
        for prompt in warm_up:
            await client.chat(model, prompt.text, config.max_tokens)
        before = await client.counters()
        for number, prompt in enumerate(measured, 1):
            start = time.monotonic()
            completions.append(await client.chat(model, prompt.text, config.max_tokens))
            progress.request_done(variant.name, number, len(measured), time.monotonic() - start)
        counters = (await client.counters()).since(before)
        study = None
        if not variant.num_speculative_tokens:
            progress.say("  once more, alone and together: how far do log-probabilities move?")
            study = await study_gaps(client, model, measured, config.max_tokens, STUDY_CONCURRENCY)
    measurement = Measurement(
        variant.name, variant.num_speculative_tokens, tuple(completions), counters
    )
    return measurement, study


def check_drafts(mtp: Measurement) -> None:
    """Refuse a head that did nothing.

    Raises:
        DemoError: a speculation counter is absent or did not move.
    """
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        value = getattr(mtp.counters, name)
        if not value:
            shown = "absent" if value is None else value
            raise DemoError(f"demo: {mtp.name}: counter {name} is {shown}; the MTP head is inert")


def check_differences(
    name: str, differences: list[Difference], noise: float, config: DemoConfig
) -> None:
    """Print how many answers are the same as without MTP, and each near-tie.

    Raises:
        DemoError: answers part where the best token is clear.
    """
    count = config.num_prompts
    near_ties = [difference for difference in differences if difference.near_tie]
    beyond = [difference for difference in differences if not difference.near_tie]
    print(f"{name}: {count - len(differences)} of {count} greedy answers of {config.max_tokens} "
          "tokens are the same as without MTP")  # fmt: skip
    for near in near_ties:
        print(f"  {near.prompt_id} parts at {near.unit} {near.position}: a near-tie, gap "
              f"{near.gap:.4f}, noise {noise:.4f}")  # fmt: skip
    if beyond:
        places = ", ".join(_place(difference) for difference in beyond)
        raise DemoError(
            f"demo: {name}: greedy answers with and without MTP differ for {len(beyond)} of "
            f"{count} prompts beyond the gap's noise of {noise:.4f}: {places}"
        )


def _place(difference: Difference) -> str:
    gap = "not known" if difference.gap is None else f"{difference.gap:.4f}"
    return f"{difference.prompt_id} at {difference.unit} {difference.position} (gap {gap})"


def serve_and_measure(
    config: DemoConfig, checkpoints: dict[str, Path], prompts: list[Prompt], launch: Launcher
) -> tuple[dict[Variant, Measurement], GapStudy]:
    """Serve each variant in turn and measure it; the study comes from the one without MTP."""
    rows = variants(config)
    progress = Progress(len(rows) * config.num_prompts)
    measurements: dict[Variant, Measurement] = {}
    studies: list[GapStudy] = []
    for variant in rows:
        progress.say(f"{variant.name}: starting the server")
        start = time.monotonic()
        log = config.output / f"serve-{variant.checkpoint}-k{variant.num_speculative_tokens}.log"
        service = Service(
            config.profile, checkpoints[variant.checkpoint], variant.num_speculative_tokens, log,
            config.start_timeout_s,
        )  # fmt: skip
        with launch(service) as url:
            progress.say(f"  up after {time.monotonic() - start:.0f} s, warming up")
            measurements[variant], study = asyncio.run(
                measure(url, config, variant, prompts, progress)
            )
        if study is not None:
            studies.append(study)
    (study,) = studies
    return measurements, study


def run_demo(
    config: DemoConfig, launch: Launcher = launch_vllm, retrofit: Retrofit = run_retrofit
) -> dict[str, Any]:
    """load prompts -> make checkpoints -> serve and measure each -> compare -> write -> print.

    Raises:
        DemoError, RequestError, ServerError, StepError: each with its one line, or the log's end.
    """
    prompts = load_prompts(config.prompts, WARM_UP_PROMPTS + config.num_prompts)
    if not config.model.is_dir():
        raise DemoError(f"demo: {config.model}: no such folder")
    plan = RetrofitPlan(
        config.model, config.output, config.profile, config.calibration_prompts,
        config.calibration_max_tokens, config.start_timeout_s,
    )  # fmt: skip
    checkpoints = make_checkpoints(plan, launch, retrofit, Progress(0).say)
    measurements, study = serve_and_measure(config, checkpoints, prompts, launch)
    asked = prompts[WARM_UP_PROMPTS:]
    base = next(iter(measurements.values()))
    compared = {
        variant: with_gaps(find_differences(asked, base, mtp), asked, base, mtp, study)
        for variant, mtp in measurements.items()
        if mtp is not base and variant.trunk == "base"
    }
    result = {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance.collect(REPOSITORY, config.model),
        "config": {
            name: provenance.recorded(value, REPOSITORY) for name, value in asdict(config).items()
        },
        "checkpoints": {
            name: provenance.checkpoint_sha256(path) for name, path in checkpoints.items()
        },
        "profiles": [
            summarize(measurement) | {"checkpoint": variant.checkpoint}
            for variant, measurement in measurements.items()
        ],
        "gap_noise": study.noise,
        "gap_noise_max_concurrency": study.max_concurrency,
        "differences": [
            {"profile": variant.name, **asdict(difference)}
            for variant, differences in compared.items()
            for difference in differences
        ],
    }
    write_result(config.output / "result.json", result)
    print()
    print(render_sample(prompts[WARM_UP_PROMPTS], measurements[variants(config)[2]].completions[0]))
    print()
    print(render_table(result["profiles"]))
    print("(the original's trunk is FP4, so its text is its own)\n")
    for measurement in measurements.values():
        if measurement is not base:
            check_drafts(measurement)
    for variant, differences in compared.items():
        check_differences(variant.name, differences, study.noise, config)
    return result


def parse_config(argv: list[str] | None) -> DemoConfig:
    """Build the configuration from the command line; a bad value ends with exit status 2."""
    default = DemoConfig()
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--profile", default=default.profile)
    parser.add_argument("--model", type=Path, default=default.model, metavar="DIR")
    parser.add_argument("--prompts", type=Path, default=default.prompts, metavar="JSONL")
    parser.add_argument("--num-prompts", type=int, default=default.num_prompts)
    parser.add_argument("--max-tokens", type=int, default=default.max_tokens)
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--calibration-prompts", type=int, default=default.calibration_prompts)
    parser.add_argument(
        "--calibration-max-tokens", type=int, default=default.calibration_max_tokens
    )
    parser.add_argument("--start-timeout-s", type=float, default=default.start_timeout_s)
    parser.add_argument("--output", type=Path, default=default.output, metavar="DIR")
    try:
        return DemoConfig(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def _exit_on_term(*_: object) -> NoReturn:
    """Unwind, so that the server is stopped."""
    raise SystemExit(128 + signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    config = parse_config(argv)
    signal.signal(signal.SIGTERM, _exit_on_term)
    start = time.monotonic()
    try:
        run_demo(config)
    except (DemoError, RequestError, ServerError, StepError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the server was stopped", file=sys.stderr)
        return 130
    written = os.path.relpath(config.output / "result.json")
    print(f"{written} written; {time.monotonic() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
