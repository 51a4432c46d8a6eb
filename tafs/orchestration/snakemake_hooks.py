"""All uses of private parts of Snakemake and of its Slurm executor.

Snakemake has no public interface for what these hooks do. The contract test,
tests/orchestration/test_snakemake_hooks.py, checks every attribute that they use in the pinned
versions.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

LOGGER = "snakemake.logging"
SLURM = "snakemake_executor_plugin_slurm"  # the module of the Slurm executor
GPU_GRES = re.compile(r"gpu(:(?P<model>[A-Za-z_][\w.]*))?(:(?P<number>\d+))?")

Key = tuple[str, str]  # a job's rule and its wildcard, or ""


@dataclass(frozen=True)
class LoggedJob:
    """A job as Snakemake's log describes it."""

    rule: str
    wildcards: Mapping[str, str]
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
                job = LoggedJob(fields["rule_name"], wildcards, record.created)
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
    complete: bool  # all its output files have been written in this call


@dataclass(frozen=True)
class FailedJob:
    """A failed submission: a job, or a group of jobs."""

    key: int  # `id` of Snakemake's job, the same for every attempt
    is_group: bool
    members: tuple[Member, ...]
    retries_left: bool


def decide_by_content(
    workflow: Any,
    decided: Collection[Key],
    decide: Callable[[set[Key], set[Key]], Mapping[Key, str]],
    records: Path,
) -> None:
    """Let `decide` determine which jobs run, in place of times and Snakemake's records.

    Files of an earlier outcome stay until a job replaces them, also if the job fails.

    Args:
        decided: the jobs that `decide` knows; Snakemake decides about all others.
        decide: takes the jobs that the user runs in any case, and all that are asked for directly
            or indirectly; returns the jobs to run and why.
        records: the folder of Snakemake's own records, which two users cannot share.
    """
    import snakemake.workflow
    from snakemake.jobs import Job, Reason

    class Told(Reason):
        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

        def __bool__(self) -> bool:
            return True

        def __str__(self) -> str:
            return self.text

        def get_names(self) -> Iterator[str]:
            yield self.text

    told: dict[Key, str] = {}  # jobs that run in this call, and why
    prepare = workflow._prepare_dag
    own_persistence = snakemake.workflow.FilePersistence

    def persistence(**given: Any) -> Any:
        # A dry run leaves nothing behind.
        own = workflow.snakemake_tmp_dir / "records" if workflow.dryrun else records
        conda = given["conda_prefix"] or str(Path(".snakemake/conda").absolute())
        found = own_persistence(**{**given, "path": given["path"] or own, "conda_prefix": conda})
        found.has_metadata = lambda job: True  # its absence means nothing here
        return found

    def key(job: Any) -> Key:
        return job.rule.name, next(iter(job.wildcards_dict.values()), "")

    def prepared(*arguments: Any, **settings: Any) -> None:
        with mock.patch.object(snakemake.workflow, "FilePersistence", persistence):
            prepare(*arguments, **{**settings, "ignore_incomplete": True})
        dag = workflow._dag
        update = dag.update_needrun

        def asked_for(job: Any) -> bool:
            if job.rule in dag.forcerules or not dag.forcefiles.isdisjoint(job.output):
                return True
            targets = job.output if job.rule in dag.targetrules else dag.targetfiles
            return any(file in targets and not Path(file).exists() for file in job.output)

        async def updated(*arguments: Any, **settings: Any) -> None:
            await update(*arguments, **settings)
            jobs = {job: key(job) for job in dag.jobs if not dag.finished(job)}
            asked = {one for job, one in jobs.items() if asked_for(job)}
            # After a checkpoint this is called again; jobs that are running then have to stay.
            reasons = {**decide(asked, set(jobs.values())), **told}
            wanted = {
                job
                for job, one in jobs.items()
                if (one in reasons if one in decided else dag.needrun(job))
            }
            dag._needrun.clear()
            dag._needrun.update(wanted)
            dag._n_until_ready.clear()
            for job in wanted:
                dag._n_until_ready[job] = sum(one in wanted for one in dag._dependencies[job])
                if jobs[job] in reasons:
                    told[jobs[job]] = reasons[jobs[job]]
                    dag._reason[job] = Told(told[jobs[job]])
            dag._checkpoint_jobs.clear()
            dag._checkpoint_jobs.update(job for job in wanted if job.is_checkpoint)
            dag._len = len(dag._finished | dag._needrun)

        if workflow.is_main_process:
            dag.update_needrun = updated

    workflow._prepare_dag = prepared

    async def remove_logs(job: Any) -> None:
        for log in job.log:
            await log.remove(remove_non_empty_dir=False)

    async def keep(job: Any, *arguments: Any) -> None:
        """Keep the outputs of a job that failed: they are whole, and of an earlier outcome."""

    Job.remove_existing_output = remove_logs
    Job.cleanup = keep


