"""What the server says about itself, and what it counts."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench import provenance
from bench.load import counters
from bench.load.counters import Counters
from bench.load.errors import LoadError, ServerUnusable

ASK_TIMEOUT_S = 120.0
# The engine tells of a request's end with its next statistics; a round waits so long for them.
SETTLE_S = 2.0
SETTLE_STEP_S = 0.05
_CACHE_CONFIG = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.M)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_CACHE_LABELS = (
    "block_size", "effective_attention_block_size", "cache_dtype", "enable_prefix_caching",
    "kv_cache_size_tokens", "num_gpu_blocks", "gpu_memory_utilization",
)  # fmt: skip
# Found out anew at each start, from the memory that is free then.
_FOUND_AT_START = ("kv_cache_size_tokens", "num_gpu_blocks")


@dataclass(frozen=True)
class ServerFacts:
    """One served model.

    root: the checkpoint's folder or name as the server has it. num_speculative_tokens: 0 without
    speculation, None where the server does not tell.
    """

    model: str
    window: int
    version: str | None
    cache: dict[str, str] | None
    root: str | None
    num_speculative_tokens: int | None = None

    @property
    def prefix_caching(self) -> bool | None:
        """Whether the prefix cache is on; None where the server does not tell."""
        value = (self.cache or {}).get("enable_prefix_caching")
        return None if value is None else value == "True"

    def to_json(self) -> dict[str, Any]:
        """For the result, without the server's folders."""
        return {
            "model": self.model,
            "window": self.window,
            "version": self.version,
            "cache": self.cache,
            "checkpoint": Path(self.root).name if self.root else None,
            "num_speculative_tokens": self.num_speculative_tokens,
        }


def lasting(facts: dict[str, Any]) -> dict[str, Any]:
    """What of `ServerFacts.to_json` two lives of one service share, the cache's labels by name."""
    labels = (facts["cache"] or {}).items()
    return {name: value for name, value in facts.items() if name != "cache"} | {
        f"cache {name}": value for name, value in labels if name not in _FOUND_AT_START
    }


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, in a, in b) of every entry that is not the same."""
    return [(k, a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k)]


class Server:
    """Requests for facts; the measured ones are in `stream`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = base_url(url)
        self._shown = provenance.without_user(self.url)

    async def facts(self, model: str | None) -> ServerFacts:
        """Read the model, its window, the version and the cache's settings.

        Raises:
            ServerUnusable: absent, wrong key, no model list.
            LoadError: `model` is not listed, or the server does not tell its window.
        """
        answer = await self._get("/v1/models")
        try:
            listed = {entry["id"]: entry for entry in json.loads(answer)["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ServerUnusable(f"{self._shown}/v1/models: no list of models: {error}") from error
        name = model or next(iter(listed), None)
        if name not in listed:
            raise LoadError(f"model {name}: the server has {', '.join(listed) or 'none'}")
        window = listed[name].get("max_model_len")
        if not window:
            raise LoadError(f"model {name}: the server does not tell max_model_len, its window")
        page = await self._optional("/metrics")
        version = await self._optional("/version")
        return ServerFacts(
            model=name,
            window=int(window),
            version=_json_field(version, "version"),
            cache=_cache_labels(page),
            root=listed[name].get("root"),
            num_speculative_tokens=_num_speculative_tokens(page),
        )

    async def counters(self) -> Counters:
        """Read the engine's counters; all None where there is no /metrics page."""
        return _read(await self._optional("/metrics"))

    async def settled(self) -> tuple[Counters, int | None]:
        """The counters, and how many requests the engine still has after a wait for none.

        None where it does not tell.
        """
        until = time.monotonic() + SETTLE_S
        while True:
            page = await self._optional("/metrics")
            left = counters.unfinished(page or "")
            if not left or time.monotonic() > until:
                return _read(page), left
            await asyncio.sleep(SETTLE_STEP_S)

    async def is_up(self) -> bool:
        """Whether it still answers."""
        return await self._optional("/v1/models") is not None

    async def tokenize(self, model: str, text: str, special: bool = False) -> list[int]:
        """Token ids of a text by the server's own tokenizer."""
        body = {"model": model, "prompt": text, "add_special_tokens": special}
        return (await self._post("/tokenize", body))["tokens"]

    async def count_chat(self, model: str, text: str) -> int:
        """Prompt tokens of a chat with one message, template included."""
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        return (await self._post("/tokenize", body))["count"]

    async def _get(self, path: str) -> str:
        status, text = await self._ask("GET", path, None)
        if status in (401, 403):
            raise ServerUnusable(f"{self._shown}{path}: HTTP {status}: the key is wrong or missing")
        if status != 200:
            raise ServerUnusable(f"{self._shown}{path}: HTTP {status}: {text.strip()[:200]}")
        return text

    async def _optional(self, path: str) -> str | None:
        try:
            status, text = await self._ask("GET", path, None)
        except ServerUnusable:
            return None
        return text if status == 200 else None

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, text = await self._ask("POST", path, body)
        if status != 200:
            raise ServerUnusable(f"{self._shown}{path}: HTTP {status}: {text.strip()[:200]}")
        return json.loads(text)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
        try:
            async with self.session.request(
                method, self.url + path, json=body, timeout=timeout
            ) as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerUnusable(
                f"{self._shown}{path}: no server: {type(error).__name__}: {error}"
            ) from error


def base_url(url: str) -> str:
    """Where the routes begin: many name a server by its /v1."""
    return url.rstrip("/").removesuffix("/v1")


def _read(page: str | None) -> Counters:
    try:
        return counters.read(page) if page else Counters()
    except ValueError as error:
        raise LoadError(str(error)) from error


def _num_speculative_tokens(page: str | None) -> int | None:
    """As many as there are counters by position: the engine makes all of them when it starts."""
    try:
        known = counters.read(page or "")
    except ValueError:
        return None
    if known == Counters():
        return None
    if known.num_drafts is None:
        return 0
    return len(known.accepted_per_position or ()) or None


def _json_field(text: str | None, name: str) -> str | None:
    try:
        return json.loads(text)[name] if text else None
    except (ValueError, KeyError, TypeError):
        return None


def _cache_labels(page: str | None) -> dict[str, str] | None:
    found = _CACHE_CONFIG.search(page or "")
    if not found:
        return None
    labels = dict(_LABEL.findall(found[1]))
    return {name: labels[name] for name in _CACHE_LABELS if name in labels}
