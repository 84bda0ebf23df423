"""Write .env.example and the settings in docker-compose.yml from the schema of `serve`.

    python docker/settings.py [--check]

Steps: read the schema -> render both -> compare, or write. Nothing but `serve/settings.py` and the
profiles says what settings there are, so that the files cannot differ from them unnoticed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from serve.environment import PREFIX  # noqa: E402
from serve.errors import ConfigError  # noqa: E402
from serve.profiles import DEVICE_KEYS, Profile, load_profile  # noqa: E402
from serve.settings import OWN, Setting, all_settings, profile_settings  # noqa: E402

ENV_EXAMPLE = ROOT / ".env.example"
COMPOSE = ROOT / "docker-compose.yml"
SHOWN_PROFILES = ("cpu-tiny", "524k")
BEGIN, END = "# settings: begin", "# settings: end"

# Of the container they are fixed; in .env they say where it is reached and what is mounted.
ON_THE_HOST = {
    "profile": "default: cpu-tiny in the profile cpu, 524k in gpu",
    "host": "where the port is published; 0.0.0.0: on every interface",
    "port": "published port",
    "api_key_file": "lines of NAME KEY [MAX_CONCURRENCY], readable by user 2000; none: no key",
    "model": "folder of the checkpoint on this machine: absolute, or with ./ before it",
}
IN_THE_IMAGE = {"report_dir": "/caches/reports"}

HEADER = """\
# Settings of `docker compose` and of `serve`. Copy to .env, take away the # of what you change.
# Written by `python docker/settings.py` from serve/settings.py; do not edit.

# --- compose ---
# cpu: the tiny model, any machine. gpu: two cards, the NVIDIA container toolkit.
# fleet, fleet-cpu: vLLM's router before several servers (docs/fleet.md).
# bench: a service for `docker compose run --rm bench`, beside one of these.
# monitoring: Prometheus and Grafana with the dashboard, as in COMPOSE_PROFILES=cpu,monitoring.
COMPOSE_PROFILES=cpu
# 0 with gpu, fleet and fleet-cpu: else the server of cpu starts, too.
CPU_SERVERS=1
COMPOSE_PROJECT_NAME=dsv4-maxq
# Indexes or UUIDs of the two cards, as nvidia-smi -L lists them.
# GPU_0=0
# GPU_1=1
# How long a container may take to stop; longer than SERVE_SHUTDOWN_TIMEOUT and 10 s.
# STOP_GRACE=1m
# How long the gpu server may load before its health check counts.
# START_PERIOD=30m
# Name of the images; each target is a tag.
# IMAGE=dsv4-maxq
# PROMETHEUS_PORT=9090
# GRAFANA_PORT=3000
# The image that `bench` runs in: cpu or gpu.
# BENCH_IMAGE=cpu
# Servers behind the router of the profile fleet.
# FLEET_WORKERS=http://host-a:8000 http://host-b:8000
"""


def shown(value: Any) -> str:
    """A value as the settings take it from an environment variable."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def own_lines(setting: Setting) -> list[str]:
    """The lines of a setting that no profile has."""
    text = ON_THE_HOST.get(setting.name, setting.help)
    default = "" if setting.default is None else shown(setting.default)
    return [f"# {text}", f"# {setting.variable}={default}"]


def profile_lines(setting: Setting) -> list[str]:
    """The lines of a setting that a profile has, with what it is in the two default ones."""
    profiles: dict[str, Profile] = {name: load_profile(name) for name in SHOWN_PROFILES}
    values = [
        f"{name}: {shown(getattr(profile, setting.name))}"
        for name, profile in profiles.items()
        if setting.name not in other_device(profile)
    ]
    text = ON_THE_HOST.get(setting.name) or "; ".join(values)
    return [f"# {text}", f"# {setting.variable}="]


def other_device(profile: Profile) -> set[str]:
    """The keys that a profile does not have, because they are of another device."""
    return {key for kind, keys in DEVICE_KEYS.items() if kind is not profile.device for key in keys}


def check_names(names: Iterable[str], source: str) -> None:
    """Refuse what compose would not pass on, so that `serve` cannot.

    Raises:
        ConfigError: a name with our prefix that is no setting, or one that the image decides.
    """
    known = {setting.variable: setting.name for setting in all_settings().values()}
    for name in sorted(name for name in names if name.startswith(PREFIX)):
        if name not in known:
            raise ConfigError(f"{source}: {name}: no such setting; .env.example has all of them")
        if fixed := IN_THE_IMAGE.get(known[name]):
            raise ConfigError(f"{source}: {name}: is {fixed} in the container")


def env_example() -> str:
    """The text of .env.example."""
    settings = all_settings()
    parts = [HEADER, "\n# --- serve ---\n"]
    for setting in (settings["profile"], *OWN):
        if setting.name not in IN_THE_IMAGE:
            parts.append("\n".join(own_lines(setting)) + "\n")
    parts.append("\n# --- instead of the profile's ---\n")
    for setting in profile_settings():
        parts.append("\n".join(profile_lines(setting)) + "\n")
    return "".join(parts)


def compose_block() -> str:
    """The settings that are passed on, as the lines between the two marks in docker-compose.yml."""
    kept = [
        setting.variable
        for setting in all_settings().values()
        if setting.name not in (*ON_THE_HOST, *IN_THE_IMAGE)
    ]
    return "\n".join([f"x-settings: &settings  {BEGIN}", *(f"  {name}:" for name in kept), END])


def compose(text: str) -> str:
    """docker-compose.yml with the settings of the schema.

    Raises:
        ValueError: the marks are not there.
    """
    head, found, rest = text.partition("x-settings: &settings")
    inside, closed, tail = rest.partition(END)
    if not (found and closed and BEGIN in inside):
        raise ValueError(f"{COMPOSE.name}: needs `x-settings: &settings`, {BEGIN!r} and {END!r}")
    return head + compose_block() + tail


def main(argv: list[str] | None = None) -> int:
    """Write the files, or say which differ."""
    parser = argparse.ArgumentParser(prog="settings.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    arguments = parser.parse_args(argv)
    old = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in FILES}
    new = {ENV_EXAMPLE: env_example(), COMPOSE: compose(old[COMPOSE])}
    stale = [path for path in FILES if old[path] != new[path]]
    for path in stale:
        if arguments.check:
            print(
                f"{path.name}: is not what serve/settings.py says; run python docker/settings.py",
                file=sys.stderr,
            )
            continue
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(new[path], encoding="utf-8")
        partial.replace(path)
        print(f"{path.name}: written")
    return 1 if arguments.check and stale else 0


FILES = (ENV_EXAMPLE, COMPOSE)

if __name__ == "__main__":
    sys.exit(main())