def _written(file: Path, began: float) -> bool:
    """Whether a file has been written since a time; earlier outcomes stay until then."""
    return file.exists() and file.stat().st_mtime >= began


def on_failure(workflow: Any, decide: Callable[[FailedJob], Verdict]) -> None:
    """Let `decide` determine what Snakemake's scheduler does with each failed job."""
    scheduler = workflow.scheduler
    began = time.time()
    handle = scheduler._handle_error

    def handle_error(job: Any, *arguments: Any, **keywords: Any) -> None:
        jobs = list(job.jobs) if job.is_group() else [job]
        members = [
            Member(
                rule=str(one.rule.name),
                wildcards=dict(one.wildcards_dict),
                logs=tuple(map(str, one.log)),
                complete=all(_written(Path(str(file)), began) for file in one.output),
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
    """The workflow's executor if it is Slurm's, with two corrections.

    It asks for GPUs as `gpus_once` says, and excludes only the nodes that the user excludes: Slurm
    gives no job to a failed node, and one that is up again is needed. `slurm.Watch` replaces some
    of its methods.
    """
    executor = workflow.scheduler._executor
    if type(executor).__module__ != SLURM:
        return None
    executor._failed_nodes = GivenNodes(executor._failed_nodes)
    sys.modules[SLURM].set_gres_string = gpu_options  # type: ignore[attr-defined]
    return executor


class GivenNodes(set[str]):
    """The nodes that the user excludes."""

    def add(self, node: str) -> None:
        """Leave out a node that has failed."""


def gpu_options(job: Any) -> str:
    """The options of sbatch for a job's GPUs and other generic resources.

    Raises:
        WorkflowError: one of the resources is malformed; names it.
    """
    from snakemake.iocontainers import ResourceList
    from snakemake_executor_plugin_slurm.utils import set_gres_string

    resources = ResourceList(fromdict=gpus_once(job.resources))
    return str(set_gres_string(SimpleNamespace(resources=resources)))


def gpus_once(resources: Any) -> dict[str, Any]:
    """A job's `gpu`, `gpu_model` and `gres`, with its GPUs in one of them.

    Settings of a profile reach jobs without GPUs, and those that have them in the other form: `gpu`
    in all, or `gres` on each node. Slurm refuses both forms in one job, and the executor asks for a
    GPU wherever a model is set.
    """
    gpu, model, gres = (resources.get(name) for name in ("gpu", "gpu_model", "gres"))
    found = GPU_GRES.fullmatch(str(gres))
    if not found:
        settings = {"gpu": gpu, "gpu_model": model if gpu else None, "gres": gres}
    else:
        model, number = found["model"] or model, found["number"] or "1"
        each = ":".join(filter(None, ("gpu", model, number)))
        settings = {"gpu": int(number), "gpu_model": model} if gpu else {"gres": each}
    return {name: value for name, value in settings.items() if value}
