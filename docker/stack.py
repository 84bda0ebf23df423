"""Start, stop and watch the containers: what `make up`, `make down` and `make logs` call.

    python docker/stack.py up [--report FILE] | down | logs

`up`: choose cpu or gpu and say why -> write .env where there is none -> build the image where there
is none -> docker compose up -> show the stage until the server is ready or a container has ended.
--report adds the seconds from `docker compose up` to ready to FILE, a report of docker/image.py.
Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import engine  # noqa: E402
import health  # noqa: E402
import settings  # noqa: E402

from serve.environment import read_env_file  # noqa: E402
from serve.errors import ConfigError  # noqa: E402

PROFILES_VARIABLE = "COMPOSE_PROFILES"
CPU_VARIABLE = "CPU_SERVERS"
INSTEAD_OF_CPU = {"gpu", "fleet", "fleet-cpu"}
ALL_PROFILES = ("cpu", "gpu", "fleet", "fleet-cpu", "bench", "monitoring")
IMAGES = {
    "cpu": ("cpu",),
    "gpu": ("gpu",),
    "fleet": ("router",),
    "fleet-cpu": ("router", "cpu"),
}
ENV_FILE = ROOT / ".env"
QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")
COMPUTE_CAPABILITY = "12.0"  # sm_120a: what the kernels are compiled for beside sm_90
MIN_CARD_MIB = 90 * 1024
NUM_CARDS = 2
POLL_S = 1.0
ENDED = {"restarting", "exited", "dead"}
LOOPBACK = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1"}


@dataclass(frozen=True)
class Choice:
    """A profile of docker-compose.yml and the reason for it, in words."""

    profile: str
    reason: str


def choose() -> Choice:
    """gpu where two suitable cards and the container toolkit are found, else cpu."""
    try:
        asked = subprocess.run(QUERY, capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        return Choice("cpu", "there is no nvidia-smi")
    except (OSError, subprocess.SubprocessError) as error:
        return Choice("cpu", f"nvidia-smi does not answer: {error}")
    return choose_by(asked.stdout, has_toolkit())


def choose_by(cards: str, toolkit: bool) -> Choice:
    """The choice for nvidia-smi's lines `name, compute capability, MiB`."""
    rows = [[field.strip() for field in line.split(",")] for line in cards.splitlines() if line]
    fit = [
        row[0]
        for row in rows
        if len(row) == 3 and row[1] == COMPUTE_CAPABILITY and int(row[2]) >= MIN_CARD_MIB
    ]
    if len(fit) < NUM_CARDS:
        seen = ", ".join(" ".join(row) for row in rows) or "none"
        return Choice(
            "cpu",
            f"{len(fit)} of {NUM_CARDS} cards with compute capability {COMPUTE_CAPABILITY} and "
            f"{MIN_CARD_MIB // 1024} GiB (found: {seen})",
        )
    if not toolkit:
        return Choice(
            "cpu",
            f"{len(fit)} x {fit[0]}, but no NVIDIA container toolkit: Docker has no runtime "
            "`nvidia`, and there is no nvidia-ctk",
        )
    return Choice("gpu", f"{len(fit)} x {fit[0]} and the NVIDIA container toolkit")


def has_toolkit() -> bool:
    """Whether containers can be given GPUs here."""
    if shutil.which("nvidia-ctk"):
        return True
    return "nvidia" in json.loads(engine.ask("info", "--format", "{{json .Runtimes}}"))


def variables() -> dict[str, str]:
    """What compose reads: .env, and the environment above it.

    Raises:
        ConfigError: .env cannot be read, or one of them has a setting that reaches no container.
    """
    found = read_env_file(ENV_FILE, prefix="")
    settings.check_names(found, ENV_FILE.name)
    settings.check_names(os.environ, "environment")
    return found | os.environ


