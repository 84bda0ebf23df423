"""For how long the start of an engine has shown no sign of progress.

A start may be silent for minutes while kernels are compiled, so signs are looked for in two places:
what the engine prints, and what its processes do (`serve.activity`).
"""

from __future__ import annotations

import time

from serve.activity import Session, read_session, works
from serve.supervisor import Supervisor

MAX_GAP = 4  # intervals between two looks; longer, it was this process that stood still


class StartWatch:
    """Looked at every `poll_s` while the engine starts; `forget` when it does not."""

    def __init__(self, supervisor: Supervisor, poll_s: float) -> None:
        self.silent_s = 0.0  # time without a sign
        self._supervisor, self._max_gap_s = supervisor, MAX_GAP * poll_s
        self._seen = (0, 0)  # life, signs in its output
        self._session: Session = {}
        self._at_s = time.monotonic()

    def forget(self) -> None:
        """Begin again at the next look."""
        self.silent_s, self._session = 0.0, {}
        self._at_s = time.monotonic()

    def look(self) -> None:
        """Look for signs since the last look."""
        supervisor, now = self._supervisor, time.monotonic()
        seen, pid = (supervisor.num_lives, supervisor.num_signs), supervisor.pid
        session = read_session(pid) if pid else {}
        gap_s = now - self._at_s
        if seen != self._seen or works(self._session, session, pid, gap_s):
            self.silent_s = 0.0
        else:
            self.silent_s += min(gap_s, self._max_gap_s)
        self._seen, self._session, self._at_s = seen, session, now
