"""How many calls a piece of code makes: what it costs, without a clock.

CPU time for the same work differs threefold between two machines, or between a quiet minute and a
busy one. The number of calls does not differ at all, and grows with every function that somebody
adds. It does not see what one call costs: the figures in `results/bench-client-*.json` do.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


class Calls:
    """Counts the calls of this thread between `begin` and `end`: Python functions and C ones.

    What compiled code calls inside itself is not seen.
    """

    def __init__(self) -> None:
        self.count = 0

    def begin(self) -> None:
        """Count from here on."""
        self._before = sys.getprofile()
        sys.setprofile(self._see)

    def end(self) -> None:
        """Count no more."""
        sys.setprofile(self._before)
        self.count -= 2  # this function and sys.setprofile

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_call"):
            self.count += 1
