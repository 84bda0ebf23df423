"""The trained tiny model on one GPU: the text of its head's drafts, and how many are accepted."""

from __future__ import annotations

import dataclasses

import pytest

from scripts.gpu_case import HELDOUT_OUTPUT_TOKENS
from scripts.gpu_check import judge
from tiny import data, load, tokenizer
from tiny.__main__ import CHECKPOINT, HERE
from tiny.generate import acceptance

pytestmark = pytest.mark.gpu
NAMES = ("tiny-k0", "tiny-k1")


@pytest.mark.parametrize("name", NAMES)
def test_a_case_ran(results, name):
    assert results[name]["error"] is None


def test_speculation_does_not_change_the_text(results):
    assert judge({name: results[name] for name in NAMES}) == []


def test_acceptance_is_that_of_the_plain_model(results):
    """The plain model drafts along the texts that the GPU wrote without speculation."""
    prompts = data.read_prompts(HERE / "heldout.jsonl", tokenizer.load(CHECKPOINT))
    model = load.load(CHECKPOINT)
    # The engine runs on past the end-of-sentence token, as the requests ask.
    model.config = dataclasses.replace(model.config, eos_token_id=-1)
    texts = results["tiny-k0"]["heldout"]["tokens"]
    plain = acceptance(model, prompts, 1, HELDOUT_OUTPUT_TOKENS, continuations=texts)
    rate = results["tiny-k1"]["heldout"]["speculation"]["acceptance_rate"]
    assert rate == pytest.approx(plain.acceptance_rate, abs=0.03)
