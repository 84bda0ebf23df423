"""/metrics: a page that Prometheus' own parser reads, ours and then vLLM's."""

import contextlib
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.front_process import running_front, wait_until

OURS = "dsv4_serve_"


def samples(page):
    """Values by name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    config = {"monitor_interval_s": 0.05, "profile": {"num_speculative_tokens": 1}}
    with running_front(tmp_path_factory.mktemp("f"), [{}], **config) as front:
        front.wait_until_ready()
        yield front


def page_of(front):
    status, headers, body = front.ask("GET", "/metrics")
    assert status == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return body.decode()


def test_the_whole_page_parses_and_each_of_ours_has_help_and_type(front):
    front.post(events=2, drafts=4, accepted=3)
    wait_until(lambda: "mtp_acceptance_length" in page_of(front), "the drafts are seen")
    page = page_of(front)
    families = list(text_string_to_metric_families(page))
    ours = [family for family in families if family.name.startswith(OURS)]
    assert len(ours) > 20
    for family in ours:
        assert len(family.documentation) > 10, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
    names = [family.name for family in ours]
    assert len(names) == len(set(names))
    described = set(re.findall(r"^# TYPE (\S+) ", page, re.MULTILINE))
    assert described == set(re.findall(r"^# HELP (dsv4_serve_\S+) ", page, re.MULTILINE))


def test_vllm_s_page_follows_ours_byte_for_byte(front):
    page = page_of(front)
    start = page.index("# HELP vllm:")
    assert OURS not in page[start:]
    assert "vllm:" not in page[:start]
    assert 'vllm:iteration_tokens_total_count{engine="0",model_name="fake"} ' in page[start:]
    assert ("vllm:num_requests_running", (("engine", "0"), ("model_name", "fake"))) in samples(page)


def test_a_request_is_counted_timed_and_measured(front):
    before = samples(page_of(front))
    body = '{"events": 2, "gap_s": 0.05}'
    answer = front.ask("POST", "/v1/completions", body)[2]
    front.post(status=418)

    def gained(name, **labels):
        key = (OURS + name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    after = samples(page_of(front))
    assert gained("requests_total", status="200", outcome="done") == 1
    assert gained("requests_total", status="418", outcome="done") == 1
    assert gained("body_bytes_total", direction="out") > len(answer)
    assert gained("body_bytes_total", direction="in") == len(body) + len('{"status": 418}')
    assert gained("time_to_first_byte_seconds_count") == 1
    assert gained("request_seconds_count") == 1
    first, whole = gained("time_to_first_byte_seconds_sum"), gained("request_seconds_sum")
    assert 0 < first < whole
    assert whole >= 0.1


def test_a_client_that_leaves_after_the_last_event_had_its_answer(front):
    key = (OURS + "requests_total", (("outcome", "done"), ("status", "200")))
    before = samples(page_of(front)).get(key, 0)
    connection, response = front.begin(parts=["data: {}\n\ndata: [DONE]\n\n"], gap_s=60)
    with contextlib.closing(connection), contextlib.closing(response):
        while b"[DONE]" not in response.readline():
            pass
    wait_until(lambda: samples(page_of(front)).get(key, 0) == before + 1, "counted")


def test_gauges_show_what_is_so_now(front):
    connection, _ = front.begin(events=10_000, gap_s=0.01)
    with contextlib.closing(connection):
        now = samples(page_of(front))
        assert now[OURS + "ready", ()] == 1
        assert now[OURS + "requests_in_flight", ()] == now[OURS + "requests_working", ()] == 1
        stages = {labels: v for (name, labels), v in now.items() if name == OURS + "stage"}
        assert [labels for labels, value in stages.items() if value] == [(("stage", "ready"),)]
        assert now[OURS + "process_resident_bytes", ()] > 2**20
        assert now[OURS + "process_open_fds", ()] > 3
        assert now[OURS + "process_tasks", ()] > 3
        connection.sock.close() if connection.sock else None


def test_while_the_engine_loads_the_page_is_ours_alone(tmp_path):
    with running_front(tmp_path, [{"load_s": 30}]) as front:
        now = samples(page_of(front))
        assert now[OURS + "ready", ()] == 0
        assert not any(name.startswith("vllm") for name, _ in now)
