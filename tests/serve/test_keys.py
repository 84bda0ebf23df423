"""API keys: the file, what a request shows, and what a key may have in work."""

import contextlib
import json
import time

import pytest

from serve.errors import ConfigError
from serve.keys import Key, read_keys
from tests.serve.front_process import running_front, wait_until

ANNA, BOB = "anna-0123456789abcdef", "bob-0123456789abcdef"
PATHS = {"/livez": 200, "/readyz": 200, "/status": 200, "/status.json": 401, "/metrics": 401}


@pytest.fixture
def keys(tmp_path):
    def read(text):
        path = tmp_path / "keys"
        path.write_text(text, encoding="utf-8")
        return read_keys(path)

    return read


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def test_a_file_gives_names_and_limits(keys):
    found = keys(f"# ours\n\nanna {ANNA}\n  bob\t{BOB} 2\n")
    assert found.names == ["anna", "bob"]
    assert found.find([(b"x-api-key", ANNA.encode())]) == Key("anna", None)
    assert found.find([(b"authorization", b"bearer  " + BOB.encode())]) == Key("bob", 2)


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", ANNA.encode()),
        (b"authorization", b"Basic " + ANNA.encode()),
        (b"authorization", b"Bearer"),
        (b"x-api-key", b""),
        (b"x-api-key", ANNA.encode()[:-1]),
        (b"x-api-key", ANNA.encode() + b"x"),
        (b"cookie", ANNA.encode()),
    ],
)
def test_what_is_no_key_is_none(keys, header):
    assert keys(f"anna {ANNA}").find([header]) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "holds no key"),
        ("# anna x\n", "holds no key"),
        ("anna\n", "line 1: 1 fields"),
        (f"anna {ANNA} 2 3\n", "line 1: 4 fields"),
        (f"-anna {ANNA}\n", "the name must match"),
        ("anna short-key\n", "16 ASCII characters"),
        (f"anna {ANNA}é\n", "16 ASCII characters"),
        (f"anna {ANNA} 0\n", "MAX_CONCURRENCY = '0'"),
        (f"anna {ANNA} -1\n", "MAX_CONCURRENCY = '-1'"),
        (f"anna {ANNA}\n\nbob {ANNA}\n", "line 3: the name or the key is given twice"),
        (f"anna {ANNA}\nanna {BOB}\n", "given twice"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_a_key(keys, text, rule):
    with pytest.raises(ConfigError) as refused:
        keys(text)
    assert rule in str(refused.value)
    assert ANNA not in str(refused.value)
    assert "short-key" not in str(refused.value)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "none")


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    path = folder / "keys"
    path.write_text(f"anna {ANNA}\nbob {BOB} 1\n")
    access = {"status_access": "key", "metrics_access": "key"}
    with running_front(folder, [{}], keys=str(path), **access) as front:
        front.wait_until_ready()
        yield front


@pytest.mark.parametrize("headers", [{}, bearer("wrong-0123456789"), {"X-Api-Key": "x" * 4000}])
def test_without_a_key_a_request_is_401(front, headers):
    status, answered, body = front.ask("POST", "/v1/completions", {"events": 1}, headers)
    assert (status, answered["WWW-Authenticate"]) == (401, "Bearer")
    assert json.loads(body)["error"]["type"] == "AuthenticationError"
    _, _, body = front.ask("POST", "/v1/messages", {"events": 1}, headers)
    assert json.loads(body)["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/v1/models", "/echo", "/livez/", "/metrics/", "//metrics"])
def test_everything_of_the_engine_s_needs_a_key(front, path):
    assert front.ask("GET", path)[0] == 401


def test_a_browser_s_preflight_reaches_the_engine_without_a_key(front):
    """A browser shows no key there, and sends the request itself only after a yes."""
    asked = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
    status, answered, _ = front.ask("OPTIONS", "/echo", headers=asked)
    method, path, _, seen = json.loads(answered["x-head"])
    assert (status, method, path, dict(seen)["origin"]) == (207, "OPTIONS", "/echo", "http://a")
    assert front.ask("OPTIONS", "/status.json")[0] == 405


@pytest.mark.parametrize(("path", "status"), PATHS.items())
def test_what_is_guarded_needs_a_key_and_probes_do_not(front, path, status):
    assert front.ask("GET", path)[0] == status
    assert front.ask("GET", path, headers={"X-Api-Key": ANNA})[0] == 200


@pytest.mark.parametrize("headers", [bearer(ANNA), {"x-api-key": ANNA}])
def test_a_key_is_taken_and_the_engine_does_not_get_it(front, headers):
    status, answered, _ = front.ask("POST", "/echo", b"{}", headers | {"X-Other": "kept"})
    assert status == 207
    seen = dict(json.loads(answered["x-head"])[3])
    assert seen["x-other"] == "kept"
    assert not {"authorization", "x-api-key"} & seen.keys()


def test_without_a_key_file_the_engine_gets_what_the_client_sent(tmp_path):
    with running_front(tmp_path, [{}]) as front:
        front.wait_until_ready()
        _, answered, _ = front.ask("GET", "/echo", headers=bearer(ANNA))
        assert dict(json.loads(answered["x-head"])[3])["authorization"] == f"Bearer {ANNA}"


def begin_as(front, secret, **job):
    connection = front.connect()
    connection.request("POST", "/v1/completions", json.dumps(job), bearer(secret))
    return connection


def status_as(front, secret):
    return front.ask("POST", "/v1/completions", {"events": 1}, bearer(secret))[0]


def hang_up_in_answer(front, connection):
    connection.getresponse().read1(10)
    connection.close()


def hang_up_in_prefill(front, connection):
    time.sleep(0.1)
    connection.close()


def read_to_the_end(front, connection):
    front.let_go()
    assert connection.getresponse().read().endswith(b"[DONE]\n\n")


@pytest.mark.parametrize(
    ("job", "end"),
    [
        ({"events": 2, "gated": True}, read_to_the_end),
        ({"events": 10_000, "gap_s": 0.01}, hang_up_in_answer),
        ({"prefill_steps": 10_000}, hang_up_in_prefill),
        ({"status": 400}, lambda _, connection: connection.getresponse().read()),
        ({"events": 1, "type": "x", "end": "cut"}, hang_up_in_answer),
    ],
)
def test_a_key_s_place_is_free_again_however_its_request_ends(front, job, end):
    """bob may have one request in work; anna is not held up."""
    begun = front.num_begun
    with contextlib.closing(begin_as(front, BOB, **job)) as connection:
        wait_until(lambda: front.num_begun > begun, "the engine works on it")
        if "status" not in job and job.get("end") != "cut":
            wait_until(lambda: status_as(front, BOB) == 429, "bob's place is taken")
            assert status_as(front, ANNA) == 200
        end(front, connection)
        wait_until(lambda: status_as(front, BOB) == 200, "bob's place is free")
