"""The client's own cost is within its bounds; `client_cost.py` says what is counted.

Calls are bounded, not time: the count is the same on every machine and whatever else runs there.
What the calls cost in time is in `results/bench-client-*.json`. Whoever needs more of them raises
the bound after a look at that.
"""

import pytest

from tests.bench.load import client_cost

pytestmark = pytest.mark.slow


def test_a_chunk_takes_at_most_57_calls_from_the_socket_to_the_trace():
    """56, of which 19 are the parsing. One `json.loads` would be 16 more, a copied chunk 9."""
    cost = client_cost.chunk_calls()
    assert cost["chunks_per_read"] == 1
    assert cost["calls_per_chunk"] <= 57


def test_the_time_of_a_chunk_is_measured_over_the_middle_of_all_streams():
    cost = client_cost.chunk_cost()
    middle = client_cost.STREAMS * client_cost.CHUNKS * 8 // 10
    assert cost["chunks"] == pytest.approx(middle, rel=0.1)
    assert cost["us_per_chunk"] > 0


def test_four_prompts_of_524000_tokens_take_2_gb_and_no_call_for_each_token():
    """The whole run, its imports with it, is a quarter of a call for each token."""
    cost = client_cost.prompts_cost(profiled=True)
    assert cost["peak_memory_bytes"] < 2e9
    assert cost["calls"] < cost["streams"] * cost["tokens"]
