"""A server with vLLM's streaming API and scripted timing, in a thread.

It has a prefix cache over whole blocks, counters, and a word-by-word tokenizer, and notes when it
wrote each chunk on the clock that the client reads.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from aiohttp import web

from tests.bench.serving import serve

TEMPLATE_TOKENS = 4  # what the chat template adds
BOS = 1


@dataclass
class FakeServer:
    """Script and record. Times in seconds. faults: at which request number (from 0) it fails."""

    ttft_s: float = 0.01
    gap_s: float = 0.001
    tokens_per_chunk: int = 1
    first_chunk_tokens: int = 1
    num_speculative_tokens: int = 0
    inert_counters: bool = False  # MTP on, nothing drafted
    window: int = 4096
    block: int = 16
    cache: bool = True
    running_usage: bool = True  # the server knows continuous_usage_stats
    usage: bool = True
    cached_details: bool = True
    metrics_page: bool = True
    keep_alive: bool = False
    long_tokens: int | None = None  # from so many prompt tokens a prefill blocks everybody
    long_ttft_s: float = 0.0
    reasoning_chunks: int = 0
    api_key: str | None = None
    slower_each_request_s: float = 0.0
    extra_tokens: int = 0  # generated for somebody else with each request
    ignore_cap: int | None = None  # stops after so many tokens
    die_at: int | None = None  # closes the connection of this and every later request
    error_at: int | None = None
    malformed_at: int | None = None
    truncated_at: int | None = None
    turn: Callable[[], Awaitable[None]] | None = None  # awaited before each chunk
    blocks: set[int] = field(default_factory=set)
    bodies: list[dict] = field(default_factory=list)
    written: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generated = self.drafts = self.drafted = self.accepted = 0
        self.queries = self.hits = 0
        self.dead = False
        self.busy_until = 0.0

    def tokenize(self, text: str) -> list[int]:
        return [10 + zlib.crc32(word.encode()) % 5000 for word in text.split()]

    def cached_tokens(self, ids: list[int]) -> int:
        """Tokens of the known prefix; then the prompt is known."""
        known, keys = 0, []
        for end in range(self.block, len(ids) + 1, self.block):
            keys.append(hash(tuple(ids[:end])))
            if self.cache and keys[-1] in self.blocks and known == end - self.block:
                known = end
        self.blocks.update(keys)
        self.queries += len(ids)
        self.hits += known
        return known

    def count(self, tokens: int, chunks: int) -> dict | None:
        """Move the counters; returns the request's own."""
        self.generated += tokens + self.extra_tokens
        if not self.num_speculative_tokens:
            return None
        drafts = 0 if self.inert_counters else chunks - 1
        accepted = 0 if self.inert_counters else tokens - chunks
        self.drafts += drafts
        self.drafted += drafts * self.num_speculative_tokens
        self.accepted += accepted
        return {
            "num_spec_steps": drafts,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafts * self.num_speculative_tokens,
            "acceptance_histogram": [drafts - accepted, accepted],
        }

    def page(self) -> str:
        labels = '{engine="0",model_name="fake"}'
        rows = {
            "generation_tokens_total": self.generated,
            "prefix_cache_queries_total": self.queries,
            "prefix_cache_hits_total": self.hits,
            "num_preemptions_total": 0,
        }
        if self.num_speculative_tokens:
            rows |= {
                "spec_decode_num_drafts_total": self.drafts,
                "spec_decode_num_draft_tokens_total": self.drafted,
                "spec_decode_num_accepted_tokens_total": self.accepted,
            }
        text = "".join(f"vllm:{name}{labels} {float(v)}\n" for name, v in rows.items())
        if self.num_speculative_tokens:
            text += (
                'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} '
                f"{float(self.accepted)}\n"
            )
        return text + 'vllm:cache_config_info{block_size="16",enable_prefix_caching="True"} 1.0\n'

    def split(self, tokens: int) -> list[int]:
        """Tokens of each chunk."""
        sizes = [min(self.first_chunk_tokens, tokens)] if tokens else []
        while sum(sizes) < tokens:
            sizes.append(min(self.tokens_per_chunk, tokens - sum(sizes)))
        return sizes


