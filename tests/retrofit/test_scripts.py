"""The measuring scripts, at a small size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def full_size(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gptq_full_size

    yield gptq_full_size
    sys.modules.pop("gptq_full_size")


def test_loads_have_the_sum_and_the_ends_that_are_asked_for(full_size):
    config = full_size.BlockConfig()
    loads = full_size.expert_loads(config)
    assert (min(loads), max(loads), sum(loads)) == (430, 175_000, 473_000 * 6)


def test_each_row_goes_to_topk_distinct_experts(full_size):
    config = full_size.BlockConfig(experts=8, rows=300, topk=2, min_load=20, max_load=200)
    loads = full_size.expert_loads(config)
    rows = full_size.expert_rows(config, loads, torch.Generator())
    assert [len(part) for part in rows] == loads
    assert all(len(part.unique()) == len(part) for part in rows)
    assert torch.cat(rows).bincount().tolist() == [2] * 300


def test_a_small_block_is_quantized_and_reported(full_size, tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = (
        "--experts 6 --hidden 256 --inter 128 --topk 2 --rows 900 --min-load 30 --max-load 700 "
        f"--experts-per-step 4 --solve-batch 3 --commit abc --out {out}"
    )
    assert full_size.main(arguments.split()) == 0
    report = json.loads(out.read_text())
    assert (report["num_experts_done"], report["num_tensors_done"]) == (6, 18)
    assert report["figures"]["w1"]["methods"]["gptq"] >= 4
    assert report["figures"]["w1"]["worst_ratio_to_rtn"] < 1
    assert report["provenance"]["commit"] == "abc"
    with pytest.raises(SystemExit, match="2"):
        full_size.main(["--rows", "10"])
    assert "the mean load" in capsys.readouterr().err


def test_repeated_rows_are_counted_once(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gptq_peer

    rows = torch.tensor([[1.0, 2], [3, 4], [1, 2], [5, 6], [3, 4]]).bfloat16()
    assert gptq_peer.first_of_each(rows).tolist() == [0, 1, 3]
