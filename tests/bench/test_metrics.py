import pytest

from bench import metrics


def test_ttft_and_e2el_are_milliseconds_since_the_request_was_sent():
    assert metrics.ttft_ms(10.0, 10.25) == 250.0
    assert metrics.e2el_ms(10.0, 11.0) == 1000.0


def test_tpot_leaves_the_first_token_out():
    assert metrics.tpot_ms(e2el_ms=1000, ttft_ms=100, output_tokens=10) == 100


def test_decode_rate_is_the_inverse_of_tpot():
    assert metrics.decode_tok_s(e2el_ms=1000, ttft_ms=100, output_tokens=10) == 10


def test_one_token_has_no_tpot_and_no_rate():
    assert metrics.tpot_ms(100, 100, 1) is None
    assert metrics.decode_tok_s(100, 100, 1) is None


def test_tokens_in_one_chunk_have_no_rate():
    assert metrics.decode_tok_s(100, 100, 4) is None


def test_without_speculation_there_is_one_pass_per_token():
    assert metrics.passes_per_token(96, 96) == 1


def test_acceptance_length_includes_the_bonus_token():
    assert metrics.acceptance_length(num_accepted_tokens=30, num_drafts=40) == 1.75


def test_acceptance_rate_is_of_drafted_tokens_not_of_drafts():
    assert metrics.acceptance_rate(num_accepted_tokens=30, num_draft_tokens=120) == 0.25


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (metrics.passes_per_token, (None, 5)),
        (metrics.passes_per_token, (5, None)),
        (metrics.passes_per_token, (5, 0)),
        (metrics.acceptance_rate, (None, None)),
        (metrics.acceptance_rate, (0, 0)),
        (metrics.acceptance_length, (None, 3)),
        (metrics.acceptance_length, (0, 0)),
    ],
)
def test_not_measured_is_none(function, arguments):
    assert function(*arguments) is None


def test_nothing_accepted_is_zero_and_not_none():
    assert metrics.acceptance_rate(0, 10) == 0
    assert metrics.acceptance_length(0, 10) == 1


def test_median_skips_what_was_not_measured():
    assert metrics.median([3.0, None, 1.0]) == 2.0
    assert metrics.median([None]) is None
