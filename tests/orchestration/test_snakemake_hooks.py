"""The contract of snakemake_hooks with the pinned Snakemake and its Slurm executor.

A failure names the private part that another version has changed.
"""

from __future__ import annotations

import inspect
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from snakemake import cli, jobs, logging, workflow
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_executor_plugin_slurm import Executor
from snakemake_interface_executor_plugins.executors.base import AbstractExecutor
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_logger_plugins.common import LogEvent

from tafs.common import errors
from tafs.orchestration import snakemake_hooks as hooks

INSTALLED = f"snakemake {version('snakemake')}, slurm plugin " + version(
    "snakemake-executor-plugin-slurm"
)

# What the hooks rely on: text in the source of the part that they use or replace.
RELIED_ON: list[tuple[Any, str]] = [
    # The scheduler calls its error handler through the instance, which lets it be replaced.
    (JobScheduler._error_jobs, "self._handle_error(job)"),
    (JobScheduler._handle_error, "def _handle_error(self, job, postprocess_job: bool = True)"),
    (JobScheduler._handle_error, "if job.restart_times > job.attempt - 1:"),
    (JobScheduler._handle_error, "job.attempt += 1"),
    (jobs.Job.restart_times.fget, "return self.rule.restart_times"),
    (jobs.GroupJob.restart_times.fget, "max(job.restart_times for job in self.jobs)"),
    (jobs.Job.is_group, "return False"),
    (jobs.GroupJob.is_group, "return True"),
    (jobs.Job, "self.wildcards_dict"),
    # Without a limiter, the scheduler starts all jobs that fit.
    (JobScheduler, "self._executor"),
    (JobScheduler, "if self.job_rate_limiter is None:"),
    (workflow.Workflow, "def local_exec(self)"),
    # Polling and reporting go through the executor's instance.
    (RemoteExecutor, "self.check_active_jobs(active_jobs)"),
    (Executor, "async def check_active_jobs("),
    (Executor, "self.report_job_success(j)"),
    (Executor, "self.report_job_error(j, msg=msg"),
    (
        AbstractExecutor,
        "def report_job_error(self, job_info: SubmittedJobInfo, msg=None, **kwargs)",
    ),
    (AbstractExecutor, "def report_job_success(self, job_info: SubmittedJobInfo)"),
    (Executor, "self.run_uuid = "),
    (Executor, "f\"The error message was '{e.output.strip()}'.\\n\""),  # slurm.REFUSED
    # Snakemake's log.
    (jobs.Job.log_info, "wildcards=self.wildcards_dict"),
    (jobs.Job.log_info, "reason=str(self.dag.reason(self))"),
    (jobs.Job.log_info, "rule_name=self.rule.name"),
    (JobScheduler, "extra=dict(event=LogEvent.JOB_FINISHED, job_id=j.jobid)"),
    (logging.LoggerManager, "self.logger.removeHandler(handler)"),
    (cli.main, "sys.exit(0 if success else 1)"),
]


@pytest.mark.parametrize("part, text", RELIED_ON)
def test_snakemake_has_the_parts_that_the_hooks_use(part, text):
    name = getattr(part, "__qualname__", str(part))
    assert text in inspect.getsource(part), (
        f"{name} of {INSTALLED} no longer contains {text!r}; adapt snakemake_hooks.py or install "
        "the versions of constraints.txt"
    )


def test_the_logger_and_the_slurm_executor_have_their_names():
    assert (logging.logger.name, Executor.__module__) == (hooks.LOGGER, hooks.SLURM)
    events = (LogEvent.JOB_INFO, LogEvent.JOB_FINISHED, LogEvent.JOB_ERROR, LogEvent.PROGRESS)
    assert events == ("job_info", "job_finished", "job_error", "progress")


SNAKEFILE = """
rule all:
    input: [f"runs/{run}/scores" for run in config["runs"].split("+")]
rule train:
    input: "runs/{run}/run.json", "method.py"
    output: "runs/{run}/adapter"
    shell: "touch {output}"
rule evaluate:
    input: "runs/{run}/adapter"
    output: "runs/{run}/scores"
    shell: "touch {output}"
"""


def aged(file: Path, seconds: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (seconds, seconds))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A workflow with a run that is new, one whose input is newer, and one that is done."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    aged(tmp_path / "method.py", 100)
    for run in ("new", "old", "kept"):
        aged(tmp_path / f"runs/{run}/run.json", 300 if run == "old" else 100)
    for run in ("old", "kept"):
        aged(tmp_path / f"runs/{run}/adapter", 200)
        aged(tmp_path / f"runs/{run}/scores", 250)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_lists_the_jobs_with_their_reasons(project, capfd):
    found = hooks.dry_run(["all", "--config", "runs=new+old+kept"])
    reasons = {(job.rule, job.wildcards.get("run")): job.reason for job in found}
    assert set(reasons) == {
        *(("train", "new"), ("evaluate", "new"), ("train", "old"), ("evaluate", "old")),
        ("all", None),
    }
    assert reasons["train", "new"] == "Missing output files: runs/new/adapter"
    assert reasons["train", "old"].startswith("Updated input files: ")
    assert hooks.dry_run(["all", "--config", "runs=kept"]) == []
    assert capfd.readouterr() == ("", "")


def test_a_dry_run_that_fails_raises_snakemakes_message(project):
    with pytest.raises(errors.RunFailed, match=r"snakemake --dry-run: .*run\.json"):
        hooks.dry_run(["all", "--config", "runs=nowhere"])
