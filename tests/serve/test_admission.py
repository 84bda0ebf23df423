import contextlib
import http.client
import json
import socket
import time

import pytest

from serve.admission import Admission, AdmissionLimits
from serve.keys import Key
from serve.relay import Flight
from tests.serve.front_process import WAIT_S, running_front, wait_until

LIMITS = AdmissionLimits(2, max_num_queued_reqs=1, max_num_queued_tokens=100, max_body_bytes=4000)


def flight(num_bytes=40, first_byte_s=0.0, work=True, started_s=0.0, key=None, status=200):
    return Flight(
        "/v1/x",
        work,
        key=key,
        status=status,
        started_s=started_s,
        first_byte_s=first_byte_s,
        num_bytes_in=num_bytes,
    )


def test_requests_beyond_streams_and_queue_are_429():
    admission = Admission(LIMITS)
    flights = {flight(), flight()}
    assert admission.refusal(40, flights) is None
    assert admission.refusal(40, flights | {flight(work=False)}) is None
    refusal = admission.refusal(40, flights | {flight()})
    assert refusal.status == 429
    assert "3 requests are in work or wait; at most 3" in refusal.message
    assert admission.num_refused == 1


def test_prompts_that_wait_are_bounded_by_tokens_but_one_is_always_taken():
    admission = Admission(LIMITS)
    assert admission.refusal(4000, set()) is None
    assert admission.refusal(360, {flight(40)}) is None
    refusal = admission.refusal(364, {flight(40)})
    assert refusal.status == 429
    assert "about 101 prompt tokens would wait; at most 100" in refusal.message
    assert admission.refusal(364, {flight(40, first_byte_s=1.0)}) is None  # decodes


def test_a_key_has_no_more_in_work_than_its_limit():
    admission = Admission(AdmissionLimits(8))
    key, other = Key("a", 2), Key("b", 2)
    flights = {flight(key=key), flight(key=key), flight(key=other)}
    refusal = admission.refusal(40, flights, key)
    assert refusal.status == 429
    assert "2 requests of key a are in work; at most 2" in refusal.message
    assert admission.refusal(40, flights, other) is None
    assert admission.refusal(40, flights, Key("c")) is None
    assert admission.refusal(40, {flight(key=key), flight(key=key, work=False)}, key) is None


def test_retry_after_follows_the_measured_rates():
    admission = Admission(LIMITS)
    admission.learn(flight(4000, first_byte_s=100.0, started_s=0.0), 140.0)  # 10 tokens/s, 140 s
    assert admission.refusal(40, {flight() for _ in range(3)}).retry_after_s == 70
    assert admission.refusal(960, {flight(40)}).retry_after_s == 15
    admission.learn(flight(first_byte_s=0.0), 9999.0)  # no answer, no lesson
    for status in (404, 405, 500):  # quick, but not because work is
        admission.learn(flight(first_byte_s=0.003, status=status), 0.003)
    assert admission.refusal(40, {flight() for _ in range(3)}).retry_after_s == 70


def test_a_body_that_is_too_large_is_413_without_retry():
    refusal = Admission(LIMITS).refusal(4001, set())
    assert (refusal.status, refusal.retry_after_s) == (413, None)


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    limits = {"streams": 1, "max_num_queued_reqs": 1, "max_body_bytes": 1000}
    limits["max_num_queued_tokens"] = 200  # 800 bytes
    with running_front(tmp_path_factory.mktemp("f"), [{}], admission=limits) as front:
        front.wait_until_ready()
        yield front


def document(front):
    return json.loads(front.ask("GET", "/status.json")[2])


def test_a_full_front_says_429_and_takes_work_again(front):
    held = [front.begin(events=1000, gap_s=0.05) for _ in range(2)]
    status, headers, body = front.post(events=1)
    assert status == 429
    assert int(headers["Retry-After"]) >= 1
    assert json.loads(body)["error"]["type"] == "RateLimitError"
    assert front.ask("GET", "/v1/models")[0] == 200
    for connection, _ in held:
        connection.close()
        connection.sock = None
    del held

    def taken():
        return front.post(events=1)[0] == 200

    wait_until(taken, "work is taken again")
    wait_until(lambda: not document(front)["requests"]["working"], "all places are free")


def test_a_prompt_counts_by_what_has_come_of_it(front):
    """Else one that is announced and never sent would keep all others away."""
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")

        def queued():
            return document(front)["queue"]["queued_tokens"]

        time.sleep(0.1)
        assert queued() == 0
        assert front.post(events=1)[0] == 200
        sock.sendall(b" " * 798)
        wait_until(lambda: queued() == 199, "what came is counted")
        assert front.post(events=1)[0] == 429
    wait_until(lambda: not queued(), "its place is free")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_413_with_and_without_its_length_announced(front, chunked):
    with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT_S) as sock:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
        if chunked:
            head += b"Transfer-Encoding: chunked\r\n\r\n"
            sock.sendall(head + b"258\r\n" + b"x" * 600 + b"\r\n258\r\n" + b"x" * 600 + b"\r\n")
        else:
            sock.sendall(head + b"Content-Length: 1001\r\n\r\n")
        response = http.client.HTTPResponse(sock)
        with contextlib.closing(response):
            response.begin()
            assert response.status == 413
            assert json.loads(response.read())["error"]["type"] == "RequestTooLargeError"
