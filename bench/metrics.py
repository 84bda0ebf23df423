"""Definitions of every figure that is reported. Pure functions; not measured is None, never 0.

Times are in milliseconds, tokens are counted by the server.
"""

from collections.abc import Sequence
from statistics import median as _median


def ttft_ms(sent_s: float, first_token_s: float) -> float:
    """Time to first token: request sent to first token received, reasoning included."""
    return (first_token_s - sent_s) * 1000


def e2el_ms(sent_s: float, last_token_s: float) -> float:
    """End-to-end latency: request sent to last token received."""
    return (last_token_s - sent_s) * 1000


def tpot_ms(e2el_ms: float, ttft_ms: float, output_tokens: int) -> float | None:
    """Time per output token after the first: (e2el - TTFT) / (output_tokens - 1).

    Source: `vllm bench serve`. None with fewer than two tokens.
    """
    if output_tokens < 2:
        return None
    return (e2el_ms - ttft_ms) / (output_tokens - 1)


def decode_tok_s(e2el_ms: float, ttft_ms: float, output_tokens: int) -> float | None:
    """Tokens per second of one stream after its first token: 1000 / TPOT."""
    tpot = tpot_ms(e2el_ms, ttft_ms, output_tokens)
    return 1000 / tpot if tpot else None


def passes_per_token(num_passes: int | None, output_tokens: int | None) -> float | None:
    """Forward passes of the target, prefill included, over tokens generated.

    Both are differences of engine counters around the measured window, one request at a time: a
    pass that serves two requests would count once.
    """
    if num_passes is None or not output_tokens:
        return None
    return num_passes / output_tokens


def acceptance_rate(num_accepted_tokens: int | None, num_draft_tokens: int | None) -> float | None:
    """Accepted over drafted tokens. None when nothing was drafted."""
    if num_accepted_tokens is None or not num_draft_tokens:
        return None
    return num_accepted_tokens / num_draft_tokens


def acceptance_length(num_accepted_tokens: int | None, num_drafts: int | None) -> float | None:
    """Tokens per verification: 1 + accepted / drafts, bonus token included."""
    if num_accepted_tokens is None or not num_drafts:
        return None
    return 1 + num_accepted_tokens / num_drafts


def median(values: Sequence[float | None]) -> float | None:
    """Median of the measured values. None when there is none."""
    measured = [value for value in values if value is not None]
    return _median(measured) if measured else None
