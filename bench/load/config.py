"""What is asked of which server, and the cells that come of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

from bench import provenance
from bench.load.errors import LoadError

SLO_NAMES = ("ttft_ms", "tpot_ms", "e2el_ms")
# Of a follow-up's prompt, this is new and the rest was sent before.
FOLLOW_UP_TOKENS = 1000


class Mode(StrEnum):
    """What the prefix cache holds when the measured request is sent."""

    COLD = "cold"  # nothing of it
    WARM = "warm"  # all of it
    FOLLOWUP = "followup"  # all but the last FOLLOW_UP_TOKENS


class Api(StrEnum):
    """Which route is measured."""

    COMPLETIONS = "completions"  # prompts are token ids, of exact length
    CHAT = "chat"  # prompts are text, fitted with the server's own count


class Text(StrEnum):
    """What prompts are made of."""

    NOVELS = "novels"
    RANDOM = "random"  # tokens drawn one by one: distorts acceptance and expert routing


class Speculation(StrEnum):
    """Whether the server must speculate."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class Cell:
    """One condition. window: the server's; context: what the run may use of it; depth: prompt."""

    window: int
    context: int
    depth: int
    streams: int


@dataclass(frozen=True)
class LoadConfig:
    """One run. contexts: empty is the server's window. depths: empty is what fits.

    goodput: limits by name of the figure. most_depth: where `depths` is empty, no deeper than this.
    """

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    contexts: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    most_depth: int | None = None
    streams: tuple[int, ...] = (1,)
    output: int = 256
    mode: Mode = Mode.COLD
    repeats: int = 5
    api: Api = Api.COMPLETIONS
    text: Text = Text.NOVELS
    speculation: Speculation = Speculation.AUTO
    goodput: tuple[tuple[str, float], ...] = ()
    max_warm_up_rounds: int = 8
    timeout_s: float = 1800.0
    seed: int = 0
    tokenizer: Path | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("mode", Mode), ("api", Api), ("text", Text), ("speculation", Speculation)
        ):  # fmt: skip
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name, least in (("output", 2), ("repeats", 1), ("max_warm_up_rounds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}; must be at least {least}")
        if not self.streams or min(self.streams) < 1:
            raise ValueError(f"streams = {self.streams}; each must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s = {self.timeout_s}; must be above 0")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url}; must start with http:// or https://")
        if self.api is Api.CHAT and self.mode is Mode.FOLLOWUP:
            raise ValueError("mode = followup needs api = completions; a chat has turns of its own")
        if self.api is Api.CHAT and self.text is Text.RANDOM:
            raise ValueError("text = random needs api = completions; random tokens have no text")
        for name, limit in self.goodput:
            if name not in SLO_NAMES or limit <= 0:
                raise ValueError(f"goodput {name}={limit:g}; names are {SLO_NAMES}, limits above 0")

    def cells(self, window: int) -> list[Cell]:
        """Every combination of context, depth and streams, in the order given.

        Raises:
            LoadError: a context larger than the window, or depth and output over the context.
        """
        cells = []
        for context, streams in product(self.contexts or (window,), self.streams):
            if context > window:
                raise LoadError(f"context {context}: the server's window is {window} tokens")
            fits = context - self.output
            for depth in self.depths or (min(fits, self.most_depth or fits),):
                if depth < 1 or depth + self.output > context:
                    raise LoadError(
                        f"depth {depth} + output {self.output} = {depth + self.output} tokens; "
                        f"must fit into the context of {context}, with a depth of at least 1"
                    )
                cells.append(Cell(window, context, depth, streams))
        return cells


def to_json(config: LoadConfig) -> dict[str, Any]:
    """Plain values. A tokenizer's folder and what a URL may carry of a user are left out."""
    record = asdict(config)
    record["goodput"] = dict(config.goodput)
    record["tokenizer"] = config.tokenizer.name if config.tokenizer else None
    record["url"] = provenance.without_user(config.url)
    return record


def check_kept(path: Path, began: LoadConfig, given: LoadConfig) -> None:
    """Refuse options beside --resume that are not those of the run; the server may have moved.

    Raises:
        LoadError: says which.
    """
    for field in fields(LoadConfig):
        then, now = getattr(began, field.name), getattr(given, field.name)
        if field.name != "url" and now not in (field.default, then):
            raise LoadError(
                f"{path}: was begun with {field.name} = {_shown(then)}, not {_shown(now)}; "
                "a resumed run keeps its settings"
            )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def from_json(record: dict[str, Any], tokenizer: Path | None) -> LoadConfig:
    """Undo `to_json`; the tokenizer must be named again."""
    known = {field.name for field in fields(LoadConfig)}
    values = {name: value for name, value in record.items() if name in known}
    for name in ("contexts", "depths", "streams"):
        values[name] = tuple(values[name])
    values["goodput"] = tuple(values["goodput"].items())
    return LoadConfig(**values | {"tokenizer": tokenizer})
