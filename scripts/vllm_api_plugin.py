"""pytest plugin with which vLLM's own API tests ask a server that runs already, each test each way.

Loaded by `vllm_api_tests.py`, in the tests' own process, by its name alone. From the environment:
API_TESTS_URLS, the ways to the server, a JSON object of URLs by name; API_TESTS_OUT, a file that
gets a JSON line for each test and way; API_TESTS_LIMIT_S, the seconds that one may take;
API_TESTS_END, the time in Unix seconds after which none is begun.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import re
import signal
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from _pytest.runner import runtestprotocol

URLS: dict[str, str] = json.loads(os.environ.get("API_TESTS_URLS", "{}"))
LIMIT_S = float(os.environ.get("API_TESTS_LIMIT_S", "60"))
END = float(os.environ.get("API_TESTS_END", "inf"))
LATE = f"no end within {LIMIT_S:g} s"
STARTS_SERVER = re.compile(r"\bRemote\w+Server\(")
MOST_WHY = 240  # characters of a reason
FORGET_S = 10


class Late(pytest.fail.Exception):
    """The test took longer than it may. No Exception: the clients would take it for theirs."""


def stand_in(name: str, **members: Any) -> None:
    """A module that vLLM's tests import, that we do not install, and of which they need little."""
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(members)


stand_in("pytest_asyncio", fixture=pytest.fixture)  # AnyIO's plugin runs them
stand_in("tblib", pickling_support=SimpleNamespace(install=lambda: None))


class OnAsyncio:
    """AnyIO's plugin runs tests on this loop. Ours only if registered later than AnyIO's own."""

    @pytest.fixture(scope="session")
    def anyio_backend(self) -> str:
        return "asyncio"


class Attached:
    """What RemoteVLLMServer gets for its own: no server is started, one is asked, one way."""

    way = next(iter(URLS), "")
    uds = None
    show_hidden_metrics = False
    host = property(lambda self: urlsplit(URLS[Attached.way]).hostname)
    port = property(lambda self: urlsplit(URLS[Attached.way]).port)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _shutdown(self) -> None:
        pass


def forget() -> None:
    """Empty the prefix cache: a test must not find there what it left on its other way.

    The engine does not while requests run: a test may leave one behind, which ends by itself.
    """
    url = f"{next(iter(URLS.values()))}/reset_prefix_cache"
    deadline = time.monotonic() + FORGET_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(url, b"", timeout=FORGET_S) as answer:
            if json.load(answer)["success"]:
                return
        time.sleep(0.1)


def asks_server(item: pytest.Function) -> bool:
    """Whether the test, or a fixture of it, makes a server; the others never come to the API."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(each.func for group in fixtures for each in group)]
    return any(STARTS_SERVER.search(inspect.getsource(each)) for each in functions)


def limited(function: Any) -> Any:
    """A coroutine function that is cancelled at its limit: else its fixtures wait for its end."""

    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> None:
        limit = asyncio.timeout(LIMIT_S)
        try:
            async with limit:
                await function(*args, **kwargs)
        except TimeoutError:
            if limit.expired():
                raise Late(LATE) from None
            raise

    return run


def without_adapter(item: pytest.Function) -> None:
    """No LoRA adapter is downloaded for a test; the server has none."""
    for name, fixtures in item._fixtureinfo.name2fixturedefs.items():
        if name.endswith("_lora_files"):
            fixtures[-1].func = lambda: ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    import tests.utils

    for name, member in vars(Attached).items():
        if not name.startswith("__") or name == "__init__":
            setattr(tests.utils.RemoteVLLMServer, name, member)
    others = [item for item in items if not asks_server(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    for item in items:
        without_adapter(item)
        if inspect.iscoroutinefunction(item.obj):
            item.obj = limited(item.obj)
    for module in {item.module for item in items}:
        if read := getattr(module, "get_tokenizer", None):  # ours in a mode that has to be named
            module.get_tokenizer = functools.partial(read, tokenizer_mode="deepseek_v4")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Each way right after the other; none but the first, if that was late; none after END."""
    if time.time() > END:
        return True
    item.late = False
    for Attached.way in URLS:
        forget()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        runtestprotocol(item, nextitem=nextitem)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if item.late:
            break
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Any:
    def late(*_: Any) -> None:
        raise Late(LATE)

    signal.signal(signal.SIGALRM, late)
    grace_s = 5 * inspect.iscoroutinefunction(item.obj)  # it has a limit of its own, above
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S + grace_s)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    report.late = call.excinfo is not None and call.excinfo.errisinstance(Late)
    item.late |= report.late
    return report


class Record:
    """Writes what became of each test, and how far we are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_runs = 0
        self.num_done = 0
        self.start = time.monotonic()
        self.seen: dict[str, Any] = {}

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write({"collect": report.nodeid, "why": str(report.longrepr)[-2000:]})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.num_runs = len(session.items) * len(URLS)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            outcome = "late" if report.late else report.outcome
            if report.failed and report.when != "call":
                outcome = "error"
            self.seen = {"outcome": outcome, "why": reason(report)}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.num_done += 1
        took = time.monotonic() - self.start
        self.write({"test": nodeid, "way": Attached.way} | self.seen)
        left = took / self.num_done * (self.num_runs - self.num_done)
        print(
            f"{self.num_done}/{self.num_runs}, {took:.0f} s, about {left:.0f} s left: "
            f"{Attached.way} {self.seen['outcome']} {nodeid.removeprefix('tests/entrypoints/')}",
            flush=True,
        )


def reason(report: Any) -> str:
    """One line of why a test did not pass; empty if it did."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        text = report.longrepr[2]
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split())[:MOST_WHY]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(OnAsyncio())
    config.pluginmanager.register(Record(Path(os.environ["API_TESTS_OUT"])))
