"""`python -m serve`: check the profile, the checkpoint and the engine, then run or become vLLM."""

import argparse
import os
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kernels.folder_lock import FolderHeld, check_free
from serve.allreduce_tier import AUTO, FILE_NAME, AllReduce, Choice, Tiers
from serve.bug_report import add_report, run_report
from serve.checkpoint import check_checkpoint, read_json
from serve.command import vllm_command
from serve.doctor.report import add_doctor, run_doctor
from serve.engine import REPOSITORY, check_engine, check_wheel
from serve.environment import (
    API_KEY,
    added_environment,
    api_key,
    cache_path,
    engine_environment,
    load_record_path,
    our_variables,
    read_env_file,
    run_path,
)
from serve.errors import ConfigError, ServeError
from serve.keys import Access, Key, Keys, read_keys
from serve.plan import check_split, run_plan
from serve.profiles import Device, load_profile, profile_names
from serve.settings import (
    GatewayMode,
    MoeBackend,
    Settings,
    add_env_file,
    add_flags,
    resolve,
)
from serve.summary import summary
from serve.supervisor import write_to_stdout
from serve.table import run_profiles


def run(arguments: argparse.Namespace) -> int:
    """settings -> command -> check_* -> print -> serve, or become vLLM."""
    settings = resolve(vars(arguments), our_variables(), read_env_file(arguments.env_file))
    profile = settings.profile
    model = settings.model
    capture = arguments.capture
    if capture is not None and profile.num_speculative_tokens != 1:
        raise ConfigError(
            f"--capture: num_speculative_tokens = {profile.num_speculative_tokens}; must be 1, so "
            "that the experts' inputs do not depend on the head's own experts"
        )
    # A restarted engine would record the same prompts twice.
    default = GatewayMode.ON if capture is None else GatewayMode.OFF
    bare = (settings["gateway"] or default) is GatewayMode.OFF
    host, port = settings["host"], settings["port"]
    uds = None if bare else run_path(f"engine-{port}.sock")
    record = (arguments.load_record or load_record_path(port)).resolve()
    keys = find_keys(settings["api_key_file"], bare)
    check_access(settings, keys)
    if not arguments.dry_run:
        prepare_run_folder(run_path("."))
        if capture is not None:
            prepare_capture(capture)
        check_port(host, port)
        check_checkpoint(model, profile.num_speculative_tokens)
        if profile.tensor_parallel_size > 1:
            check_split(read_json(model / "config.json"), profile)
        check_engine()
        check_wheel(profile.device)
        prepare_record(record)
    check_moe_backend(settings)
    all_reduce = choose_all_reduce(settings, probe=not arguments.dry_run)
    base = engine_environment(profile, capture=capture, load_record=record)
    if uds is not None:
        base.pop(API_KEY, None)  # the gateway asks for it

    def start(choice: Choice | None) -> tuple[list[str], dict[str, str]]:
        command = vllm_command(
            profile,
            model,
            host,
            port,
            profile.num_speculative_tokens,
            capture is not None,
            uds,
            settings["sse_keep_alive_interval"],
            settings["otlp_traces_endpoint"],
            choice.tier if choice else None,
            settings["moe_backend"],
        )
        return command, base | (choice.environment if choice else {})

    choice = all_reduce.choice if all_reduce else None
    command, env = start(choice)
    added = added_environment(profile, capture, record) | (choice.environment if choice else {})
    shown = [f"{name}={value}" for name, value in sorted(added.items())]
    for line in settings.changed():
        print(f"serve: {line}", file=sys.stderr, flush=True)
    print(shlex.join(shown + command), flush=True)
    if arguments.dry_run:
        return 0
    if uds is not None:
        return run_front(
            settings,
            keys,
            record,
            command,
            env,
            uds,
            lambda: print_summary(record, model),
            Tiers(all_reduce, start) if all_reduce else None,
        )
    start_summary(record, model, host, port)
    os.execve(command[0], command, env)
    return 0  # only where a test keeps execve from taking this process


def check_moe_backend(settings: Settings) -> None:
    """Refuse a choice of experts where there is none.

    Raises:
        ConfigError: the profile is for the CPU.
    """
    backend, device = settings["moe_backend"], settings.profile.device
    if backend is not MoeBackend.AUTO and device is not Device.CUDA:
        raise ConfigError(
            f"moe_backend = {backend.value} ({settings.sources['moe_backend'].value}): device = "
            f"{device.value}; only GPUs have a choice. Leave it at {MoeBackend.AUTO.value}"
        )


