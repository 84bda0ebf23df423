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


# A stream under MTP: sent at 10.0, chunks of 1, 2, 2 and 1 tokens.
TIMES = [10.1, 10.2, 10.4, 10.5]
COUNTS = [1, 2, 2, 1]


def test_itl_is_the_gap_between_chunks_whatever_they_carry():
    assert metrics.itl_ms(TIMES) == pytest.approx([100, 200, 100])
    assert metrics.itl_ms([10.1]) == []
    assert metrics.itl_ms([]) == []


def test_itl_per_token_shares_a_gap_among_the_tokens_of_its_chunk():
    assert metrics.itl_per_token_ms(TIMES, COUNTS) == pytest.approx([50, 50, 100, 100, 100])
    assert metrics.itl_per_token_ms(TIMES, [1, 1, 1, 1]) == metrics.itl_ms(TIMES)


def test_the_mean_of_itl_per_token_is_tpot_and_that_of_itl_is_not():
    per_token = metrics.itl_per_token_ms(TIMES, COUNTS)
    tpot = metrics.tpot_ms(e2el_ms=500, ttft_ms=100, output_tokens=6)
    assert sum(per_token) / len(per_token) == pytest.approx(tpot)
    assert sum(metrics.itl_ms(TIMES)) / 3 == pytest.approx(tpot * 5 / 3)


def test_itl_per_token_needs_every_count_but_the_first():
    assert metrics.itl_per_token_ms(TIMES, [None, 2, 2, 1]) is not None
    assert metrics.itl_per_token_ms(TIMES, [1, 2, None, 1]) is None


def test_a_chunk_without_tokens_has_no_share():
    assert metrics.itl_per_token_ms([0.0, 0.1, 0.2], [1, 0, 1]) == pytest.approx([100])


def test_prefill_counts_only_what_was_computed():
    assert metrics.prefill_tok_s(1000, 200, 400) == 2000
    assert metrics.prefill_tok_s(1000, None, 400) is None
    assert metrics.prefill_tok_s(None, 0, 400) is None
    assert metrics.prefill_tok_s(1000, 0, None) is None


def test_aggregate_runs_from_the_first_request_sent_to_the_last_token():
    assert metrics.output_throughput([10, 20], [0.0, 1.0], [3.0, 6.0]) == 5
    assert metrics.output_throughput([], [], []) is None


def test_aggregate_is_less_than_the_sum_of_the_streams_decode_rates():
    # Two streams, one after the other: each decodes 10 tok/s, together they give 5.
    streams = [metrics.decode_tok_s(1000, 0, 11), metrics.decode_tok_s(1000, 0, 11)]
    assert sum(streams) == 20
    assert metrics.output_throughput([11, 11], [0.0, 0.0], [1.0, 2.2]) == pytest.approx(10)


def test_the_overlap_window_is_where_every_stream_decodes():
    assert metrics.overlap_window_s([(1.0, 5.0), (2.0, 4.0)]) == (2.0, 4.0)
    assert metrics.overlap_window_s([(1.0, 2.0), (3.0, 4.0)]) is None
    assert metrics.overlap_window_s([(1.0, 1.0)]) is None
    assert metrics.overlap_window_s([]) is None


def test_overlap_rate_counts_tokens_in_the_window_of_all_streams():
    first = [(0.0, 1), (1.0, 2), (2.0, 2), (3.0, 2)]
    second = [(1.0, 1), (2.0, 3), (4.0, 9)]
    # From 1 to 3: 2 + 2 of the first, 3 of the second; the chunks at 1 are not of it.
    assert metrics.overlap_tok_s([first, second]) == 3.5


def test_overlap_rate_of_unknown_counts_or_an_empty_stream_is_none():
    assert metrics.overlap_tok_s([[(0.0, 1), (1.0, None)]]) is None
    assert metrics.overlap_tok_s([[(0.0, 1), (1.0, 1)], []]) is None
    assert metrics.overlap_tok_s([]) is None


def test_acceptance_per_position_is_over_drafts():
    assert metrics.acceptance_per_position([30, 10], 40) == [0.75, 0.25]
    assert metrics.acceptance_per_position(None, 40) is None
    assert metrics.acceptance_per_position([0], 0) is None


def test_goodput_needs_every_limit_and_a_failed_request_is_not_within():
    fast, slow = {"ttft_ms": 10.0, "tpot_ms": 5.0}, {"ttft_ms": 10.0, "tpot_ms": 50.0}
    limits = {"ttft_ms": 10.0, "tpot_ms": 20.0}
    assert metrics.goodput_share([fast, slow, None, fast], limits) == 0.5
    assert metrics.goodput_share([{"ttft_ms": 1.0, "tpot_ms": None}], limits) == 0
    assert metrics.goodput_share([fast], {}) is None
    assert metrics.goodput_share([], limits) is None


def test_percentiles_are_linear_between_neighbours():
    assert metrics.percentile([4.0, 1.0, None, 3.0, 2.0], 0.5) == 2.5
    assert metrics.percentile([1.0, 2.0], 0.99) == pytest.approx(1.99)
    assert metrics.percentile([7.0], 0.99) == 7
    assert metrics.percentile([None], 0.5) is None


def test_energy_is_the_area_under_power_cut_at_both_ends():
    samples = [(0.0, 100.0), (1.0, 200.0), (2.0, 200.0)]
    assert metrics.energy_j(samples, 0.0, 2.0) == 350
    assert metrics.energy_j(samples, 0.5, 1.5) == pytest.approx(87.5 + 100)


def test_energy_is_none_where_samples_do_not_cover_the_window():
    samples = [(0.0, 100.0), (1.0, 100.0), (9.0, 100.0)]
    assert metrics.energy_j(samples, -0.1, 1.0) is None
    assert metrics.energy_j(samples, 0.0, 9.1) is None
    assert metrics.energy_j(samples, 0.0, 5.0) is None  # a gap of 8 s
    assert metrics.energy_j([], 0.0, 1.0) is None


def test_counted_energy_is_the_difference_cut_at_both_ends():
    readings = [(0.0, 1000.0), (1.0, 1100.0), (2.0, 1400.0), (9.0, 1500.0)]
    assert metrics.counted_energy_j(readings, 0.0, 2.0) == 400
    assert metrics.counted_energy_j(readings, 0.5, 1.5) == pytest.approx(50 + 150)
    assert metrics.counted_energy_j(readings, -0.1, 1.0) is None
    assert metrics.counted_energy_j(readings, 1.0, 9.1) is None
    assert metrics.counted_energy_j(readings, 1.0, 5.0) is None  # a gap of 7 s
    assert metrics.counted_energy_j([], 0.0, 1.0) is None


def test_energy_per_token_of_no_token_is_none():
    assert metrics.per_token(10.0, 5) == 2
    assert metrics.per_token(10.0, 0) is None
    assert metrics.per_token(None, 5) is None


def test_cached_share_is_of_the_prompt():
    assert metrics.cached_share(200, 50) == 0.25
    assert metrics.cached_share(0, 0) is None
    assert metrics.cached_share(200, None) is None
