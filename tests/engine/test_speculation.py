"""Speculative decoding through the MTP head: same text, the plain model's acceptance, controls."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("vllm")

from tests.engine.conftest import CHECKPOINT, ROOT, EngineRun, request
from tiny import export
from tiny.generate import acceptance
from tiny.load import load
from tiny.tokenizer import load_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OUTPUT_TOKENS = 64
DEPTHS = (1, 2, 3)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids of the held-out prompts, with the token that starts a text."""
    tokenizer = load_tokenizer(CHECKPOINT)
    lines = (ROOT / "tiny" / "heldout.jsonl").read_text().splitlines()
    return [[0, *tokenizer.encode(json.loads(line)["text"]).ids] for line in lines]


@pytest.fixture(scope="module")
def requests(prompts):
    return [request(ids, OUTPUT_TOKENS, "output") for ids in prompts]


@pytest.fixture(scope="module")
def plain_run(run_engine, requests) -> EngineRun:
    return run_engine(CHECKPOINT, requests)


@pytest.fixture(scope="module")
def mtp_runs(run_engine, requests) -> dict[int, EngineRun]:
    return {
        k: run_engine(
            CHECKPOINT, requests, speculative_config={"method": "mtp", "num_speculative_tokens": k}
        )
        for k in DEPTHS
    }


def gap(logprobs: torch.Tensor) -> torch.Tensor:
    """Distance of the best token to the second best, per position."""
    best = logprobs.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


@pytest.fixture(scope="module")
def noise(run_engine, requests, plain_run) -> float:
    """How far the gap moves between two batch shapes of the same engine: one request, or eight."""
    few = requests[:16]
    alone = run_engine(CHECKPOINT, few, batches=[[i] for i in range(len(few))], max_num_seqs=1)
    moved = 0.0
    for i in range(len(few)):
        a, b = plain_run.tokens(i), alone.tokens(i)
        same = next((j for j, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        until = min(same + 1, len(a))  # the position of the first difference is still comparable
        change = gap(plain_run.logprobs(i)[:until]) - gap(alone.logprobs(i)[:until])
        moved = max(moved, change.abs().max().item())
    return moved


@pytest.mark.parametrize("k", DEPTHS)
def test_speculation_does_not_change_the_text(plain_run, mtp_runs, prompts, noise, k):
    """Where texts part, the two best tokens must have been closer than the measured noise."""
    parted = []
    for i in range(len(prompts)):
        a, b = plain_run.tokens(i), mtp_runs[k].tokens(i)
        if a != b:
            at = next(j for j, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            parted.append((i, at, gap(plain_run.logprobs(i))[at].item()))
    beyond = [entry for entry in parted if entry[2] > noise]
    assert not beyond, f"(prompt, position, gap) beyond the noise {noise:.4f}: {beyond}"
    assert len(parted) <= len(prompts) // 4, parted


def test_acceptance_is_that_of_the_plain_model(plain_run, mtp_runs, prompts):
    model = load(CHECKPOINT)
    outputs = [plain_run.tokens(i) for i in range(len(prompts))]
    for k in DEPTHS:
        plain = acceptance(model, prompts, outputs, k)
        assert abs(mtp_runs[k].acceptance_rate - plain.acceptance_rate) <= 0.03
    assert mtp_runs[1].acceptance_rate >= 0.50


def test_a_head_with_shuffled_experts_is_accepted_less_than_half_as_often(
    run_engine, requests, plain_run, mtp_runs, tmp_path, noise
):
    shuffled = tmp_path / "checkpoint"
    export.shuffle_mtp_experts(CHECKPOINT, shuffled)
    run = run_engine(
        shuffled, requests, speculative_config={"method": "mtp", "num_speculative_tokens": 1}
    )
    assert run.acceptance_rate < 0.5 * mtp_runs[1].acceptance_rate
    # A bad head costs speed, never text.
    same = sum(plain_run.tokens(i) == run.tokens(i) for i in range(len(requests)))
    assert same >= 0.75 * len(requests)


@pytest.mark.parametrize("k", [1, 3])
def test_speculation_beyond_the_indexers_selection(run_engine, k):
    """Past 4 x 512 tokens the indexer scores and selects, for each speculative row."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(30, 2048, (n,), generator=generator).tolist() for n in (2200, 2350)]
    jobs = [request(ids, 24, "output") for ids in texts]
    speculative = {"method": "mtp", "num_speculative_tokens": k}
    plain = run_engine(CHECKPOINT, jobs)
    drafted = run_engine(CHECKPOINT, jobs, speculative_config=speculative)
    for i in range(len(jobs)):
        a, b = plain.tokens(i), drafted.tokens(i)
        at = next((j for j, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        assert at is None or gap(plain.logprobs(i))[at] < 0.1, (i, at)
    assert drafted.counters["spec_decode_num_draft_tokens"] > 0
