"""The contract of snakemake_hooks with the pinned Snakemake and its Slurm executor.

A failure names the private part that another version has changed.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import pytest
from snakemake import checkpoints, cli, jobs, logging, workflow
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_executor_plugin_slurm import Executor
from snakemake_interface_executor_plugins.executors.base import AbstractExecutor
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_logger_plugins.common import LogEvent

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
    (Executor, "self._failed_nodes.add(node)"),
    (Executor, '"node failure, SLURM status is: "'),  # slurm.NODE_FAILED
    (Executor, "f\"The error message was '{e.output.strip()}'.\\n\""),  # slurm.REFUSED
    (cli.main, "parser, args = parse_args(argv)"),
    # Content decides what runs.
    (workflow.Workflow._prepare_dag, "ignore_incomplete: bool"),
    (workflow.Workflow._prepare_dag, "self._persistence = persistence("),
    (workflow.Workflow._prepare_dag, "persistence = FilePersistence"),
    (workflow.Workflow._prepare_dag, "path=persistence_path"),
    (workflow.Workflow._prepare_dag, "conda_prefix=self.deployment_settings.conda_prefix"),
    (workflow.Workflow, "self._prepare_dag("),
    (workflow.Workflow, "def snakemake_tmp_dir(self)"),
    (workflow.Workflow, "def dryrun(self)"),
    (workflow.Workflow.is_main_process.fget, "return self.exec_mode == ExecMode.DEFAULT"),
    (workflow.DAG, "await self.update_needrun(create_inventory=True)"),
    (workflow.DAG.update_needrun, "_needrun = self._needrun"),
    (workflow.DAG.update_needrun, "if not self.workflow.persistence.has_metadata(job):"),
    (workflow.DAG.update_needrun, "sum(1 for dep in dependencies[job] if dep in _needrun)"),
    (workflow.DAG.update_needrun, "self._len = len(self._finished | self._needrun)"),
    (workflow.DAG.update_needrun, "if job.is_checkpoint:"),
    (workflow.DAG.update_needrun, "self._checkpoint_jobs.add(job)"),
    (workflow.DAG.update_checkpoint_dependencies, "if not self.needrun(checkpoint)"),
    (workflow.DAG.finish, "await self.update_checkpoint_dependencies(jobs)"),
    (workflow.Workflow._build_dag, "self.dag.update_checkpoint_dependencies()"),
    (workflow.Workflow, "rule.is_checkpoint for rule in self.rules"),
    (checkpoints.CheckpointsProxy, "setattr(self, rule.name, checkpoint)"),
    (workflow.DAG.reason, "return self._reason[job]"),
    (jobs.Reason, "def get_names(self):"),
    (jobs.Job.prepare, "await self.remove_existing_output()"),
    (jobs.Job.postprocess, "await self.cleanup(skip_cleanup_outputs)"),
    (Executor, 'f"Job submission failed with exception: {e}"'),  # slurm.INVALID
    (Executor, 'f"Exception in run_job for rule {job.rule.name}: {e}"'),
    (Executor.run_job, "call += set_gres_string(job)"),
    (Executor.run_array_jobs, "call += set_gres_string(jobs[0])"),
    (Executor, "def run_jobs(self, jobs: List[JobExecutorInterface])"),
    (JobScheduler, "executor.run_jobs"),
    (jobs.GroupJob.log.fget, "for job in self.jobs for f in job.log"),
    # Snakemake's log.
    (jobs.Job.log_info, "wildcards=self.wildcards_dict"),
    (jobs.Job.log_info, "rule_name=self.rule.name"),
    (JobScheduler, "extra=dict(event=LogEvent.JOB_FINISHED, job_id=j.jobid)"),
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
