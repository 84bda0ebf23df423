"""Command line of `python -m bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from bench import simulate
from bench.load import compare, interference, readme, result, speculative, vllm_bench
from bench.load import run as run_module
from bench.load.config import Api, LoadConfig, Mode, Speculation, Text
from bench.load.errors import INTERRUPTED, NO_SERVER, LoadError, Regression
from bench.load.sizes import parse_size, parse_sizes
from bench.server import ServerError

# The only environment variable that is read: a key in the arguments would be seen by everybody.
API_KEY_VARIABLE = "VLLM_API_KEY"
RESULTS = Path("results")
# Of --quick, where nothing else is asked for: some two minutes, and no intervals.
QUICK = {"repeats": 2, "output": 64, "max_warm_up_rounds": 2, "most_depth": 8192}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done. 1: measured and not to be believed, or a regression. 2: bad input. 3: no server.
    130: interrupted.
    """
    given = sys.argv[1:] if argv is None else argv
    arguments = parser(QUICK if "--quick" in given else {}).parse_args(given)
    try:
        return arguments.call(arguments)
    except LoadError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    except ServerError as error:
        print(f"bench: {error}", file=sys.stderr)
        return NO_SERVER
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return INTERRUPTED


def parser(defaults: Mapping[str, int] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; `defaults` of `run` in place of its own."""
    top = argparse.ArgumentParser(prog="python -m bench", description="Measure a served model.")
    commands = top.add_subparsers(dest="command", required=True)
    run_command = commands.add_parser("run", help="measure a running server")
    _add_run(run_command)
    run_command.set_defaults(**(defaults or {}))
    _add_compare(commands.add_parser("compare", help="exit 1 where a result regressed"))
    _add_report(commands.add_parser("report", help="tables from the files in results/"))
    _add_interference(
        commands.add_parser("interference", help="short requests while a long prompt prefills")
    )
    _add_simulate(commands.add_parser("simulate", help="predict decode speed from bytes"))
    commands.add_parser("eval", help="score accuracy; see `bench eval --help`", add_help=False)
    return top


def _add_run(command: argparse.ArgumentParser) -> None:
    default = LoadConfig()
    add = command.add_argument
    add("--url", default=default.url)
    add("--model", help="served name; default: the first one listed")
    add("--context", dest="contexts", type=_sizes, default=(), metavar="TOKENS[,TOKENS]",
        help="prompt and answer together, e.g. 524k; default: the server's window")  # fmt: skip
    add("--depth", dest="depths", type=_sizes, default=(), metavar="TOKENS[,TOKENS]",
        help="prompt tokens; default: what fits into the context")  # fmt: skip
    add("--streams", type=_sizes, default=default.streams, metavar="N[,N]",
        help="requests at once")  # fmt: skip
    add("--output", type=_size, default=default.output, metavar="TOKENS", help="of each answer")
    add("--mode", type=Mode, choices=list(Mode), default=default.mode, help="prefix cache")
    add("--repeats", type=int, default=default.repeats)
    add("--api", type=Api, choices=list(Api), default=default.api)
    add("--text", type=Text, choices=list(Text), default=default.text)
    add("--speculation", type=Speculation, choices=list(Speculation), default=default.speculation,
        help="fail unless the server does, or does not, export acceptance metrics")  # fmt: skip
    add("--goodput", type=_limits, default=(), metavar="NAME=MS[,NAME=MS]",
        help="limits of ttft_ms, tpot_ms, e2el_ms")  # fmt: skip
    add("--max-warm-up-rounds", type=int, default=default.max_warm_up_rounds)
    add("--timeout-s", type=float, default=default.timeout_s, help="longest wait for bytes")
    add("--seed", type=int, default=default.seed, help="which text is asked")
    add("--tokenizer", type=Path, metavar="PATH", help="for servers without /tokenize")
    add("--quick", action="store_true", help="fewer, shorter and shallower requests: a first look")
    add("--dry-run", action="store_true", help="check everything, print the plan, send nothing")
    add("--label", help="a name for tables")
    add("--result", type=Path, metavar="JSON", help="default: a new file in results/")
    add("--resume", type=Path, metavar="FILE",
        help="go on with what a run that was cut short left")  # fmt: skip
    add("--engine", choices=("own", "vllm"), default="own",
        help="vllm: vLLM's Rust bench on the same plan, as a cross-check")  # fmt: skip
    add("--vllm-rs", type=Path, metavar="FILE", help="instead of the installed vLLM's")
    add("--compare-speculative", action="store_true",
        help="start --profile without MTP, then with it, and measure both")  # fmt: skip
    add("--profile", help="of `serve run`, for --compare-speculative")
    add("--checkpoint", type=Path, metavar="DIR", help="instead of the profile's")
    add("--num-speculative-tokens", type=_counts, default=(), metavar="K[,K]",
        help="an arm with MTP for each, instead of one with the profile's")  # fmt: skip
    add("--start-timeout-s", type=float, default=3600.0, help="of a server that is started")
    command.set_defaults(call=_run, most_depth=default.most_depth)


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("base", type=Path)
    command.add_argument("head", type=Path)
    command.add_argument("--max-regression", type=_share, default=compare.DEFAULT_BOUND,
                         help="how much worse TTFT, TPOT, aggregate may be, e.g. 3%%")  # fmt: skip
    command.set_defaults(call=_compare)


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--write", type=Path, metavar="FILE", help="between its marks")
    where.add_argument("--check", type=Path, metavar="FILE",
                       help="exit 1 unless it has the tables already")  # fmt: skip
    command.set_defaults(call=_report)


def _add_interference(command: argparse.ArgumentParser) -> None:
    default = LoadConfig()
    add = command.add_argument
    add("--url", default=default.url)
    add("--model")
    add("--long", type=_size, required=True, metavar="TOKENS", help="of the long prompt")
    add("--short", type=_size, default=512, metavar="TOKENS", help="of the short prompts")
    add("--output", type=_size, default=512, metavar="TOKENS", help="of the stream's answer")
    add("--repeats", type=int, default=default.repeats)
    add("--timeout-s", type=float, default=default.timeout_s)
    add("--seed", type=int, default=default.seed)
    add("--tokenizer", type=Path, metavar="PATH")
    add("--result", type=Path, required=True, metavar="JSON")
    command.set_defaults(call=_interference)


def _interference(arguments: argparse.Namespace) -> int:
    names = ("url", "model", "output", "repeats", "timeout_s", "seed", "tokenizer")
    try:
        config = LoadConfig(**{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        raise LoadError(str(error)) from error
    sizes = interference.Sizes(arguments.long, arguments.short, arguments.output)
    interference.run(config, sizes, arguments.result, os.environ.get(API_KEY_VARIABLE))
    return 0


def _add_simulate(command: argparse.ArgumentParser) -> None:
    default = simulate.Machine()
    add = command.add_argument
    add("--config", type=Path, required=True, metavar="JSON", help="a checkpoint's config.json")
    add("--cards", type=int, default=2)
    add("--bandwidth-gb-s", type=float, default=default.bandwidth_gb_s, help="of one card")
    add("--efficiency", type=float, default=default.efficiency, help="share of it that is reached")
    add("--all-reduce-us", type=float, default=default.all_reduce_us)
    add("--gaps-ms", type=float, default=default.gaps_ms, help="of a step, between kernels")
    add("--acceptance", type=_numbers, default=(), metavar="P[,P]",
        help="unconditional, by draft position; none is no speculation")  # fmt: skip
    add("--kernel", type=_named, action="append", default=[], metavar="PART=US",
        help="measured time per layer, instead of a part's bytes")  # fmt: skip
    command.set_defaults(call=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    try:
        config = json.loads(arguments.config.read_text(encoding="utf-8"))
        machine = simulate.Machine(
            arguments.bandwidth_gb_s, arguments.efficiency, arguments.all_reduce_us,
            arguments.gaps_ms, dict(arguments.kernel),
        )  # fmt: skip
        predicted = simulate.predict(config, machine, arguments.acceptance, arguments.cards)
    except OSError as error:
        raise LoadError(f"{arguments.config}: {error.strerror}") from error
    except KeyError as error:
        raise LoadError(f"{arguments.config}: no {error}; is it DeepSeek-V4's?") from error
    except ValueError as error:
        raise LoadError(str(error)) from error
    print(json.dumps(predicted, indent=2))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    try:
        config = LoadConfig(**{f.name: getattr(arguments, f.name) for f in fields(LoadConfig)})
    except ValueError as error:
        raise LoadError(str(error)) from error
    api_key = os.environ.get(API_KEY_VARIABLE)
    if arguments.resume is not None and (arguments.result or arguments.engine != "own"):
        raise LoadError(f"--resume {arguments.resume}: goes without --result and --engine")
    if arguments.resume is not None and arguments.resume.name.endswith(speculative.SUFFIX):
        speculative.resume(arguments.resume, api_key, given=config)
        return 0
    if arguments.compare_speculative:
        return _compare_speculative(arguments, config)
    if arguments.dry_run:
        print(run_module.rehearse(config, api_key))
        return 0
    output = arguments.result or run_module.default_output(config, RESULTS)
    if arguments.engine == "vllm":
        vllm_bench.run(config, output, arguments.vllm_rs, api_key)
        return 0
    run_module.run(config, output, api_key, arguments.resume)
    return 0


def _compare_speculative(arguments: argparse.Namespace, config: LoadConfig) -> int:
    if arguments.profile is None:
        raise LoadError("--compare-speculative needs --profile: it starts the server itself")
    if arguments.dry_run:
        raise LoadError("--compare-speculative has no --dry-run: without a server nothing is known")
    if arguments.resume is not None:
        raise LoadError(f"--resume {arguments.resume}: must be a {speculative.SUFFIX} file here")
    if arguments.engine != "own":
        raise LoadError("--compare-speculative has no --engine vllm: its prompts are random tokens")
    try:
        plan = speculative.Plan(
            arguments.profile, arguments.checkpoint, arguments.num_speculative_tokens,
            arguments.start_timeout_s,
        )  # fmt: skip
    except ValueError as error:
        raise LoadError(str(error)) from error
    config = replace(config, label=arguments.profile)
    output = arguments.result or run_module.default_output(config, RESULTS)
    speculative.run(config, output, plan, os.environ.get(API_KEY_VARIABLE))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    base, head = result.read(arguments.base), result.read(arguments.head)
    changes = compare.compare(base, head, arguments.max_regression)
    print(compare.table(changes))
    for note in compare.notes(base, head):
        print(f"note: {note}")
    if unsure := [c for c in changes if c.not_shown]:
        named = ", ".join(f"{c.figure} at {c.cell} by {c.worse_by:.1%}" for c in unsure)
        print(f"note: worse by more than {arguments.max_regression:.1%}, not shown: {named}; "
              "more repeats would tell")  # fmt: skip
    worse = [c for c in changes if c.regressed]
    if worse:
        named = ", ".join(f"{c.figure} at {c.cell} by {c.worse_by:.1%}" for c in worse)
        raise Regression(f"regressed by more than {arguments.max_regression:.1%}: {named}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    if arguments.write is not None:
        readme.write(arguments.write, arguments.results)
    elif arguments.check is not None:
        readme.check(arguments.check, arguments.results)
    else:
        print(readme.render(readme.load_results(arguments.results)))
    return 0


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
def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


@_argument
def _limits(text: str) -> tuple[tuple[str, float], ...]:
    pairs = (part.partition("=") for part in text.split(",") if part)
    return tuple((name.strip(), float(value)) for name, _, value in pairs)


@_argument
def _share(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


@_argument
def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


@_argument
def _named(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)
