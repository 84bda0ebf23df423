"""Ask all items, judge each answer when it comes, and keep every one on disk."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.eval import chat
from bench.eval.chat import Answer
from bench.eval.config import EvalConfig
from bench.eval.items import Item, Judged, Message, Verdict
from bench.eval.tasks import Task
from bench.load.errors import ServerUnusable
from bench.load.journal import Journal
from bench.load.progress import duration, say
from bench.load.server import Server

PROGRESS_S = 10.0
# Of a longer message the ends are kept, and a hash of all.
MOST_CHARS = 20_000
KEPT_CHARS = 1_000
Record = dict[str, Any]


class ItemJournal(Journal):
    """A header, then one line for each item that was asked; it stays beside the result."""

    encode = staticmethod(dict)
    decode = staticmethod(dict)

    def answered(self) -> dict[tuple[str, str], Record]:
        """The last record of each (task, item); failed requests are no answers."""
        return {(r["task"], r["id"]): r for r in self.done if r["verdict"] != Verdict.FAILED.value}

    def records(self) -> dict[tuple[str, str], Record]:
        """The last record of each (task, item)."""
        return {(r["task"], r["id"]): r for r in self.done}


async def ask_all(
    server: Server, model: str, window: int, tasks: Sequence[Task], config: EvalConfig,
    journal: ItemJournal,
) -> None:  # fmt: skip
    """Ask what the journal has no answer for, `config.streams` items at once.

    Raises:
        ServerUnusable: the server does not answer any more; what came stays in the journal.
    """
    done = journal.answered()
    left = [(t, i) for t in tasks for i in t.items if (t.name.value, i.id) not in done]
    progress = _Progress(len(left))
    slots = asyncio.Semaphore(config.streams)

    async def one(task: Task, item: Item) -> None:
        async with slots:
            record = await _asked(server, model, window, task, item, config)
            journal.add(record)
            progress.one(record)

    try:
        async with asyncio.TaskGroup() as group:
            for task, item in left:
                group.create_task(one(task, item))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed


async def _asked(
    server: Server, model: str, window: int, task: Task, item: Item, config: EvalConfig
) -> Record:
    most = item.max_tokens or config.answer_tokens(window)
    body = chat.request_body(model, item.messages, most, config)
    answer = await chat.ask(server.session, server.url, body)
    if answer.failure and not await server.is_up():
        raise ServerUnusable(f"the server went away: {answer.failure}")
    return record(task, item, answer, await judge(task, item, answer))


async def judge(task: Task, item: Item, answer: Answer) -> Judged:
    """The verdict. An answer that was cut off, or never came, is not looked into."""
    if answer.failure:
        return Judged(Verdict.FAILED, None, answer.failure)
    if answer.finish_reason in chat.CUT_OFF:
        return Judged(Verdict.TRUNCATED, None, chat.CUT_OFF[answer.finish_reason])
    return await task.score(item, answer.text)


def record(task: Task, item: Item, answer: Answer, judged: Judged) -> Record:
    """One line of the journal."""
    return {
        "task": task.name.value,
        "id": item.id,
        "group": item.group,
        "verdict": judged.verdict.value,
        "expected": item.expected,
        "extracted": judged.value,
        "how": judged.how,
        "run": judged.details or None,
        "prompt": [_kept(message) for message in item.messages],
        **asdict(answer),
    }


def _kept(message: Message) -> Record:
    text = message["content"]
    if len(text) <= MOST_CHARS:
        return dict(message)
    digest = hashlib.sha256(text.encode()).hexdigest()
    cut = f"{text[:KEPT_CHARS]} [...] {text[-KEPT_CHARS:]}"
    return {**message, "content": cut, "chars": len(text), "sha256": digest}


class _Progress:
    """A line every so often: how far, the verdicts so far, the time left."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._right = 0
        self._started = self._told = time.monotonic()

    def one(self, record: Record) -> None:
        """Count an item."""
        self._done += 1
        self._right += record["verdict"] == Verdict.CORRECT.value
        now = time.monotonic()
        if now - self._told < PROGRESS_S and self._done < self._total:
            return
        self._told = now
        left_s = (now - self._started) / self._done * (self._total - self._done)
        say(
            f"{record['task']}: {self._done}/{self._total} items, {self._right} correct; "
            f"about {duration(left_s)} left"
        )
