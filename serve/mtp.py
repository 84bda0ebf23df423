"""Whether the MTP head does what it is there for: drafts that are accepted.

An engine whose head was loaded wrong drafts garbage, answers correctly, and is only slower. So zero
acceptance is a fault and no footnote.
"""

from __future__ import annotations

from serve.engine_metrics import EngineMetrics
from serve.faults import FaultKind, Faults

ENOUGH = 200  # drafts, or tokens without any draft
COUNTERS = ("generation_tokens", "drafts", "accepted")


class MtpTruth:
    """Watches the counters of an engine that speculates."""

    def __init__(self, num_speculative_tokens: int, faults: Faults) -> None:
        self._enabled, self._faults = num_speculative_tokens > 0, faults
        # Where the counters stood when a token was last accepted, and when one was last drafted.
        self._at_accepted = self._at_drafted = EngineMetrics()
        self._latest = EngineMetrics()

    def observe(self, now: EngineMetrics) -> None:
        """Take the counters of a page; a new life of the engine starts them at zero."""
        if not self._enabled or now.generation_tokens is None:
            return
        old, self._latest = self._latest, now
        if any(value(getattr(now, name)) < value(getattr(old, name)) for name in COUNTERS):
            self._at_accepted = self._at_drafted = EngineMetrics()
        if value(now.drafts) != value(self._at_drafted.drafts):
            self._at_drafted = now
            self._faults.end(FaultKind.MTP_NO_DRAFTS)
        if value(now.accepted) != value(self._at_accepted.accepted):
            self._at_accepted = now
            self._faults.end(FaultKind.MTP_ZERO_ACCEPTANCE)
        drafts = value(now.drafts) - value(self._at_accepted.drafts)
        if drafts >= ENOUGH:
            text = f"MTP is on and none of the last {drafts:.0f} drafts was accepted"
            self._faults.begin(FaultKind.MTP_ZERO_ACCEPTANCE, text)
        tokens = decoded(now) - decoded(self._at_drafted)
        if tokens >= ENOUGH:
            text = f"MTP is on and nothing was drafted for the last {tokens:.0f} tokens"
            self._faults.begin(FaultKind.MTP_NO_DRAFTS, text)


def decoded(metrics: EngineMetrics) -> float:
    """Tokens that a draft could have given: a request's first is the prefill's, and may be all."""
    return value(metrics.generation_tokens) - value(metrics.first_tokens)


def value(count: float | None) -> float:
    """A counter that is not there yet has counted nothing."""
    return count or 0.0