def _event(choices: list[dict]) -> dict:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "fake",
        "choices": choices,
    }


async def _answer(server: FakeServer, request: web.Request, chat: bool) -> web.StreamResponse:
    body = await request.json()
    number = len(server.bodies)
    server.bodies.append(body)
    if server.die_at is not None and number >= server.die_at:
        server.dead = True
        request.transport.abort()
        raise web.HTTPInternalServerError
    written: list[float] = []
    server.written.append(written)
    text = body["messages"][0]["content"] if chat else ""
    ids = [BOS] * TEMPLATE_TOKENS + server.tokenize(text) if chat else body["prompt"]
    cached = server.cached_tokens(ids)
    asked = body["max_tokens"]
    tokens = asked if server.ignore_cap is None else min(asked, server.ignore_cap)
    sizes = server.split(tokens)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    start = time.perf_counter()

    async def send(event: dict | str) -> None:
        data = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {data}\n\n".encode())

    if chat:
        await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    if server.keep_alive:
        await response.write(b": keep-alive\n\n")
    if server.long_tokens is not None and len(ids) >= server.long_tokens:
        server.busy_until = start + server.long_ttft_s
    gap = server.gap_s + number * server.slower_each_request_s
    for index, size in enumerate(sizes):
        await asyncio.sleep(max(0, start + server.ttft_s + index * gap - time.perf_counter()))
        while time.perf_counter() < server.busy_until:
            await asyncio.sleep(server.busy_until - time.perf_counter())
        if server.turn is not None:
            await server.turn()
        if index == 1 and number == server.error_at:
            await send({"error": {"message": "engine died", "code": 500}})
            return response
        if index == 1 and number == server.malformed_at:
            await send("{not json")
            return response
        if index == 1 and number == server.truncated_at:
            return response
        key = "reasoning" if index < server.reasoning_chunks else "content"
        choice = {"index": 0, "delta": {key: "x" * size}} if chat else {"text": "x" * size}
        choice |= {"index": 0, "logprobs": None, "finish_reason": None}
        event: dict = _event([choice])
        if server.running_usage and body["stream_options"].get("continuous_usage_stats"):
            event["usage"] = {
                "prompt_tokens": len(ids),
                "total_tokens": len(ids) + sum(sizes[: index + 1]),
                "completion_tokens": sum(sizes[: index + 1]),
            }  # fmt: skip
        written.append(time.perf_counter())
        await send(event)
    metrics = server.count(tokens, len(sizes))
    last: dict = _event([])
    if server.usage:
        last["usage"] = {
            "prompt_tokens": len(ids),
            "total_tokens": len(ids) + tokens,
            "completion_tokens": tokens,
        }
        if server.cached_details:
            last["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
    if metrics:
        last["metrics"] = {"speculative_decoding": metrics}
    await send(last)
    await send("[DONE]")
    return response


def _app(server: FakeServer) -> web.Application:
    @web.middleware
    async def guard(request: web.Request, handler):
        if server.dead:
            request.transport.abort()
        wanted = f"Bearer {server.api_key}"
        if server.api_key and request.headers.get("Authorization") != wanted:
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def completions(request: web.Request) -> web.StreamResponse:
        return await _answer(server, request, chat=False)

    async def chat(request: web.Request) -> web.StreamResponse:
        return await _answer(server, request, chat=True)

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": server.window}]})

    async def metrics(_: web.Request) -> web.Response:
        if not server.metrics_page:
            raise web.HTTPNotFound
        return web.Response(text=server.page())

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.fake"})

    async def tokenize(request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body:
            ids = [BOS] * TEMPLATE_TOKENS + server.tokenize(body["messages"][0]["content"])
        else:
            ids = [BOS] * bool(body["add_special_tokens"]) + server.tokenize(body["prompt"])
        return web.json_response({"tokens": ids, "count": len(ids)})

    app = web.Application(client_max_size=64 << 20, middlewares=[guard])
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post("/tokenize", tokenize)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/version", version)
    return app


def serving(server: FakeServer) -> AbstractContextManager[str]:
    """Serve on a free port; gives the URL."""
    return serve(_app(server), shutdown_timeout=1)
