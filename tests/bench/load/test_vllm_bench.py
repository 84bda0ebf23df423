"""vLLM's Rust bench beside ours on one server whose timing is known.

The binary is in vLLM's CUDA wheel only. VLLM_RS names one for the tests that run it.
"""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from bench.load import run as run_module
from bench.load import vllm_bench
from bench.load.cli import main
from bench.load.config import LoadConfig
from bench.load.errors import LoadError, ServerUnusable, Unbelievable
from tests.bench.load.fake_server import FakeServer, serving

ROOT = Path(__file__).parents[3]
BINARY = os.environ.get("VLLM_RS")
real = pytest.mark.skipif(not BINARY, reason="VLLM_RS names no vllm-rs")
CONFIG = LoadConfig(
    contexts=(300,), streams=(2,), output=41, repeats=5, max_warm_up_rounds=1,
    tokenizer=ROOT / "tiny" / "checkpoint",
)  # fmt: skip

FAKE = """#!/usr/bin/env python3
import json, pathlib, sys
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
folder = pathlib.Path(options["--result-dir"])
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
result = {{"completed": 2, "failed": {failed}, "errors": ["", "broken"], "input_lens": [258, 258],
          "median_ttft_ms": 1.0, "median_tpot_ms": 2.0, "median_e2el_ms": 3.0,
          "output_throughput": 4.0}}
if {status} == 0:
    (folder / options["--result-filename"]).write_text(json.dumps(result))
print("no luck", file=sys.stderr)
sys.exit({status})
"""


@pytest.fixture
def fake_binary(tmp_path):
    def write(failed: int = 0, status: int = 0) -> Path:
        path = tmp_path / "vllm-rs"
        log = str(tmp_path / "log")
        path.write_text(FAKE.format(log=log, failed=failed, status=status))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return write


def test_each_invocation_has_a_seed_of_its_own_and_the_plans_lengths(fake_binary, tmp_path):
    with serving(FakeServer()) as url:
        result = vllm_bench.run(replace(CONFIG, url=url), tmp_path / "r.json", fake_binary())
    calls = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    options = [dict(zip(call[2::2], call[3::2], strict=False)) for call in calls]
    assert len({o["--seed"] for o in options}) == 6  # a warm-up and five repeats
    assert {o["--random-input-len"] for o in options} == {"259"}
    assert {o["--num-prompts"] for o in options} == {"2"}
    (cell,) = result["cells"]
    assert cell["tpot_ms"]["value"] == 2
    assert cell["prompt_tokens"] == [258]
    assert json.loads((tmp_path / "r.json").read_text())["kind"] == "vllm-bench"


def test_failed_requests_fail_the_run_and_give_no_figures(fake_binary, tmp_path):
    with serving(FakeServer()) as url, pytest.raises(Unbelievable, match="5 requests failed: brok"):
        vllm_bench.run(replace(CONFIG, url=url), tmp_path / "r.json", fake_binary(failed=1))
    assert json.loads((tmp_path / "r.json").read_text())["cells"][0]["ttft_ms"] is None


def test_a_binary_that_fails_is_one_line(fake_binary, tmp_path):
    with serving(FakeServer()) as url, pytest.raises(ServerUnusable, match="status 3: no luck"):
        vllm_bench.run(replace(CONFIG, url=url), tmp_path / "r.json", fake_binary(status=3))
    assert not (tmp_path / "r.json").exists()


def test_what_it_cannot_measure_is_refused(tmp_path, monkeypatch):
    with pytest.raises(LoadError, match="mode cold over completions only"):
        vllm_bench.run(replace(CONFIG, mode="warm"), tmp_path / "r.json", None)
    monkeypatch.setattr(vllm_bench.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LoadError, match="has no vllm-rs; name one with --vllm-rs"):
        vllm_bench.find_binary(None)
    with pytest.raises(LoadError, match="no such file"):
        vllm_bench.find_binary(tmp_path / "absent")


def both(server: FakeServer, folder: Path) -> tuple[dict, dict]:
    with serving(server) as url:
        config = replace(CONFIG, url=url)
        theirs = vllm_bench.run(config, folder / "theirs.json", Path(BINARY))
        ours = run_module.run(config, folder / "ours.json")
    return ours["cells"][0], theirs["cells"][0]


@real
@pytest.mark.slow
@pytest.mark.parametrize("tokens_per_chunk", [1, 2, 3])
def test_both_agree_within_2_percent_where_the_definition_is_one(tmp_path, tokens_per_chunk):
    server = FakeServer(ttft_s=0.3, gap_s=0.02, tokens_per_chunk=tokens_per_chunk)
    ours, theirs = both(server, tmp_path)
    for name in ("ttft_ms", "tpot_ms", "e2el_ms", "output_throughput"):
        assert ours[name]["value"] == pytest.approx(theirs[name]["value"], rel=0.02), name


@real
@pytest.mark.slow
def test_its_peak_counts_chunks_as_tokens(tmp_path):
    """All 82 tokens come within a third of a second, in 11 chunks for each of two streams."""
    _, theirs = both(FakeServer(ttft_s=0.1, gap_s=0.02, tokens_per_chunk=4), tmp_path)
    assert {run["max_output_tokens_per_s"] for run in theirs["runs"]} == {2 * 11}


@real
@pytest.mark.slow
def test_a_comment_before_the_first_event_makes_it_fail_and_not_us(tmp_path):
    """vLLM sends such comments to keep a connection alive."""
    with serving(FakeServer(keep_alive=True)) as url:
        config = replace(CONFIG, url=url)
        assert run_module.run(config, tmp_path / "ours.json")["cells"][0]["num_failed"] == 0
        with pytest.raises(Unbelievable, match="Never received a valid chunk"):
            vllm_bench.run(config, tmp_path / "theirs.json", Path(BINARY))


def test_the_command_line_picks_the_engine(fake_binary, tmp_path, capsys):
    with serving(FakeServer()) as url:
        options = ["--url", url, "--context", "300", "--output", "41", "--repeats", "1"]
        options += ["--engine", "vllm", "--vllm-rs", str(fake_binary())]
        options += ["--tokenizer", str(CONFIG.tokenizer), "--result", str(tmp_path / "r.json")]
        assert main(["run", *options]) == 0
    assert "Measured by vLLM's Rust bench" in capsys.readouterr().out
