"""vLLM's log-probabilities against the plain-PyTorch model with the same dequantized weights.

The yardstick is the plain model itself: in float64 it is exact, in bfloat16 it shows what the
number format costs. vLLM may cost half as much again. Per position, the error is the RMS over the
vocabulary; a router's near-tie that falls the other way makes single positions far worse in either
model, so the median and the 90th percentile are compared, not the maximum.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from tests.engine.engine import CHECKPOINT, HERE, ROOT, request
from tiny import export, tokenizer
from tiny.load import load

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LENGTHS = (1, 127, 128, 129, 600)
LONG = 2300  # 575 compressed keys: more than index_topk = 512, so the indexer selects
EVERY_POSITION = 129  # the length whose prompt positions are all compared
OUTPUT_TOKENS = 16
PLACES = 2  # per length
STEP = 650  # tokens from one request's place to the next
ALLOWED = 1.5

VARIANTS = {
    "as this CPU has the ops": {},
    "reference ops": {"env": {"DSV4_CPU_OPS": "reference"}},
    "no AVX-512": {"env": {"PYTHONPATH": str(HERE / "without_amx")}},
    "chunked prefill": {"max_num_batched_tokens": 96},
}


@pytest.fixture(scope="module")
def requests():
    """Held-out text, each request from another place: a router's flip stays in its request."""
    ids = tokenizer.load(CHECKPOINT).encode((ROOT / "tiny" / "heldout.txt").read_text()).ids
    lengths = [*LENGTHS * PLACES, LONG]
    starts = [STEP * i for i in range(len(lengths))]
    return [
        request(ids[start : start + n], OUTPUT_TOKENS, "all" if n == EVERY_POSITION else "output")
        for start, n in zip(starts, lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def w4a16(tmp_path_factory):
    """The same model with INT4 experts (pack-quantized) and FP8 attention."""
    folder = tmp_path_factory.mktemp("w4a16") / "checkpoint"
    export.export(load(CHECKPOINT), folder, export.Layout.W4A16, tokenizer=CHECKPOINT)
    return folder


def position_errors(model, tokens: list[int], logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """RMS error over the vocabulary at each position, of vLLM and of the plain bfloat16 model."""

    def plain(dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), dtype=dtype)[0]
        return torch.log_softmax(logits.double(), -1)

    exact = plain(torch.float64)[-len(logprobs) :]
    rms = {
        "vllm": logprobs.double() - exact,
        "bfloat16": plain(torch.bfloat16)[-len(logprobs) :] - exact,
    }
    return {name: error.square().mean(-1).sqrt() for name, error in rms.items()}


def assert_close_as_bfloat16(checkpoint, requests, run) -> None:
    model = load(checkpoint)
    table = {"vllm": [], "bfloat16": []}
    for index, asked in enumerate(requests):
        tokens = asked["ids"] + run.tokens(index)[:-1]
        errors = position_errors(model, tokens, run.logprobs(index))
        for name, values in errors.items():
            table[name].append(values)
    for quantile in (0.5, 0.9):
        vllm, plain = (torch.cat(table[name]).quantile(quantile).item() for name in table)
        assert vllm <= ALLOWED * plain, f"quantile {quantile}: vLLM {vllm:.4f}, bf16 {plain:.4f}"
    # No length may hide behind the others.
    for length in {len(asked["ids"]) for asked in requests}:
        chosen = [i for i, asked in enumerate(requests) if len(asked["ids"]) == length]
        vllm, plain = (
            torch.cat([table[name][i] for i in chosen]).median().item() for name in table
        )
        assert vllm <= 2 * ALLOWED * plain, f"length {length}: vLLM {vllm:.4f}, bf16 {plain:.4f}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp4_checkpoint_agrees_with_the_plain_model(run_engine, requests, variant):
    arguments = {"max_num_batched_tokens": 4096, **VARIANTS[variant]}
    run = run_engine(CHECKPOINT, requests, batches=[[i] for i in range(len(requests))], **arguments)
    if variant in ("reference ops", "no AVX-512"):
        assert set(run.ops.values()) == {"reference"}
    assert_close_as_bfloat16(CHECKPOINT, requests, run)


def test_w4a16_checkpoint_agrees_with_the_plain_model(run_engine, requests, w4a16):
    run = run_engine(
        w4a16,
        requests,
        batches=[[i] for i in range(len(requests))],
        max_num_batched_tokens=4096,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    )
    assert "Using ReferenceExpertsInt4" in run.log
    assert_close_as_bfloat16(w4a16, requests, run)


def test_a_wrong_model_is_seen(run_engine, requests, tmp_path):
    """Negative control: one block scale doubled must not pass as rounding."""
    damaged = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, damaged)
    name = "layers.1.attn.wo_b.scale"
    shard = damaged / export.read_index(damaged)[name]
    tensors = load_file(shard)
    tensors[name].view(torch.uint8)[0, 0] += 1  # E8M0: twice the value
    save_file(tensors, shard, metadata={"format": "pt"})
    short = requests[:-1]
    run = run_engine(damaged, short, batches=[[i] for i in range(len(short))])
    with pytest.raises(AssertionError, match="quantile"):
        assert_close_as_bfloat16(CHECKPOINT, short, run)
