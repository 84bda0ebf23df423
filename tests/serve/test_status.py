"""/status.json: each field of a real document has the type, the range and the unit it claims."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import pytest

from serve import monitor
from serve.faults import FaultKind, Faults
from serve.monitor import Monitor
from serve.status import Status
from serve.traffic import Traffic
from tests.serve.front_process import running_front, wait_until


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    target = {"all_reduce": ["Custom", "OneShot (host-pinned)"], "tensor_parallel_size": 2}
    record = {"schema_version": 1, "target": target, "draft": {}}
    (folder / "load.json").write_text(json.dumps(record))
    config = {
        "monitor_interval_s": 0.1,
        "load_record": str(folder / "load.json"),
        "profile": {"num_speculative_tokens": 1},
    }
    with running_front(folder, [{}], **config) as front:
        front.wait_until_ready()
        # A rate needs a look before the tokens.
        wait_until(lambda: status(front)["kv_cache"]["usage"] is not None, "a first look")
        front.post(events=5, gap_s=0.05, drafts=10, accepted=8)
        wait_until(lambda: status(front)["mtp"]["drafts"], "the drafts are seen")
        wait_until(lambda: not status(front)["engine"]["owes_progress_s"], "it owes nothing")
        yield front


def status(front, query=""):
    code, headers, body = front.ask("GET", f"/status.json{query}")
    assert (code, headers["Content-Type"]) == (200, "application/json")
    return json.loads(body)


def test_a_real_document_is_the_schema_s_to_the_last_field(front):
    """Strict: an int is no float's text, no field is unknown, none is missing."""
    _, _, body = front.ask("GET", "/status.json")
    parsed = Status.model_validate_json(body, strict=True, extra="forbid")
    assert json.loads(parsed.model_dump_json()) == json.loads(body)


def test_numbers_are_in_their_range_and_times_are_unix(front):
    seen = status(front)
    assert abs(seen["at_unix_s"] - time.time()) < 60
    assert 0 < seen["stage_s"] < seen["uptime_s"] < 600
    assert (seen["ready"], seen["stage"], seen["progress"], seen["reason"]) == (
        True,
        "ready",
        None,
        None,
    )
    assert seen["engine"] == {
        "lives": 1,
        "ends": [],
        "stalls": 0,
        "canaries": 0,
        "canaries_failed": 0,
        "owes_progress_s": 0.0,
    }
    requests = seen["requests"]
    assert requests["in_flight"] == requests["working"] == requests["silent"] == 0
    assert requests["ended"] == {"done": 1}
    assert 0 < requests["ttft_ms_p50"] <= requests["ttft_ms_p99"]
    assert requests["e2el_ms_p50"] >= 250
    assert seen["queue"]["max_working"] == 20
    assert 0 <= seen["kv_cache"]["usage"] <= 1
    mtp = seen["mtp"]
    assert (mtp["drafts"], mtp["drafted_tokens"], mtp["accepted_tokens"]) == (10, 10, 8)
    assert (mtp["acceptance_rate"], mtp["acceptance_length"]) == (0.8, 1.8)
    assert (mtp["per_position"], mtp["fault"]) == ([0.8], False)
    reduces = seen["all_reduce"]
    assert (reduces["tensor_parallel_size"], reduces["tier"]) == (2, "host-pinned")
    assert reduces["paths"] == ["Custom", "OneShot (host-pinned)"]
    assert seen["faults"] == []
    assert seen["profile"]["name"] == "cpu-tiny"


def test_what_is_not_known_is_null(tmp_path):
    with running_front(tmp_path, [{"load_s": 30}]) as front:
        seen = status(front)
        Status.model_validate(seen)
        assert (seen["ready"], seen["load_record"], seen["gpus"]) == (False, None, None)
        for part in ("throughput", "kv_cache"):
            assert set(seen[part].values()) == {None}
        assert seen["requests"]["ttft_ms_p50"] is None
        assert seen["mtp"]["acceptance_rate"] is None
        assert seen["progress"] is None or seen["progress"]["total"] == 4


def test_the_history_has_columns_of_one_length_and_since_cuts_it(front):
    wait_until(lambda: len(status(front)["history"]["at_unix_s"]) > 3, "points")
    history = status(front)["history"]
    at = history["at_unix_s"]
    assert {len(column) for column in history.values()} == {len(at)}
    assert at == sorted(at)
    assert any(tokens for tokens in history["generation_tok_s"])
    later = status(front, f"?since={at[1]}")["history"]["at_unix_s"]
    assert later[0] == at[2]
    for query in ("?since=nan", "?since=x"):
        assert front.ask("GET", f"/status.json{query}")[0] == 422


class Engine:
    """What a monitor sees of a supervisor."""

    num_lives, serving = 1, True


class Paged(Monitor):
    """A monitor whose engine gives the pages of a list, one each 2 s of the clock that it reads."""

    def __init__(self, pages, monkeypatch):
        self.pages, self.now_s = pages, 0.0
        clock = SimpleNamespace(monotonic=lambda: self.now_s, time=time.time)
        monkeypatch.setattr(monitor, "time", clock)
        super().__init__(Engine(), Traffic(), Faults(), None, 0, 0.1, nvml=lambda: None)

    async def page(self, session):
        self.now_s += 2.0
        return self.pages.pop(0)

    async def look_at_all(self):
        while self.pages:
            await self._look(None)
        return [point.generation_tok_s for point in self.seen.points]


def test_a_missed_page_does_not_double_the_rate(monkeypatch):
    tokens = "vllm:generation_tokens_total {}\n"
    pages = [tokens.format(0), tokens.format(100), None, tokens.format(300)]
    assert asyncio.run(Paged(pages, monkeypatch).look_at_all()) == [None, 50, None, 50]


def test_nvml_that_hangs_while_it_is_loaded_holds_up_nothing_and_is_a_fault(monkeypatch):
    hang = threading.Event()
    pages = ["vllm:generation_tokens_total 0\n", "vllm:generation_tokens_total 7\n"]
    paged = Paged(pages, monkeypatch)
    paged._load_nvml = lambda: hang.wait(60)

    async def look_at_all():
        rates = await paged.look_at_all()
        hang.set()  # the loop's end waits for the thread
        return rates

    assert asyncio.run(look_at_all()) == [None, 3.5]
    assert paged._faults.known[FaultKind.GPU_UNREADABLE].active
