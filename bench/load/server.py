"""What the server says about itself, and what it counts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench.load import counters
from bench.load.counters import Counters
from bench.load.errors import LoadError, ServerUnusable

ASK_TIMEOUT_S = 120.0
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
    """One served model. root: the checkpoint's folder or name as the server has it."""

    model: str
    window: int
    version: str | None
    cache: dict[str, str] | None
    root: str | None

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
        }


def same_service(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two `ServerFacts.to_json` are of one service, perhaps of two lives of it."""
    lasting = [
        one | {"cache": {k: v for k, v in (one["cache"] or {}).items() if k not in _FOUND_AT_START}}
        for one in (a, b)
    ]
    return lasting[0] == lasting[1]


class Server:
    """Requests for facts; the measured ones are in `stream`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url.rstrip("/")

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
            raise ServerUnusable(f"{self.url}/v1/models: no list of models: {error}") from error
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
        )

    async def counters(self) -> Counters:
        """Read the engine's counters; all None where there is no /metrics page."""
        page = await self._optional("/metrics")
        try:
            return counters.read(page) if page else Counters()
        except ValueError as error:
            raise LoadError(str(error)) from error

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
            raise ServerUnusable(f"{self.url}{path}: HTTP {status}: the key is wrong or missing")
        if status != 200:
            raise ServerUnusable(f"{self.url}{path}: HTTP {status}: {text.strip()[:200]}")
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
            raise ServerUnusable(f"{self.url}{path}: HTTP {status}: {text.strip()[:200]}")
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
                f"{self.url}{path}: no server: {type(error).__name__}: {error}"
            ) from error


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
