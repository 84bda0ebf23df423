"""`bench interference` against a server whose long prefills block everybody for a known time."""

import json

import pytest

from bench.load.cli import main
from tests.bench.load.fake_server import FakeServer, serving


def measure(server: FakeServer, path, *options: str) -> tuple[int, dict | None]:
    asked = ["--long", "2k", "--short", "100", "--output", "61", "--repeats", "5"]
    with serving(server) as url:
        status = main(["interference", "--url", url, "--result", str(path), *asked, *options])
    return status, json.loads(path.read_text()) if path.exists() else None


def blocking(**changes) -> FakeServer:
    return FakeServer(
        **{"ttft_s": 0.02, "gap_s": 0.005, "long_tokens": 2000, "long_ttft_s": 0.2} | changes
    )


def test_the_stall_of_a_known_prefill_is_found(tmp_path, capsys):
    server = blocking(gap_s=0.01, long_ttft_s=0.5)
    status, result = measure(server, tmp_path / "r.json", "--output", "41")
    assert status == 0
    summary = result["summary"]
    assert summary["long_ttft_ms"]["value"] == pytest.approx(500, abs=150)
    gap = summary["stream_longest_gap_ms"]
    assert gap["alone"]["value"] < 150
    assert gap["beside"]["value"] == pytest.approx(500, abs=150)
    newcomer = summary["newcomer_ttft_ms"]
    assert newcomer["alone"]["value"] < 150
    assert newcomer["beside"]["value"] == pytest.approx(450, abs=150)  # sent 50 ms later
    assert newcomer["ratio"]["low"] > 3
    assert summary["met_prefill"] == [True] * 5
    assert "beside a long prefill" in capsys.readouterr().out


def test_a_server_that_does_not_stall_shows_no_stall(tmp_path):
    """The long prompt takes as long, and nobody waits for it."""
    server = blocking(long_tokens=None, ttft_s=0.2, gap_s=0.03)
    options = ["--output", "21", "--repeats", "3"]
    _, result = measure(server, tmp_path / "r.json", *options)
    # Where it stalls both are above 10.
    assert result["summary"]["stream_longest_gap_ms"]["ratio"]["value"] < 5
    assert 0.4 < result["summary"]["newcomer_ttft_ms"]["ratio"]["value"] < 2.5


def test_a_stream_that_ends_before_the_prefill_fails_the_run(tmp_path, capsys):
    server = FakeServer(long_tokens=None, ttft_s=0.3, gap_s=0)
    status, result = measure(server, tmp_path / "r.json", "--output", "2", "--repeats", "1")
    assert status == 1
    assert result["summary"]["met_prefill"] == [False]
    assert "did not lie within the stream" in capsys.readouterr().err


def test_a_request_that_fails_fails_the_run(tmp_path, capsys):
    status, result = measure(blocking(error_at=9), tmp_path / "r.json")
    assert status == 1
    assert "engine died" in capsys.readouterr().err
    assert result["summary"]["stream_tpot_ms"]["ratio"]["num"] == 4


def test_what_the_window_cannot_hold_is_refused(tmp_path, capsys):
    for options in (["--long", "4095"], ["--short", "4036"]):
        status, result = measure(blocking(), tmp_path / "r.json", *options)
        assert status == 2
        assert result is None
        assert "4097 tokens with its answer; the window is 4096" in capsys.readouterr().err
