"""The live table of a running workflow, in place of Snakemake's own lines on the terminal."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tafs.orchestration.snakemake_hooks import JobLog, screen_handlers
from tafs.runtime.progress import active, aligned, cells, clock

if TYPE_CHECKING:
    from rich.live import Live


class LiveTable:
    """A thread that shows the running jobs: a table on a terminal, else lines every 30 s.

    Args:
        runs: the folder of the runs, where jobs report their progress.
        stream: where it is shown.
        title: what runs.
    """

    def __init__(self, runs: Path, stream: TextIO, title: str) -> None:
        self.runs = runs
        self.stream = stream
        self.title = title
        self.jobs = JobLog(self.say)
        self.failed = 0  # jobs that were given up
        self.interval = 1.0 if stream.isatty() else 30.0
        self._live: Live | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started = time.time()

    def start(self, logger: logging.Logger) -> None:
        """Follow Snakemake's logger and silence its terminal; its log file keeps every line."""
        self._logger = logger
        self._screen = screen_handlers(logger)
        for handler in self._screen:
            handler.setLevel(logging.CRITICAL + 1)
        logger.addHandler(self.jobs)
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream)
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        self._thread.start()
        atexit.register(self.stop)  # an interrupted workflow calls no hook

    def stop(self) -> None:
        """Remove the table; Snakemake's warnings and errors go to the terminal again."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(timeout=5)
        if self._live:
            self._live.stop()
        self._logger.removeHandler(self.jobs)
        for handler in self._screen:
            handler.setLevel(logging.WARNING)

    def say(self, text: str) -> None:
        """Print lines that stay above the table."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def elapsed(self) -> str:
        return clock(time.time() - self._started)

    def lines(self) -> list[str]:
        """The table: a header, then one line per job."""
        now = time.time()
        head = f"{self.title}  {self.elapsed()}"
        if self.jobs.total:
            head += f"  {self.jobs.done} of {self.jobs.total} jobs done"
        if self.failed:
            head += f", {self.failed} failed"
        reports = {(r["stage"], r["run"]): r for r in active(self.runs, now)}
        rows = []
        for job in list(self.jobs.running.values()):
            run = job.wildcards.get("run", "")
            report = reports.get((job.rule, run))
            # An older report belongs to a job that was killed.
            current = report is not None and report["updated"] >= job.since
            progress = cells(report, now) if report and current else ("", "", "")
            rows.append((job.rule, run, *progress))
        return [head, *aligned(rows)]

    def _watch(self) -> None:
        from rich.text import Text

        while not self._stop.wait(self.interval):
            text = "\n".join(self.lines())
            if self._live:
                self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)
            else:
                self.say(text)
