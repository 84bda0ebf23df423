"""Guard of cpu-refuse-the-placeholders-of-padded-drafts-when-sampling.patch."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

VOCABULARY, REQUESTS = 4, 2048
# Of the row of a draft; the last token of the row before it is certain.
P = torch.tensor([0.5, 0.3, 0.2, 0.0])


@pytest.fixture
def metadata():
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    return SimpleNamespace(
        all_greedy=False,
        all_random=True,
        temperature=torch.ones(REQUESTS),
        generators={},
    )


def sampled(metadata, drafts):
    """Verify one draft of each request: what is taken of it, and the bonus or -1."""
    from vllm.v1.sample.rejection_sampler import rejection_sample

    torch.manual_seed(0)
    # Before each row stands a certain token: what an index of -1 reads.
    rows = torch.full((2 * REQUESTS, VOCABULARY), -30.0)
    rows[::2, -1] = 30.0
    rows[1::2] = P.log()
    return rejection_sample(
        torch.tensor(drafts, dtype=torch.int32),
        [2] * REQUESTS,
        2,
        torch.arange(2, 2 * REQUESTS + 1, 2, dtype=torch.int32),
        None,
        rows,
        torch.full((REQUESTS, 1), 3, dtype=torch.int32),
        metadata,
    )


def test_a_placeholder_is_never_taken_and_its_place_is_sampled_from_the_whole_row(metadata):
    taken = sampled(metadata, [VOCABULARY - 1, -1] * REQUESTS)
    assert taken[:, 0].eq(VOCABULARY - 1).all()
    assert taken[:, 2].eq(-1).all()  # no bonus after a refused draft
    share = torch.bincount(taken[:, 1].long().clamp(min=0), minlength=VOCABULARY) / REQUESTS
    assert taken[:, 1].ge(0).all()
    assert (share - P).abs().max() < 0.1  # nine standard deviations: other CPUs draw other numbers


def test_other_drafts_are_taken_as_often_as_they_are_likely(metadata):
    taken = sampled(metadata, [VOCABULARY - 1, 0] * REQUESTS)
    accepted = taken[:, 2].eq(3)
    assert taken[accepted, 1].eq(0).all()
    assert abs(accepted.float().mean() - P[0]) < 0.1
