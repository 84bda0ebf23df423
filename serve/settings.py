"""Where each setting comes from: flag, then environment, then .env, then profile, then default."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from serve.allreduce_tier import AUTO, Tier
from serve.engine import REPOSITORY
from serve.environment import PREFIX
from serve.errors import ConfigError
from serve.keys import Access
from serve.log import LogFormat
from serve.profiles import DEVICE_KEYS, Profile, load_profile, profile_names

BOOLEANS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


class Source(StrEnum):
    """In the order in which they are asked; the first that gives a value decides."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    FILE = ".env"
    PROFILE = "profile"
    DEFAULT = "default"


class GatewayMode(StrEnum):
    """Whether vLLM runs behind our front or takes this process's place."""

    ON = "on"
    OFF = "off"


class MoeBackend(StrEnum):
    """vLLM's --moe-backend values for this model's INT4 experts."""

    AUTO = "auto"  # ours where a measured table says so, see docs/kernels.md
    MARLIN = "marlin"  # vLLM's own
    EXTERNAL = "external"  # ours


def port(text: str) -> int:
    """A TCP port."""
    value = int(text)
    if not 1 <= value <= 65535:
        raise ValueError("must be in 1..65535")
    return value


def seconds(text: str) -> float:
    """A positive number of seconds."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError("must be a positive number of seconds")
    return value


def count(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def boolean(text: str) -> bool:
    """true/false, on/off, 1/0."""
    if text.lower() not in BOOLEANS:
        raise ValueError(f"must be one of {', '.join(BOOLEANS)}")
    return BOOLEANS[text.lower()]


def endpoint(text: str) -> str:
    """An address without credentials: it is printed and in the engine's arguments."""
    if "@" in text:
        raise ValueError("must be without user and password")
    return text


def all_reduce(text: str) -> str:
    """auto, or the name of a tier."""
    if text not in (names := [AUTO, *(tier.value for tier in Tier)]):
        raise ValueError(f"must be one of {', '.join(names)}")
    return text


@dataclass(frozen=True)
class Setting:
    """parse raises ValueError with the rule as its text. default None: the profile has it."""

    name: str
    parse: Callable[[str], Any]
    help: str
    default: Any = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


OWN = (
    Setting("host", str, "where to listen", "127.0.0.1"),
    Setting("port", port, "where to listen", 8000),
    Setting("gateway", GatewayMode, "off: become vLLM instead of running it; default on"),
    Setting(
        "shutdown_timeout", seconds, "seconds that running requests may take after SIGTERM", 30.0
    ),
    Setting(
        "slow_client_timeout",
        seconds,
        "seconds until a client that takes or sends nothing is let go",
        60.0,
    ),
    Setting(
        "stall_timeout", seconds, "seconds until an engine without progress is restarted", 120.0
    ),
    Setting(
        "start_stall_timeout",
        seconds,
        "seconds until a start without a sign of work is ended",
        900.0,
    ),
    Setting("start_step_timeout", seconds, "the same between two shards, two graphs", 300.0),
    Setting(
        "canary_interval",
        seconds,
        "seconds between requests for one token to an idle engine",
        300.0,
    ),
    Setting("max_num_queued_reqs", count, "requests that may wait beside the running ones", 16),
    Setting("max_num_queued_tokens", count, "prompt tokens that may wait; default 2 windows"),
    Setting("max_body_bytes", count, "of one request", 16 * 2**20),
    Setting("max_header_bytes", count, "of one request's line and headers", 65536),
    Setting("api_key_file", Path, "lines of NAME KEY [MAX_CONCURRENCY]; none: everybody is served"),
    Setting("status_access", Access, "key: /status.json needs one", Access.OPEN),
    Setting("metrics_access", Access, "key: /metrics needs one", Access.OPEN),
    Setting("log_format", LogFormat, "json or text", LogFormat.JSON),
    Setting("sse_keep_alive_interval", count, "seconds after which a silent stream says so", 15),
    Setting("otlp_traces_endpoint", endpoint, "where vLLM sends OpenTelemetry traces"),
    Setting(
        "moe_backend",
        MoeBackend,
        "of the experts on GPUs: auto, marlin (vLLM's own) or external (ours)",
        MoeBackend.AUTO,
    ),
    Setting("allreduce", all_reduce, "of two cards: auto, or a tier of docs/hardware.md", AUTO),
    Setting("report_dir", Path, "where dumps of a stalled engine go"),
)


