"""live_table."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.live import Live
from tafs.runtime.progress import _clock, active, aligned, cells


@dataclass(frozen=True)
class Job:
    """A job that Snakemake has started (on a cluster: submitted)."""

    stage: str
    run: str  # "" for what is made of all runs
    since: float


class Jobs(logging.Handler):
    """Snakemake's log, read as an account of its jobs; what goes wrong is said at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say
        self.running: dict[int, Job] = {}
        self.done = self.total = self.failed = 0

    def emit(self, record: logging.LogRecord) -> None:
        facts = vars(record)
        event = facts.get("event")
        if event == "job_info":
            run = (facts["wildcards"] or {}).get("run", "")
            self.running[facts["jobid"]] = Job(facts["rule_name"], run, time.time())
        elif event == "job_finished":
            self.running.pop(facts["job_id"], None)
        elif event == "progress":
            self.done, self.total = facts["done"], facts["total"]
        elif event == "job_error":
            self.running.pop(
                facts["jobid"], None
            )  # what follows, tafs/orchestration/retries.py says
        elif facts.get("exception") == "RuleException":
            pass  # the shell's exit status, beside a job_error that says more
        elif record.levelno >= logging.WARNING and record.msg:
            self.say(record.getMessage())


def failure(how: str, stage: str, run: str, logs: Sequence[str], reason: str) -> str:
    """A failed job: what becomes of it, which one, why, and where the rest stands.

    Args:
        reason: "" where the job has not said it; its log's last line then has to do.
    """
    log = logs[0] if logs else "no log"
    if not reason:
        try:
            said = Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            said = []
        reason = said[-1] if said else "no output"
    return f"{how} {stage} {run}".rstrip() + f" ({log})\n    {reason}"


class Watcher:
    """A thread that shows the running jobs in the place of Snakemake's own lines."""

    def __init__(self, runs: Path, stream: TextIO, title: str) -> None:
        self.runs = runs
        self.stream = stream
        self.title = title
        self.jobs = Jobs(self.say)
        self.interval = 1.0 if stream.isatty() else 30.0
        self._live: Live | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started = time.time()

    def start(self, logger: logging.Logger) -> None:
        """Show the jobs that `logger` tells of; its file keeps every line, its screen none."""
        self._logger = logger
        self._screen = [
            handler
            for handler in logger.handlers
            if isinstance(handler, logging.StreamHandler)
            and not isinstance(handler, logging.FileHandler)
        ]
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
        """Give the screen back; Snakemake's warnings and errors appear on it again."""
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
        """Lines that stay."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def elapsed(self) -> str:
        return _clock(time.time() - self._started)

    def lines(self) -> list[str]:
        """The table: a head, then a line a job."""
        now = time.time()
        head = f"{self.title}  {self.elapsed()}"
        if self.jobs.total:
            head += f"  {self.jobs.done} of {self.jobs.total} jobs done"
        if self.jobs.failed:
            head += f", {self.jobs.failed} failed"
        reports = {(r["stage"], r["run"]): r for r in active(self.runs, now)}
        rows = []
        for job in list(self.jobs.running.values()):
            report = reports.get((job.stage, job.run))
            # An older report is that of a job that was killed.
            if report is None or report["updated"] < job.since:
                rows.append((job.stage, job.run, "", "", ""))
            else:
                rows.append((job.stage, job.run, *cells(report, now)))
        return [head, *aligned(rows)]

    def _watch(self) -> None:
        from rich.text import Text

        while not self._stop.wait(self.interval):
            text = "\n".join(self.lines())
            if self._live:
                self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)
            else:
                self.say(text)
