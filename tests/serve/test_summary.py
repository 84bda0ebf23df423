"""What `serve run` prints of the load record once the engine answers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from bench.server import free_port
from serve import summary

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


def module(name: str, scheme: str, kernel: str, count: int) -> dict:
    return {"module": name, "scheme": scheme, "kernel": kernel, "count": count}


TARGET = {
    "num_parameters": 1593,
    "num_tensors": 100652,
    "dequantized": ["layers.2.attn.compressor.wkv"],
    "attention": {"SM120Attention": 43},
    "modules": [
        module("model.layers.*.attn.wq_b", "Fp8", "DeepGemm", 43),
        module("model.layers.*.attn.wo_b", "Fp8", "DeepGemm", 43),
        module("model.layers.*.ffn.experts.routed_experts", "WNA16", "MarlinExperts", 43),
        module("lm_head", "Unquantized", "", 1),
    ],
    "all_reduce": ["CudaCommunicator", "PyNcclCommunicator"],
    "tensor_parallel_size": 2,
}
DRAFT = TARGET | {"num_parameters": 39, "num_tensors": 2338, "dequantized": []}
RECORD = {"schema_version": 1, "target": TARGET, "draft": DRAFT}


class Health(BaseHTTPRequestHandler):
    """Answers /health."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "load.json"
    path.write_text(json.dumps(RECORD))
    return path


@pytest.fixture
def url():
    server = HTTPServer(("127.0.0.1", 0), Health)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_record_on_one_screen(record):
    assert summary.summary(record, "/model").splitlines() == [
        "serve: ready; /model on 2 rank(s)",
        "  target    1,593 parameters from 100,652 tensors, 1 dequantized from FP8 to BF16",
        "    attention SM120Attention x 43",
        "    Fp8 with DeepGemm",
        "      attn.wq_b x 43, attn.wo_b x 43",
        "    WNA16 with MarlinExperts",
        "      ffn.experts.routed_experts x 43",
        "    Unquantized",
        "      lm_head x 1",
        "  MTP head  39 parameters from 2,338 tensors",
        "    attention SM120Attention x 43",
        "    Fp8 with DeepGemm",
        "      attn.wq_b x 43, attn.wo_b x 43",
        "    WNA16 with MarlinExperts",
        "      ffn.experts.routed_experts x 43",
        "    Unquantized",
        "      lm_head x 1",
        "  all-reduce  CudaCommunicator, PyNcclCommunicator",
        f"  record      {record}",
    ]


def test_a_head_that_was_not_loaded_is_said(record):
    record.write_text(json.dumps({"schema_version": 1, "target": TARGET | {"all_reduce": []}}))
    text = summary.summary(record, "/model")
    assert "  MTP head  not loaded\n  all-reduce  none\n" in text


def test_long_lists_of_modules_are_wrapped():
    lines = summary.wrapped([f"module_{i} x 1" for i in range(30)])
    assert max(map(len, lines)) <= summary.WIDTH
    assert ", ".join(line.strip() for line in lines).count("module_") == 30


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "what was loaded is not known: .*No such file"),
        ("{", "what was loaded is not known: "),
        ('{"schema_version": 2}', "schema_version = 2; must be 1"),
    ],
)
def test_without_a_record_that_is_said(record, body, said):
    record.unlink()
    if body is not None:
        record.write_text(body)
    text = summary.summary(record, "/model")
    assert text.startswith("serve: ready; ")
    assert re.search(said, text)


def start(record: Path, url: str, pid: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "serve.summary", str(record), "--model", "/model"]
    command += ["--url", url, "--pid", str(pid)]
    # The output ends when the process in the background does.
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=TIMEOUT_S)


def test_it_is_printed_when_the_server_answers(record, url):
    done = start(record, url, os.getpid())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == summary.summary(record, "/model") + "\n"


def test_nothing_is_printed_when_the_engine_ends_first(record):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = start(record, f"http://127.0.0.1:{unused.getsockname()[1]}", ended.pid)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.engine
@pytest.mark.slow
def test_the_engine_s_own_record_is_printed_once_it_answers(tmp_path):
    port = free_port()
    log, record = tmp_path / "log", tmp_path / "new" / "load.json"
    command = [sys.executable, "-m", "serve", "run", "--profile", "cpu-tiny", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--load-record", str(record)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while f"record      {record}" not in log.read_text():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    checkpoint = ROOT / "tiny" / "checkpoint"
    text = log.read_text()
    assert text.count(f"serve: ready; {checkpoint} on 1 rank(s)\n") == 1
    entries = json.loads(record.read_text())
    for part, label in (("target", "target  "), ("draft", "MTP head")):
        counts = [entries[part][f"num_{what}"] for what in ("parameters", "tensors")]
        assert "  {}  {:,} parameters from {:,} tensors\n".format(label, *counts) in text
    assert "    Mxfp4MoEMethod with ReferenceExpertsMxfp4\n" in text
    assert "    attention DeepseekV4CPUAttention x 4\n" in text
    assert "  all-reduce  none\n" in text
