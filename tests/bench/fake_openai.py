"""A small OpenAI server in a thread, with vLLM's counters, for tests of the client and demo."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from aiohttp import web

from tests.bench.serving import serve


@dataclass
class FakeEngine:
    """What the server does. `accepts` MTP drafts are accepted of every two passes."""

    num_speculative_tokens: int = 0
    accept_every: int = 2  # every n-th draft is accepted; 0: none
    change_token: int | None = None  # answer another token at this position
    change_by: int = 1  # which: so many letters on
    status: int = 200
    token_ids: bool = True
    usage: bool = True
    error_after: int | None = None  # an error event after so many chunks
    gaps: dict[int, float] = field(default_factory=dict)  # of the two best, by position; else 5
    moved_together: float = 0.0  # change of every gap when several requests run at once
    in_flight: int = 0

    def __post_init__(self) -> None:
        self.passes = self.generated = self.drafts = self.accepted = 0
        self.bodies: list[dict] = []

    def answer(self, prompt: str, count: int) -> list[int]:
        """The tokens for a prompt: a function of the prompt alone, but for `change_token`."""
        tokens = [(sum(prompt.encode()) + 7 * i) % 26 for i in range(count)]
        if self.change_token is not None:
            tokens[self.change_token] = (tokens[self.change_token] + self.change_by) % 26
        return tokens

    def chunks(self, tokens: list[int]) -> Iterator[list[int]]:
        """One list of tokens per forward pass, counted as vLLM counts."""
        at = 0
        while at < len(tokens):
            self.passes += 1
            step = 1
            if self.num_speculative_tokens and at:
                self.drafts += 1
                if self.accept_every and self.drafts % self.accept_every == 0:
                    self.accepted += 1
                    step = 2
            self.generated += len(tokens[at : at + step])
            yield tokens[at : at + step]
            at += step

    def logprobs(self, tokens: list[int], together: bool, num_best: int) -> list[dict]:
        """Best tokens of each position: the answer's, then the next letters', a gap apart."""
        content = []
        for position, token in enumerate(tokens):
            gap = self.gaps.get(position, 5.0) + (self.moved_together if together else 0.0)
            best = [((token + i) % 26, -0.1 - i * gap) for i in range(num_best)]
            top = [{"token": f"token_id:{t}", "logprob": p} for t, p in best]
            content.append({**top[0], "top_logprobs": top})
        return content

    def metrics_page(self) -> str:
        """The counters as Prometheus text."""
        labels = '{engine="0",model_name="fake"}'
        rows = {
            "vllm:iteration_tokens_total_count": self.passes,
            "vllm:generation_tokens_total": self.generated,
        }
        if self.num_speculative_tokens:
            rows["vllm:spec_decode_num_drafts_total"] = self.drafts
            rows["vllm:spec_decode_num_draft_tokens_total"] = self.drafts
            rows["vllm:spec_decode_num_accepted_tokens_total"] = self.accepted
        return "".join(f"# TYPE {k} counter\n{k}{labels} {float(v)}\n" for k, v in rows.items())


def _app(engine: FakeEngine) -> web.Application:
    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        engine.bodies.append(body)
        if engine.status != 200:
            error = {"error": {"message": "no", "type": "x", "param": None, "code": engine.status}}
            return web.json_response(error, status=engine.status)
        if not body.get("stream"):
            return web.json_response(await whole_answer(body))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: dict | str) -> None:
            data = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {data}\n\n".encode())

        await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        tokens = engine.answer(body["messages"][0]["content"], body["max_tokens"])
        for number, chunk in enumerate(engine.chunks(tokens)):
            if number == engine.error_after:
                await send({"error": {"message": "engine died"}})
                return response
            choice = {"index": 0, "delta": {"content": "".join(chr(97 + t) for t in chunk)}}
            if engine.token_ids:
                choice["token_ids"] = chunk
            await send({"choices": [choice]})
            await asyncio.sleep(0.001)
        await send({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        if engine.usage:
            usage = {"prompt_tokens": 3, "completion_tokens": len(tokens)}
            await send({"choices": [], "usage": usage})
        await send("[DONE]")
        return response

    async def whole_answer(body: dict) -> dict:
        tokens = engine.answer(body["messages"][0]["content"], body["max_tokens"])
        engine.in_flight += 1
        together = False
        for _ in range(2):  # whoever comes while this one is here is seen
            await asyncio.sleep(0.02)
            together |= engine.in_flight > 1
        engine.in_flight -= 1
        content = None
        if body.get("logprobs"):
            content = engine.logprobs(tokens, together, body["top_logprobs"])
        message = {"content": "".join(chr(97 + t) for t in tokens)}
        usage = {"prompt_tokens": 3, "completion_tokens": len(tokens)}
        choice = {"message": message, "logprobs": content and {"content": content}}
        return {"choices": [choice], "usage": usage}

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": 4096}]})

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=engine.metrics_page())

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    return app


def fake_openai(engine: FakeEngine) -> AbstractContextManager[str]:
    """Serve the engine on a free port; gives the URL."""
    return serve(_app(engine))
