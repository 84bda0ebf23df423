"""vLLM's log-probabilities against the plain-PyTorch model with the same dequantized weights.

What vLLM may cost over the number format itself is in `yardstick.py`.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from tests.engine.engine import CHECKPOINT, HERE, ROOT, request
from tests.engine.yardstick import yardstick
from tiny import export, tokenizer
from tiny.load import load

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LENGTHS = (1, 127, 128, 129, 600)
LONG = 2300  # 575 compressed keys: more than index_topk = 512, so the indexer selects
EVERY_POSITION = 129  # the length whose prompt positions are all compared
OUTPUT_TOKENS = 16
PLACES = 2  # per length
STEP = 650  # tokens from one request's place to the next

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp4_checkpoint_agrees_with_the_plain_model(run_engine, requests, variant):
    arguments = {"max_num_batched_tokens": 4096, **VARIANTS[variant]}
    run = run_engine(CHECKPOINT, requests, batches=[[i] for i in range(len(requests))], **arguments)
    if variant in ("reference ops", "no AVX-512"):
        assert set(run.ops.values()) == {"reference"}
    yardstick(CHECKPOINT).assert_close(requests, run)


def test_w4a16_checkpoint_agrees_with_the_plain_model(run_engine, requests, w4a16):
    run = run_engine(
        w4a16,
        requests,
        batches=[[i] for i in range(len(requests))],
        max_num_batched_tokens=4096,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    )
    assert "Using ReferenceExpertsInt4" in run.log
    yardstick(w4a16).assert_close(requests, run)


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
        yardstick(CHECKPOINT).assert_close(short, run)