def choose_all_reduce(settings: Settings, probe: bool) -> AllReduce | None:
    """How two cards reduce; None for any other number, and on the CPU.

    Raises:
        ConfigError: one is asked for where there are not two cards.
        TierError: the one that is asked for is not proven, or none is.
    """
    profile = settings.profile
    if profile.device is not Device.CUDA or profile.tensor_parallel_size != 2:
        if settings["allreduce"] != AUTO:
            raise ConfigError(
                f"allreduce = {settings['allreduce']} ({settings.sources['allreduce'].value}): "
                f"device = {profile.device.value}, tensor_parallel_size = "
                f"{profile.tensor_parallel_size}; only two cards have a choice. Leave it at {AUTO}"
            )
        return None

    def say(text: str) -> None:
        print(f"serve: {text}", file=sys.stderr, flush=True)

    path = cache_path(FILE_NAME)
    all_reduce = AllReduce.of_this_machine(path, settings["allreduce"], say, probe)
    say(f"all-reduce: {all_reduce.choice.tier.value}: {all_reduce.choice.reason}")
    return all_reduce


def find_keys(path: Path | None, bare: bool) -> Keys | None:
    """Who may send requests; None is everybody.

    Raises:
        ConfigError: the file is no good, or nobody would ask for its keys.
    """
    own = api_key()
    if path is None:
        return Keys([(Key("default"), own)]) if own and not bare else None
    if bare:
        raise ConfigError("api_key_file: --gateway off: vLLM does not read it; set VLLM_API_KEY")
    if own:
        raise ConfigError("api_key_file: VLLM_API_KEY is set, too; one of them must go")
    return read_keys(path)


def check_access(settings: Settings, keys: Keys | None) -> None:
    """Refuse pages that need a key where everybody would get them.

    Raises:
        ConfigError: there is no key, or no gateway to ask for it.
    """
    for name in ("status_access", "metrics_access"):
        if settings[name] is Access.KEY and keys is None:
            raise ConfigError(
                f"{name} = key ({settings.sources[name].value}): nobody would ask for one; it "
                "needs the gateway, and api_key_file or VLLM_API_KEY"
            )


def run_front(
    settings: Settings,
    keys: Keys | None,
    record: Path,
    command: list[str],
    env: dict[str, str],
    uds: Path,
    on_ready: Callable[[], None],
    tiers: Tiers | None,
) -> int:
    """Serve from this process, with vLLM as its child."""
    from serve import front  # FastAPI: the other commands do without

    config = front.FrontConfig(
        host=settings["host"],
        port=settings["port"],
        socket_path=uds,
        shutdown_timeout=settings["shutdown_timeout"],
        slow_client_s=settings["slow_client_timeout"],
        profile=settings.profile,
        max_head_bytes=settings["max_header_bytes"],
        load_record=record,
        keys=keys,
        status_access=settings["status_access"],
        metrics_access=settings["metrics_access"],
        log_format=settings["log_format"],
        admission=front.AdmissionLimits(
            streams=settings.profile.max_num_seqs,
            max_num_queued_reqs=settings["max_num_queued_reqs"],
            max_num_queued_tokens=settings["max_num_queued_tokens"]
            or 2 * settings.profile.max_model_len,
            max_body_bytes=settings["max_body_bytes"],
        ),
        watch=front.WatchConfig(
            report_dir=settings["report_dir"] or run_path("reports"),
            model=settings.profile.served_model_name,
            stall_timeout_s=settings["stall_timeout"],
            canary_interval_s=settings["canary_interval"],
            start_stall_timeout_s=settings["start_stall_timeout"],
            start_step_timeout_s=settings["start_step_timeout"],
        ),
    )
    front.check_socket_path(uds)
    sock = front.listen(config.host, config.port, config.slow_client_s)
    return front.run(front.serve(config, command, env, sock, on_ready, tiers))


def print_summary(record: Path, model: Path) -> None:
    """Print what the engine loaded. Past Python's buffer: where nobody reads, its lock would be
    held when the server ends.
    """
    write_to_stdout(f"{summary(record, str(model))}\n".encode())


def prepare_run_folder(folder: Path) -> None:
    """Make the folder of the engine's socket, the load record and the dumps.

    Raises:
        ConfigError: it cannot be made, or others can write there: a socket of theirs in the place
            of the engine's would get every prompt.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    own = found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077 == 0
    if not (stat.S_ISDIR(found.st_mode) and own):
        raise ConfigError(
            f"{folder}: {stat.filemode(found.st_mode)} of user {found.st_uid}; must be a folder "
            f"that user {os.getuid()} alone can use; remove it"
        )


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
    add_flags(run_parser)
    add_env_file(run_parser)
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
    table_parser = commands.add_parser("profiles", help="what each needs; does it fit here")
    table_parser.add_argument("--json", action="store_true", help="for other programs")
    add_doctor(commands)
    add_report(commands)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = parse_arguments(argv)
    try:
        if arguments.command == "plan":
            run_plan(load_profile(arguments.profile), arguments.model, arguments.json)
        elif arguments.command == "profiles":
            run_profiles(arguments.json)
        elif arguments.command == "doctor":
            return run_doctor(arguments)
        elif arguments.command == "report":
            return run_report(arguments)
        else:
            return run(arguments)
    except ServeError as error:
        print(f"serve: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
