"""A chat server that answers each question as its script says, by vLLM's streaming API."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from aiohttp import web

from tests.bench.serving import serve

WINDOW = 4096


@dataclass(frozen=True)
class Reply:
    """One answer. status: of an HTTP error in its place. cut: the connection ends in mid-stream."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str = "stop"
    status: int = 200
    cut: bool = False


@dataclass
class ChatServer:
    """Replies by a piece of the last message. die_at: it is gone from this request on.

    key: that it asks for. cache: labels of its cache, on its page of metrics.
    """

    replies: dict[str, Reply]
    window: int = WINDOW
    key: str | None = None
    cache: dict[str, str] = field(default_factory=dict)
    die_at: int | None = None
    bodies: list[dict] = field(default_factory=list)
    dead: bool = False

    def reply(self, body: dict) -> Reply:
        text = body["messages"][-1]["content"]
        (found,) = [reply for piece, reply in self.replies.items() if piece in text]
        return found


def _words(text: str) -> int:
    return 4 + len(text.split())


async def _hang_up(request: web.Request) -> None:
    request.transport.abort()
    await asyncio.sleep(0)  # in which the loop closes the socket
    raise web.HTTPInternalServerError


async def _answer(server: ChatServer, request: web.Request) -> web.StreamResponse:
    body = await request.json()
    server.bodies.append(body)
    if server.die_at is not None and len(server.bodies) > server.die_at:
        server.dead = True
        await _hang_up(request)
    reply = server.reply(body)
    if reply.status != 200:
        return web.json_response({"error": {"message": "no"}}, status=reply.status)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)

    async def send(event: dict | str) -> None:
        data = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {data}\n\n".encode())

    def choice(delta: dict, reason: str | None = None) -> dict:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    if reply.reasoning:
        await send(choice({"reasoning": reply.reasoning}))
    half = len(reply.text) // 2
    await send(choice({"content": reply.text[:half]}))
    if reply.cut:
        return response
    await send(choice({"content": reply.text[half:]}))
    await send(choice({}, reply.finish_reason))
    usage = {"prompt_tokens": _words(body["messages"][-1]["content"]),
             "completion_tokens": len(reply.text.split())}  # fmt: skip
    await send({"choices": [], "usage": usage})
    await send("[DONE]")
    return response


def serving(server: ChatServer) -> AbstractContextManager[str]:
    """Serve on a free port; gives the URL."""

    @web.middleware
    async def guard(request: web.Request, handler):
        if server.dead:
            await _hang_up(request)
        if server.key and request.headers.get("Authorization") != f"Bearer {server.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def chat(request: web.Request) -> web.StreamResponse:
        return await _answer(server, request)

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": server.window}]})

    async def tokenize(request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"count": _words(body["messages"][0]["content"]), "tokens": []})

    async def metrics(_: web.Request) -> web.Response:
        labels = ",".join(f'{name}="{value}"' for name, value in server.cache.items())
        return web.Response(text=f"vllm:cache_config_info{{{labels}}} 1.0\n")

    app = web.Application(client_max_size=64 << 20, middlewares=[guard])
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post("/tokenize", tokenize)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    return serve(app, shutdown_timeout=1)
