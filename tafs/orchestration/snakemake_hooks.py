"""All uses of private parts of Snakemake and of its Slurm executor.

Snakemake has no public interface for what these hooks do. The contract test,
tests/orchestration/test_snakemake_hooks.py, checks every attribute that they use in the pinned
versions.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tafs.common.errors import RunFailed

LOGGER = "snakemake.logging"
SLURM = "snakemake_executor_plugin_slurm"  # the module of the Slurm executor


# -- the log ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoggedJob:
    """A job as Snakemake's log describes it."""

    id: int
    rule: str
    wildcards: Mapping[str, str]
    reason: str  # why it runs


class JobLog(logging.Handler):
    """Follows Snakemake's jobs through its log; subclasses override what they need."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = vars(record)
        match fields.get("event"):
            case "job_info":
                wildcards = dict(fields["wildcards"] or {})
                reason = str(fields.get("reason") or "")
                self.started(LoggedJob(fields["jobid"], fields["rule_name"], wildcards, reason))
            case "job_finished":
                self.ended(fields["job_id"])
            case "job_error":
                self.ended(fields["jobid"])
            case "progress":
                self.progressed(fields["done"], fields["total"])
            case _:
                # A RuleException only repeats the shell's exit status of a job_error.
                repeated = fields.get("exception") == "RuleException"
                if record.levelno >= logging.WARNING and record.msg and not repeated:
                    self.warned(record.getMessage())

    def started(self, job: LoggedJob) -> None:
        """A job was started, or submitted to a cluster."""

    def ended(self, job: int) -> None:
        """A job finished or failed."""

    def progressed(self, done: int, total: int) -> None:
        """The number of finished jobs changed."""

    def warned(self, text: str) -> None:
        """Snakemake logged a warning or an error."""


def screen_handlers(logger: logging.Logger) -> list[logging.Handler]:
    """The handlers of Snakemake's logger that write to the terminal, not to a file."""
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
        and not isinstance(handler, logging.FileHandler)
    ]


# -- dry runs --------------------------------------------------------------------------------------


def dry_run(arguments: Sequence[str]) -> list[LoggedJob]:
    """The jobs that `snakemake ARGUMENTS` would run in this folder, from a dry run in this process.

    Raises:
        RunFailed: snakemake fails; holds its last line.
    """
    from snakemake import cli

    found: list[LoggedJob] = []

    class Planned(JobLog):
        def started(self, job: LoggedJob) -> None:
            found.append(job)

    handler = Planned()

    def observe(record: logging.LogRecord) -> bool:
        handler.handle(record)
        return True

    logger = logging.getLogger(LOGGER)
    logger.addFilter(observe)  # Snakemake removes all handlers when it starts
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            cli.main([*arguments, "--dry-run"])
    except SystemExit as ended:
        if ended.code:
            lines = (printed.getvalue().strip() or "no output").splitlines()
            raise RunFailed(f"snakemake --dry-run: {lines[-1]}") from None
    finally:
        logger.removeFilter(observe)
    return found


# -- the scheduler ---------------------------------------------------------------------------------


class Verdict(Enum):
    """What happens to a failed job."""

    RETRY = "retry"  # as often as `retries` allows
    CONTINUE = "continue"  # run it again without using up a retry
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Member:
    """One job of a failed submission."""

    rule: str
    wildcards: Mapping[str, str]
    logs: tuple[str, ...]
    complete: bool  # all its output files exist


@dataclass(frozen=True)
class FailedJob:
    """A failed submission: a job, or a group of jobs."""

    key: int  # the same for every attempt; see `key_of`
    is_group: bool
    members: tuple[Member, ...]
    retries_left: bool


def key_of(job: Any) -> int:
    """Identifies one of Snakemake's jobs while Snakemake holds it."""
    return id(job)


def on_failure(workflow: Any, decide: Callable[[FailedJob], Verdict]) -> None:
    """Let `decide` determine what Snakemake's scheduler does with each failed job."""
    scheduler = workflow.scheduler
    handle = scheduler._handle_error

    def handle_error(job: Any, *arguments: Any, **keywords: Any) -> None:
        members = list(job.jobs) if job.is_group() else [job]
        verdict = decide(
            FailedJob(
                key=key_of(job),
                is_group=bool(job.is_group()),
                members=tuple(map(_member, members)),
                retries_left=job.restart_times > job.attempt - 1,
            )
        )
        limits = {Verdict.CONTINUE: sys.maxsize, Verdict.GIVE_UP: 0}
        with _retries(members, limits.get(verdict)):
            handle(job, *arguments, **keywords)
        if verdict is Verdict.CONTINUE:
            job.attempt -= 1

    scheduler._handle_error = handle_error


def _member(job: Any) -> Member:
    return Member(
        rule=str(job.rule.name),
        wildcards=dict(job.wildcards_dict),
        logs=tuple(map(str, job.log)),
        complete=all(Path(str(file)).exists() for file in job.output),
    )


@contextmanager
def _retries(jobs: Sequence[Any], count: int | None) -> Iterator[None]:
    """Allow the jobs' rules `count` retries inside the block; None: as many as before."""
    rules = {id(job.rule): job.rule for job in jobs}.values()
    before = [(rule, rule.restart_times) for rule in rules]
    for rule, own in before:
        rule.restart_times = own if count is None else count
    try:
        yield
    finally:
        for rule, own in before:
            rule.restart_times = own


def remove_rate_limit(workflow: Any) -> None:
    """Do not limit the number of jobs per second on one machine.

    The limit makes Snakemake look for new jobs once a second for every job that has ended, which
    costs a tenth of the CPU time of a scale with short jobs.
    """
    if workflow.local_exec:
        workflow.scheduler.job_rate_limiter = None


# -- the Slurm executor ----------------------------------------------------------------------------


class SlurmExecutor:
    """The original methods of the Slurm executor that poll jobs and report how they end."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.run_name: str = executor.run_uuid  # the name of all its jobs in Slurm
        self._check = executor.check_active_jobs
        self._success = executor.report_job_success
        self._error = executor.report_job_error

    @classmethod
    def of(cls, workflow: Any) -> SlurmExecutor | None:
        """The workflow's executor, if that is Slurm's."""
        executor = workflow.scheduler._executor
        return cls(executor) if type(executor).__module__ == SLURM else None

    def check(self, active: Sequence[Any]) -> AsyncIterator[Any]:
        """Report the jobs that have ended; yield those to ask for again."""
        found: AsyncIterator[Any] = self._check(active)
        return found

    def report_success(self, job: Any) -> None:
        self._success(job)

    def report_error(self, job: Any, msg: str | None = None, **fields: Any) -> None:
        self._error(job, msg=msg, **fields)

    def replace(
        self,
        check: Callable[[Sequence[Any]], AsyncIterator[Any]],
        success: Callable[[Any], None],
        error: Callable[..., None],
    ) -> None:
        """Make the executor call these functions instead of its own methods."""
        self._executor.check_active_jobs = check
        self._executor.report_job_success = success
        self._executor.report_job_error = error
