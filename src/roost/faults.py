"""Named points where a test may kill the process, to prove that the next run completes what this one began.

A point costs one dictionary look-up when nothing is set.  `ROOST_CRASH_AT=name` kills the process with SIGKILL when it
first reaches that point; `ROOST_CRASH_AT=name:3` at the third time.  The names are listed by `grep -rn 'faults.point'`.
"""

from __future__ import annotations

import os
import signal

_wanted, _, _nth = os.environ.get("ROOST_CRASH_AT", "").partition(":")
_left = int(_nth or 1)


def point(name: str) -> None:
    """A place between two durable steps; returns, unless a test chose it to die at."""
    global _left
    if name == _wanted:
        _left -= 1
        if _left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
