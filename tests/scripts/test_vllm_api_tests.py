"""How vLLM's own API tests are chosen, run and compared; the servers themselves need an engine."""

from __future__ import annotations

import contextlib
import json
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts import vllm_api_tests
from scripts.vllm_api_tests import (
    FOLDER,
    compare,
    copy_tests,
    lost,
    main,
    run_tests,
)

FILE = "openai/test_theirs.py"
HOSTS = {"direct": "127.0.0.1", "gateway": "localhost"}
UTILS = """
class RemoteVLLMServer:
    def __init__(self, model, args):
        raise AssertionError("started")
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self._shutdown()
    def _shutdown(self):
        raise AssertionError("ended")
    def url_for(self, path):
        return f"http://{self.host}:{self.port}/{path}"
class RemoteOpenAIServer(RemoteVLLMServer):
    pass
def get_tokenizer(name, tokenizer_mode="auto"):
    return name, tokenizer_mode
"""
TESTS = """
import asyncio, time
from pathlib import Path
import pytest, pytest_asyncio
from tests.utils import RemoteOpenAIServer, get_tokenizer
MODEL_NAME = "Qwen/Qwen3-0.6B"
@pytest.fixture(scope="session")
def theirs_lora_files():
    raise AssertionError("downloaded")
@pytest.fixture(scope="module")
def server(theirs_lora_files):
    with RemoteOpenAIServer(MODEL_NAME, []) as remote:
        yield remote
@pytest_asyncio.fixture
async def client(server):
    yield server.url_for("v1")
@pytest.mark.asyncio
async def test_slow_coroutine(client):
    try:
        await asyncio.sleep(60)
    except Exception:
        pass
    Path(__file__).with_name("went on").touch()
@pytest.mark.asyncio
async def test_model_and_server(client):
    assert client.endswith("/v1")
    assert get_tokenizer(MODEL_NAME) == ("tiny/checkpoint", "deepseek_v4")
def test_direct_only(server):
    assert server.host == "127.0.0.1", f"a host, {__file__}"
def test_two(server):
    assert False
@pytest.mark.parametrize("model", ["their-lora"])
def test_adapter(server, model):
    assert False
def test_of_no_server():
    pass
def test_inline():
    with RemoteOpenAIServer(MODEL_NAME, []):
        pytest.skip("no card")
def test_slow(server):
    try:
        time.sleep(60)
    except Exception:
        pass
"""


@pytest.fixture
def source(tmp_path):
    """A source distribution with one file of tests."""
    root = tmp_path / "vllm-0"
    (root / "examples").mkdir(parents=True)
    for name, text in {"tests/utils.py": UTILS, f"{FOLDER}/{FILE}": TESTS}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for folder in ("tests", FOLDER, f"{FOLDER}/openai"):
        (root / folder / "__init__.py").touch()
    return root


@pytest.fixture
def copied(source, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    copy_tests(source, folder, [FILE])
    return folder


@pytest.fixture
def asked():
    """What the server of `urls` was asked."""
    return []


@pytest.fixture
def urls(asked):
    """Two names of a server whose prefix cache is not empty at the first asking."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            body = json.dumps({"success": len(asked) > 1}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {way: f"http://{host}:{server.server_port}" for way, host in HOSTS.items()}
        server.shutdown()


def reports(way, **outcomes):
    return [
        {"test": f"{FOLDER}/{name}", "way": way, "outcome": outcome, "why": ""}
        for name, outcome in outcomes.items()
    ]


def test_only_what_passes_directly_alone_is_lost():
    direct = reports(
        "direct", a="passed", b="passed", c="failed", d="passed", e="passed", f="passed"
    )
    gateway = reports("gateway", a="passed", b="failed", c="passed", d="late", e="skipped")
    rows = compare(direct + gateway)
    assert [row["test"] for row in rows] == list("abcdef")
    assert lost(rows) == ["b", "d", "e", "f"]
    assert rows[-1] == {"test": "f", "direct": "passed", "gateway": None, "why": {}}


def test_their_tests_run_against_the_given_server_within_a_limit(copied, monkeypatch, urls, asked):
    monkeypatch.setattr(vllm_api_tests, "DESELECTED", {f"{FILE}::test_two": "why"})
    rows = compare(run_tests(copied, urls, [FILE], 2.0))
    assert {row.pop("test"): (row["direct"], row["gateway"]) for row in rows} == {
        f"{FILE}::test_model_and_server": ("passed", "passed"),
        f"{FILE}::test_direct_only": ("passed", "failed"),
        f"{FILE}::test_inline": ("skipped", "skipped"),
        f"{FILE}::test_slow": ("late", None),
        f"{FILE}::test_slow_coroutine": ("late", None),
    }
    assert not (copied / FOLDER / FILE).with_name("went on").exists()
    assert asked == ["/reset_prefix_cache"] * (1 + 2 * 3 + 2)
    whys = [row["why"] for row in rows]
    assert {"direct": "Skipped: no card", "gateway": "Skipped: no card"} in whys
    [why] = [why["gateway"] for why in whys if list(why) == ["gateway"]]
    assert f"a host, {FOLDER}/{FILE}" in why


def test_no_test_is_begun_after_the_end(copied, urls):
    assert run_tests(copied, urls, [FILE], 1, end=time.time()) == []


def test_a_file_that_cannot_be_collected_is_an_error(copied):
    (copied / FOLDER / FILE).write_text("import no_such_module")
    with pytest.raises(
        RuntimeError, match=r"test_theirs.py cannot be collected: (?s:.*)no_such_module"
    ):
        run_tests(copied, {}, [FILE], 1)


def test_what_is_lost_behind_the_gateway_is_told_and_recorded(
    source, tmp_path, monkeypatch, urls, capfd
):
    archive = tmp_path / "vllm.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(source, source.name)
    windows = []

    def servers(log, window):
        windows.append(window)
        return contextlib.nullcontext(urls)

    monkeypatch.setattr(vllm_api_tests, "servers", servers)
    monkeypatch.setattr(vllm_api_tests, "WINDOWS", {FILE: 77})
    names = ["test_model_and_server", "test_slow", "test_slow_coroutine", "test_two"]
    deselected = {f"{FILE}::{name}": "why" for name in names}
    monkeypatch.setattr(vllm_api_tests, "DESELECTED", deselected)
    out = tmp_path / "result-0.1"
    assert main([str(archive), "--out", str(out), "--limit-s", "60", "--files", FILE]) == 1
    assert windows == [77]
    body = json.loads(Path(f"{out}.json").read_text())
    assert body["lost"] == [f"{FILE}::test_direct_only"]
    assert [row["gateway"] for row in body["tests"]] == ["failed", "skipped"]
    assert len(body["source_sha256"]) == 64
    assert str(tmp_path) not in body["command"]
    assert body["deselected"].items() > deselected.items()
    printed = capfd.readouterr().out
    assert "4/4, " in printed
    assert printed.endswith(table := Path(f"{out}.md").read_text())
    assert f"| {FILE} | 1 of 2 | 0 of 2 |" in table
    assert f"- {FILE}::test_direct_only: direct passed, gateway failed" in table


def test_what_is_no_source_distribution_or_lacks_a_file_is_refused(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, file, rule in (
        (tmp_path / "empty", FILE, "not vLLM's source distribution"),
        (source, "openai/test_other.py", "has no tests/entrypoints/openai/test_other.py"),
    ):
        assert main([str(path), "--out", str(tmp_path / "x"), "--files", file]) == 2
        assert rule in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
