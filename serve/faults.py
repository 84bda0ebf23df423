"""What is wrong: each kind once, with how often it began and whether it lasts."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from enum import StrEnum

from serve.log import event


class FaultKind(StrEnum):
    """Everything that is a fault here."""

    ENGINE_ENDED = "engine_ended"
    ENGINE_STALLED = "engine_stalled"
    ENGINE_FAILED = "engine_failed"
    ALL_REDUCE_FAILED = "all_reduce_failed"
    CANARY_FAILED = "canary_failed"
    MTP_ZERO_ACCEPTANCE = "mtp_zero_acceptance"
    MTP_NO_DRAFTS = "mtp_no_drafts"
    MTP_NOT_LOADED = "mtp_not_loaded"
    LOAD_RECORD_UNREADABLE = "load_record_unreadable"
    GPU_UNREADABLE = "gpu_unreadable"
    METRICS_UNREADABLE = "metrics_unreadable"
    MONITOR_BROKEN = "monitor_broken"


@dataclass
class Fault:
    """count: how often it began. active: whether it lasts."""

    kind: FaultKind
    message: str
    first_unix_s: float
    last_unix_s: float
    count: int = 1
    active: bool = True


class Faults:
    """The faults of this process's life."""

    def __init__(self) -> None:
        self.known: dict[FaultKind, Fault] = {}

    def begin(self, kind: FaultKind, message: str) -> None:
        """A fault is there; one that lasts is counted once."""
        now = time.time()
        fault = self.known.get(kind)
        if fault is None:
            self.known[kind] = Fault(kind, message, now, now)
        else:
            fault.count += not fault.active
            began = not fault.active
            fault.message, fault.last_unix_s, fault.active = message, now, True
            if not began:
                return
        event("fault", message, logging.ERROR, kind=kind.value)

    def end(self, kind: FaultKind) -> None:
        """It is over, if it was there."""
        if (fault := self.known.get(kind)) and fault.active:
            fault.active = False
            event("fault_over", fault.message, kind=kind.value)

    def once(self, kind: FaultKind, message: str) -> None:
        """Something that happened and does not last."""
        self.end(kind)
        self.begin(kind, message)
        self.known[kind].active = False

    def count(self, kind: FaultKind) -> int:
        """How often it began."""
        return self.known[kind].count if kind in self.known else 0
