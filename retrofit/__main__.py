"""`python -m retrofit inspect | quantize-base | capture | mtp | verify`.

Exit status: 0 done or sound; 1 a check found faults; 2 bad options or input; 130 interrupted; 141
nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import os
import sys
from enum import StrEnum
from pathlib import Path

from retrofit import capture, inspection, mtp, quantize_base, verify
from retrofit.errors import BadInput

BAD_INPUT = 2
INTERRUPTED = 130  # as a shell says of SIGINT
OUTPUT_CLOSED = 141  # and of SIGPIPE


def values(kind: type[StrEnum]) -> list[str]:
    """What an option may be, as argparse shows it in messages."""
    return [item.value for item in kind]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m retrofit", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    inspect = commands.add_parser("inspect", help="what a checkpoint holds, from its headers")
    inspect.add_argument("path", type=Path)

    base = commands.add_parser("quantize-base", help="original FP4/FP8 to W4A16-FP8, without data")
    base.add_argument("source", type=Path, metavar="SRC")
    base.add_argument("dst", type=Path, metavar="DST")
    base.add_argument(
        "--mtp",
        choices=values(quantize_base.Head),
        default="drop",
        help="the head; drop by default",
    )
    base.add_argument(
        "--scale",
        choices=values(quantize_base.Scale),
        default="mse",
        help="mse, searched, by default",
    )
    base.add_argument("--shard-bytes", type=int, default=5_000_000_000)

    _add_capture(commands.add_parser("capture", help="calibration rows from a running server"))
    _add_mtp(commands.add_parser("mtp", help="the base plus its MTP head, GPTQ-quantized"))

    check = commands.add_parser("verify", help="the gate before serving")
    check.add_argument("path", type=Path)
    check.add_argument("--deep", type=Path, metavar="SRC", help="compare with the original")
    check.add_argument(
        "--stock-vllm", action="store_true", help="also refuse what only our loader takes"
    )
    return top


def _add_capture(command: argparse.ArgumentParser) -> None:
    default = capture.CaptureConfig(url="http://localhost", out=Path())
    command.add_argument("--url", required=True, help="of a server run with --capture DIR")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the same folder")
    command.add_argument(
        "--prompts", type=Path, default=default.prompts, metavar="JSONL",
        help='lines of {"text"} or {"messages"}; a bundled text by default',
    )  # fmt: skip
    command.add_argument(
        "--num-prompts",
        type=int,
        default=default.num_prompts,
        help="from the file's start (%(default)s)",
    )
    command.add_argument(
        "--max-tokens", type=int, default=default.max_tokens, help="of each answer (%(default)s)"
    )
    command.add_argument(
        "--budget-gib",
        type=float,
        default=default.budget_gib,
        help="of all rows together (%(default)s)",
    )
    command.add_argument(
        "--concurrency",
        type=int,
        default=default.concurrency,
        help="requests at once (%(default)s)",
    )


def _add_mtp(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, metavar="SRC", help="original; the head's shards do")
    command.add_argument("base", type=Path, metavar="BASE", help="W4A16-FP8 without a head")
    command.add_argument("dst", type=Path, metavar="DST", help="must not exist")
    data = command.add_mutually_exclusive_group(required=True)
    data.add_argument("--calibration", type=Path, metavar="DIR", help="what `capture` wrote")
    data.add_argument("--rtn", action="store_true", help="round to nearest, without data")
    command.add_argument(
        "--device", choices=values(mtp.Device), default="cpu", help="%(default)s by default"
    )
    command.add_argument(
        "--scale", choices=values(mtp.Scale), default="mse", help="mse, searched, by default"
    )
    command.add_argument(
        "--percdamp", type=float, default=0.01, help="damping tried first (%(default)s)"
    )
    command.add_argument("--no-activation-order", dest="activation_order", action="store_false")
    command.add_argument(
        "--no-route-weight", dest="route_weight_in_h2", action="store_false",
        help="leave the route weight out of w2's Hessian",
    )  # fmt: skip
    command.add_argument("--experts-per-step", type=int, help="1 on the CPU, 4 on CUDA")
    command.add_argument(
        "--files", choices=values(mtp.Files), default="hard",
        help="how the base's weights come into DST; hard, as links, by default",
    )  # fmt: skip
    command.add_argument(
        "--allow-uncalibrated", action="store_true", help="round experts that no row was routed to"
    )


CONFIGS = {
    "inspect": (inspection.InspectConfig, inspection.run),
    "quantize-base": (quantize_base.QuantizeBaseConfig, quantize_base.run),
    "capture": (capture.CaptureConfig, capture.run),
    "mtp": (mtp.MtpConfig, mtp.run),
    "verify": (verify.VerifyConfig, verify.run),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; an error is one line on standard error."""
    options = vars(parser().parse_args(argv))
    make, run = CONFIGS[options.pop("command")]
    options.pop("rtn", None)
    # Errors of writing do not say where.
    place = options.get("dst") or options.get("out") or options.get("path")
    try:
        config = make(**options)
        print(config, file=sys.stderr)
        status = run(config)
        sys.stdout.flush()
        return status
    except BadInput as error:
        print(f"retrofit: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:
        # What is still buffered would raise again at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return OUTPUT_CLOSED
    except OSError as error:
        print(f"retrofit: {error.filename or place}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("retrofit: interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
