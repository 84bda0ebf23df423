"""`python -m serve`: check the profile, the checkpoint and the engine, then become vLLM."""

import argparse
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from kernels.folder_lock import FolderHeld, check_free
from serve.checkpoint import check_checkpoint, read_json
from serve.command import vllm_command
from serve.engine import REPOSITORY, check_engine
from serve.environment import added_environment, engine_environment, load_record_path
from serve.errors import ConfigError, ServeError
from serve.plan import check_split, run_plan
from serve.profiles import MAX_SPECULATIVE_TOKENS, load_profile, profile_names


def run(arguments: argparse.Namespace) -> NoReturn | None:
    """load_profile -> command -> check_* -> print -> start_summary -> exec."""
    profile = load_profile(arguments.profile)
    model = arguments.model or REPOSITORY / profile.model
    num_speculative_tokens = arguments.num_speculative_tokens
    if num_speculative_tokens is None:
        num_speculative_tokens = profile.num_speculative_tokens
    capture = arguments.capture
    if capture is not None and num_speculative_tokens != 1:
        raise ConfigError(
            f"--capture: num_speculative_tokens = {num_speculative_tokens}; must be 1, so that the "
            "experts' inputs do not depend on the head's own experts"
        )
    command = vllm_command(
        profile, model, arguments.host, arguments.port, num_speculative_tokens, capture is not None
    )
    record = (arguments.load_record or load_record_path(arguments.port)).resolve()
    env = engine_environment(profile, capture=capture, load_record=record)
    added = added_environment(profile, capture, record)
    shown = [f"{name}={value}" for name, value in sorted(added.items())]
    if not arguments.dry_run:
        if capture is not None:
            prepare_capture(capture)
        check_port(arguments.host, arguments.port)
        check_checkpoint(model, num_speculative_tokens)
        if profile.tensor_parallel_size > 1:
            check_split(read_json(model / "config.json"), profile)
        check_engine()
        prepare_record(record)
    print(shlex.join(shown + command), flush=True)
    if arguments.dry_run:
        return None
    start_summary(record, model, arguments.host, arguments.port)
    os.execve(command[0], command, env)


def prepare_capture(folder: Path) -> None:
    """Make the folder for calibration rows. The engine takes it later and looks again.

    Raises:
        ConfigError: it cannot be made or used, or another server records into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_free(folder)
    except FolderHeld as error:
        raise ConfigError(
            f"--capture {folder}: is held by {error}; one server records into a folder at a time"
        ) from None
    except OSError as error:
        raise ConfigError(f"--capture {folder}: {error.strerror}") from error


def check_port(host: str, port: int) -> None:
    """Refuse a port that another server has, whose answers would be taken for the engine's.

    Raises:
        ConfigError: nothing can listen there.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from error


def prepare_record(path: Path) -> None:
    """Make the folder of the load record; what an earlier start wrote is removed.

    Raises:
        ConfigError: it cannot be written there.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--load-record: {path}: {error.strerror}") from error


def start_summary(record: Path, model: Path, host: str, port: int) -> None:
    """Let `serve.summary` print what was loaded when this process, as the engine, answers."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    reached = f"[{reached}]" if ":" in reached else reached
    command = [sys.executable, "-m", "serve.summary", str(record), "--model", str(model)]
    command += ["--url", f"http://{reached}:{port}", "--pid", str(os.getpid())]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; a bad value ends with exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="check everything, then serve")
    run_parser.add_argument("--profile", required=True, help=f"one of {profile_names()}")
    run_parser.add_argument("--host", default="127.0.0.1")
    run_parser.add_argument("--port", type=port, default=8000)
    run_parser.add_argument("--model", type=Path, metavar="DIR", help="instead of the profile's")
    run_parser.add_argument(
        "--num-speculative-tokens",
        type=int,
        choices=range(MAX_SPECULATIVE_TOKENS + 1),
        help="instead of the profile's; 0 serves without MTP",
    )
    run_parser.add_argument(
        "--capture", type=Path, metavar="DIR", help="let `retrofit capture` record calibration rows"
    )
    run_parser.add_argument(
        "--load-record", type=Path, metavar="FILE", help="where the engine writes what it loaded"
    )
    run_parser.add_argument("--dry-run", action="store_true", help="print the command only")
    plan_parser = commands.add_parser("plan", help="memory of a profile; nothing is loaded")
    plan_parser.add_argument("--profile", required=True, help=f"one of {profile_names()}")
    plan_parser.add_argument("--model", type=Path, metavar="DIR", help="read its config, headers")
    plan_parser.add_argument("--json", action="store_true", help="for other programs")
    return parser.parse_args(argv)


def port(text: str) -> int:
    """Parse a TCP port."""
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"port {value}; must be in 1..65535")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = parse_arguments(argv)
    try:
        if arguments.command == "plan":
            run_plan(load_profile(arguments.profile), arguments.model, arguments.json)
        else:
            run(arguments)
    except ServeError as error:
        print(f"serve: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
