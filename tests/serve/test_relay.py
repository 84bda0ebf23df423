"""The relay, between real sockets: a front in a process, the fake engine behind it."""

import asyncio
import contextlib
import gzip
import http.client
import json
import random
import select
import signal
import socket
import time
from pathlib import Path

import pytest

from serve.front import listen
from serve.relay import ClientSlow, is_work, kept_headers
from serve.upstream import EngineGone, Upstream
from tests.serve.front_process import WAIT_S, is_running, running_front, wait_until

SLOW_S = 1.0  # long enough for a client that is kept to be held up by other work of the machine
UPLOAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n"


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    with running_front(tmp_path_factory.mktemp("f"), [{}]) as front:
        front.wait_until_ready()
        yield front


def until_closed(sock):
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    """A front that waits for nobody."""
    with running_front(tmp_path_factory.mktemp("f"), [{}], slow_client_s=SLOW_S) as front:
        front.wait_until_ready()
        yield front


def chunked(parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def cut(data, generator):
    """Data in pieces of random sizes, 1 byte among them."""
    parts = []
    while data:
        size = generator.choice((1, 2, 7, 100, 5000))
        parts.append(data[:size])
        data = data[size:]
    return parts


@pytest.mark.parametrize("seed", range(8))
def test_bytes_out_are_bytes_in_however_they_are_cut(front, seed):
    """The body holds what would tempt a relay to decode: split UTF-8, CRLF, SSE, NUL."""
    generator = random.Random(seed)
    pieces = [
        "ﾟ漢字🙂\r\n".encode(),
        b"data: {}\n\n",
        b"\r",
        b"\n",
        b"\x00\xff\xfe",
        b"data: [DONE]\n\n",
    ]
    data = b"".join(generator.choice(pieces) for _ in range(2000))
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        sock.sendall(head)
        for part in cut(chunked(cut(data, generator)), generator):
            sock.sendall(part)
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.read() == data


def test_path_query_status_and_headers_pass_unchanged(front):
    target = "/echo?a=%2F&b=%E2%82%AC+x&b=&c"
    headers = {"X-Ours": "é".encode(), "Connection": "x-private", "X-Private": "1"}
    status, answered, _ = front.ask("PUT", target, b"{}", headers)
    method, path, query, seen = json.loads(answered["x-head"])
    assert (status, method, path, query) == (207, "PUT", "/echo", target.partition("?")[2])
    seen = dict(seen)
    assert seen["x-ours"].encode("latin-1") == "é".encode()
    assert seen["content-length"] == "2"
    assert seen["host"] == f"127.0.0.1:{front.port}"
    assert seen["connection"] == "close"  # of the relay's own connection
    assert not {"x-private", "accept", "user-agent"} & seen.keys()
    assert "x-mine" not in answered  # named in the engine's Connection header


def test_an_escaped_path_is_not_decoded(front):
    _, answered, _ = front.ask("GET", "/echo")
    assert json.loads(answered["x-head"])[3] != []
    status, _, _ = front.ask("GET", "/v1/models/a%2Fb%20c")
    assert status == 200


def test_each_event_arrives_before_the_next_is_sent(front):
    connection, response = front.begin(events=4, gated=True)
    with contextlib.closing(connection):
        for number in range(4):
            assert json.loads(response.readline().removeprefix(b"data: "))["n"] == number
            response.readline()
            front.let_go()


def test_an_upload_streams_too(front):
    """The engine's echo of the first part comes before the second is sent."""
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head + b"5\r\nfirst\r\n")
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.read1(100) == b"first"
        sock.sendall(b"6\r\nsecond\r\n0\r\n\r\n")
        assert response.read() == b"second"


def test_a_compressed_answer_is_not_decompressed(front):
    packed = gzip.compress(b"x" * 100)
    job = {"parts": [packed.decode("latin-1")], "encoding": "gzip"}
    _, headers, body = front.post(**job)
    assert headers["Content-Encoding"] == "gzip"
    assert body == packed + b"data: [DONE]\n\n"


def test_an_event_of_4_mb_passes(front):
    status, _, body = front.post(events=1, size=4 * 2**20)
    assert status == 200
    assert len(json.loads(body.split(b"\n\n")[0][6:])["text"]) == 4 * 2**20


def test_the_engine_s_own_errors_pass_unchanged(front):
    status, _, body = front.post(status=418)
    assert (status, body) == (418, b'{"error": {"message": "told to"}}')


@pytest.mark.parametrize("job", [{"events": 1000, "gap_s": 0.02}, {"prefill_steps": 10_000}])
def test_a_client_that_goes_away_ends_its_request_at_the_engine(front, job):
    """In the middle of the answer, and before its first byte."""
    before, begun = front.num_aborted, front.num_begun
    connection = front.connect()
    connection.request("POST", "/v1/completions", json.dumps(job))
    if "events" in job:
        connection.getresponse().read1(10)
    wait_until(lambda: front.num_begun > begun, "the engine works on it")
    assert front.num_aborted == before
    connection.sock.close() if connection.sock else None
    connection.close()
    wait_until(lambda: front.num_aborted == before + 1, "the engine sees it")


