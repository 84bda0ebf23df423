import pytest

from bench.prometheus import EngineCounters, parse_samples, read_counters

PAGE = """\
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="a} b"} 96.0
vllm:generation_tokens_total{engine="1",model_name="a} b"} 4.0
vllm:generation_tokens_created{engine="0",model_name="a} b"} 1.7e+09

vllm:iteration_tokens_total_bucket{engine="0",le="+Inf"} 60.0
vllm:iteration_tokens_total_count{engine="0"} 60.0
vllm:iteration_tokens_total_sum{engine="0"} 1234.0
vllm:spec_decode_num_drafts_total{engine="0"} 55.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 110.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 41.0
python_info 1.0 1700000000000
"""


def test_the_counters_are_read_and_summed_over_engines():
    assert read_counters(PAGE) == EngineCounters(
        num_passes=60,
        generation_tokens=100,
        num_drafts=55,
        num_draft_tokens=110,
        num_accepted_tokens=41,
    )


def test_a_counter_that_is_not_exported_is_none():
    counters = read_counters("vllm:generation_tokens_total 3\n")
    assert counters.generation_tokens == 3
    assert counters.num_drafts is None


def test_a_difference_is_none_where_either_reading_is():
    earlier = EngineCounters(1, 2, None, 4, 5)
    later = EngineCounters(11, 12, 13, None, 15)
    assert later.since(earlier) == EngineCounters(10, 10, None, None, 10)


def test_a_counter_that_went_backwards_is_refused():
    with pytest.raises(ValueError, match="the engine restarted"):
        EngineCounters(1, 2, 3, 4, 5).since(EngineCounters(1, 3, 3, 4, 5))


def test_a_line_that_is_no_sample_is_refused():
    with pytest.raises(ValueError, match="not a sample"):
        parse_samples("<html>\n")
