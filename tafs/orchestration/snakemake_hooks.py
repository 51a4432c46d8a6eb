"""All uses of private parts of Snakemake and of its Slurm executor.

Snakemake has no public interface for what these hooks do. The contract test,
tests/orchestration/test_snakemake_hooks.py, checks every attribute that they use in the pinned
versions.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tafs.common.errors import RunFailed

LOGGER = "snakemake.logging"
SLURM = "snakemake_executor_plugin_slurm"  # the module of the Slurm executor


@dataclass(frozen=True)
class LoggedJob:
    """A job as Snakemake's log describes it."""

    rule: str
    wildcards: Mapping[str, str]
    reason: str  # why it runs
    since: float  # when it was started, or submitted to a cluster; Unix seconds


class JobLog(logging.Handler):
    """Follows Snakemake's jobs through its log.

    Args:
        say: prints Snakemake's warnings and errors.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say
        self.running: dict[int, LoggedJob] = {}
        self.done = self.total = 0

    def emit(self, record: logging.LogRecord) -> None:
        fields = vars(record)
        match fields.get("event"):
            case "job_info":
                wildcards = dict(fields["wildcards"] or {})
                reason = str(fields.get("reason") or "")
                job = LoggedJob(fields["rule_name"], wildcards, reason, record.created)
                self.running[fields["jobid"]] = job
            case "job_finished":
                self.running.pop(fields["job_id"], None)
            case "job_error":
                self.running.pop(fields["jobid"], None)
            case "progress":
                self.done, self.total = fields["done"], fields["total"]
            case _:
                # A RuleException only repeats the shell's exit status of a job_error.
                repeated = fields.get("exception") == "RuleException"
                if record.levelno >= logging.WARNING and record.msg and not repeated:
                    self.say(record.getMessage())


def screen_handlers(logger: logging.Logger) -> list[logging.Handler]:
    """The handlers of Snakemake's logger that write to the terminal, not to a file."""
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
        and not isinstance(handler, logging.FileHandler)
    ]


def dry_run(arguments: Sequence[str]) -> list[LoggedJob]:
    """The jobs that `snakemake ARGUMENTS` would run in this folder, from a dry run in this process.

    Raises:
        RunFailed: snakemake fails; holds its last line.
    """
    from snakemake import cli

    handler = JobLog(say=lambda text: None)

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
    return list(handler.running.values())


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

    key: int  # `id` of Snakemake's job, the same for every attempt
    is_group: bool
    members: tuple[Member, ...]
    retries_left: bool


def on_failure(workflow: Any, decide: Callable[[FailedJob], Verdict]) -> None:
    """Let `decide` determine what Snakemake's scheduler does with each failed job."""
    scheduler = workflow.scheduler
    handle = scheduler._handle_error

    def handle_error(job: Any, *arguments: Any, **keywords: Any) -> None:
        jobs = list(job.jobs) if job.is_group() else [job]
        members = [
            Member(
                rule=str(one.rule.name),
                wildcards=dict(one.wildcards_dict),
                logs=tuple(map(str, one.log)),
                complete=all(Path(str(file)).exists() for file in one.output),
            )
            for one in jobs
        ]
        retries_left = job.restart_times > job.attempt - 1
        verdict = decide(FailedJob(id(job), bool(job.is_group()), tuple(members), retries_left))
        limit = {Verdict.CONTINUE: sys.maxsize, Verdict.GIVE_UP: 0}.get(verdict)
        before = {one.rule: one.rule.restart_times for one in jobs}
        try:
            for rule, own in before.items():
                rule.restart_times = own if limit is None else limit
            handle(job, *arguments, **keywords)
        finally:
            for rule, own in before.items():
                rule.restart_times = own
        if verdict is Verdict.CONTINUE:
            job.attempt -= 1

    scheduler._handle_error = handle_error


def remove_rate_limit(workflow: Any) -> None:
    """Do not limit the number of jobs per second on one machine.

    The limit makes Snakemake look for new jobs once a second for every job that has ended, which
    costs a tenth of the CPU time of a scale with short jobs.
    """
    if workflow.local_exec:
        workflow.scheduler.job_rate_limiter = None


def slurm_executor(workflow: Any) -> Any | None:
    """The workflow's executor if it is Slurm's; `slurm.Watch` replaces some of its methods."""
    executor = workflow.scheduler._executor
    return executor if type(executor).__module__ == SLURM else None
