"""`python -m bench.demo`: the tiny model without and with its MTP head, on this CPU.

Serves the checkpoint twice with the patched vLLM, asks both servers the same held-out prompts
greedily over HTTP, checks that the answers are the same, and shows what the head is worth. Answers
may part where the two best tokens are closer than that gap's own noise, which is measured. Exit
status 1: a server failed, answers differ beyond that, or no drafted token was accepted.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp

from bench import provenance
from bench.client import Client, RequestError
from bench.measurement import Difference, Measurement, Prompt, find_differences
from bench.near_ties import GapStudy, study_gaps, with_gaps
from bench.report import render_sample, render_table, summarize, write_result
from bench.server import ServerError, free_port, running_server

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEMA_VERSION = 1
WARM_UP_PROMPTS = 2
STUDY_CONCURRENCY = 4  # another batch shape than one request at a time


class DemoError(RuntimeError):
    """The demo ran and did not show what it must."""


@dataclass(frozen=True)
class DemoConfig:
    """What is asked of whom. Counts are of measured requests; warm-up comes on top."""

    profile: str = "cpu-tiny"
    model: Path = REPOSITORY / "tiny" / "checkpoint"
    prompts: Path = REPOSITORY / "tiny" / "heldout.jsonl"
    num_prompts: int = 8
    max_tokens: int = 96
    num_speculative_tokens: int = 1
    start_timeout_s: float = 240.0
    output: Path = REPOSITORY / ".demo"

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts = {self.num_prompts}; must be at least 1")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens = {self.max_tokens}; a rate needs at least 2")
        if not 1 <= self.num_speculative_tokens <= 3:
            raise ValueError(
                f"num_speculative_tokens = {self.num_speculative_tokens}; must be in 1..3"
            )


Launcher = Callable[[DemoConfig, int], AbstractContextManager[str]]


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
    """Read the first `count` prompts of a JSON-lines file of {"id", "text"}.

    Raises:
        DemoError: fewer prompts than that, or no such file.
    """
    if not path.exists():
        raise DemoError(f"demo: {path} does not exist")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < count:
        raise DemoError(f"demo: {path} holds {len(lines)} prompts; {count} are asked for")
    rows = (json.loads(line) for line in lines[:count])
    return [Prompt(str(row["id"]), row["text"]) for row in rows]


@contextlib.contextmanager
def launch_vllm(config: DemoConfig, num_speculative_tokens: int) -> Iterator[str]:
    """Run `python -m serve run` on a free port; gives the server's URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "serve", "run", "--profile", config.profile]
    command += ["--port", str(port), "--model", str(config.model)]
    command += ["--num-speculative-tokens", str(num_speculative_tokens)]
    log = config.output / f"{profile_slug(config.profile, num_speculative_tokens)}.log"
    with running_server(command, url, log, config.start_timeout_s):
        yield url


def profile_slug(profile: str, num_speculative_tokens: int) -> str:
    """Return a file name for one variant of a profile."""
    return f"{profile}-mtp-k{num_speculative_tokens}" if num_speculative_tokens else profile


def profile_title(profile: str, num_speculative_tokens: int) -> str:
    """Return the name of one variant of a profile in tables and results."""
    variant = f"MTP k={num_speculative_tokens}" if num_speculative_tokens else "(no MTP)"
    return f"{profile} {variant}"


async def measure(
    url: str,
    config: DemoConfig,
    num_speculative_tokens: int,
    prompts: list[Prompt],
    progress: Progress,
) -> tuple[Measurement, GapStudy | None]:
    """Warm up with other prompts, then ask the measured ones one after the other.

    Without MTP the same prompts are asked again, untimed, for the gaps of their best tokens.
    """
    name = profile_title(config.profile, num_speculative_tokens)
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
            progress.request_done(name, number, len(measured), time.monotonic() - start)
        counters = (await client.counters()).since(before)
        study = None
        if not num_speculative_tokens:
            progress.say("  once more, alone and together: how far do log-probabilities move?")
            study = await study_gaps(client, model, measured, config.max_tokens, STUDY_CONCURRENCY)
    return Measurement(name, num_speculative_tokens, tuple(completions), counters), study


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


def check_differences(differences: list[Difference], noise: float, config: DemoConfig) -> None:
    """Print what is the same and each near-tie.

    Raises:
        DemoError: answers part where the best token is clear.
    """
    count = config.num_prompts
    near_ties = [difference for difference in differences if difference.near_tie]
    beyond = [difference for difference in differences if not difference.near_tie]
    print(f"\n{count - len(differences)} of {count} greedy answers of {config.max_tokens} tokens, "
          "with and without MTP: the same")  # fmt: skip
    for near in near_ties:
        print(f"  {near.prompt_id} parts at {near.unit} {near.position}: a near-tie, gap "
              f"{near.gap:.4f}, noise {noise:.4f}")  # fmt: skip
    if beyond:
        places = ", ".join(_place(difference) for difference in beyond)
        raise DemoError(
            f"demo: greedy answers with and without MTP differ for {len(beyond)} of {count} "
            f"prompts beyond the gap's noise of {noise:.4f}: {places}"
        )


def _place(difference: Difference) -> str:
    gap = "not known" if difference.gap is None else f"{difference.gap:.4f}"
    return f"{difference.prompt_id} at {difference.unit} {difference.position} (gap {gap})"


def run_demo(config: DemoConfig, launch: Launcher = launch_vllm) -> dict[str, Any]:
    """load prompts -> serve and measure without, with MTP -> compare -> write -> print.

    Raises:
        DemoError, RequestError, ServerError: each with its one line, or with the log's end.
    """
    prompts = load_prompts(config.prompts, WARM_UP_PROMPTS + config.num_prompts)
    progress = Progress(2 * config.num_prompts)
    measurements: list[Measurement] = []
    studies: list[GapStudy] = []
    for num_speculative_tokens in (0, config.num_speculative_tokens):
        title = profile_title(config.profile, num_speculative_tokens)
        progress.say(f"{title}: starting the server")
        start = time.monotonic()
        with launch(config, num_speculative_tokens) as url:
            progress.say(f"  up after {time.monotonic() - start:.0f} s, warming up")
            measured, study = asyncio.run(
                measure(url, config, num_speculative_tokens, prompts, progress)
            )
            measurements.append(measured)
            if study is not None:
                studies.append(study)
    base, mtp = measurements
    (study,) = studies
    asked = prompts[WARM_UP_PROMPTS:]
    differences = with_gaps(find_differences(asked, base, mtp), asked, base, mtp, study)
    result = {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance.collect(REPOSITORY, config.model),
        "config": {key: _plain(value) for key, value in asdict(config).items()},
        "profiles": [summarize(measurement) for measurement in measurements],
        "gap_noise": study.noise,
        "gap_noise_max_concurrency": study.max_concurrency,
        "differences": [asdict(difference) for difference in differences],
    }
    write_result(config.output / "result.json", result)
    print()
    print(render_sample(prompts[WARM_UP_PROMPTS], mtp.completions[0]))
    print()
    print(render_table(result["profiles"]))
    check_drafts(mtp)
    check_differences(differences, study.noise, config)
    return result


def _plain(value: Any) -> Any:
    return _relative(value) if isinstance(value, Path) else value


def _relative(path: Path) -> str:
    """Return a path below the repository relative to it: results name no machine's folders."""
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


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
    except (DemoError, RequestError, ServerError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the server was stopped", file=sys.stderr)
        return 130
    print(f"{_relative(config.output / 'result.json')} written; "
          f"{time.monotonic() - start:.0f} s in all")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
