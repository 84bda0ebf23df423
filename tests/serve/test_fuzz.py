"""Our own routes under whatever a client may send: no 500, no traceback, and they go on."""

import contextlib
import json
import random
import re
import socket

import pytest

from serve.gateway import OWN_PATHS
from tests.serve.front_process import WAIT_S, running_front

KEY = "fuzz-0123456789abcdef"
METHODS = ("GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "Q")
SINCE = ("0", "-1", "1e9", "1e400", "-1e400", "nan", "inf", "", "x", "0x1", "1,5", "%00", "%ff")
SINCE += (
    "%F0%9F%8C%8A",
    "9" * 400,
    "1e-400",
    "[]",
    "%7B%7D",
    "1&since=2",
    "1&since[]=2",
    " 1",
    "½",
)
QUERIES = ("", "?", "??", "?=", "?&&&", "?%", "?%zz", "?\xff", "?a=" + "b" * 3000, "?since", "#f")
HEADERS = (
    ("Accept", "text/html"),
    ("Accept-Encoding", "gzip, br;q=nope"),
    ("Range", "bytes=5-1"),
    ("If-None-Match", '"'),
    ("If-Modified-Since", "yesterday"),
    ("Content-Type", "application/json; charset=none"),
    ("Content-Type", "multipart/form-data"),
    ("X-Request-Id", "\xff\xfe"),
    ("X-Request-Id", "a" * 3000),
    ("X-Forwarded-For", "', \""),
    ("Origin", "null"),
    ("Cookie", "=;=;\xe9"),
    ("Expect", "100-continue"),
    ("Upgrade", "h2c"),
    ("Authorization", "Bearer"),
    ("Authorization", f"Bearer {KEY}"),
    ("x-api-key", KEY),
    ("x-api-key", "\xe9\xe9"),
    ("", "nameless"),
)
WEBSOCKET = (
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
    ("Sec-WebSocket-Version", "13"),
)
BODIES = (b"", b"{}", b"[" * 2000, b"\xff\x00" * 10, b'{"since": 1}', b"a=b&c=d")
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n")


@pytest.fixture(scope="module", params=["open", "key"])
def front(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    (folder / "keys").write_text(f"fuzz {KEY}\n")
    guarded = {"status_access": request.param, "metrics_access": request.param}
    with running_front(folder, [{}], keys=str(folder / "keys"), **guarded) as front:
        front.wait_until_ready()
        yield front


def make_request(rng):
    """A request to one of our paths, as bytes; and its method."""
    method, path = rng.choice(METHODS), rng.choice(sorted(OWN_PATHS))
    query = "?since=" + rng.choice(SINCE) if rng.random() < 0.5 else rng.choice(QUERIES)
    body = rng.choice(BODIES) if rng.random() < 0.4 else b""
    headers = rng.sample(HEADERS[:-1], rng.randrange(4))
    headers += rng.sample(WEBSOCKET, rng.randrange(4)) if rng.random() < 0.1 else []
    if body and rng.random() < 0.5:
        headers.append(("Transfer-Encoding", "chunked"))
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    elif body:
        headers.append(("Content-Length", str(len(body))))
    version = "1.0" if rng.random() < 0.1 else "1.1"
    head = [f"{method} {path}{query} HTTP/{version}", "Host: x", "Connection: close"]
    head += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*head, "", ""]).encode("utf-8" if rng.random() < 0.1 else "latin-1") + body


def broken(rng, data):
    """The request with some bytes lost, doubled, changed or put in."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data))
        end = min(len(data), at + rng.randrange(1, 20))
        piece = rng.choice(
            (
                b"",
                data[at:end] * 2,
                rng.randbytes(end - at),
                b"\r\n",
                b"\0",
                b" ",
                b"\r",
                b"\n",
                b":",
            )
        )
        data[at:end] = piece
        if not data:
            return b"\r\n"
    return bytes(data)


def exchange(front, data, end=False):
    """All that comes back before the connection ends. end: say that nothing more will be sent."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as client,
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
    ):
        client.sendall(data)
        if end:
            client.shutdown(socket.SHUT_WR)
        while part := client.recv(65536):
            answer += part
    return answer


def final_status(answer):
    """The status behind the interim ones, 0 without an answer; and what comes after its head."""
    while found := STATUS.match(answer):
        _, _, rest = answer.partition(b"\r\n\r\n")
        if int(found[1]) >= 200:
            return int(found[1]), rest
        answer = rest
    return 0, answer


def goes_on(front):
    assert front.ask("GET", "/livez")[0] == 200
    assert front.ask("GET", "/readyz")[0] == 200
    assert front.ask("GET", "/status.json", headers={"x-api-key": KEY})[0] == 200
    assert "Traceback" not in front.log()


def test_any_sound_request_is_answered_and_refused_in_our_words(front):
    rng = random.Random(7)
    seen = set()
    for _ in range(400):
        data = make_request(rng)
        status, body = final_status(exchange(front, data))
        seen.add(status)
        assert 200 <= status < 500, data
        if body.startswith(b"{") and status >= 400:
            error = json.loads(body)["error"]
            assert (error["code"], bool(error["message"])) == (status, True), data
    assert seen >= {200, 405, 422}
    goes_on(front)


def test_any_since_is_a_number_or_refused_in_words(front):
    statuses = set()
    for since in SINCE:
        head = f"GET /status.json?since={since} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        data = f"{head}x-api-key: {KEY}\r\n\r\n".encode()
        status, body = final_status(exchange(front, data))
        assert status in (200, 400, 422), since
        assert status == 400 or json.loads(body), since
        statuses.add(status)
    assert statuses >= {200, 422}
    goes_on(front)


def test_no_broken_request_breaks_it(front):
    rng = random.Random(8)
    seen = set()
    for _ in range(600):
        data = broken(rng, make_request(rng))
        status, _ = final_status(exchange(front, data, end=True))
        seen.add(status)
        assert status < 500 or is_relayed(data), data
    assert {200, 400} <= seen
    goes_on(front)


def is_relayed(data):
    """Whether the path is no longer one of ours: then the fake engine answers as it likes."""
    target = data.split(b" ")[1] if data.count(b" ") > 1 else b""
    return re.split(rb"[?#]", target)[0].decode("latin-1") not in OWN_PATHS