def profile_settings() -> tuple[Setting, ...]:
    """Each key of a profile but its name and device: vLLM's flags under their names."""
    parsers: dict[Any, Callable[[str], Any]] = {bool: boolean, Path: Path}
    return tuple(
        Setting(field.name, parsers.get(field.type, field.type), "instead of the profile's")
        for field in fields(Profile)
        if field.name not in ("name", "device")
    )


def all_settings() -> dict[str, Setting]:
    """By name, the profile's name among them."""
    known = (Setting("profile", str, f"one of {profile_names()}"), *OWN, *profile_settings())
    return {setting.name: setting for setting in known}


@dataclass(frozen=True)
class Settings:
    """The values in force and where each came from."""

    profile: Profile
    values: Mapping[str, Any]
    sources: Mapping[str, Source]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def model(self) -> Path:
        """The checkpoint's folder; a profile names one of this repository."""
        if self.sources["model"] is Source.PROFILE:
            return REPOSITORY / self.profile.model
        return Path(self.profile.model)

    def changed(self) -> list[str]:
        """Lines for each value that neither the profile nor a default gave."""
        return [
            f"{name} = {getattr(value, 'value', value)} ({self.sources[name].value})"
            for name, value in sorted(self.values.items())
            if self.sources[name] not in (Source.PROFILE, Source.DEFAULT)
        ]


def parse(setting: Setting, text: str, source: str) -> Any:
    """The value of a setting's text.

    Raises:
        ConfigError: with the place, the text and the rule. What stands before an @ is not shown.
    """
    try:
        return setting.parse(text)
    except ValueError as error:
        rule = str(error)
        if isinstance(setting.parse, type) and issubclass(setting.parse, Enum):
            rule = "must be one of " + ", ".join(member.value for member in setting.parse)
        elif setting.parse is not boolean and not rule.startswith("must"):
            rule = "must be a number"
        head, at, tail = text.rpartition("@")
        shown = f"...{at}{tail}" if head else text
        raise ConfigError(f"{source} = {shown!r}; {rule}") from None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; an absent one is None."""
    for setting in all_settings().values():
        if setting.parse is boolean:
            parser.add_argument(
                setting.flag,
                action=argparse.BooleanOptionalAction,
                default=None,
                help=setting.help,
            )
            continue
        shown = setting.help + (f" ({setting.default})" if setting.default is not None else "")
        parser.add_argument(setting.flag, metavar="X", help=shown)


def add_env_file(parser: argparse.ArgumentParser) -> None:
    """Where the settings are that neither a flag nor the environment gives."""
    parser.add_argument(
        "--env-file", type=Path, metavar="FILE", default=Path(".env"), help="settings; .env"
    )


def resolve(
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Mapping[str, str],
) -> Settings:
    """Take each setting from the first source that has it.

    Args:
        flags: by name of the setting: text, a bool, or None where the flag is absent.
        environment, file: variables that start with our prefix.

    Raises:
        ConfigError: an unknown variable, a bad value, no profile, or a key of the other device.
    """
    known = all_settings()
    variables = {setting.variable: setting for setting in known.values()}
    given: dict[str, tuple[Any, Source]] = {}
    for source, mapping in ((Source.FILE, file), (Source.ENVIRONMENT, environment)):
        for variable, text in mapping.items():
            if variable not in variables:
                raise ConfigError(f"{source.value}: {variable}: no such setting")
            setting = variables[variable]
            where = f"{source.value}: {variable}"
            given[setting.name] = (parse(setting, text, where), source)
    for name, setting in known.items():
        value = flags.get(name)
        if value is not None:
            parsed = parse(setting, value, setting.flag) if isinstance(value, str) else value
            given[name] = (parsed, Source.FLAG)
    if "profile" not in given:
        raise ConfigError(f"profile: none given; one of {profile_names()}")
    profile = load_profile(given["profile"][0])
    names = [setting.name for setting in profile_settings()]
    changes = {name: given[name][0] for name in names if name in given}
    other = {
        key for kind, keys in DEVICE_KEYS.items() if kind is not profile.device for key in keys
    }
    if wrong := sorted(other & changes.keys()):
        raise ConfigError(
            f"{wrong[0]} ({given[wrong[0]][1].value}): profile {profile.name} is for "
            f"{profile.device.value} and has no such setting"
        )
    profile = replace(profile, **changes)
    values = {setting.name: setting.default for setting in OWN}
    sources = dict.fromkeys(values, Source.DEFAULT) | dict.fromkeys(names, Source.PROFILE)
    values |= {name: getattr(profile, name) for name in names if name not in other}
    for name, (value, source) in given.items():
        values[name] = getattr(profile, name) if name in names else value
        sources[name] = source
    return Settings(profile, values, sources)
