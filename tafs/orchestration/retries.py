"""Which failed jobs Snakemake tries again: it knows only how often, the stages know why.

A stage that cannot go on says so in its run's folder (`rundir.RunDir.failure`). One that has saved
its state to be continued is called again without using up one of its `retries`; one whose input is
bad is not, since it would fail the same way; all others, such as jobs that were killed, are tried
again as often as the profile's `retries` allow.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafs.common import errors
from tafs.orchestration.live_table import Jobs, failure
from tafs.runtime.run_dir import RunDir


@dataclass(frozen=True)
class Failure:
    """How a job ended."""

    stage: str
    run: str  # "" of what is made of all runs
    logs: tuple[str, ...]
    code: int | None  # None: without a word, as of a job that was killed
    message: str


class Retries:
    """Decides in the place of Snakemake's scheduler what becomes of a failed job.

    Args:
        scheduler: Snakemake's.
        runs: the folder of the runs.
        jobs: is told what failed and what follows, and counts what is given up.
    """

    def __init__(self, scheduler: Any, runs: Path, jobs: Jobs) -> None:
        self.runs = runs
        self.jobs = jobs
        self._forgiven: set[int] = set()
        self._handle = scheduler._handle_error
        # Snakemake has no setting for it: a rule's retries are one number.
        scheduler._handle_error = self.handle

    def forgive(self, job: Any) -> None:
        """The failure that is about to be handled is not the job's: it uses up no retry."""
        self._forgiven.add(id(job))

    def handle(self, job: Any, *arguments: Any, **keywords: Any) -> None:
        """As Snakemake's own `_handle_error`, for a job or a group of jobs."""
        members = list(job.jobs) if job.is_group() else [job]
        found = [taken(self.runs, member) for member in members]
        known = [f for f in found if f.code is not None]
        killed = [
            f
            for f, one in zip(found, members, strict=True)
            if f.code is None and (not job.is_group() or unmade(one))
        ]
        forgiven = id(job) in self._forgiven
        self._forgiven.discard(id(job))
        all_continued = not killed and all(f.code == errors.CONTINUE for f in known)
        continued = forgiven or (bool(known) and all_continued)
        refused = bool(known) and not killed and all(f.code == errors.BAD_INPUT for f in known)
        retried = not refused and (continued or job.restart_times > job.attempt - 1)
        for one in known + ([] if forgiven else killed):
            if continued:
                self.jobs.say(f"{one.stage} {one.run}: {one.message}")
                continue
            how = "failed and is tried again:" if retried else "FAILED"
            self.jobs.say(failure(how, one.stage, one.run, one.logs, one.message))
        self.jobs.failed += not retried
        with _retries(members, sys.maxsize if continued else 0 if refused else None):
            self._handle(job, *arguments, **keywords)
        if continued:
            job.attempt -= 1


def taken(runs: Path, job: Any) -> Failure:
    """How a job ended, by what its stage has said; that is marked as seen, and not taken again."""
    stage, run = str(job.rule.name), str(dict(job.wildcards_dict).get("run", ""))
    silent = Failure(stage, run, tuple(map(str, job.log)), None, "")
    file = RunDir(runs / run).failure(stage)
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if said["seen"]:
            return silent
        file.write_text(json.dumps({**said, "seen": True}), encoding="utf-8")
        return Failure(stage, run, silent.logs, int(said["exit"]), str(said["message"]))
    except (OSError, ValueError, KeyError, TypeError):
        return silent


def unmade(job: Any) -> bool:
    """Whether it lacks one of its files, as others of its group may not."""
    return not all(Path(str(file)).exists() for file in job.output)


@contextmanager
def _retries(jobs: list[Any], count: int | None) -> Iterator[None]:
    """The jobs' rules allow so many retries inside the block; None: as many as before."""
    rules = {id(job.rule): job.rule for job in jobs}.values()
    before = [rule.restart_times for rule in rules]
    for rule, own in zip(rules, before, strict=True):
        rule.restart_times = own if count is None else count
    try:
        yield
    finally:
        for rule, own in zip(rules, before, strict=True):
            rule.restart_times = own
