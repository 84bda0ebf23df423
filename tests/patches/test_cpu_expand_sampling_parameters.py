"""Guard of cpu-expand-sampling-parameters-to-draft-tokens-in-their-own.patch.

tests/serve/test_clients.py samples from a running engine.
"""

import pytest
import torch

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64], ids=str)
def test_each_request_s_value_comes_once_for_each_of_its_drafts(dtype):
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    values = torch.tensor([0.5, 0, 40, 7.25]).to(dtype)
    ends = torch.tensor([2, 3, 3, 6], dtype=torch.int32)  # the third has no draft
    expanded = expand_batch_to_tokens(values, ends, 6, replace_from=0, replace_to=1)
    first, last = values[0].item() or 1, values[3].item()
    assert expanded.tolist() == [first, first, 1, last, last, last]
    assert expanded.dtype == dtype
