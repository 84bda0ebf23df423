"""The log: who asked for what and how it ended, and nothing that was secret."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from serve.log import MAX_WAITING, STOP_S, Log, LogFormat, event
from tests.serve.front_process import WAIT_S, running_front, wait_until

KEY = "anna-0123456789abcdef"
SECRETS = ("s3cret-prompt", "s3cret-query", "s3cret-header", "s3cret-cookie", "s3cret-wrong-key")
OUTPUT = "s3cret-output"


def requests_of(front):
    """Our whole lines; the engine may have left one of its own without an end."""
    lines = [json.loads(line) for line in re.findall(r'(\{"time": .*)\n', front.log())]
    return [line for line in lines if line["event"] == "request"]


@pytest.fixture(scope="module", params=["json", "text"])
def front(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("f")
    (folder / "keys").write_text(f"anna {KEY}\n")
    config = {"keys": str(folder / "keys"), "log_format": request.param}
    with running_front(folder, [{}, {}], **config) as front:
        front.wait_until_ready()
        yield front


def test_no_key_header_prompt_output_or_query_is_in_the_log(front):
    prompt, query, header, cookie, wrong = SECRETS
    target = f"/v1/completions?q={query}"
    good = {"X-Api-Key": KEY, "X-Mine": header, "Cookie": cookie}
    ask = {"prompt": prompt, "parts": [f"data: {OUTPUT}\n\n"]}
    assert OUTPUT.encode() in front.ask("POST", target, ask, good)[2]
    front.ask("POST", target, ask, good | {"X-Api-Key": wrong})
    front.ask("POST", target, ask, good | {"Authorization": f"Bearer {wrong}"})
    front.ask("POST", target, ask | {"status": 400}, good)
    front.ask("POST", target, f"{{{prompt}", good)  # the engine fails on it
    front.ask("GET", f"/status.json?since={query}", None, good)
    front.ask("GET", f"/metrics?{query}", None, good)
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        sock.sendall(f"GET http://[{query} HTTP/1.1\r\nX-Api-Key: {KEY}\r\n\r\n".encode())
        assert b" 400 " in sock.recv(1000)
    front.ask("POST", target, ask, good | {"X-Request-Id": f"{prompt} {query}"})
    front.ask("POST", target, ask | {"end": "crash"}, good)
    front.wait_until_ready()
    front.ask("POST", target, ask | {"events": 1}, good | {"X-Request-Id": "the-last"})
    wait_until(lambda: "the-last" in front.log(), "the last request is logged")
    log = front.log()
    ours = "\n".join(re.findall(r'(?:\{"time": |serve: ).*', log))
    assert "/v1/completions" in ours
    for secret in (*SECRETS, OUTPUT, KEY):
        assert secret not in ours
    for secret in (query, header, cookie, wrong, KEY):  # of what the engine failed on, it may tell
        assert secret not in log


@pytest.fixture(scope="module")
def open_front(tmp_path_factory):
    with running_front(tmp_path_factory.mktemp("f"), [{}]) as front:
        front.wait_until_ready()
        yield front


def test_a_request_s_line_says_how_it_ended(open_front):
    open_front.ask("POST", "/v1/x%0A%22y", {"events": 2}, {"X-Request-Id": "one"})
    [line] = wait_until(lambda: [r for r in requests_of(open_front) if r["id"] == "one"], "a line")
    assert line["path"] == '/v1/x?"y'
    assert (line["method"], line["status"], line["outcome"]) == ("POST", 200, "done")
    assert 0 < line["ttft_ms"] <= line["duration_ms"]
    assert line["bytes_in"] == len('{"events": 2}')
    assert line["bytes_out"] > 50
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


@pytest.mark.parametrize("given", ["a", "x" * 128, "A.b_c:d-9"])
def test_a_fit_id_is_the_client_s_everywhere(open_front, given):
    _, headers, _ = open_front.ask("GET", "/echo", headers={"X-Request-Id": given})
    assert headers.get_all("X-Request-Id") == [given]
    assert dict(json.loads(headers["x-head"])[3])["x-request-id"] == given
    wait_until(lambda: given in [r["id"] for r in requests_of(open_front)], "it is logged")


@pytest.mark.parametrize(
    "given", ["", "x" * 129, "a b", "a\tb", 'a"}', "é", "a;b", "\u2028".encode()]
)
def test_an_unfit_id_is_replaced_by_ours_and_not_passed_on(open_front, given):
    _, headers, _ = open_front.ask("GET", "/echo", headers={"X-Request-Id": given})
    [ours] = headers.get_all("X-Request-Id")
    assert re.fullmatch(r"req-[0-9a-f]{24}", ours)
    assert "x-request-id" not in dict(json.loads(headers["x-head"])[3])
    wait_until(lambda: ours in [r["id"] for r in requests_of(open_front)], "it is logged")


@pytest.mark.parametrize(
    ("part", "engine_id"),
    [
        ('{"id":"cmpl-7","text":"{\\"id\\":\\"of the text\\"}"}', "cmpl-7"),
        (': keep-alive\n\ndata: {"message": {"id": "chatcmpl-7"}}\n\n', None),  # one part
        ('data: {"message": {"id": "chatcmpl-7"}}\n\n', "chatcmpl-7"),
        ('{"request_id":"abc","choices":[]}', "abc"),
        ('{"text":"{\\"id\\":\\"secret\\"}"}', None),
        ('{"text":"%s","id":"late"}' % ("x" * 512), None),
        ('{"id":"a secret"}', None),
    ],
)  # fmt: skip
def test_the_engine_s_own_name_of_a_request_is_in_its_line(open_front, part, engine_id):
    _, headers, _ = open_front.ask("POST", "/v1/completions", {"parts": [part]})
    [ours] = headers.get_all("X-Request-Id")
    [line] = wait_until(lambda: [r for r in requests_of(open_front) if r["id"] == ours], "a line")
    assert line.get("engine_id") == engine_id


def test_a_path_cannot_forge_a_field_of_a_text_line(tmp_path):
    with running_front(tmp_path, [{}], log_format="text") as front:
        front.wait_until_ready()
        front.ask("GET", "/x%20status=200%20key=admin%0Aserve:%20y")
        wait_until(lambda: "key=admin" in front.log(), "it is logged")
        [line] = [line for line in front.log().splitlines() if "key=admin" in line]
        assert 'path="/x status=200 key=admin?serve: y"' in line


def lines_of(log_format, *events):
    read_end, write_end = os.pipe()
    with Log(log_format, write_end):
        for fields in events:
            event("x", **fields)
    os.close(write_end)
    with os.fdopen(read_end, encoding="utf-8") as text:
        return text.read().splitlines()


@pytest.mark.parametrize("log_format", LogFormat)
def test_an_event_is_one_line_whatever_is_in_it(log_format):
    fields = {"message": "a\nb", "note": "c\nd\r e\u2028", "none": None}
    [line] = lines_of(log_format, fields)
    assert "none" not in line
    assert r"a\nb" in line


def test_what_cannot_be_written_is_said_and_ends_nothing():
    first, second = lines_of(LogFormat.JSON, {"thing": object()}, {"thing": 1})
    assert "TypeError" in json.loads(first)["message"]
    assert json.loads(second)["thing"] == 1


BLOCKED = """
import sys
from serve import log
from serve.log import Log, LogFormat, event
log.STOP_S = float(sys.argv[2])
with Log(LogFormat.JSON):
    for number in range(int(sys.argv[1])):
        event("x", "y" * 100, number=number)
    print("written", flush=True)
    sys.stdin.readline()
    event("last")
print("closed", flush=True)
"""


def start_blocked(num_lines, stop_s=STOP_S):
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, str(num_lines), str(stop_s)],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    assert process.stdout.readline() == "written\n"
    return process


@pytest.mark.parametrize("num_lines", [2000, MAX_WAITING + 5000])
def test_a_log_that_nobody_reads_neither_stops_the_server_nor_its_end(num_lines):
    """A full pipe, and a full queue behind it."""
    with start_blocked(num_lines) as process:
        process.stdin.write("\n")
        process.stdin.flush()
        try:
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()


def test_dropped_lines_are_counted_in_the_log_when_it_is_read_again():
    with start_blocked(MAX_WAITING + 5000, stop_s=WAIT_S) as process:
        _, log = process.communicate("\n", timeout=WAIT_S)
    lines = [json.loads(line) for line in log.splitlines()]
    told = [re.match(r"(\d+) lines", line.get("message", "")) for line in lines]
    num_dropped = sum(int(match[1]) for match in told if match)
    assert num_dropped > 0
    assert len(lines) - sum(map(bool, told)) + num_dropped == MAX_WAITING + 5000 + 1
