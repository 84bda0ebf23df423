"""Environment variables: the only file that reads them, and what vLLM is started with."""

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from serve.errors import ConfigError
from serve.profiles import Device, Profile

PLUGIN = "dsv4_maxq"
PREFIX = "SERVE_"  # of variables that are settings, see settings.py
ENV_LINE = re.compile(
    r"""(?:export\s+)?(?P<name>[A-Za-z_]\w*)\s*=\s*
    (?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^"'].*?|))(?:\s+\#.*)?""",
    re.VERBOSE,
)
LOAD_RECORD = "DSV4_LOAD_RECORD"  # read by the plugin, see kernels/load_record.py
API_KEY = "VLLM_API_KEY"  # read by vLLM itself, which takes it from OpenAI's clients alone
CAPTURE_DIR = "DSV4_CAPTURE_DIR"  # read by the plugin, see kernels/capture.py


def engine_environment(
    profile: Profile,
    base: Mapping[str, str] | None = None,
    capture: Path | None = None,
    load_record: Path | None = None,
) -> dict[str, str]:
    """Return the environment of the vLLM process: `base` and what the profile adds.

    Raises:
        ConfigError: VLLM_PLUGINS is set and leaves out our plugin, without which vLLM has no
            DeepSeek-V4 operators on this CPU.
    """
    env = dict(os.environ if base is None else base)
    plugins = env.get("VLLM_PLUGINS")
    if plugins is not None and PLUGIN not in plugins.split(","):
        raise ConfigError(f"VLLM_PLUGINS = {plugins!r}; must include {PLUGIN}, or be unset")
    return env | added_environment(profile, capture, load_record)


def added_environment(
    profile: Profile, capture: Path | None = None, load_record: Path | None = None
) -> dict[str, str]:
    """Return the variables that the profile sets, whatever the caller's environment says."""
    added = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    added["PYTHONFAULTHANDLER"] = "1"  # an abort writes the stacks, see evidence.py
    if profile.device is Device.CPU:
        added |= {
            "OMP_NUM_THREADS": str(profile.cpu_num_threads),
            "VLLM_CPU_KVCACHE_SPACE": str(profile.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes share the cores
        }
    if load_record is not None:
        added[LOAD_RECORD] = str(load_record.resolve())
    if capture is not None:
        added[CAPTURE_DIR] = str(capture.resolve())
    return added


def api_key(environment: Mapping[str, str] | None = None) -> str | None:
    """The key that vLLM would ask for by itself."""
    return (os.environ if environment is None else environment).get(API_KEY) or None


def load_record_path(port: int) -> Path:
    """Where the engine says what it loaded: the variable's path, or one for each port."""
    if given := os.environ.get(LOAD_RECORD):
        return Path(given)
    return run_path(f"load-{port}.json")


def run_path(name: str) -> Path:
    """Where a file of a running server is: in a folder of this user's."""
    return Path(tempfile.gettempdir()) / f"dsv4-maxq-{os.getuid()}" / name


def cache_path(name: str) -> Path:
    """Where a file is that outlives the server: in this user's cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(folder) / "dsv4-maxq" / name


def given_variables(names: Iterable[str]) -> dict[str, str]:
    """Those of the named variables that the caller has set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def our_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that are settings of ours, from the environment."""
    given = os.environ if environment is None else environment
    return {name: value for name, value in given.items() if name.startswith(PREFIX)}


def read_env_file(path: Path, prefix: str = PREFIX) -> dict[str, str]:
    """Our settings in a file of NAME=VALUE lines, as docker compose reads; others are not ours.

    A file that is not there is an empty one. Values may be quoted; ` #` starts a comment.
    prefix: of the names that are wanted.

    Raises:
        ConfigError: a line of another form, or a name given twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = ENV_LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(f"{path}: line {number}: must be NAME=VALUE")
        name = match["name"]
        if not name.startswith(prefix):
            continue
        if name in found:
            raise ConfigError(f"{path}: line {number}: {name} is given twice")
        found[name] = next(
            value for value in match.group("double", "single", "bare") if value is not None
        )
    return found
