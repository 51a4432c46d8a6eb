"""Corrections of Snakemake's Slurm executor: lost jobs, failed nodes, refused jobs and orphans.

The executor stops polling jobs whose state it cannot get during an outage of Slurm, and keeps
waiting for jobs that end in a state that it does not know, such as PREEMPTED. Jobs of a workflow
that was killed continue, or start later.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tafs.common import files
from tafs.common.errors import RunFailed
from tafs.orchestration.retries import Retries
from tafs.orchestration.snakemake_hooks import LOGGER, Verdict

# A job in one of these states will run, is running or is about to end.
ALIVE = frozenset(
    [
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING"),
        *("STAGE_OUT", "RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"),
        "SPECIAL_EXIT",
    ]
)
GRACE = 150.0  # s outside ALIVE after which a job is lost; Slurm requeues a job within 120 s
FORGIVEN = 2  # losses of a job, with or without its node, that use up no retry
QUERY_TIMEOUT = 60  # s
CANCEL_TIMEOUT = 300.0  # s for cancelled jobs to end
# sbatch's messages when it cannot reach the controller; it has then waited for some seconds.
UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Connection refused")
# The executor's report of an sbatch that failed: sbatch's own message, then the whole command.
REFUSED = re.compile(r"SLURM sbatch failed\. The error message was '(.*?)'\.\n", re.DOTALL)
# Its report of a job whose node failed, or did not boot.
NODE_FAILED = re.compile(r"failed due to a node failure|SLURM status is: 'BOOT_FAIL'")
# Its report of a job that it cannot describe to sbatch, which it has printed already.
INVALID = "Job submission failed with exception: "

logger = logging.getLogger(LOGGER)


class Watch:
    """Polls Slurm in addition to the executor, and reports the jobs that Slurm has lost.

    Args:
        executor: Snakemake's executor; its methods that submit and poll jobs and report how they
            end are replaced.
        retries: is told which failures are Slurm's.
    """

    def __init__(self, executor: Any, retries: Retries) -> None:
        self.run_name: str = executor.run_uuid  # the name of all its jobs in Slurm
        self.retries = retries
        # By id. Keeping the objects prevents Python from reusing their ids.
        self._reported: dict[int, Any] = {}
        self._lost_since: dict[str, float] = {}
        self._forgiven: Counter[int] = Counter()
        self._poll = executor.check_active_jobs
        self._report_success = executor.report_job_success
        self._report_error = executor.report_job_error
        self._submit = executor.run_jobs
        executor.check_active_jobs = self.check
        executor.report_job_success = self._success
        executor.report_job_error = self._error
        executor.run_jobs = self._run

    async def check(self, active: Sequence[Any]) -> AsyncIterator[Any]:
        """The executor's `check_active_jobs`: yields the jobs to poll again."""
        awaited = []
        try:
            async for job in self._poll(active):
                awaited.append(job)
        except Exception as error:  # would end the polling thread, and the workflow would hang
            logger.warning(f"Slurm could not be asked for its jobs: {error}")
        known = {id(job) for job in awaited} | self._reported.keys()
        awaited += [job for job in active if id(job) not in known]
        self._reported.clear()
        states = await asyncio.to_thread(self._states) if awaited else {}
        for job in awaited:
            if states is None or not self._lost(job.external_jobid, states):
                yield job
                continue
            # It may have succeeded and been forgotten by Slurm. The next job finds its work done.
            self._forgive(job)
            message = f"Slurm has lost job {job.external_jobid}"
            self.retries.table.say(message)
            self._report_error(job, msg=message)

    def _forgive(self, job: Any) -> None:
        """Let a failure that is not the job's own use up no retry, unless it repeats."""
        key = id(job.job)
        if self._forgiven[key] < FORGIVEN:
            self._forgiven[key] += 1
            self.retries.expect(job.job, Verdict.CONTINUE)

    def _run(self, jobs: Sequence[Any]) -> None:
        """Submit jobs; the logs of earlier attempts are deleted, as on one machine."""
        for log in (log for job in jobs for log in job.log):
            Path(log).unlink(missing_ok=True)
        self._submit(jobs)

    def _success(self, job: Any) -> None:
        self._reported[id(job)] = job
        self._report_success(job)

    def _error(self, job: Any, msg: str | None = None, **fields: Any) -> None:
        self._reported[id(job)] = job
        if msg and NODE_FAILED.search(msg):
            self._forgive(job)
            msg = f"the node of Slurm job {job.external_jobid} has failed"
            self.retries.table.say(msg)
        elif msg:
            refused = REFUSED.search(msg)
            said = refused.group(1) if refused else msg
            invalid = msg.startswith(INVALID)
            if not invalid:  # Snakemake does not print the message of a group.
                self.retries.table.say(" ".join(said.split()))
            if any(sign in msg for sign in UNREACHABLE):
                self.retries.expect(job.job, Verdict.CONTINUE)
            elif refused or invalid:
                self.retries.expect(job.job, Verdict.GIVE_UP)
                msg = said
        self._report_error(job, msg=msg, **fields)

    def _lost(self, job: str, states: dict[str, str]) -> bool:
        """Whether a job has been outside ALIVE for longer than GRACE."""
        if states.get(job) in ALIVE:
            self._lost_since.pop(job, None)
            return False
        return time.monotonic() - self._lost_since.setdefault(job, time.monotonic()) > GRACE

    def _states(self) -> dict[str, str] | None:
        """The states of the workflow's jobs; None if Slurm does not answer."""
        try:
            answer = squeue("--states=all", "--format=%i %T", f"--name={self.run_name}")
        except (OSError, subprocess.SubprocessError):
            return None
        return dict(line.split() for line in answer.splitlines())


def squeue(*options: str) -> str:
    """What squeue prints.

    Raises:
        OSError, subprocess.SubprocessError: Slurm is not installed or does not answer.
    """
    command = ["squeue", "--noheader", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=QUERY_TIMEOUT, check=True
    )
    return done.stdout


def remember(file: Path, run_name: str) -> None:
    """Write the name that all Slurm jobs of this call have."""
    files.atomic_text(file, json.dumps({"name": run_name}))


def end_orphans(file: Path) -> int:
    """Cancel the Slurm jobs of an earlier call that has ended; return their number.

    The work of a running job is saved. A pending job would start after its successor has ended,
    and begin from scratch.

    Args:
        file: written by `remember`; deleted once no job is left.

    Raises:
        RunFailed: the jobs do not end, or Slurm does not answer; names the remedy.
    """
    try:
        name = json.loads(file.read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    before = _count(name, file)
    if before:
        subprocess.run(["scancel", f"--name={name}"], capture_output=True, check=False)
    deadline = time.monotonic() + CANCEL_TIMEOUT
    while before and _count(name, file):
        if time.monotonic() > deadline:
            raise RunFailed(f"Slurm jobs of an earlier call do not end: scancel --name={name}")
        time.sleep(1.0)
    file.unlink()
    return before


def _count(name: str, file: Path) -> int:
    """The number of jobs of this name that are pending or running."""
    try:
        return len(squeue("--format=%i", f"--name={name}").split())
    except FileNotFoundError:
        raise RunFailed(
            f"an earlier call has submitted jobs to Slurm, which is not installed here: run "
            f"scancel --name={name} where it is, then delete {file}"
        ) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"Slurm does not answer ({error}); try again") from None
