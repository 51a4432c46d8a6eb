"""Which failed jobs are run again.

Snakemake's `retries` is one number for every failure. Here the reason counts, which a stage writes
to its run's folder (`RunDir.failure`):

- it saved its state and is to be continued: the job runs again without using up a retry;
- its input is bad, or sbatch refused it: no retry, since it would fail in the same way;
- anything else, such as a job that was killed: as many retries as the profile allows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafs.common import errors
from tafs.orchestration.live_table import LiveTable
from tafs.orchestration.snakemake_hooks import FailedJob, Member, Verdict
from tafs.runtime.run_dir import RunDir


@dataclass(frozen=True)
class Failure:
    """How a job ended."""

    stage: str
    run: str  # "" for jobs over all runs
    logs: tuple[str, ...]
    code: int | None  # exit code; None: the stage wrote nothing, as when it was killed
    message: str

    def describe(self, outcome: str) -> str:
        """What happened to which job, its log and the reason.

        Where the stage wrote no reason, the last line of its log is shown.
        """
        log = self.logs[0] if self.logs else "no log"
        reason = self.message or _last_line(self.logs)
        return f"{outcome} {self.stage} {self.run}".rstrip() + f" ({log})\n    {reason}"


class Retries:
    """Decides what happens to each failed job, and prints it.

    Args:
        table: prints the failures and counts the jobs that are given up.
    """

    def __init__(self, table: LiveTable) -> None:
        self.table = table
        self._decided: dict[int, Verdict] = {}

    def expect(self, job: Any, verdict: Verdict) -> None:
        """Set the verdict on the next failure of Snakemake's job, which was reported already."""
        self._decided[id(job)] = verdict

    def decide(self, job: FailedJob) -> Verdict:
        """The verdict on a failed job or group."""
        failures = [(take_failure(self.table.runs, member), member) for member in job.members]
        known = [failure for failure, _ in failures if failure.code is not None]
        silent = [
            failure
            for failure, member in failures
            if failure.code is None and not (job.is_group and member.complete)
        ]
        codes = {failure.code for failure in known + silent}
        if codes == {errors.CONTINUE}:
            verdict = Verdict.CONTINUE
        elif codes == {errors.BAD_INPUT}:
            verdict = Verdict.GIVE_UP
        else:
            verdict = Verdict.RETRY
        if job.key in self._decided:
            verdict, silent = self._decided.pop(job.key), []
        retried = job.retries_left and verdict is Verdict.RETRY
        outcome = "failed and is tried again:" if retried else "FAILED"
        for failure in known + silent:
            if verdict is Verdict.CONTINUE:
                self.table.say(f"{failure.stage} {failure.run}: {failure.message}")
            else:
                self.table.say(failure.describe(outcome))
        self.table.failed += not retried and verdict is not Verdict.CONTINUE
        return verdict


def take_failure(runs: Path, member: Member) -> Failure:
    """How a job ended according to its run's folder; the record is marked as seen.

    A record that was seen before belongs to an earlier attempt and does not count.
    """
    stage, run = member.rule, member.wildcards.get("run", "")
    file = RunDir(runs / run).failure(stage)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not record["seen"]:
            file.write_text(json.dumps({**record, "seen": True}), encoding="utf-8")
            return Failure(stage, run, member.logs, int(record["exit"]), str(record["message"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Failure(stage, run, member.logs, None, "")


def _last_line(logs: Sequence[str]) -> str:
    try:
        text = Path(logs[0]).read_text(encoding="utf-8", errors="replace") if logs else ""
    except OSError:
        text = ""
    return (text.strip().splitlines() or ["no output"])[-1]
