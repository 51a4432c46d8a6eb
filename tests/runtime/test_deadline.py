"""A job stops while there is time to save its state."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tafs.runtime.deadline import Deadline


@pytest.mark.parametrize(
    ("minutes", "longest", "last"),
    [
        (10, 0.0, 480.0),  # two of ten minutes are reserved for start and end
        (10, 60.0, 360.0),  # and twice the longest piece, as the next one may take longer
        (1, 4.0, 40.0),  # a fifth of a short limit: 12 of 60 seconds
    ],
)
def test_a_piece_is_started_only_if_it_would_end_in_time(minutes, longest, last, monkeypatch):
    deadline = Deadline(60.0 * minutes, started=1000.0)
    deadline.longest = longest
    monkeypatch.setattr(time, "time", lambda: 1000.0 + last - 0.5)
    assert deadline.expired == ""
    monkeypatch.setattr(time, "time", lambda: 1000.0 + last + 0.5)
    assert deadline.expired == f"the time limit of {minutes} minutes is near"


def test_the_longest_piece_is_measured(monkeypatch):
    clock = iter([0.0, 0.0, 5.0, 8.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Deadline(600.0) as deadline:
        for longest in (5.0, 5.0, 12.0):
            deadline.tick()
            assert deadline.longest == longest


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_reason_to_stop_inside_the_block(asked):
    before = signal.getsignal(asked)
    with Deadline() as deadline:
        assert deadline.expired == ""
        os.kill(os.getpid(), asked)
        assert deadline.expired == asked.name
    assert signal.getsignal(asked) == before


def test_a_deadline_works_in_a_thread_that_cannot_handle_signals():
    def work():
        with Deadline() as deadline:
            return deadline.expired

    with ThreadPoolExecutor() as pool:
        assert pool.submit(work).result() == ""
