"""The progress of work: of jobs in small files, which the live table and `tafs status` read.

Inside `heard_by`, a command also hears of every batch of its own process.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FOLDER = ".progress"
STALE = 900.0  # s; a job without a report for longer is not shown
MIN_INTERVAL = 0.5  # s between two reports of a job

Listener = Callable[[str, int, int], None]  # (name of the work, done, total)
_listeners: list[Listener] = []


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Call `listener` for everything that `tell` says inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(name: str, done: int, total: int) -> None:
    """Tell the listeners how much of the named work is done."""
    for listener in _listeners:
        listener(name, done, total)


class Reporter:
    """Writes the progress of a job to the run's folder.

    Args:
        folder: of the run.
        stage: "train" or "evaluate", for example.
        total: number of steps.
        done: number of steps that earlier attempts have finished.
    """

    def __init__(self, folder: Path, stage: str, total: int, done: int = 0) -> None:
        self.file = folder / FOLDER / f"{stage}.json"
        self.record: dict[str, Any] = {"stage": stage, "run": folder.name, "note": ""}
        self.record |= {"total": total, "done": done, "first": done, "started": time.time()}
        self._written = 0.0
        self._write()

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Report finished steps, with a note to display."""
        self.record["done"] += steps
        self.record["note"] = note
        if time.time() - self._written >= MIN_INTERVAL:
            self._write()

    def finish(self) -> None:
        """Remove the report of a finished job."""
        with suppress(OSError):
            self.file.unlink()

    def _write(self) -> None:
        self._written = time.time()
        temporary = self.file.with_suffix(f".{os.getpid()}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({**self.record, "updated": self._written}))
            os.replace(temporary, self.file)
        except OSError:
            # Progress is informative: a full disk must not stop the run here.
            with suppress(OSError):
                temporary.unlink()


def active(runs: Path, now: float) -> list[dict[str, Any]]:
    """Return the recent reports of all jobs in a folder of runs, in a stable order."""
    found = []
    for file in sorted(runs.glob(f"*/{FOLDER}/*.json")):
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if now - record["updated"] < STALE:
            found.append(record)
    return found


def seconds_left(record: dict[str, Any], now: float) -> float | None:
    """Estimate the time left from the pace so far; None before the first step."""
    steps = record["done"] - record["first"]
    if steps <= 0:
        return None
    pace = (record["updated"] - record["started"]) / steps
    return max(0.0, pace * (record["total"] - record["done"]) - (now - record["updated"]))


def cells(record: dict[str, Any], now: float) -> tuple[str, str, str]:
    """Return the progress, the time left and the note of a job as text."""
    left = seconds_left(record, now)
    remaining = "" if left is None else f"{clock(left)} left"
    return f"{record['done']}/{record['total']}", remaining, record["note"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines with columns of equal width."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: 42 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    for unit, name, part, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part} {small}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def clock(seconds: float) -> str:
    """Format a duration as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
