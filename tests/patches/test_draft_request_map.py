"""Guard of spec-decode-map-draft-tokens-to-their-requests-anew-after.patch."""

import dataclasses

import pytest

pytest.importorskip("vllm")

from tests.engine.engine import CHECKPOINT, ROOT, request
from tiny import data, tokenizer
from tiny.generate import acceptance
from tiny.load import load

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OUTPUT_TOKENS = 48
NO_DRAFT = 0  # begins a text


@pytest.fixture(scope="module")
def model():
    model = load(CHECKPOINT)
    # The engine runs on past the end-of-sentence token, as the requests ask.
    model.config = dataclasses.replace(model.config, eos_token_id=-1)
    return model


@pytest.mark.parametrize("streams", [1, 8])
def test_streams_beside_a_request_leave_its_second_draft_token_alone(run_engine, model, streams):
    prompts = data.read_prompts(ROOT / "tiny" / "heldout.jsonl", tokenizer.load(CHECKPOINT))[:16]
    run = run_engine(
        CHECKPOINT,
        [request(ids, OUTPUT_TOKENS) for ids in prompts],
        speculative_config={"method": "mtp", "num_speculative_tokens": 2},
        max_num_seqs=streams,
    )
    # Of the engine's own text: where the CPU's products round by batch shape, texts part.
    texts = [run.tokens(i) + [NO_DRAFT] * 2 for i in range(len(prompts))]
    plain = acceptance(model, prompts, 2, OUTPUT_TOKENS, continuations=texts)
    counted = run.counters["spec_decode_num_accepted_tokens_per_pos"]
    rates = [second / first for first, second in (counted, plain.per_position)]
    # Measured: 0.57 alone; 0.41 beside others where they read each other's cache.
    assert abs(rates[0] - rates[1]) < 0.08, rates
