import pytest
import torch

from tiny.generate import Acceptance, acceptance, drafts, greedy, walk
from tiny.model import DeepseekV4

EOS = 1


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return DeepseekV4(tiny_config).eval().requires_grad_(False)


def test_the_walk_counts_as_an_engine_does():
    prompt, continuation = [10, 11], [20, 21, 22, 23, 24, 25, 26]
    tokens = prompt + continuation
    padded = tokens + [0, 0]
    right = [padded[p + 2 : p + 4] for p in range(7)]
    # step 1 emits 20 21 22 23 (two accepted, one bonus, after the prefill's 20)
    assert walk(2, tokens, right, max_tokens=4, eos=EOS) == (1, [1, 1])
    wrong = [[99, 99]] * 7
    assert walk(2, tokens, wrong, max_tokens=4, eos=EOS) == (3, [0, 0])
    second_only = [[99, row[1]] for row in right]
    assert walk(2, tokens, second_only, max_tokens=4, eos=EOS) == (3, [0, 0])
    first_only = [[row[0], 99] for row in right]
    assert walk(2, tokens, first_only, max_tokens=5, eos=EOS) == (2, [2, 0])


def test_the_walk_ends_at_the_end_of_sentence():
    tokens = [10, 20, EOS, 30, 31, 32]
    wrong = [[99]] * 6
    assert walk(1, tokens, wrong, max_tokens=4, eos=EOS) == (1, [0])


def test_rate_and_length_are_vllms():
    figures = Acceptance(
        2, num_drafts=10, num_draft_tokens=20, num_accepted_tokens=9, per_position=(6, 3)
    )
    assert figures.acceptance_rate == 9 / 20
    assert figures.acceptance_length == 1 + 9 / 10


def test_greedy_does_not_depend_on_the_batch(model):
    prompts = [[0, 5, 6, 7], [0, 100, 101, 102, 103, 104, 105]]
    # In float32 a near-tie, of two tokens or of two experts, may fall otherwise in another shape.
    together = greedy(model, prompts, 4, torch.float64)
    alone = [greedy(model, [p], 4, torch.float64)[0] for p in prompts]
    assert together == alone
    assert [len(t) for t in together] == [4, 4]


def test_drafts_chain(model):
    tokens = torch.arange(2, 32)[None]
    two = drafts(model, tokens, 2, torch.float32)
    assert two.shape == (1, 29, 2)
    assert torch.equal(two[..., :1], drafts(model, tokens, 1, torch.float32))


def test_acceptance_counts_all_prompts(model):
    prompts = [[0, 5, 6, 7], [0, 8, 9]]
    figures = acceptance(model, prompts, 2, max_tokens=5, dtype=torch.float32, batch=1)
    assert figures.num_draft_tokens == 2 * figures.num_drafts
    assert figures.num_accepted_tokens == sum(figures.per_position)
    emitted = 2 + figures.num_drafts + figures.num_accepted_tokens
    assert 10 <= emitted <= 10 + 2 * 2


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        greedy(model, [[]], 1, torch.float32)
