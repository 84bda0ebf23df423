"""`bench run` against the real engine with the tiny model, without MTP and with it."""

import json
from pathlib import Path

import pytest

from bench.load import result, speculative
from bench.load.cli import main
from bench.load.config import LoadConfig, Mode
from bench.load.run import run
from bench.server import free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def serve(folder: Path, num_speculative_tokens: int):
    log = folder / "serve.log"
    arm = speculative.Arm("x", "cpu-tiny", None, num_speculative_tokens, free_port(), log, 600)
    return arm, speculative.launch(arm)


def test_both_arms_are_measured_and_acceptance_is_the_engines(tmp_path, capsys):
    options = ["--context", "2k", "--streams", "2", "--output", "48", "--repeats", "3"]
    options += ["--compare-speculative", "--profile", "cpu-tiny", "--start-timeout-s", "600"]
    assert main(["run", *options, "--result", str(tmp_path / "x.json")]) == 0
    base, mtp = (result.read(tmp_path / f"x-{name}.json") for name in ("no-mtp", "mtp"))
    for one in (base, mtp):
        (cell,) = one["cells"]
        assert (cell["window"], cell["context"], cell["depth"]) == (4096, 2000, 1952)
        assert cell["num_failed"] == 0
        assert cell["cache"]["contaminated"] is False
        assert cell["cache"]["cached_share"] == 0
        assert cell["counters"]["generation_tokens"] == 6 * 48
        assert cell["ttft_ms"]["value"] > 0
    assert base["cells"][0]["acceptance"] is None
    measured = mtp["cells"][0]["acceptance"]
    assert 0.3 < measured["rate"] < 1
    assert measured["source"] == "counters"
    assert measured["requests_agree"] is True
    assert len(measured["per_request"]) == 6
    chunks = [r["chunks"] for d in mtp["cells"][0]["rounds"] for r in d["requests"]]
    assert {sum(n for _, n, _ in one) for one in chunks} == {48}
    assert {n for one in chunks for _, n, _ in one} >= {1, 2}
    assert "cpu-tiny MTP k=1" in capsys.readouterr().out


def test_warm_and_follow_up_come_from_the_cache(tmp_path):
    arm, server = serve(tmp_path, 1)
    with server:
        for mode, share in ((Mode.WARM, 0.75), (Mode.FOLLOWUP, 0.4)):
            config = LoadConfig(
                url=arm.url, contexts=(3000,), output=16, mode=mode, repeats=1, max_warm_up_rounds=0
            )
            output = tmp_path / f"{mode}.json"
            run(config, output)
            cache = json.loads(output.read_text())["cells"][0]["cache"]
            assert cache["contaminated"] is False
            assert cache["cached_share"] > share
