"""A client for vLLM's OpenAI API: one streamed chat completion at a time, with its times."""

import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench import metrics
from bench.prometheus import EngineCounters, read_counters

REQUEST_TIMEOUT_S = 300.0


class RequestError(RuntimeError):
    """A request failed or its answer is not what the API promises."""


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` is None where the server does not send them."""

    text: str
    token_ids: tuple[int, ...] | None
    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None
    ttft_ms: float
    e2el_ms: float


@dataclass(frozen=True)
class Choices:
    """One greedy answer, and two or more best tokens of each position as (token id, log p)."""

    token_ids: tuple[int, ...]
    best: tuple[tuple[tuple[int, float], ...], ...]

    def gap(self, position: int) -> float:
        """Log p of the best token less that of the second."""
        (_, first), (_, second), *_ = self.best[position]
        return first - second


class Client:
    """Requests to one server."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self._session = session
        self._base_url = base_url.rstrip("/")

    async def model_name(self) -> str:
        """Return the name of the model that the server serves first."""
        return (await self._get("/v1/models")).json_object()["data"][0]["id"]

    async def counters(self) -> EngineCounters:
        """Read the engine's counters."""
        return read_counters((await self._get("/metrics")).text)

    async def chat(self, model: str, prompt: str, max_tokens: int) -> Completion:
        """Ask one question greedily for exactly `max_tokens` tokens and read the stream.

        The first token is the first reasoning or content delta. Tokens are counted from the
        server's usage, not from chunks: under MTP a chunk carries several.

        Raises:
            RequestError: HTTP status other than 200, an error in the stream, no token, no usage.
        """
        body = _greedy(model, prompt, max_tokens) | {
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        stream = _Stream()
        sent_s = time.perf_counter()
        url = f"{self._base_url}/v1/chat/completions"
        try:
            async with self._session.post(url, json=body, timeout=_TIMEOUT) as response:
                if response.status != 200:
                    text = (await response.text()).strip()
                    raise RequestError(f"chat completion: HTTP {response.status}: {text[:500]}")
                async for line in response.content:
                    stream.feed(line, time.perf_counter())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestError(f"chat completion: {type(error).__name__}: {error}") from error
        return stream.completion(sent_s)

    async def choices(self, model: str, prompt: str, max_tokens: int, num_best: int = 2) -> Choices:
        """Ask as `chat` does, for the best tokens of each position; not to be timed.

        Raises:
            RequestError: HTTP status other than 200, or no two log-probabilities for a token.
        """
        body = _greedy(model, prompt, max_tokens) | {
            "logprobs": True,
            "top_logprobs": num_best,
            "return_tokens_as_token_ids": True,
        }
        url = f"{self._base_url}/v1/chat/completions"
        try:
            async with self._session.post(url, json=body, timeout=_TIMEOUT) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestError(f"log-probabilities: {type(error).__name__}: {error}") from error
        if response.status != 200:
            raise RequestError(f"log-probabilities: HTTP {response.status}: {text.strip()[:500]}")
        try:
            return _read_choices(json.loads(text)["choices"][0]["logprobs"]["content"], num_best)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RequestError(f"log-probabilities: not in the answer: {text[:500]}") from error

    async def _get(self, path: str) -> "_Page":
        try:
            async with self._session.get(self._base_url + path, timeout=_TIMEOUT) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestError(f"GET {path}: {type(error).__name__}: {error}") from error
        if response.status != 200:
            raise RequestError(f"GET {path}: HTTP {response.status}: {text[:500]}")
        return _Page(text)


def _greedy(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def _read_choices(content: list[dict[str, Any]], num_best: int) -> Choices:
    """vLLM spells a token `token_id:123`. The chosen token may come first in a tie."""
    ids, best = [], []
    for entry in content:
        ids.append(_token_id(entry))
        tops = [(_token_id(top), float(top["logprob"])) for top in entry["top_logprobs"]]
        first, second, *more = sorted(tops, key=lambda pair: -pair[1])[:num_best]
        best.append((first, second, *more))
    return Choices(tuple(ids), tuple(best))


def _token_id(entry: dict[str, Any]) -> int:
    return int(entry["token"].removeprefix("token_id:"))


_TIMEOUT = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)


@dataclass(frozen=True)
class _Page:
    text: str

    def json_object(self) -> dict[str, Any]:
        return json.loads(self.text)


class _Stream:
    """Collects the server-sent events of one completion."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._token_ids: list[int] | None = []
        self._usage: dict[str, Any] | None = None
        self._finish_reason: str | None = None
        self._first_s: float | None = None
        self._last_s: float | None = None

    def feed(self, line: bytes, now_s: float) -> None:
        """Take one line of the stream."""
        if not line.startswith(b"data:"):
            return
        payload = line[len(b"data:") :].strip()
        if payload == b"[DONE]":
            return
        event = json.loads(payload)
        if event.get("error"):
            raise RequestError(f"chat completion: {event['error']}")
        if event.get("usage"):
            self._usage = event["usage"]
        for choice in event.get("choices", ()):
            self._take(choice, now_s)

    def _take(self, choice: dict[str, Any], now_s: float) -> None:
        delta = choice.get("delta", {})
        text = (delta.get("reasoning") or "") + (delta.get("content") or "")
        token_ids = choice.get("token_ids")
        if text or token_ids:
            self._first_s = self._first_s or now_s
            self._last_s = now_s
        if text:
            self._parts.append(text)
            if token_ids is None:
                self._token_ids = None
        if token_ids and self._token_ids is not None:
            self._token_ids += token_ids
        self._finish_reason = choice.get("finish_reason") or self._finish_reason

    def completion(self, sent_s: float) -> Completion:
        """Return what the stream held."""
        if self._first_s is None or self._last_s is None:
            raise RequestError("chat completion: the stream held no token")
        if self._usage is None:
            raise RequestError("chat completion: the stream held no usage")
        return Completion(
            text="".join(self._parts),
            token_ids=tuple(self._token_ids) if self._token_ids is not None else None,
            prompt_tokens=self._usage["prompt_tokens"],
            output_tokens=self._usage["completion_tokens"],
            finish_reason=self._finish_reason,
            ttft_ms=metrics.ttft_ms(sent_s, self._first_s),
            e2el_ms=metrics.e2el_ms(sent_s, self._last_s),
        )
