"""Guard of sampling-refuse-lists-of-tokens-that-do-not-fit-into-the.patch."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

# By name: parameters with a list of that many tokens.
ASKED = {
    "allowed_token_ids": lambda n: {"allowed_token_ids": list(range(n))},
    "logit_bias": lambda n: {"logit_bias": dict.fromkeys(range(n), 1.0)},
    "stop_token_ids": lambda n: {"stop_token_ids": list(range(n)), "min_tokens": 1},
    "bad_words": lambda n: {"bad_words": ["x"]},
}
LIMITS = {"allowed_token_ids": 1024, "logit_bias": 1024, "stop_token_ids": 128, "bad_words": 1024}


@pytest.fixture
def cuda(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)


@pytest.mark.parametrize("name", LIMITS)
def test_what_does_not_fit_is_refused(cuda, name):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    def asked(size):
        params = SamplingParams(max_tokens=2, **ASKED[name](size))
        if name == "bad_words":
            params._bad_words_token_ids = [[1]] * size
        return params

    limit = LIMITS[name]
    asked(limit).verify_buffer_sizes()
    with pytest.raises(VLLMValidationError, match=f"{name}: {limit + 1} token ids; at most"):
        asked(limit + 1).verify_buffer_sizes()


def test_stop_tokens_without_a_minimum_are_not_bounded(cuda):
    from vllm import SamplingParams

    SamplingParams(max_tokens=2, stop_token_ids=list(range(500))).verify_buffer_sizes()


def test_the_runner_of_a_cpu_has_no_such_buffers():
    from vllm import SamplingParams

    SamplingParams(max_tokens=2, allowed_token_ids=list(range(2000))).verify_buffer_sizes()


def test_each_request_is_looked_at_once_its_tokens_are_known():
    [folder] = find_spec("vllm").submodule_search_locations
    source = Path(folder, "v1", "engine", "input_processor.py").read_text()
    assert re.search(
        r"update_from_tokenizer\(.*\)\n +sampling_params.verify_buffer_sizes\(\)", source
    )


def test_the_limits_are_the_workers():
    from vllm import envs

    [folder] = find_spec("vllm").submodule_search_locations
    source = Path(folder, "v1", "worker", "gpu", "sample", "logit_bias.py").read_text()
    found = dict(re.findall(r"^MAX_NUM_([A-Z_]+) = (\d+)$", source, re.MULTILINE))
    assert found == {
        "ALLOWED_TOKEN_IDS": str(LIMITS["allowed_token_ids"]),
        "LOGIT_BIAS_TOKENS": str(LIMITS["logit_bias"]),
        "STOP_TOKEN_IDS": str(LIMITS["stop_token_ids"]),
    }
    assert LIMITS["bad_words"] == envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