def post_of(**job):
    body = json.dumps(job).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("pause_s", [0.0, 0.2])
@pytest.mark.parametrize("job", [{"events": 1000, "gap_s": 0.02}, {"prefill_steps": 10_000}])
def test_a_pipelined_request_does_not_hide_that_the_client_is_gone(front, job, pause_s):
    """uvicorn tells the newest request of a connection alone."""
    before, begun = front.num_aborted, front.num_begun
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        sock.sendall(post_of(**job))
        time.sleep(pause_s)
        sock.sendall(post_of(events=1))
        wait_until(lambda: front.num_begun > begun, "the engine works on the first")
        time.sleep(0.3)  # the second has come, too
    wait_until(lambda: front.num_aborted == before + 1, "the engine sees it")


def test_a_pipelined_request_does_not_keep_the_place_of_one_that_broke_off(front):
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        sock.sendall(post_of(type="text/plain", events=2, end="cut") + post_of(events=1))
        assert until_closed(sock).count(b"HTTP/1.1 ") == 1

    def working():
        return json.loads(front.ask("GET", "/status.json")[2])["requests"]["working"]

    wait_until(lambda: not working(), "its place is free")


def test_pipelined_requests_are_answered_in_turn(front):
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        jobs = [{"parts": [f"<{number}>"], "gap_s": 0.1 * (2 - number)} for number in range(3)]
        sock.sendall(b"".join(post_of(**job) for job in jobs))
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = until_closed(sock)
        assert answer.count(b"HTTP/1.1 200 ") == 4
        places = [answer.index(b"\r\n<%d>" % number) for number in range(3)]
        assert places == sorted(places)


def test_a_client_that_leaves_during_its_upload_leaves_nothing_behind(front):
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        time.sleep(0.1)
    assert front.post(events=1)[0] == 200


def test_many_requests_leave_no_socket_behind(front):
    def num_open():
        return len(list(Path(f"/proc/{front.process.pid}/fd").iterdir()))

    front.post(events=1)
    before = num_open()
    with contextlib.closing(front.connect()) as connection:
        for _ in range(500):
            connection.request("POST", "/v1/completions", '{"events": 2}')
            assert connection.getresponse().read().endswith(b"[DONE]\n\n")
    wait_until(lambda: num_open() <= before, "sockets are closed")


def test_answers_on_a_kept_connection_do_not_wait_for_acknowledgements():
    """Nagle's algorithm and delayed acknowledgements make 40 ms of each."""
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname(), timeout=WAIT_S),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_websocket_is_refused(front):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    status, _, _ = front.ask("GET", "/v1/realtime", None, headers)
    assert status == 403


def test_a_slow_client_is_let_go(hasty):
    before = hasty.num_aborted
    connection, _ = hasty.begin(events=200, size=2**20)
    wait_until(lambda: hasty.num_aborted == before + 1, "the request ends")
    connection.close()
    assert hasty.post(events=1)[0] == 200


def test_a_client_that_does_not_take_an_answer_s_end_is_let_go(hasty):
    """Each of the pipelined answers is one part: whoever waits, waits at an end."""
    before = hasty.log().count('"client slow"')
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=WAIT_S) as sock:
        sock.sendall(post_of(status=200, times=20_000) * 60)
        wait_until(lambda: hasty.log().count('"client slow"') == before + 1, "it is let go")


def test_a_client_that_takes_bytes_slowly_but_steadily_is_kept(hasty):
    """The kernel takes megabytes in its stead, and says for seconds that it takes no more."""
    before = hasty.num_aborted
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        sock.connect(("127.0.0.1", hasty.port))
        sock.settimeout(WAIT_S)
        sock.sendall(post_of(events=100, size=10**5))
        until = time.monotonic() + 4 * SLOW_S  # the kernel's buffers last for more than one
        while time.monotonic() < until:
            assert sock.recv(20_000)
            time.sleep(0.05)
        assert hasty.num_aborted == before
        wait_until(lambda: hasty.num_aborted == before + 1, "it takes nothing and is let go")


def test_the_engine_s_death_is_an_error_event_at_an_event_s_end(tmp_path):
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        status, _, body = front.post(events=3, end="crash")
        *events, last, rest = body.split(b"\n\n")
        assert status == 200
        assert [json.loads(event[6:])["n"] for event in events] == [0, 1, 2]
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["code"] == 503
        assert "the engine ended" in error["message"]
        assert rest == b""


@pytest.mark.parametrize(
    "job", [{"parts": ['data: {"n"'], "end": "crash"}, {"parts": ["{"], "type": "application/json"}]
)
def test_an_answer_that_broke_off_elsewhere_is_not_ended_as_if_whole(tmp_path, job):
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        connection, response = front.begin(**{"end": "crash", **job})
        with contextlib.closing(connection), pytest.raises(http.client.IncompleteRead):
            response.read()


