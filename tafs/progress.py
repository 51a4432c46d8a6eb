"""What a person sees while the workflow runs: every job's stage, run, progress and time left.

Jobs write a small file each; `watch` reads them and draws one live table on a terminal, or a line
now and then where there is none. Losing such a file loses nothing else.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

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
        self.file.unlink(missing_ok=True)

    def _write(self) -> None:
        self._written = time.time()
        temporary = self.file.with_suffix(f".{os.getpid()}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({**self.record, "updated": self._written}))
            os.replace(temporary, self.file)
        except OSError:
            # A full disk must not stop a run for the sake of its progress bar.
            temporary.unlink(missing_ok=True)


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


def line(record: dict[str, Any], now: float) -> str:
    """One job in one line."""
    left = seconds_left(record, now)
    remaining = "" if left is None else f"  {_clock(left)} left"
    progress = f"{record['done']}/{record['total']}"
    return (
        f"{record['stage']:<9} {record['run']:<44} {progress:>7}{remaining:>12}  {record['note']}"
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Watcher:
    """A thread that shows the active jobs while the workflow runs."""

    def __init__(
        self, runs: Path, finished: Callable[[], tuple[int, int]], stream: TextIO, title: str
    ) -> None:
        self.runs = runs
        self.finished = finished  # () -> (jobs done, jobs in all)
        self.stream = stream
        self.title = title
        self.interval = 1.0 if stream.isatty() else 30.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started = time.time()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def lines(self) -> list[str]:
        now = time.time()
        done, total = self.finished()
        head = f"{self.title}  {done} of {total} jobs done  {_clock(now - self._started)}"
        return [head, *(line(record, now) for record in active(self.runs, now))]

    def _watch(self) -> None:
        if not self.stream.isatty():
            while not self._stop.wait(self.interval):
                print("\n".join(self.lines()), file=self.stream, flush=True)
            return
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console = Console(file=self.stream)
        with Live(console=console, refresh_per_second=2, transient=True) as live:
            while not self._stop.wait(self.interval):
                live.update(Text("\n".join(self.lines()), overflow="ellipsis", no_wrap=True))
