"""vLLM's router before two CPU replicas, one of which is killed while it serves.

The tests of this file are one story in the order in which they stand.
"""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.docker.own_engine import wait_until
from tests.docker.stack import Stack, events, running

pytestmark = [pytest.mark.docker, pytest.mark.slow]
REPLICAS = ("replica-1", "replica-2")
HEALTHY_S = 400  # two engines load at once
NUM_STREAMS = 6
HARBOUR = "It was a bright morning and the harbour lay still under the hills. " * 8
SHIPS = "Chapter nine of the book begins with a long list of ships at sea. " * 8
STATUS = """
from urllib.request import urlopen
print(urlopen("http://127.0.0.1:8000/status.json").read().decode())
"""


@pytest.fixture(scope="module")
def fleet(engine, build, tmp_path_factory, say):
    """Router and replicas, all healthy."""
    build("cpu")
    build("router")
    stack = Stack(engine, "fleet-cpu", tmp_path_factory.mktemp("fleet"))
    with running(stack, ("router", *REPLICAS), HEALTHY_S, say):
        yield stack


def answered(fleet, text, max_tokens=8):
    """Status of a chat request that was read to its end; None where the answer broke off."""
    try:
        with fleet.chat(text, max_tokens, fleet.key) as answer:
            whole = answer.status != 200 or list(events(answer))[-1:] == ["[DONE]"]
            return answer.status if whole else None
    except (OSError, http.client.HTTPException):
        return None


def requests(fleet, replica):
    """The part of a replica's /status.json that counts requests."""
    return json.loads(fleet.execute(replica, "python", "-c", STATUS))["requests"]


def chats(fleet):
    """Chats that each replica's log tells of, without what the router asks both besides."""
    logs = [fleet.engine.docker("logs", fleet.container(replica)) for replica in REPLICAS]
    return [log.count('"path": "/v1/chat/completions"') for log in logs]


def logged(fleet, total):
    """What chats() gives once it is `total` in all: a line is written after its answer's end."""
    wait_until(f"{total} chats in the logs", lambda: sum(chats(fleet)) >= total, 120)
    return chats(fleet)


def test_requests_with_one_beginning_go_to_the_replica_that_has_it(fleet):
    with fleet.chat(HARBOUR, 400, fleet.key) as answer:
        stream = events(answer)
        next(stream)
        assert answered(fleet, SHIPS) == 200  # by the other one, which has nothing to do
        assert list(stream)[-1] == "[DONE]"
    counts = logged(fleet, 2)
    assert counts == [1, 1]
    went = []
    for number, beginning in enumerate((HARBOUR, SHIPS, HARBOUR, HARBOUR, SHIPS, SHIPS)):
        assert answered(fleet, f"{beginning}{number}") == 200
        before, counts = counts, logged(fleet, sum(counts) + 1)
        went.append(counts[0] - before[0])
    first = went[0]
    other = 1 - first
    assert went == [first, other, first, first, other, other]


def test_killed_replica_s_requests_end_and_all_others_are_answered(fleet, say):
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [
            pool.submit(answered, fleet, f"{n} {chr(97 + n) * 40}", 1000)
            for n in range(NUM_STREAMS)
        ]

        def working():
            return [requests(fleet, replica)["in_flight"] for replica in REPLICAS]

        wait_until("both replicas at work", lambda: min(working()) > 0, 30, poll_s=0.1)
        say(f"in flight: {working()}")
        fleet.engine.docker("kill", fleet.container(REPLICAS[0]))
        # One of these beginnings is in the cache of the killed one.
        after = [answered(fleet, beginning) for beginning in (HARBOUR, SHIPS)]
        ended = [stream.result() for stream in streams]
    say(f"streams while one replica was killed: {ended}")
    assert 0 < ended.count(200) < NUM_STREAMS
    assert after == [200, 200]
    assert [answered(fleet, f"Once more, {n}") for n in range(8)] == [200] * 8
    health = fleet.engine.inspect("container", fleet.container("router"))["Config"]["Healthcheck"]
    fleet.execute("router", *health["Test"][1:])  # one server is enough to be healthy


def test_replica_that_comes_back_gets_requests_again(fleet, say):
    before = chats(fleet)[0]
    fleet.compose("start", REPLICAS[0])
    seconds = wait_until("healthy", lambda: fleet.healthy(REPLICAS[0]), HEALTHY_S)
    say(f"killed replica healthy again: {seconds:.0f} s")

    def both_serve():
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            texts = [f"{n} {chr(97 + n) * 40}" for n in range(NUM_STREAMS)]
            assert set(pool.map(lambda text: answered(fleet, text, 100), texts)) == {200}
        return chats(fleet)[0] > before

    wait_until("the replica serves", both_serve, 60)


def test_down_ends_router_and_replicas(fleet):
    fleet.compose("stop")
    assert [fleet.state(replica)["ExitCode"] for replica in REPLICAS] == [0, 0]