def test_the_engine_s_death_before_the_answer_is_503_with_retry_after(tmp_path):
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        status, headers, body = front.post(crash_before=True)
        assert status == 503
        assert 1 <= int(headers["Retry-After"]) <= 120
        assert json.loads(body)["error"]["type"] == "ServiceUnavailableError"
        front.wait_until_ready()
        body = json.dumps({"crash_before": True})
        status, _, body = front.ask("POST", "/v1/messages", body)
        assert status == 503
        assert json.loads(body)["error"]["type"] == "overloaded_error"


def test_the_engine_s_stop_breaks_nothing_of_a_killed_front(tmp_path):
    """Killed, we cannot end the engine; the kernel does."""
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        [pid] = front.lives
        front.process.send_signal(signal.SIGKILL)
        wait_until(lambda: not is_running(pid), "the engine ends")


def test_headers_of_one_connection_do_not_pass():
    headers = [(b"Connection", b"close, X-A"), (b"x-a", b"1"), (b"TE", b"x"), (b"B", b"2")]
    assert kept_headers(headers) == [(b"b", b"2")]


def test_a_body_keeps_its_length_whatever_the_connection_header_names(front):
    headers = {"Connection": "close, content-length"}
    _, answered, body = front.ask("POST", "/echo", b"{}", headers)
    assert (dict(json.loads(answered["x-head"])[3])["content-length"], body) == ("2", b"{}")


def test_work_is_what_the_engine_computes_for():
    assert is_work("POST", "/v1/chat/completions")
    assert not is_work("GET", "/v1/models")
    assert not is_work("POST", "/tokenize")
    assert not is_work("POST", "/health")
    assert not is_work("POST", "/v1/chat/completions/render")


def test_a_request_that_ended_early_fails_for_one_reader_only(tmp_path):
    """Else the upload would fail of a slow client, too, and its place never be free again."""

    async def send_after_abort():
        server = await asyncio.start_unix_server(lambda *_: None, tmp_path / "s")
        async with server:
            upstream = await Upstream.open(tmp_path / "s", "POST")
            upstream.abort(ClientSlow())
            with pytest.raises(EngineGone):
                await upstream.send(b"x")
            with pytest.raises(ClientSlow):
                await upstream.head()

    asyncio.run(send_after_abort())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"408"),
        (UPLOAD + b" " * 2**18, b"408"),  # at a fair rate on the whole, but then no more
    ],
)
def test_a_connection_without_a_whole_request_is_closed(hasty, sent, status):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=WAIT_S) as sock:
        sock.sendall(sent)
        answer = until_closed(sock)
        assert answer.count(b"HTTP/1.1 ") == bool(status)
        assert answer[9:12] == (status or b"")


def test_ends_of_lines_between_requests_do_not_hold_a_connection(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=WAIT_S) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"\r\n")
        assert b"HTTP/1.1 " not in until_closed(sock)  # only what is left of the answer


@pytest.mark.parametrize("wrong", [b"", b"\r\nno header\r\n\r\n"])
@pytest.mark.parametrize("size", [66_000, 400_000])
def test_a_head_that_is_too_long_is_431_once(front, size, wrong):
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        with contextlib.suppress(OSError):  # closed before it has come whole
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * size + wrong)
        with contextlib.suppress(ConnectionResetError):
            answer = until_closed(sock)
            assert answer[9:12] == b"431" or wrong and answer[9:12] == b"400"
            assert answer.count(b"HTTP/1.1 ") == 1


def upload_slowly(sock, part, num_parts):
    """Send the head, and of 1 MiB that it announces so many parts, ten in a second; not beyond an
    answer."""
    sock.sendall(UPLOAD)
    for _ in range(num_parts):
        sock.sendall(part)
        if select.select([sock], [], [], 0.1)[0]:
            break


def test_a_body_that_comes_byte_by_byte_is_408(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=WAIT_S) as sock:
        upload_slowly(sock, b" ", 50)
        response = http.client.HTTPResponse(sock)
        with contextlib.closing(response):
            response.begin()
            assert response.status == 408
            assert b"at least 16384 bytes/s after the first 1 s" in response.read()


def test_a_body_that_comes_at_a_fair_rate_may_take_long(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=WAIT_S) as sock:
        upload_slowly(sock, b" " * 8192, 16)
        sock.sendall(b"{}".rjust(2**20 - 16 * 8192))
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", [b"/livez", b"/echo"])
@pytest.mark.parametrize(
    ("begin", "part"), [(b"0\r\nX-A: ", b"a"), (b"0\r\n", b"X-A: a\r\n"), (b"1;", b"a")]
)
def test_what_follows_a_body_without_being_of_it_is_bounded(front, path, begin, part):
    """Trailers, which httptools joins in quadratic time, and extensions of chunks."""
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    with (
        socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock,
        pytest.raises(OSError, match="reset|Broken pipe"),
    ):
        sock.sendall(head + begin + part * (2**24 // len(part)))
    assert front.ask("GET", "/livez")[0] == 200


def test_trailers_and_extensions_of_chunks_are_allowed(front):
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(40):
            sock.sendall(b"5;" + b"a" * 4096 + b"\r\nfirst\r\n")
        sock.sendall(b"0\r\nX-A: " + b"a" * 10_000 + b"\r\nX-B: b\r\n\r\n")
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.read() == b"first" * 40
