"""Figures of a cell from its rounds. Definitions are in `bench.metrics`; here they are applied.

A figure's value is the median over repeats. Within a repeat it is the median over its requests,
which ran together and are no independent samples; the interval is a bootstrap over repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from bench import metrics
from bench.load import counters, intervals, rounds
from bench.load.config import Cell, LoadConfig, Mode
from bench.load.counters import Counters
from bench.load.rounds import Round
from bench.load.trace import Speculation, Trace

CONTAMINATED_SHARE = 0.01
# What a primed prompt may lack of its prefix without notice: the last block is always computed,
# and blocks are 256 tokens.
CACHE_SLACK_TOKENS = 512
FIGURES = (
    "ttft_ms", "time_to_first_content_ms", "tpot_ms", "e2el_ms", "prefill_tok_s", "decode_tok_s",
)  # fmt: skip
ROUND_FIGURES = (
    "output_throughput", "overlap_tok_s", "sum_decode_tok_s", "energy_j_per_token",
    "goodput_req_s",
)  # fmt: skip


def request_figures(sent: Trace) -> dict[str, float | None] | None:
    """The figures of one request; None for a failed one."""
    if sent.error or sent.first_s is None or sent.last_s is None or sent.output_tokens is None:
        return None
    ttft = metrics.ttft_ms(sent.sent_s, sent.first_s)
    e2el = metrics.e2el_ms(sent.sent_s, sent.last_s)
    content = sent.first_content_s
    return {
        "ttft_ms": ttft,
        "time_to_first_content_ms": (
            None if content is None else metrics.ttft_ms(sent.sent_s, content)
        ),
        "tpot_ms": metrics.tpot_ms(e2el, ttft, sent.output_tokens),
        "e2el_ms": e2el,
        "prefill_tok_s": metrics.prefill_tok_s(sent.prompt_tokens, sent.cached_tokens, ttft),
        "decode_tok_s": metrics.decode_tok_s(e2el, ttft, sent.output_tokens),
    }


def round_figures(done: Round, goodput: dict[str, float]) -> dict[str, float | None]:
    """The figures of one repeat. Rates over all streams need every stream: None if one failed."""
    figures = [request_figures(t) for t in done.traces]
    kept = [f for f in figures if f is not None]
    result = {name: metrics.median([f[name] for f in kept]) for name in FIGURES}
    result |= dict.fromkeys(ROUND_FIGURES)
    tokens = sum(t.output_tokens or 0 for t in done.traces)
    share = metrics.goodput_share(figures, goodput)
    if len(kept) == len(figures):
        sent = [t.sent_s for t in done.traces]
        last = [t.last_s for t in done.traces if t.last_s is not None]
        rates = [f["decode_tok_s"] for f in kept]
        result["output_throughput"] = metrics.output_throughput(
            [t.output_tokens or 0 for t in done.traces], sent, last
        )
        result["overlap_tok_s"] = metrics.overlap_tok_s(
            [[(c.at_s, c.num_tokens) for c in t.chunks] for t in done.traces]
        )
        result["sum_decode_tok_s"] = None if None in rates else sum(rates)
        result["energy_j_per_token"] = metrics.per_token(done.energy_j, tokens)
        if share is not None:
            result["goodput_req_s"] = share * len(figures) / (max(last) - min(sent))
    return result


def summarize(cell: Cell, done: Sequence[Round], config: LoadConfig) -> dict[str, Any]:
    """One cell's entry in the result."""
    ordered = sorted(done, key=lambda r: r.repeat)
    traces = [t for r in ordered for t in r.traces]
    goodput = dict(config.goodput)
    repeats = [round_figures(r, goodput) for r in ordered]
    figures = [request_figures(t) for t in traces]
    moved = counters.total([r.counters for r in ordered])
    entry: dict[str, Any] = {
        "window": cell.window,
        "context": cell.context,
        "depth": cell.depth,
        "max_concurrency": cell.streams,
        "num_repeats": len(ordered),
        "num_requests": len(traces),
        "num_failed": sum(f is None for f in figures),
        "failures": sorted({t.error for t in traces if t.error}),
    }
    for name in (*FIGURES, *ROUND_FIGURES):
        estimate = intervals.median([r[name] for r in repeats], config.seed)
        entry[name] = estimate and asdict(estimate)
    for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
        if entry[name]:
            entry[name]["p99"] = metrics.percentile([f[name] for f in figures if f], 0.99)
    entry |= {
        "itl_ms": _pooled(traces, _itl),
        "itl_per_token_ms": _pooled(traces, _itl_per_token),
        "goodput_share": metrics.goodput_share(figures, goodput),
        "acceptance": acceptance(moved, traces),
        "cache": cache(ordered, config.mode),
        "counters": asdict(moved),
        "throttle_reasons": _throttle_reasons(ordered),
        "repeats": repeats,
    }
    entry["problems"] = problems(entry, config, ordered)
    entry["rounds"] = [rounds.to_json(r) for r in ordered]
    return entry


