"""The truth about MTP: an engine whose drafts are never accepted has a fault, and says so."""

import json
import re

import pytest

from serve.engine_metrics import EngineMetrics, read_metrics
from serve.faults import FaultKind, Faults
from serve.mtp import MtpTruth
from tests.serve.front_process import running_front, wait_until
from tests.serve.test_metrics import samples

ZERO, NONE = FaultKind.MTP_ZERO_ACCEPTANCE, FaultKind.MTP_NO_DRAFTS


@pytest.fixture
def faults():
    return Faults()


def active(faults):
    return {kind for kind, fault in faults.known.items() if fault.active}


def seen(tokens, drafts=None, accepted=None, first=None):
    return EngineMetrics(
        generation_tokens=tokens, first_tokens=first, drafts=drafts, accepted=accepted
    )


def test_200_drafts_without_one_accepted_are_a_fault_until_one_is(faults):
    truth = MtpTruth(1, faults)
    truth.observe(seen(300, 199, 0))
    assert active(faults) == set()
    truth.observe(seen(301, 200, 0))
    assert active(faults) == {ZERO}
    assert "none of the last 200 drafts" in faults.known[ZERO].message
    truth.observe(seen(700, 500, 0))
    truth.observe(seen(702, 501, 1))
    assert active(faults) == set()
    assert faults.count(ZERO) == 1
    truth.observe(seen(901, 700, 1))
    assert active(faults) == set()
    truth.observe(seen(902, 701, 1))
    assert faults.count(ZERO) == 2


def test_nothing_drafted_for_200_tokens_is_a_fault_until_something_is(faults):
    truth = MtpTruth(2, faults)
    truth.observe(seen(199))
    assert active(faults) == set()
    truth.observe(seen(200))
    assert active(faults) == {NONE}
    truth.observe(seen(202, 1, 1))
    assert active(faults) == set()


def test_requests_of_one_token_draft_nothing_and_are_no_fault(faults):
    truth = MtpTruth(1, faults)
    truth.observe(seen(1000, first=1000))
    assert active(faults) == set()
    truth.observe(seen(1300, first=1100))
    assert active(faults) == {NONE}


def test_without_mtp_nothing_is_expected(faults):
    MtpTruth(0, faults).observe(seen(10_000, 500, 0))
    assert faults.known == {}


def test_a_new_life_of_the_engine_is_counted_from_its_start(faults):
    """Its counters may have passed the old life's before they are seen."""
    truth = MtpTruth(1, faults)
    truth.observe(seen(250, 190, 100))
    truth.observe(seen(260, 199, 0))
    assert active(faults) == set()
    truth.observe(seen(261, 200, 0))
    assert active(faults) == {ZERO}


def test_the_first_tokens_are_read_from_vllm_s_page():
    page = 'vllm:time_to_first_token_seconds_count{engine="0"} 3.0\nvllm:x 1\n'
    assert read_metrics(page).first_tokens == 3


def test_zero_acceptance_is_in_the_status_and_the_metrics_and_goes_away(tmp_path):
    def status():
        return json.loads(front.ask("GET", "/status.json")[2])

    def fault():
        return {f["kind"]: f for f in status()["faults"]}.get(ZERO.value)

    def metric(name):
        page = front.ask("GET", "/metrics")[2].decode()
        return samples(page)[f"dsv4_serve_{name}", (("kind", ZERO.value),)]

    config = {"monitor_interval_s": 0.05, "profile": {"num_speculative_tokens": 1}}
    with running_front(tmp_path, [{}], **config) as front:
        front.wait_until_ready()
        front.post(events=1, drafts=199, accepted=0)
        wait_until(lambda: status()["mtp"]["drafts"] == 199, "the drafts are seen")
        assert fault() is None
        assert not status()["mtp"]["fault"]
        assert (metric("faults_total"), metric("fault_active")) == (0, 0)
        front.post(events=1, drafts=1, accepted=0)
        entry = wait_until(fault, "the fault")
        assert entry["active"]
        assert "none of the last 200 drafts was accepted" in entry["message"]
        mtp = status()["mtp"]
        assert mtp["fault"]
        assert (mtp["acceptance_rate"], mtp["per_position"]) == (0, [0])
        assert (metric("faults_total"), metric("fault_active")) == (1, 1)
        front.post(events=1, drafts=10, accepted=7)
        wait_until(lambda: not fault()["active"], "the fault is over")
        assert not status()["mtp"]["fault"]
        assert (metric("faults_total"), metric("fault_active")) == (1, 0)

        def kinds():
            events = [json.loads(line) for line in re.findall(r'(\{"time": .*)\n', front.log())]
            return [(e["event"], e["level"]) for e in events if e.get("kind") == ZERO.value]

        wait_until(lambda: len(kinds()) == 2, "both are logged")
        assert kinds() == [("fault", "error"), ("fault_over", "info")]
