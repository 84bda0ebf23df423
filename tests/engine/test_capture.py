"""Captured rows against the plain model: the MTP layer's FFN inputs of the same tokens.

As in `test_logits`, the yardstick is the plain model's own bfloat16 error against float64.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm")

from retrofit.calibration import Calibration, read_meta, rows_file
from retrofit.control import CAPTURE_DIR, CONTROL, Action, Order, write
from tests.engine.engine import CHECKPOINT, ROOT, run_script
from tiny import data, tokenizer
from tiny.load import load

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OUTPUT_TOKENS = 40
ALLOWED = 1.5
NEAR_TIE = 0.02  # of the biased scores, which are around 1


@dataclass
class Capture:
    folder: Path
    answers: list[dict]
    sequences: list[list[int]]  # prompt and output

    def rows(self, number: int) -> dict[str, torch.Tensor]:
        """Rows of one request; there may be one more, for a draft accepted beyond the end."""
        rows = load_file(self.folder / rows_file(number))
        count = len(self.sequences[number]) - 1
        assert count <= len(rows["hidden"]) <= count + 1
        return {key: value[:count] for key, value in rows.items()}


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Capture:
    place = tmp_path_factory.mktemp("capture")
    folder = place / "calibration"
    folder.mkdir()
    # Left over from another server's life: must not start anything.
    write(folder / CONTROL, Order("old", Action.BEGIN, 10**9))
    prompts = data.read_prompts(ROOT / "tiny" / "heldout.jsonl", tokenizer.load(CHECKPOINT))[:4]
    requests = [{"ids": ids, "max_tokens": OUTPUT_TOKENS} for ids in prompts]
    job, result = place / "job.json", place / "result.npz"
    job.write_text(
        json.dumps(
            {
                "model": str(CHECKPOINT),
                "folder": str(folder),
                "requests": requests,
                "budget_bytes": 10**9,
                "small_budget_bytes": 1000,
            }
        )
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run_script("run_capture.py", job, result, {CAPTURE_DIR: str(folder), "PYTHONPATH": path})
    with np.load(result) as arrays:
        sequences = [ids + arrays[f"tokens_{i}"].tolist() for i, ids in enumerate(prompts)]
        return Capture(folder, json.loads(str(arrays["answers"])), sequences)


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT)


def plain_inputs(model, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    """FFN inputs of the plain model's MTP layer: (len(tokens) - 1, hidden)."""
    seen = []
    hook = model.mtp[0].block.ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            model.draft(model.trunk(ids, dtype)[:, :-1], ids[:, 1:])
    finally:
        hook.remove()
    return seen[0][0]


def rms(error: torch.Tensor) -> torch.Tensor:
    return error.double().square().mean(-1).sqrt()


def test_rows_are_the_plain_models_inputs_up_to_bfloat16(captured, model):
    vllm, plain = [], []
    for number, tokens in enumerate(captured.sequences):
        exact = plain_inputs(model, tokens, torch.float64)
        vllm.append(rms(captured.rows(number)["hidden"].double() - exact) / rms(exact))
        plain.append(rms(plain_inputs(model, tokens, torch.bfloat16).double() - exact) / rms(exact))
    for quantile in (0.5, 0.9):
        ours, theirs = (torch.cat(errors).quantile(quantile).item() for errors in (vllm, plain))
        assert ours <= ALLOWED * theirs, f"quantile {quantile}: {ours:.4f}, bf16 {theirs:.4f}"
    assert torch.cat(vllm).median() < 0.05


def test_rows_of_other_tokens_are_seen(captured, model):
    """Negative control: one position off is not within bfloat16's error."""
    tokens = captured.sequences[0]
    exact = plain_inputs(model, tokens, torch.float64)
    off = captured.rows(0)["hidden"].double().roll(1, 0)
    assert (rms(off - exact) / rms(exact)).median() > 0.5


def test_ids_are_the_plain_routers_but_for_near_ties(captured, model):
    gate = model.mtp[0].block.ffn.gate
    topk = model.config.num_experts_per_tok
    count = different = 0
    for number, tokens in enumerate(captured.sequences):
        rows = captured.rows(number)
        ids = rows["topk_ids"].long()
        # From the captured inputs themselves: nothing but the router can differ.
        hidden = rows["hidden"].double()
        scores = torch.nn.functional.softplus(hidden @ gate.weight.double().T).sqrt()
        best = (scores + gate.bias.double()).topk(topk + 1, dim=-1)
        same = (ids.sort().values == best.indices[:, :topk].sort().values).all(-1)
        gaps = best.values[:, topk - 1] - best.values[:, topk]
        assert (gaps[~same] < NEAR_TIE).all(), gaps[~same]
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * model.config.routed_scaling_factor
        torch.testing.assert_close(rows["topk_weights"].double(), weights, atol=0.01, rtol=0.01)
        # From the tokens: the whole way through the engine.
        with torch.no_grad():
            exact_ids = gate(plain_inputs(model, tokens, torch.float64), torch.tensor(tokens[1:]))[
                1
            ]
        different += (ids.sort().values != exact_ids.sort().values).any(-1).sum().item()
        count += len(ids)
    assert different <= 0.05 * count, f"{different} of {count}"


def test_only_what_was_asked_for_and_committed_is_kept(captured):
    begin, *commits = captured.answers[: 1 + len(captured.sequences)]
    assert begin["num_rows"] == 0
    ends = [answer["num_rows"] for answer in commits]
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        expected = len(captured.sequences[number]) - 1
        assert expected <= end - start <= expected + 1
    meta = read_meta(captured.folder)
    assert meta["num_rows"] == ends[-1]
    assert meta["done"] == len(captured.sequences) - 1
    assert meta["layers"] == [4]


def test_the_budget_is_kept(captured):
    over, stop, late = captured.answers[-3:]
    assert over["full"]
    assert over["num_rows"] == captured.answers[-5]["num_rows"]
    assert stop["error"] is None
    assert late["error"] == "capture: commit without begin; did the server restart?"


def test_mtp_can_read_the_folder(captured, model):
    config = model.config
    calibration = Calibration(
        captured.folder, config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    )
    calibration.check_finite()
    assert sum(calibration.counts) == calibration.num_rows * config.num_experts_per_tok
