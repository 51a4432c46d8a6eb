"""What Snakemake's Slurm executor leaves open: jobs that it would await for ever, and orphans.

The executor forgets the jobs whose state it cannot ask for in an outage of Slurm, and takes for
queued what Slurm has ended without one of the states that it knows, such as PREEMPTED. And jobs
that were submitted by a workflow that was killed go on, or start much later.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tafs.common.errors import RunFailed
from tafs.orchestration.retries import Retries

EXECUTOR = "snakemake_executor_plugin_slurm"  # where Snakemake's executor for Slurm is defined
# A job in one of them will run, runs, or is just ending.
ALIVE = frozenset(
    [
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING"),
        *("STAGE_OUT", "RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"),
        "SPECIAL_EXIT",
    ]
)
GRACE = 150.0  # s that a job may be in none of them before it counts as lost: Slurm requeues in 120
FORGIVEN = 2  # losses of a job that use up no retry
QUERY_TIMEOUT = 60  # s
CANCEL_TIMEOUT = 300.0  # s for cancelled jobs to end

# What sbatch says where it could not ask: it has then waited for some seconds.
UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Connection refused")

logger = logging.getLogger("snakemake.logging")


class Watch:
    """Asks Slurm beside its executor, and reports as failed the jobs that Slurm has lost.

    Args:
        executor: Snakemake's, which this changes.
        retries: told which jobs an outage of Slurm kept from being submitted.
    """

    def __init__(self, executor: Any, retries: Retries) -> None:
        self.executor = executor
        self.retries = retries
        self._check = executor.check_active_jobs
        self._reported: dict[int, Any] = {}  # by id, and kept alive: ids of the dead come again
        self._lost_since: dict[str, float] = {}
        self._forgiven: Counter[int] = Counter()
        self._succeeded, self._failed = executor.report_job_success, executor.report_job_error
        executor.check_active_jobs = self.check
        executor.report_job_success, executor.report_job_error = self._success, self._error

    async def check(self, active: Sequence[Any]) -> AsyncIterator[Any]:
        """As the executor's: yields the jobs that are to be asked for again."""
        awaited = []
        try:
            async for job in self._check(active):
                awaited.append(job)
        except Exception as error:  # it would end the thread that asks, and the workflow hang
            logger.warning(f"Slurm could not be asked for its jobs: {error}")
        known = {id(job) for job in awaited} | self._reported.keys()
        awaited += [job for job in active if id(job) not in known]
        self._reported.clear()
        states = await self._states() if awaited else {}
        for job in awaited:
            lost = states is not None and self._lost(job.external_jobid, states)
            if lost:
                # It may have ended well, and Slurm have forgotten it before it was asked: what such
                # a job has done is still there for the next one.
                if self._forgiven[id(job.job)] < FORGIVEN:
                    self._forgiven[id(job.job)] += 1
                    self.retries.forgive(job.job)
                self.executor.report_job_error(job, msg=f"Slurm has lost job {job.external_jobid}")
                self._reported.clear()
            else:
                yield job

    def _success(self, job: Any) -> None:
        self._reported[id(job)] = job
        self._succeeded(job)

    def _error(self, job: Any, msg: str | None = None, **facts: Any) -> None:
        self._reported[id(job)] = job
        if msg:  # Snakemake would not show that of a group
            self.retries.jobs.say(" ".join(msg.split()))
            if any(sign in msg for sign in UNREACHABLE):
                self.retries.forgive(job.job)
        self._failed(job, msg=msg, **facts)

    def _lost(self, job: str, states: dict[str, str]) -> bool:
        """Whether Slurm has for long neither run a job nor meant to."""
        if states.get(job) in ALIVE:
            self._lost_since.pop(job, None)
            return False
        return time.monotonic() - self._lost_since.setdefault(job, time.monotonic()) > GRACE

    async def _states(self) -> dict[str, str] | None:
        """Of the workflow's jobs; None where Slurm does not answer."""
        command = ["squeue", "--noheader", "--states=all", "--format=%i %T"]
        command += ["--name", self.executor.run_uuid]
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            answer, _ = await asyncio.wait_for(process.communicate(), QUERY_TIMEOUT)
        except (OSError, TimeoutError):
            return None
        if process.returncode != 0:
            return None
        return dict(line.split() for line in answer.decode().splitlines())


def end_orphans(file: Path) -> int:
    """Cancel the jobs of an earlier workflow, which must have ended; how many there were.

    A running one has its state on the disk; one that waits would start after its successor has
    ended, and begin anew.

    Args:
        file: what `remember` wrote.

    Raises:
        RunFailed: they do not end, or Slurm cannot be asked; says what to do.
    """
    try:
        name = json.loads(file.read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    before = _alive(name, file)
    if before:
        subprocess.run(["scancel", f"--name={name}"], capture_output=True, check=False)
    deadline = time.monotonic() + CANCEL_TIMEOUT
    while before and _alive(name, file):
        if time.monotonic() > deadline:
            raise RunFailed(f"Slurm jobs of an earlier call do not end: scancel --name={name}")
        time.sleep(1.0)
    file.unlink()
    return before


def remember(file: Path, executor: Any) -> None:
    """Write the name of the jobs that the executor submits: {"name"}."""
    from tafs.common import files  # it imports torch, which no plan needs

    files.atomic_text(file, json.dumps({"name": executor.run_uuid}))


def _alive(name: str, file: Path) -> int:
    command = ["squeue", "--noheader", "--format=%i", f"--name={name}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=QUERY_TIMEOUT, check=True
        )
    except FileNotFoundError:
        raise RunFailed(
            f"jobs of an earlier call may still be in a Slurm that is not here: where it is, "
            f"scancel --name={name}; then delete {file}"
        ) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"Slurm does not answer ({error}); try again") from None
    return len(done.stdout.split())