def acceptance(moved: Counters, traces: Sequence[Trace]) -> dict[str, Any] | None:
    """From the engine's counters, and from each request's own where the server sends them.

    None where the server exports neither, or the second with some requests only.
    """
    told = [t.speculation for t in traces if t.speculation]
    if moved.num_drafts is None and (not told or len(told) < sum(not t.error for t in traces)):
        return None
    source = "counters"
    drafts, drafted = moved.num_drafts, moved.num_draft_tokens
    accepted, positions = moved.num_accepted_tokens, moved.accepted_per_position
    if drafts is None:
        source = "requests"
        drafts, drafted = sum(s.num_drafts for s in told), sum(s.num_draft_tokens for s in told)
        accepted, positions = sum(s.num_accepted_tokens for s in told), accepted_positions(told)
    return {
        "source": source,
        "num_speculative_tokens": round(drafted / drafts) if drafts and drafted else None,
        "num_drafts": drafts,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
        "rate": metrics.acceptance_rate(accepted, drafted),
        "length": metrics.acceptance_length(accepted, drafts),
        "per_position": metrics.acceptance_per_position(positions, drafts),
        "per_request": [
            metrics.acceptance_length(s.num_accepted_tokens, s.num_drafts) for s in told
        ],
        # Whether the sum over requests is what the engine counted: nobody else was served.
        "requests_agree": (
            sum(s.num_accepted_tokens for s in told) == moved.num_accepted_tokens
            if len(told) == len(traces) and moved.num_accepted_tokens is not None
            else None
        ),
    }


def accepted_positions(told: Sequence[Speculation]) -> tuple[int, ...] | None:
    """Accepted tokens at each draft position, from histograms of how many were accepted."""
    histograms = [s.accepted_histogram for s in told]
    if not histograms or None in histograms:
        return None
    size = max(len(h) for h in histograms if h) - 1
    return tuple(sum(sum(h[i + 1 :]) for h in histograms if h) for i in range(size))


def cache(done: Sequence[Round], mode: Mode) -> dict[str, Any]:
    """What came from the prefix cache, and whether the mode allows it.

    contaminated: in cold mode more than 1 % of a prompt was cached; in the others less than what
    was primed, or nothing. None where the server does not tell.
    """
    pairs = [(r, t) for r in done for t in r.traces if not t.error]
    shares = [metrics.cached_share(t.prompt_tokens, t.cached_tokens) for _, t in pairs]
    measured = [share for share in shares if share is not None]
    by_request = bool(measured)
    if not by_request:  # usage does not tell; the engine's counters do
        counted = [
            metrics.cached_share(r.counters.prefix_cache_queries, r.counters.prefix_cache_hits)
            for r in done
        ]
        measured = [share for share in counted if share is not None]
    bad: bool | None = None
    if measured:
        if mode is Mode.COLD:
            bad = max(measured) > CONTAMINATED_SHARE
        elif by_request:
            bad = any(
                t.cached_tokens is not None and t.cached_tokens < _least_cached(r) for r, t in pairs
            )
        else:
            bad = any(
                r.counters.prefix_cache_hits < len(r.traces) * _least_cached(r)
                for r in done
                if r.counters.prefix_cache_hits is not None
            )
    return {
        "mode": mode.value,
        "primed_tokens": max((r.primed_tokens for r in done), default=None),
        "cached_share": metrics.median(shares),
        "largest_cached_share": max(measured, default=None),
        "contaminated": bad,
    }


