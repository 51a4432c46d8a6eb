"""What a person sees while the workflow runs: every job's stage, run, progress and time left.

Training and evaluation write a small file each; the watcher reads them beside Snakemake's own
account of its jobs and draws one live table on a terminal, or prints it now and then where there
is none. Losing such a file loses nothing else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


FOLDER = ".progress"


STALE = 900.0  # s; a job that has been silent for longer is not shown


MIN_INTERVAL = 0.5  # s between two writes of a job


class Reporter:
    """A job's own account of its progress; `done` of `total` steps."""

    def __init__(self, folder: Path, stage: str, total: int, done: int = 0) -> None:
        self.file = folder / FOLDER / f"{stage}.json"
        self.record: dict[str, Any] = {
            "stage": stage,
            "run": folder.name,
            "total": total,
            "done": done,
            "first": done,
            "note": "",
            "started": time.time(),
        }
        self._written = 0.0
        self._write()

    def advance(self, note: str = "", steps: int = 1) -> None:
        self.record["done"] += steps
        self.record["note"] = note
        if time.time() - self._written >= MIN_INTERVAL:
            self._write()

    def finish(self) -> None:
        """The job is over: nothing is left to show."""
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
            # A full disk must not stop a run for the sake of its progress bar.
            with suppress(OSError):
                temporary.unlink()


def active(runs: Path, now: float) -> list[dict[str, Any]]:
    """The jobs that reported lately, in a stable order."""
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
    """Time left at the job's own pace so far; None before its first step."""
    steps = record["done"] - record["first"]
    if steps <= 0:
        return None
    pace = (record["updated"] - record["started"]) / steps
    return max(0.0, pace * (record["total"] - record["done"]) - (now - record["updated"]))


def cells(record: dict[str, Any], now: float) -> tuple[str, str, str]:
    """Progress, time left and note of a job."""
    left = seconds_left(record, now)
    remaining = "" if left is None else f"{_clock(left)} left"
    return f"{record['done']}/{record['total']}", remaining, record["note"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines with columns of one width."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def duration(seconds: float) -> str:
    """Two units: 42 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    for unit, name, part, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part} {small}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
