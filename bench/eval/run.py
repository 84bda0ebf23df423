"""`python -m bench eval`: score a running server.

ask the server -> data and sandbox -> items -> ask, judge, journal -> summarize -> write
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.eval import config as config_module
from bench.eval import engine, html, longcontext, markdown, result, sandbox, tasks
from bench.eval.config import EvalConfig, TaskName
from bench.eval.engine import ItemJournal
from bench.eval.sandbox import Sandbox
from bench.eval.sources import Origin
from bench.eval.tasks import Task
from bench.load import origin
from bench.load.errors import LoadError, Unbelievable
from bench.load.progress import say
from bench.load.run import session
from bench.load.server import Server, ServerFacts
from bench.load.sizes import format_size
from bench.load.telemetry import Telemetry

DEFAULT_CONTEXTS = (8_000, 128_000, 524_000)
LONG_ANSWER_TOKENS = 4096


@dataclass(frozen=True)
class Files:
    """Where a run writes. The journal holds every item and stays."""

    output: Path

    @property
    def journal(self) -> Path:
        """Every item's prompt, answer and verdict."""
        return self.output.with_suffix(".items.jsonl")


def default_output(config: EvalConfig, folder: Path, kind: str = "eval") -> Path:
    """A name in `results/` that says what was run and when."""
    stamp = datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S")
    label = f"{config.label}-" if config.label else ""
    return folder / f"{kind}-{label}{stamp}.json"


def run(
    config: EvalConfig, output: Path, api_key: str | None = None, resume: Path | None = None
) -> dict[str, Any]:
    """Score, write the result with its Markdown and HTML, print the table.

    A resumed run may take the place of a result in which items failed: it has the same answers,
    and asks those items again.

    Raises:
        LoadError: bad input, no data, no sandbox, no server; the journal stays.
        Unbelievable: the result is written, and a score is not valid.
    """
    journal = None
    if resume is not None:
        journal = ItemJournal.load(resume)
        config = _resumed_config(journal, config)
        output = resume.with_name(resume.name.removesuffix(".items.jsonl") + ".json")
    files = Files(output)
    if output.exists() and not (journal and result.num_failed(result.read(output))):
        raise LoadError(f"{output}: exists; a result is written once")
    if journal is None and files.journal.exists():
        raise LoadError(f"{files.journal}: exists; go on with --resume, or remove it")
    try:
        scored = asyncio.run(score(config, files, api_key, journal))
    except BaseException as error:
        if files.journal.exists():
            kept = len(ItemJournal.load(files.journal).done)
            say(f"{kept} items are kept; go on with: {_resuming(files)}")
        if isinstance(error, asyncio.CancelledError):
            raise KeyboardInterrupt from error
        raise
    if journal is not None:
        output.unlink(missing_ok=True)
    finish(scored, files)
    return scored


async def score(
    config: EvalConfig, files: Files, api_key: str | None, resumed: ItemJournal | None
) -> dict[str, Any]:
    """Ask what the journal does not have yet; returns the result, which is not written."""
    async with session(config.timeout_s, api_key) as opened:
        server = Server(opened, config.url)
        facts = await server.facts(config.model)
        names, notes = config.tasks, []
        if not names:
            names, notes = tasks.default_tasks(config)
            config = replace(config, tasks=names)
        for note in notes:
            say(note)
        box = sandbox.find(config.sandbox_image) if tasks.needs_sandbox(names) else None
        asked = [await _make(name, config, box, server, facts) for name in names]
        header = {
            "config": config_module.to_json(config),
            "server": facts.to_json(),
            "provenance": origin.collect(facts, config.url, Telemetry.for_url(config.url)),
            "sandbox": box and box.layer,
            "notes": notes,
            "items_sha256": {task.name.value: task.fingerprint for task in asked},
        }
        if resumed is not None:
            _check_same(resumed, header)
        journal = resumed or ItemJournal.start(files.journal, header)
        await engine.ask_all(server, facts.model, facts.window, asked, config, journal)
    return result.assemble(config, asked, journal)


def finish(scored: dict[str, Any], files: Files) -> None:
    """Write the three files, print.

    Raises:
        Unbelievable: some score is not valid.
    """
    result.write(files.output, scored)
    text = markdown.render(scored)
    files.output.with_suffix(".md").write_text(text, encoding="utf-8")
    files.output.with_suffix(".html").write_text(html.render(scored), encoding="utf-8")
    print(text)
    say(f"{files.output} written, .md, .html and {files.journal.name} beside it")
    if failed := result.num_failed(scored):
        say(f"{failed} items failed; ask them again with: {_resuming(files)}")
    found = result.problems(scored)
    if found:
        raise Unbelievable("not valid: " + "; ".join(found))


def _resuming(files: Files) -> str:
    return f"python -m bench eval --resume {files.journal}"


async def _make(
    name: TaskName, config: EvalConfig, box: Sandbox | None, server: Server, facts: ServerFacts
) -> Task:
    if name is not TaskName.LONG:
        return tasks.make(name, config, box)
    contexts = config.contexts or tuple(c for c in DEFAULT_CONTEXTS if c <= facts.window)
    contexts = contexts or (facts.window,)
    for context in contexts:
        if context > facts.window:
            raise LoadError(
                f"long: context {format_size(context)}: the server's window is {facts.window}"
            )
    answer = min(config.answer_tokens(facts.window), LONG_ANSWER_TOKENS, min(contexts) // 4)

    async def count(text: str) -> int:
        return await server.count_chat(facts.model, text)

    items = await longcontext.make_items(
        contexts, config.depths, config.long_repeats, config.seed, answer, count, say
    )
    made = Origin("bench/eval/longcontext.py, generated", "Apache-2.0; novels: public domain", None)
    limited = items if config.limit is None else items[: config.limit]
    return Task(name, tuple(limited), len(items), made, longcontext.score)


def _resumed_config(journal: ItemJournal, given: EvalConfig) -> EvalConfig:
    """The journal's settings; the server may have moved, and the user's files are named again.

    Raises:
        LoadError: no journal of this command, or another setting was given.
    """
    try:
        recorded = config_module.from_json(journal.header["config"], given)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{journal.path}: not a journal of `{result.COMMAND}`: {error}") from error
    for field in fields(EvalConfig):
        began, now = getattr(recorded, field.name), getattr(given, field.name)
        if field.name != "url" and now not in (field.default, began):
            raise LoadError(
                f"{journal.path}: was begun with {field.name} = {_shown(began)}, not "
                f"{_shown(now)}; a resumed run keeps its settings"
            )
    return recorded if given.url == EvalConfig.url else replace(recorded, url=given.url)


def _check_same(resumed: ItemJournal, header: dict[str, Any]) -> None:
    """Refuse to go on where the server or the items are not those of the journal."""
    for key, began, now in (
        *_differing("server", _answering(resumed.header["server"]), _answering(header["server"])),
        *_differing("items of", resumed.header["items_sha256"], header["items_sha256"]),
    ):
        raise LoadError(f"{resumed.path}: was begun with {key} {began}; now it is {now}")


def _answering(server: dict[str, Any]) -> dict[str, Any]:
    """What of a server changes its answers: of the cache its format, not its size."""
    return server | {"cache": (server["cache"] or {}).get("cache_dtype")}


def _differing(
    what: str, began: dict[str, Any], now: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for name in began | now:
        if began.get(name) != now.get(name):
            yield f"{what} {name}", began.get(name), now.get(name)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
