"""One chat whose text is kept, over the load engine's stream reader."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.eval.config import EvalConfig, Reasoning
from bench.eval.items import Message
from bench.load import stream
from bench.load.stream import Stream

BUSY = ("HTTP 429", "HTTP 503")
BUSY_TRIES = 6
BUSY_WAIT_S = 1.0
# vLLM's finish reasons of an answer that is not whole; a stream with one of them ends as any other.
ENDED_BY_SERVER = ("abort", "error")
CUT_OFF = {
    "length": "cut off at the limit of tokens",
    "repetition": "cut off where it repeated itself",
}


@dataclass(frozen=True)
class Answer:
    """error: why there is no answer, else None. Counts are None where the server tells none."""

    reasoning: str
    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    output_tokens: int | None
    wall_s: float
    error: str | None = None

    @property
    def failure(self) -> str | None:
        """Why it is none, or only a part of one that the server did not finish."""
        if self.error is None and self.finish_reason in ENDED_BY_SERVER:
            return f"the server ended the answer: finish_reason {self.finish_reason}"
        return self.error


class TextStream(Stream):
    """Keeps the reasoning and the text. An answer without a token, or without usage, is one."""

    def __init__(self) -> None:
        super().__init__()
        self.reasoning: list[str] = []
        self.text: list[str] = []

    def _choice(self, choice: dict[str, Any], counted: int | None, at_s: float) -> None:
        super()._choice(choice, counted, at_s)
        delta = choice.get("delta") or {}
        self.reasoning.append(delta.get("reasoning") or delta.get("reasoning_content") or "")
        self.text.append(delta.get("content") or "")

    def _missing(self) -> str | None:
        if self._ended or self._finish_reason:
            return None
        return "the stream ended before [DONE]"


def request_body(
    model: str, messages: Sequence[Message], max_tokens: int, config: EvalConfig
) -> dict[str, Any]:
    """A streaming chat that ends where the model ends it."""
    body: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.reasoning is not Reasoning.AUTO:
        body["chat_template_kwargs"] = {"thinking": config.reasoning is Reasoning.ON}
    return body


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """Send one chat; a server that is busy is asked again a few times."""
    started = time.monotonic()
    for attempt in range(BUSY_TRIES):
        answer = await _once(session, f"{url}/v1/chat/completions", body, started)
        if not (answer.error or "").startswith(BUSY):
            break
        await asyncio.sleep(BUSY_WAIT_S * 2**attempt)
    return answer


async def _once(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], started: float
) -> Answer:
    reader = TextStream()
    sent = await stream.send(session, url, stream.encode(body), time.perf_counter(), stream=reader)
    return Answer(
        "".join(reader.reasoning), "".join(reader.text), sent.finish_reason, sent.prompt_tokens,
        sent.output_tokens, round(time.monotonic() - started, 3), sent.error,
    )  # fmt: skip
