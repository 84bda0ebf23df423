"""Command line of `python -m bench eval`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

from bench.eval import compare, lm_eval, parity_run, result
from bench.eval import run as run_module
from bench.eval.config import QUICK_ITEMS, EvalConfig, Reasoning, TaskName
from bench.eval.parity_run import ParityConfig
from bench.load.cli import API_KEY_VARIABLE, RESULTS
from bench.load.errors import INTERRUPTED, NO_SERVER, LoadError, Regression, Unbelievable
from bench.load.run import session
from bench.load.server import Server, ServerFacts
from bench.load.sizes import parse_size, parse_sizes
from bench.server import ServerError

COMMANDS = ("run", "parity", "compare")
QUICK_PROMPTS = 40


def main(argv: list[str]) -> int:
    """Run a command and return its exit status, as `bench.load.cli.main` has them.

    Without a command it is `run`.
    """
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    arguments = parser().parse_args(argv)
    try:
        return arguments.call(arguments)
    except LoadError as error:
        print(f"bench eval: {error}", file=sys.stderr)
        return error.exit_code
    except ServerError as error:
        print(f"bench eval: {error}", file=sys.stderr)
        return NO_SERVER
    except KeyboardInterrupt:
        print("bench eval: interrupted", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="python -m bench eval", description="Is it still accurate?")
    commands = top.add_subparsers(dest="command", required=True)
    _add_run(commands.add_parser("run", help="score a running server (the default)"))
    _add_parity(commands.add_parser("parity", help="greedy text with and without MTP"))
    _add_compare(commands.add_parser("compare", help="exit 1 where a candidate lost accuracy"))
    return top


def _add_run(command: argparse.ArgumentParser) -> None:
    default = EvalConfig()
    add = command.add_argument
    add("--url", default=default.url)
    add("--model", help="served name; default: the first one listed")
    add("--tasks", type=_tasks, default=(), metavar="NAME[,NAME]",
        help=f"of {', '.join(TaskName)}; default: those whose data are there")  # fmt: skip
    add("--quick", action="store_true", help=f"{QUICK_ITEMS} items of each task: a smoke test")
    add("--limit", type=int, help="items of each task")
    add("--reasoning", type=Reasoning, choices=list(Reasoning), default=default.reasoning)
    add("--streams", type=int, default=default.streams, help="requests at once")
    add("--max-tokens", type=_size, help="of an answer; default: 4096, with reasoning 32768")
    add("--temperature", type=float, default=default.temperature)
    add("--seed", type=int, default=default.seed, help="which items, in which order")
    add("--contexts", type=_sizes, default=(), metavar="TOKENS[,TOKENS]",
        help="of the long-context items; default: 8k, 128k, 524k that fit")  # fmt: skip
    add("--depths", type=_shares, default=default.depths, metavar="SHARE[,SHARE]",
        help="where in the text the answer lies")  # fmt: skip
    add("--long-repeats", type=int, default=default.long_repeats)
    add("--timeout-s", type=float, default=default.timeout_s, help="longest wait for bytes")
    for name, form in (("gsm8k", "JSONL"), ("mmlu", "FILE|DIR"), ("humaneval", "JSONL")):
        add(f"--{name}", type=Path, metavar=form, help="your own items")
    add("--sandbox-image", help="for programs where there is no bubblewrap, e.g. python:3.11-slim")
    add("--label", help="a name for tables")
    add("--result", type=Path, metavar="JSON", help="default: a new file in results/")
    add("--resume", type=Path, metavar="JSONL",
        help="go on with a run that was cut short; ask what failed again")  # fmt: skip
    add("--base", type=Path, metavar="JSON", help="an earlier result: compare with it")
    add("--engine", choices=("own", "lm-eval"), default="own")
    command.set_defaults(call=_run)


def _add_parity(command: argparse.ArgumentParser) -> None:
    default = ParityConfig(profile="-")
    add = command.add_argument
    add("--off-url", help="a server without MTP")
    add("--on-url", help="the same with MTP")
    add("--profile", help="of `serve run`: started without MTP, then with it")
    add("--checkpoint", type=Path, metavar="DIR", help="instead of the profile's")
    add("--num-speculative-tokens", type=int, help="instead of the profile's")
    add("--num-prompts", type=int, default=None, help=f"default: {default.num_prompts}")
    add("--quick", action="store_true", help=f"{QUICK_PROMPTS} prompts")
    add("--max-tokens", type=_size, default=default.max_tokens, help="of each answer")
    add("--streams", type=int, default=default.streams, help="prompts at once")
    add("--control-streams", type=int, default=default.control_streams, help="in the control")
    add("--prompts", type=Path, metavar="JSONL", help="your own, as {id, text}")
    add("--timeout-s", type=float, default=default.timeout_s)
    add("--start-timeout-s", type=float, default=default.start_timeout_s)
    add("--label")
    add("--result", type=Path, metavar="JSON", help="default: a new file in results/")
    command.set_defaults(call=_parity)


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("base", type=Path)
    command.add_argument("candidate", type=Path)
    command.add_argument(
        "--tasks",
        type=_tasks,
        default=(),
        metavar="NAME[,NAME]",
        help="default: all of the base; one that is missing is exit status 1",
    )
    command.add_argument("--json", action="store_true", help="for other programs")
    command.set_defaults(call=_compare)


def _run(arguments: argparse.Namespace) -> int:
    try:
        config = EvalConfig(**{f.name: getattr(arguments, f.name) for f in fields(EvalConfig)})
    except ValueError as error:
        raise LoadError(str(error)) from error
    if arguments.quick and config.limit is None:
        config = replace(config, limit=QUICK_ITEMS)
    if arguments.resume and arguments.result:
        raise LoadError("--result: a resumed run writes its result beside its journal")
    own_only = [name for name in ("resume", "base") if getattr(arguments, name)]
    if arguments.engine == "lm-eval" and own_only:
        raise LoadError(f"--{own_only[0]}: lm-evaluation-harness writes results of its own")
    base = result.read(arguments.base) if arguments.base else None
    output = arguments.result or run_module.default_output(config, RESULTS)
    api_key = os.environ.get(API_KEY_VARIABLE)
    if arguments.engine == "lm-eval":
        facts = asyncio.run(_facts(config, api_key))
        lm_eval.run(config, facts, output, api_key)
        return 0
    scored = run_module.run(config, output, api_key, arguments.resume)
    return 0 if base is None else _compared(base, scored, arguments.tasks, as_json=False)


def _parity(arguments: argparse.Namespace) -> int:
    names = [f.name for f in fields(ParityConfig) if f.name != "num_prompts"]
    count = arguments.num_prompts
    if count is None:
        count = QUICK_PROMPTS if arguments.quick else ParityConfig.num_prompts
    try:
        config = ParityConfig(
            num_prompts=count, **{name: getattr(arguments, name) for name in names}
        )
    except ValueError as error:
        raise LoadError(str(error)) from error
    labelled = EvalConfig(label=config.label or config.profile)
    output = arguments.result or run_module.default_output(labelled, RESULTS, "parity")
    parity_run.run(config, output, os.environ.get(API_KEY_VARIABLE))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    base, head = result.read(arguments.base), result.read(arguments.candidate)
    return _compared(base, head, arguments.tasks, arguments.json)


def _compared(base: dict, head: dict, chosen: tuple[TaskName, ...], as_json: bool) -> int:
    pairs = compare.compare(base, head, chosen)
    missing = compare.unpaired(base, head, chosen)
    if as_json:
        others = [{"task": name, "verdict": where} for name, where in missing.items()]
        print(json.dumps([pair.to_json() for pair in pairs] + others, indent=2))
    else:
        print(compare.render(pairs, missing))
        for note in compare.notes(base, head):
            print(f"note: {note}")
    if void := [pair.task for pair in pairs if not pair.valid]:
        raise Unbelievable(f"not valid: {', '.join(void)}: see the results' problems")
    lost = [pair for pair in pairs if pair.is_loss]
    if lost:
        named = ", ".join(f"{p.task} by {100 * (p.base - p.head):.1f} points" for p in lost)
        raise Regression(f"accuracy was lost: {named}")
    if missing:
        named = ", ".join(f"{name} is {where}" for name, where in missing.items())
        raise Unbelievable(f"not compared: {named}; choose with --tasks what is to be compared")
    return 0


async def _facts(config: EvalConfig, api_key: str | None) -> ServerFacts:
    async with session(config.timeout_s, api_key) as opened:
        return await Server(opened, config.url).facts(config.model)


def _argument(parse):  # noqa: ANN001, ANN202 - argparse shows only ArgumentTypeError's text
    def checked(text: str):  # noqa: ANN202
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


_size = _argument(parse_size)
_sizes = _argument(parse_sizes)


@_argument
def _tasks(text: str) -> tuple[TaskName, ...]:
    return tuple(TaskName(part.strip()) for part in text.split(",") if part.strip())


@_argument
def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part.strip())
