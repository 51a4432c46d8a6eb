"""How long a job may take, and how it ends in time with its state saved.

The workflow gives a job's limit in TAFS_MINUTES (0: none) and its start in TAFS_STARTED (Unix
seconds). SIGTERM and SIGUSR1 ask for the same end at once: after the piece of work in progress.
"""

from __future__ import annotations

import signal
import threading
import time
from functools import partial
from types import FrameType, TracebackType

from tafs.common.env import whole_number

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Kept for the start before the first piece and the writing after the last one.
RESERVE_S, RESERVE_SHARE = 120.0, 0.2


class Deadline:
    """Whether there is time for another piece of work.

    Args:
        limit: seconds from `started`; None: no limit.
        started: Unix seconds.

    Inside its block a signal of SIGNALS does not end the process, but asks it to stop.
    """

    def __init__(self, limit: float | None = None, started: float | None = None) -> None:
        self.started = time.time() if started is None else started
        self.limit = limit
        self.longest = 0.0  # s of a piece so far
        self.signal: signal.Signals | None = None
        self._last_tick = time.monotonic()

    @classmethod
    def from_environment(cls) -> Deadline:
        """This job's.

        Raises:
            ValueError: TAFS_MINUTES or TAFS_STARTED is no whole number; names it.
        """
        number = partial(whole_number, remedy="the workflow sets it", default="0")
        minutes, started = number("TAFS_MINUTES"), number("TAFS_STARTED")
        return cls(60.0 * minutes if minutes else None, float(started) if started else None)

    def tick(self) -> None:
        """A piece of work has ended, which had begun with the last one's end."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self._last_tick)
        self._last_tick = now

    @property
    def expired(self) -> str:
        """Why no other piece should be begun, in a few words; empty where there is time."""
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
        # Only a process's main thread may say what signals do.
        here = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS} if here else {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
