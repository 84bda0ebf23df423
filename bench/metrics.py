"""Definitions of every figure that is reported. Pure functions; not measured is None, never 0.

Times are in milliseconds, tokens are counted by the server.
"""

from collections.abc import Mapping, Sequence
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


def itl_ms(times_s: Sequence[float]) -> list[float]:
    """Inter-token latency as tools report it: gaps between successive chunks of one stream.

    Under MTP a chunk carries several tokens, so this is not TPOT.
    """
    return [(b - a) * 1000 for a, b in zip(times_s, times_s[1:], strict=False)]


def itl_per_token_ms(
    times_s: Sequence[float], num_tokens: Sequence[int | None]
) -> list[float] | None:
    """Each gap shared among the tokens of the chunk that ends it: one value per token.

    None where the tokens of a chunk are not known. Without speculation it equals `itl_ms`.
    """
    counts = list(num_tokens[1:])
    if any(count is None for count in counts):
        return None
    shared = []
    for gap, count in zip(itl_ms(times_s), counts, strict=True):
        if count:
            shared += [gap / count] * count
    return shared


def prefill_tok_s(
    prompt_tokens: int | None, cached_tokens: int | None, ttft_ms: float | None
) -> float | None:
    """Prompt tokens that had to be computed over TTFT, which holds queueing and one decode step.

    None where the server does not tell what came from its cache.
    """
    if prompt_tokens is None or cached_tokens is None or not ttft_ms:
        return None
    return (prompt_tokens - cached_tokens) / ttft_ms * 1000


def cached_share(prompt_tokens: int | None, cached_tokens: int | None) -> float | None:
    """Share of the prompt that came from the prefix cache."""
    if not prompt_tokens or cached_tokens is None:
        return None
    return cached_tokens / prompt_tokens


def output_throughput(
    output_tokens: Sequence[int], sent_s: Sequence[float], last_token_s: Sequence[float]
) -> float | None:
    """Strict aggregate in tok/s: all output tokens over first sent to last token received.

    Prefill is inside. The sum of the per-stream decode rates is larger and is another figure.
    """
    if not output_tokens or not sent_s or not last_token_s:
        return None
    wall_s = max(last_token_s) - min(sent_s)
    return sum(output_tokens) / wall_s if wall_s > 0 else None


def overlap_window_s(spans_s: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """When every stream decodes: latest first token to earliest last token; None without it.

    Args:
        spans_s: (first token, last token) of each stream, on one clock.
    """
    if not spans_s:
        return None
    start, end = max(first for first, _ in spans_s), min(last for _, last in spans_s)
    return (start, end) if end > start else None


def overlap_tok_s(
    streams: Sequence[Sequence[tuple[float, int | None]]],
) -> float | None:
    """Tokens that all streams received in the overlap window, over its length.

    Args:
        streams: (time, tokens) of each chunk. A chunk at the window's start is not of it.
    Returns:
        None without a window, or where the tokens of a chunk are not known.
    """
    if not streams or any(not chunks for chunks in streams):
        return None
    window = overlap_window_s([(chunks[0][0], chunks[-1][0]) for chunks in streams])
    counts = [(at, count) for chunks in streams for at, count in chunks]
    if window is None or any(count is None for _, count in counts):
        return None
    start, end = window
    return sum(count or 0 for at, count in counts if start < at <= end) / (end - start)


def acceptance_per_position(
    accepted_per_position: Sequence[int] | None, num_drafts: int | None
) -> list[float] | None:
    """Share of the drafts whose token at each position was accepted."""
    if accepted_per_position is None or not num_drafts:
        return None
    return [accepted / num_drafts for accepted in accepted_per_position]


def goodput_share(
    requests: Sequence[Mapping[str, float | None] | None], limits: Mapping[str, float]
) -> float | None:
    """Share of the requests sent that finished within every limit (SLO).

    Args:
        requests: figures by name (`ttft_ms`, `tpot_ms`, `e2el_ms`); None for a failed request.
        limits: the largest value allowed, by name. A figure that was not measured is not within.
    """
    if not requests or not limits:
        return None
    return sum(_is_within(request, limits) for request in requests) / len(requests)


def _is_within(request: Mapping[str, float | None] | None, limits: Mapping[str, float]) -> bool:
    if request is None:
        return False
    values = [(request.get(name), limit) for name, limit in limits.items()]
    return all(value is not None and value <= limit for value, limit in values)


def percentile(values: Sequence[float | None], share: float) -> float | None:
    """Percentile of the measured values, linear between neighbours. None when there is none.

    Args:
        share: in [0, 1]; 0.99 is p99.
    """
    measured = sorted(value for value in values if value is not None)
    if not measured:
        return None
    at = share * (len(measured) - 1)
    low = int(at)
    high = min(low + 1, len(measured) - 1)
    return measured[low] + (measured[high] - measured[low]) * (at - low)


def energy_j(
    samples: Sequence[tuple[float, float]], start_s: float, end_s: float, max_gap_s: float = 3.0
) -> float | None:
    """Energy between two times: power integrated by trapezoids, interpolated at both ends.

    Args:
        samples: (time in s, power in W), in order.
    Returns:
        None where the samples do not cover the window, or a gap in it is longer than `max_gap_s`.
    """
    if end_s <= start_s or not samples:
        return None
    if samples[0][0] > start_s or samples[-1][0] < end_s:
        return None
    joules = 0.0
    for (t0, p0), (t1, p1) in zip(samples, samples[1:], strict=False):
        a, b = max(t0, start_s), min(t1, end_s)
        if b <= a:
            continue
        if t1 - t0 > max_gap_s:
            return None
        slope = (p1 - p0) / (t1 - t0)
        joules += (p0 + slope * ((a + b) / 2 - t0)) * (b - a)
    return joules


def counted_energy_j(
    readings: Sequence[tuple[float, float]], start_s: float, end_s: float, max_gap_s: float = 3.0
) -> float | None:
    """Energy between two times by a counter, interpolated at both ends.

    Args:
        readings: (time in s, energy so far in J), in order.
    Returns:
        None where the readings do not cover the window, or a gap in it is longer than `max_gap_s`.
    """
    powers = [
        (t0, t1, (e1 - e0) / (t1 - t0))
        for (t0, e0), (t1, e1) in zip(readings, readings[1:], strict=False)
        if t1 > start_s and t0 < end_s
    ]
    covered = powers and readings[0][0] <= start_s < end_s <= readings[-1][0]
    if not covered or any(t1 - t0 > max_gap_s for t0, t1, _ in powers):
        return None
    return sum(power * (min(t1, end_s) - max(t0, start_s)) for t0, t1, power in powers)


def per_token(total: float | None, output_tokens: int | None) -> float | None:
    """A total (joules, for example) over the tokens generated."""
    if total is None or not output_tokens:
        return None
    return total / output_tokens