def _least_cached(done: Round) -> float:
    """Cached tokens that each prompt of a primed round must have."""
    return max(1, (1 - CONTAMINATED_SHARE) * done.primed_tokens - CACHE_SLACK_TOKENS)


def problems(entry: dict[str, Any], config: LoadConfig, done: Sequence[Round]) -> list[str]:
    """Why a cell must not be believed; a run with any of them fails."""
    found = []
    if entry["num_failed"]:
        found.append(
            f"{entry['num_failed']} of {entry['num_requests']} requests failed: "
            + "; ".join(entry["failures"])
        )
    if entry["cache"]["contaminated"]:
        share = entry["cache"]["largest_cached_share"]
        found.append(
            f"contaminated: {share:.1%} of a prompt came from the prefix cache; at most "
            f"{CONTAMINATED_SHARE:.0%} may in mode cold"
            if config.mode is Mode.COLD
            else f"contaminated: {share:.1%} of a prompt at most came from the prefix cache; "
            f"{entry['cache']['primed_tokens']} of {entry['depth']} tokens were primed"
        )
    if entry["cache"]["contaminated"] is None and config.mode is not Mode.COLD:
        found.append(
            f"mode {config.mode}: the server does not tell what came from its prefix cache"
        )
    found += _speculation_problems(entry["acceptance"], config.speculation.value)
    telling = sum(r.counters.num_drafts is not None for r in done)
    if 0 < telling < len(done):
        found.append(f"speculation: {telling} of {len(done)} rounds have counters of drafts")
    return found + [f"other traffic: {told}" for told in _other_traffic(entry, config, done)]


def _other_traffic(entry: dict[str, Any], config: LoadConfig, done: Sequence[Round]) -> list[str]:
    """What the engine did that this run did not ask for."""
    found = []
    generated = entry["counters"]["generation_tokens"]
    asked = entry["num_requests"] * config.output
    if generated is not None and not entry["num_failed"] and generated > asked:
        found.append(f"the engine generated {generated} tokens and this run asked for {asked}")
    looked_up = entry["counters"]["prefix_cache_queries"]
    sent = sum(t.prompt_tokens or 0 for r in done for t in r.traces)
    if looked_up is not None and not entry["num_failed"] and looked_up > sent:
        found.append(f"the engine took in {looked_up} prompt tokens and this run sent {sent}")
    if entry["acceptance"] and entry["acceptance"]["requests_agree"] is False:
        found.append("the engine accepted other drafts than those of this run's requests")
    if waiting := max((r.others or 0 for r in done), default=0):
        found.append(f"the engine had {waiting} requests before a round began")
    return found


def _speculation_problems(measured: dict[str, Any] | None, expected: str) -> list[str]:
    if measured is None:
        return ["speculation: no acceptance metrics from the server"] if expected == "on" else []
    if expected == "off":
        return ["speculation: the server has acceptance metrics; it was to run without"]
    zero = [n for n in ("num_drafts", "num_draft_tokens", "num_accepted_tokens") if not measured[n]]
    return [f"speculation: {', '.join(zero)} stayed at 0: the MTP head is inert"] if zero else []


def _itl(sent: Trace) -> list[float] | None:
    return metrics.itl_ms([c.at_s for c in sent.chunks])


def _itl_per_token(sent: Trace) -> list[float] | None:
    return metrics.itl_per_token_ms(
        [c.at_s for c in sent.chunks], [c.num_tokens for c in sent.chunks]
    )


def _pooled(
    traces: Sequence[Trace], gaps: Callable[[Trace], list[float] | None]
) -> dict[str, Any] | None:
    """Percentiles over all gaps of all good requests; None where a request's are not known."""
    lists = [gaps(t) for t in traces if not t.error]
    if not lists or any(one is None for one in lists):
        return None
    values = [v for one in lists for v in one or ()]
    if not values:
        return None
    named = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {"num": len(values)} | {n: metrics.percentile(values, s) for n, s in named.items()}


def _throttle_reasons(done: Sequence[Round]) -> list[str] | None:
    told = [r.throttle_reasons for r in done if r.throttle_reasons is not None]
    return sorted({reason for reasons in told for reason in reasons}) if told else None
