"""Profiles: one TOML file per deployment, checked into a frozen dataclass."""

import tomllib
from dataclasses import dataclass, fields
from enum import Enum, StrEnum
from pathlib import Path

from serve.errors import ConfigError

PROFILE_DIR = Path(__file__).parent / "profiles"
MAX_SPECULATIVE_TOKENS = 3
_POSITIVE = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")


class Device(StrEnum):
    """What the engine runs on."""

    CPU = "cpu"
    CUDA = "cuda"


# Keys that a profile has for its device only; the fields of the other one are zero.
DEVICE_KEYS = {
    Device.CPU: ("cpu_kv_cache_gib", "cpu_num_threads"),
    Device.CUDA: ("tensor_parallel_size", "gpu_memory_utilization"),
}


class KvCacheDtype(StrEnum):
    """vLLM's --kv-cache-dtype values that DeepSeek-V4 accepts."""

    AUTO = "auto"
    FP8 = "fp8"
    FP8_DS_MLA = "fp8_ds_mla"


class ReasoningParser(StrEnum):
    """vLLM's --reasoning-parser values for this model."""

    DEEPSEEK_V4 = "deepseek_v4"


class ToolCallParser(StrEnum):
    """vLLM's --tool-call-parser values for this model."""

    DEEPSEEK_V4 = "deepseek_v4"


@dataclass(frozen=True)
class Profile:
    """What the server runs with. Fields that share a vLLM flag's name mean what the flag means."""

    name: str
    device: Device
    model: str
    served_model_name: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int
    block_size: int
    kv_cache_dtype: KvCacheDtype
    num_speculative_tokens: int
    enforce_eager: bool
    reasoning_parser: ReasoningParser
    tool_call_parser: ToolCallParser
    enable_auto_tool_choice: bool
    enable_scale_out: bool
    thinking: bool
    cpu_kv_cache_gib: int = 0
    cpu_num_threads: int = 0
    tensor_parallel_size: int = 0
    gpu_memory_utilization: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            kind = field.type
            value = getattr(self, field.name)
            if isinstance(kind, type) and issubclass(kind, Enum):
                allowed = [member.value for member in kind]
                if value not in allowed:
                    raise self._error(field.name, value, f"must be one of {', '.join(allowed)}")
                object.__setattr__(self, field.name, kind(value))
            elif type(value) is not kind:
                raise self._error(field.name, value, f"must be of type {kind.__name__}")
            elif kind is str and not value:
                raise self._error(field.name, value, "must not be empty")
        counts = [key for key in DEVICE_KEYS[self.device] if key != "gpu_memory_utilization"]
        for name in (*_POSITIVE, *counts):
            if getattr(self, name) < 1:
                raise self._error(name, getattr(self, name), "must be at least 1")
        if self.device is Device.CUDA and not 0 < self.gpu_memory_utilization < 1:
            raise self._error(
                "gpu_memory_utilization", self.gpu_memory_utilization, "must be between 0 and 1"
            )
        if not 0 <= self.long_prefill_token_threshold <= self.max_num_batched_tokens:
            raise self._error(
                "long_prefill_token_threshold",
                self.long_prefill_token_threshold,
                f"must be in 0..max_num_batched_tokens ({self.max_num_batched_tokens})",
            )
        if self.block_size != 256:
            raise self._error("block_size", self.block_size, "DeepSeek-V4 takes 256 only")
        if not 0 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise self._error(
                "num_speculative_tokens",
                self.num_speculative_tokens,
                f"must be in 0..{MAX_SPECULATIVE_TOKENS}",
            )

    def _error(self, key: str, value: object, rule: str) -> ConfigError:
        shown = value.value if isinstance(value, Enum) else value
        return ConfigError(f"profile {self.name}: {key} = {shown!r}; {rule}")


def profile_names(folder: Path = PROFILE_DIR) -> list[str]:
    """Return the names of the profiles, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load_profile(name: str, folder: Path = PROFILE_DIR) -> Profile:
    """Read and check one profile.

    Raises:
        ConfigError: no such profile, TOML that does not parse, a missing or unknown key, a bad
            value, or a `name` that differs from the file's.
    """
    if name not in profile_names(folder):
        raise ConfigError(f"profile {name!r} does not exist; there are {profile_names(folder)}")
    try:
        data = tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {name}: not TOML: {error}") from error
    device = data.get("device")
    other = [key for kind, keys in DEVICE_KEYS.items() if kind != device for key in keys]
    known = {field.name for field in fields(Profile)} - set(other)
    if unknown := sorted(data.keys() - known):
        raise ConfigError(f"profile {name}: unknown key {unknown[0]!r}")
    if missing := sorted(known - data.keys()):
        raise ConfigError(f"profile {name}: key {missing[0]!r} is missing")
    if data["name"] != name:
        raise ConfigError(f"profile {name}: name = {data['name']!r}; must be the file's name")
    return Profile(**data)
