"""A job stops while there is time to save what it has done."""

import os
import signal
import threading
import time

import pytest

from tafs.runtime.deadline import Deadline


def test_without_a_limit_there_is_always_time(monkeypatch):
    for name in ("TAFS_MINUTES", "TAFS_STARTED"):
        monkeypatch.delenv(name, raising=False)
    assert Deadline.from_environment().limit is None
    monkeypatch.setenv("TAFS_MINUTES", "0")
    assert Deadline.from_environment().expired == ""


@pytest.mark.parametrize(
    ("minutes", "longest", "last"),
    [
        # Of ten minutes two are kept for start and end.
        (10, 0.0, 480.0),
        # Twice the longest piece: the next one may be slower.
        (10, 60.0, 360.0),
        # Of a short limit a fifth: 12 of 60 seconds.
        (1, 4.0, 40.0),
        (1440, 116.0, 86048.0),
    ],
)
def test_another_piece_is_begun_only_if_it_would_end_in_time(minutes, longest, last, monkeypatch):
    deadline = Deadline(60.0 * minutes, started=1000.0)
    deadline.longest = longest
    monkeypatch.setattr(time, "time", lambda: 1000.0 + last - 0.5)
    assert deadline.expired == ""
    monkeypatch.setattr(time, "time", lambda: 1000.0 + last + 0.5)
    assert deadline.expired == f"the time limit of {minutes} minutes is near"


def test_the_limit_counts_from_the_jobs_start(monkeypatch):
    monkeypatch.setenv("TAFS_MINUTES", "10")
    monkeypatch.setenv("TAFS_STARTED", str(int(time.time()) - 500))
    assert Deadline.from_environment().expired


def test_the_longest_piece_counts(monkeypatch):
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


def test_a_thread_that_may_not_say_what_signals_do_has_a_budget_too():
    found = []

    def work():
        with Deadline() as deadline:
            found.append(deadline.expired)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [""]


@pytest.mark.parametrize("given", ["", "-1", "1.5", "soon"])
@pytest.mark.parametrize("name", ["TAFS_MINUTES", "TAFS_STARTED"])
def test_what_is_no_number_is_refused_by_name(name, given, monkeypatch):
    monkeypatch.setenv(name, given)
    with pytest.raises(ValueError, match=f"^{name}: '{given}' is no whole number"):
        Deadline.from_environment()
