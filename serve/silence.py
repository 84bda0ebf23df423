"""For how long an engine has shown no sign of work.

It may be silent for minutes while kernels are compiled: in a start, and at the first request of a
kind. So signs are looked for in two places: what the engine says, and what its processes do
(`serve.activity`).
"""

from __future__ import annotations

import time

from serve.activity import Session, read_session, works

MAX_GAP = 4  # intervals between two looks; longer, it was this process that stood still


class Silence:
    """Looked at every `poll_s` while the engine owes a sign; `forget` when it does not.

    Args:
        grace_s: so long what the engine says is all that is looked at; the rest costs milliseconds.
        serving: the engine takes requests, which give its processes something to do.

    owed_s: without a word. silent_s: nor any other sign.
    """

    def __init__(self, poll_s: float, grace_s: float = 0.0, serving: bool = False) -> None:
        self.owed_s = self.silent_s = 0.0
        self._max_gap_s, self._grace_s, self._serving = MAX_GAP * poll_s, grace_s, serving
        self._said: object = None
        self._session: Session = {}
        self._at_s = time.monotonic()

    def forget(self) -> None:
        """Begin again at the next look."""
        self.owed_s = self.silent_s = 0.0
        self._session = {}
        self._at_s = time.monotonic()

    def look(self, pid: int, said: object) -> None:
        """Look at the session that `pid` began. said: changes with each word of the engine's."""
        now = time.monotonic()
        gap_s = now - self._at_s
        session: Session = {}
        if said != self._said:
            self.owed_s = self.silent_s = 0.0
        else:
            counted_s = min(gap_s, self._max_gap_s)
            self.owed_s += counted_s
            self.silent_s += counted_s
        if pid and self.owed_s >= self._grace_s:
            session = read_session(pid)
        if self._session and works(self._session, session, pid, gap_s, self._serving):
            self.silent_s = 0.0
        self._said, self._session, self._at_s = said, session, now
