"""Guard of spec-decode-refuse-logprob-token-ids-which-end-the-engine.patch.

tests/serve/test_clients.py asks a running engine.
"""

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine


def test_they_are_refused_with_speculation_and_only_then():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    asked = SamplingParams(max_tokens=1, logprob_token_ids=[100, 200])
    asked._validate_spec_decode(None)
    with pytest.raises(VLLMValidationError, match="logprob_token_ids is not yet supported"):
        asked._validate_spec_decode(object())
    SamplingParams(max_tokens=1, logprobs=2)._validate_spec_decode(object())