def prepare() -> dict[str, str]:
    """The variables to start with; .env is written where there is none, and never changed."""
    known = variables()
    if known.get(PROFILES_VARIABLE):
        where = "the environment" if PROFILES_VARIABLE in os.environ else ".env"
        print(f"up: profile {known[PROFILES_VARIABLE]} ({where})", flush=True)
        return known | selection(known[PROFILES_VARIABLE])
    choice = choose()
    print(f"up: profile {choice.profile}: {choice.reason}", flush=True)
    if not ENV_FILE.exists():
        text, default = settings.env_example(), selection("cpu")
        for name, value in selection(choice.profile).items():
            text = text.replace(f"{name}={default[name]}\n", f"{name}={value}\n")
        partial = ENV_FILE.with_name(".env.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(ENV_FILE)
        print("up: wrote .env; its settings are explained there", flush=True)
        return variables()
    return known | selection(choice.profile)


def selection(profiles: str) -> dict[str, str]:
    """What compose needs to start these profiles and nothing else."""
    others = INSTEAD_OF_CPU.intersection(profiles.split(","))
    return {PROFILES_VARIABLE: profiles, CPU_VARIABLE: "0" if others else "1"}


def up(report: Path | None = None) -> int:
    """prepare -> images -> compose up -> wait_until_ready -> the time into the report."""
    known = prepare()
    data = json.loads(report.read_text(encoding="utf-8")) if report else {}
    profiles = known[PROFILES_VARIABLE].split(",") + ["cpu"] * int(known[CPU_VARIABLE])
    name = known.get("IMAGE", "dsv4-maxq")
    for target in dict.fromkeys(image for p in profiles for image in IMAGES.get(p, ())):
        if engine.inspect(f"{name}:{target}") is None:
            build = [sys.executable, str(HERE / "image.py"), target]
            if code := subprocess.run(build, env=known, check=False).returncode:
                return code
    begin = time.monotonic()
    command = [*engine.compose(), "up", "--detach", "--no-build"]
    if code := subprocess.run(command, cwd=ROOT, env=known, check=False).returncode:
        return code
    host = known.get("SERVE_HOST", "")
    address = LOOPBACK.get(host, host), int(known.get("SERVE_PORT") or 8000)
    code = wait_until_ready(*address, begin, containers(known))
    if report and code == 0:
        data["up_to_ready_s"] = round(time.monotonic() - begin, 1)
        partial = report.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(report)
    return code


def containers(known: dict[str, str]) -> list[str]:
    """The ids of what compose runs.

    Raises:
        engine.DockerError: nothing.
    """
    command = [*engine.compose(), "ps", "--quiet"]
    asked = subprocess.run(
        command, cwd=ROOT, env=known, stdout=subprocess.PIPE, text=True, check=False
    )
    if not (ids := asked.stdout.split()):
        raise engine.DockerError(
            f"up: {PROFILES_VARIABLE} = {known[PROFILES_VARIABLE]}, {CPU_VARIABLE} = "
            f"{known[CPU_VARIABLE]}: no container runs"
        )
    return ids


def ended(ids: Sequence[str], restarts: dict[str, int]) -> str | None:
    """Which container ended by itself, with its last line; None while all run.

    Args:
        restarts: of each container at the first look, filled in here. After a run of 10 s Docker
            waits for 0.1 s only, so that its state between two runs may never be seen.
    """
    for found in json.loads(engine.ask("container", "inspect", *ids)):
        state, count = found["State"], found["RestartCount"]
        again = count > restarts.setdefault(found["Id"], count) or state["Status"] == "restarting"
        if again or state["Status"] in ENDED:
            service = found["Config"]["Labels"]["com.docker.compose.service"]
            code = f" with exit status {state['ExitCode']}" if state["Status"] in ENDED else ""
            more = " and is started again" if again else ""
            return f"{service} ended{code}{more}: {engine.last_line(found['Id'])}"
    return None


def wait_until_ready(host: str, port: int, begin: float, ids: Sequence[str]) -> int:
    """Show the stage and the seconds since `begin` until the server is ready (0).

    Returns:
        1 where the engine failed for good, or one of the containers `ids` ended.
    """
    shown = ""
    restarts: dict[str, int] = {}
    while True:
        ready, said = ask_ready(host, port)
        if said != shown:
            print(f"up: {time.monotonic() - begin:4.0f} s  {said}", flush=True)
            shown = said
        if ready:
            print(f"up: http://{host}:{port}/v1 answers; `make logs`, `make down`")
            return 0
        if said.startswith("failed"):
            print("up: the engine failed and is not restarted; see `make logs`", file=sys.stderr)
            return 1
        if reason := ended(ids, restarts):
            print(f"up: {reason}", file=sys.stderr)
            print("up: `make logs` shows more, `make down` ends it", file=sys.stderr)
            return 1
        time.sleep(POLL_S)


def ask_ready(host: str, port: int) -> tuple[bool, str]:
    """Whether the server, or the router before it, takes requests; and the stage in words."""
    try:
        status, body = health.ask(host, port)
    except (OSError, http.client.HTTPException):
        return False, "the container starts"
    data = {}
    with contextlib.suppress(ValueError):
        data = json.loads(body)
    stage = str(data.get("stage", "")) if isinstance(data, dict) else ""
    progress = data.get("progress") if isinstance(data, dict) else None
    if progress:
        stage += f", {progress['what']} {progress['done']}/{progress['total']}"
    return status == 200, stage or f"status {status}"


def compose(*arguments: str) -> int:
    """Run compose over everything that any profile started."""
    everything = {**os.environ, PROFILES_VARIABLE: ",".join(ALL_PROFILES)}
    command = [*engine.compose(), *arguments]
    return subprocess.run(command, cwd=ROOT, env=everything, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="stack.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("up", "down", "logs"))
    parser.add_argument("--report", type=Path, metavar="FILE", help="of `make image REPORT=FILE`")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "up":
            return up(arguments.report)
        if arguments.command == "down":
            return compose("down")
        return compose("logs", "--follow", "--tail", "100")
    except ConfigError as error:
        print(f"up: {error}", file=sys.stderr)
        return error.exit_code
    except (engine.DockerError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
