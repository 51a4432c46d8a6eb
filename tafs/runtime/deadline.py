"""The time limit of a job, and stopping in time to save its state."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Reserved for start-up before the first piece and for saving after the last one.
RESERVE_S, RESERVE_SHARE = 120.0, 0.2


class Deadline:
    """Decide whether there is time for another piece of work.

    Inside its `with` block, a signal of `SIGNALS` only sets `expired`: work stops after the piece
    in progress.

    Args:
        limit: seconds from `started`. None: no limit.
        started: Unix seconds. None: now.
    """

    def __init__(self, limit: float | None = None, started: float | None = None) -> None:
        self.started = time.time() if started is None else started
        self.limit = limit
        self.longest = 0.0  # s, of a piece so far
        self.signal: signal.Signals | None = None
        self._last_tick = time.monotonic()

    def tick(self) -> None:
        """Record the end of a piece of work, which began at the previous tick."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self._last_tick)
        self._last_tick = now

    @property
    def expired(self) -> str:
        """Why no further piece should be started; "" while there is time."""
        if self.signal is not None:
            return self.signal.name
        if self.limit is None:
            return ""
        reserve = min(RESERVE_S, RESERVE_SHARE * self.limit) + 2 * self.longest
        if time.time() - self.started + reserve < self.limit:
            return ""
        return f"the time limit of {self.limit / 60:g} minutes is near"

    def __enter__(self) -> Deadline:
        self._last_tick = time.monotonic()
        # Python allows signal handlers to be set in the main thread only.
        here = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS} if here else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
