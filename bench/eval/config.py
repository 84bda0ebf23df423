"""What is asked of which server."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from bench import provenance
from bench.load.origin import REPOSITORY

QUICK_ITEMS = 100
# MMLU has 14,042 items; so many, spread over its subjects, show what a run is for.
DEFAULT_MMLU_ITEMS = 1000
# Reasoning that does not fit is the commonest fault of published scores.
MAX_TOKENS = {"off": 4096, "on": 32768, "auto": 32768}

# Tokens of the window that an answer leaves to its prompt, or a quarter of it.
LEAST_PROMPT_ROOM = 1024


class TaskName(StrEnum):
    """What can be scored."""

    GSM8K = "gsm8k"  # zero-shot, chain of thought
    GSM8K_8SHOT = "gsm8k-8shot"
    MMLU = "mmlu"
    HUMANEVAL = "humaneval"
    LONG = "long"
    MINI_MATH = "mini-math"
    MINI_CHOICE = "mini-choice"
    MINI_CODE = "mini-code"


class Reasoning(StrEnum):
    """`thinking` in the chat template's arguments; auto sends nothing."""

    ON = "on"
    OFF = "off"
    AUTO = "auto"


@dataclass(frozen=True)
class EvalConfig:
    """One run. limit: items of each task at most; None is the task's own number.

    contexts, depths: of the long-context items, prompt and answer together in tokens, and where
    in the text the needles lie, as shares of it. max_tokens: None is by reasoning.
    gsm8k, mmlu, humaneval: the user's files.
    """

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    tasks: tuple[TaskName, ...] = ()
    reasoning: Reasoning = Reasoning.AUTO
    limit: int | None = None
    streams: int = 2
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    contexts: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    long_repeats: int = 1
    timeout_s: float = 1800.0
    gsm8k: Path | None = None
    mmlu: Path | None = None
    humaneval: Path | None = None
    sandbox_image: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(TaskName(t) for t in self.tasks))
        object.__setattr__(self, "reasoning", Reasoning(self.reasoning))
        for name in ("limit", "streams", "max_tokens", "long_repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}; must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature}; must be at least 0")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s = {self.timeout_s}; must be above 0")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url}; must start with http:// or https://")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depth {depth}; must be a share of the text, in 0..1")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks = {','.join(self.tasks)}; each at most once")

    def answer_tokens(self, window: int) -> int:
        """Most tokens of an answer: as configured, and so that a prompt fits into the window."""
        wanted = self.max_tokens or MAX_TOKENS[self.reasoning]
        return max(1, min(wanted, window - max(LEAST_PROMPT_ROOM, window // 4)))


def to_json(config: EvalConfig) -> dict[str, Any]:
    """Plain values. Of the user's files only the names are kept, of the URL no user."""
    record = {name: provenance.recorded(v, REPOSITORY) for name, v in asdict(config).items()}
    return record | {"url": provenance.without_user(config.url)}


def from_json(record: dict[str, Any], files: EvalConfig) -> EvalConfig:
    """Undo `to_json`; the user's files come from `files`, named again."""
    known = {field.name for field in fields(EvalConfig)}
    values = {name: value for name, value in record.items() if name in known}
    for name in ("tasks", "contexts", "depths"):
        values[name] = tuple(values[name])
    for name in ("gsm8k", "mmlu", "humaneval"):
        values[name] = getattr(files, name)
    return EvalConfig(**values)
