"""The workflow on a real Slurm with the faults of clusters: it ends with the same tables.

`make test-slurm`; skipped where no Slurm can be started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support import slurm_cluster
from support.killable_training import iterations as recorded
from support.project_copy import (
    RUN,
    Project,
    assert_same,
    copied,
    half_decided,
    outcome,
    reduced,
)
from support.slurm_cluster import Cluster, wait

from tafs.runtime import journal
from tafs.runtime.run_dir import RunDir

pytestmark = pytest.mark.skipif(
    bool(slurm_cluster.missing()), reason=f"no Slurm can be started: {slurm_cluster.missing()}"
)

ITERATIONS = 60  # enough for a fault among them
PROFILE = ("--profile", "slurm", "--slurm-init-seconds-before-status-checks", "3")
OUTAGE = 45.0  # s; Snakemake polls its jobs meanwhile
FOLLOWED = 300.0  # s; Slurm holds a requeued job for two minutes


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return reduced(tmp_path_factory.mktemp("project"), ITERATIONS).folder


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory) -> Project:
    """A finished workflow, without Slurm."""
    place = Project(project, tmp_path_factory.mktemp("undisturbed"))
    done = place.snakemake("all")
    assert done.returncode == 0, done.stderr
    return place


def iterations(place: Project) -> int:
    """The number of iterations of the training in progress."""
    return recorded(RunDir(place.smoke / "runs" / RUN))


def kinds(place: Project) -> list[str]:
    return [r["kind"] for r in journal.read(place.smoke / "runs" / RUN / "journal.jsonl")]


def holder(place: Project) -> dict[str, Any]:
    """The lock's holder: `pid`, and `job`, Slurm's id."""
    held = (place.smoke / "runs" / RUN / ".locks" / "train").read_bytes()
    return dict(json.loads(held))


def control(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def disturbed(place: Project, act: Callable[[str], None], *arguments: str) -> str:
    """Run the workflow and call `act` with Slurm's job id while it trains; return its stderr."""
    workflow = place.start("all", *PROFILE, *arguments)
    try:
        wait(lambda: iterations(place) >= 5 or workflow.poll() is not None, "a training", 240.0)
        assert workflow.poll() is None, workflow.communicate()[1]
        act(holder(place)["job"])
        said = workflow.communicate(timeout=FOLLOWED + 900.0)[1]
    finally:
        if workflow.poll() is None:
            os.killpg(workflow.pid, signal.SIGKILL)
            workflow.wait()
    assert workflow.returncode == 0, said
    return said


def called_again(place: Project, undisturbed: Project) -> str:
    """Repeat the command, which continues the training with the same results; return its stderr."""
    done = place.snakemake("all", *PROFILE)
    assert done.returncode == 0, done.stderr
    assert "resume" in kinds(place)
    assert_same(place, undisturbed)
    return done.stderr


@pytest.fixture
def place(project, tmp_path) -> Project:
    return Project(project, tmp_path / "results")


def cancel(slurm: Cluster, place: Project, job: str) -> None:
    control("scancel", job)


def hang(slurm: Cluster, place: Project, job: str) -> None:
    """The job hangs until Slurm ends it."""
    control("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    os.kill(holder(place)["pid"], signal.SIGSTOP)


def requeue(slurm: Cluster, place: Project, job: str) -> None:
    control("scontrol", "requeue", job)


def preempt(slurm: Cluster, place: Project, job: str) -> None:
    """Submit a job of higher priority that takes all nodes."""
    options = ("--partition=urgent", "--exclusive", f"--nodes={len(slurm.names)}")
    control("sbatch", *options, "--output=/dev/null", "--wrap=sleep 5")


def fail_node(slurm: Cluster, place: Project, job: str) -> None:
    node = control("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    control("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")


# Without tafs.orchestration.slurm, Snakemake would wait forever for a job that was preempted and
# cancelled.
SPARE = ("--default-resources", "slurm_partition=spare", "runtime=60")


@pytest.mark.parametrize(
    "fault, act, arguments, quick",
    [
        ("scancel", cancel, (), 0),
        ("time limit, unforeseen", hang, (), 0),
        ("scontrol requeue", requeue, (), 0),
        ("preemption with requeue", preempt, (), 0),
        ("preemption with cancellation", preempt, SPARE, 0),
        ("node failure", fail_node, (), 0),
    ],
)
def test_a_job_that_slurm_ends_runs_again_and_continues(
    slurm, place, undisturbed, trials, fault, act, arguments, quick
) -> None:
    for _ in trials(f"Slurm: {fault}", quick, 1):
        try:
            said = disturbed(place, lambda job: act(slurm, place, job), *arguments)
        finally:
            if act is fail_node:
                for name in slurm.names:
                    command = ["scontrol", "update", f"NodeName={name}", "State=RESUME"]
                    subprocess.run(command, check=False)
        assert act is not cancel or f"train {RUN}" in said
        assert "resume" in kinds(place)
        assert_same(place, undisturbed)


def test_a_job_near_its_time_limit_is_continued_by_another(
    slurm, place, undisturbed, trials
) -> None:
    """Without using up a retry: there are none. A second iteration as slow would not fit."""

    def stall(job: str) -> None:
        process = holder(place)["pid"]
        os.kill(process, signal.SIGSTOP)
        time.sleep(33.0)
        os.kill(process, signal.SIGCONT)

    for _ in trials("Slurm: time limit, state saved before it", 1, 1):
        said = disturbed(place, stall, "--retries", "0", "--set-resources", "train:runtime=2")
        assert f"of {ITERATIONS} iterations, to be continued: the time limit" in said
        assert kinds(place).count("pause") >= 1
        assert_same(place, undisturbed)


def test_the_same_command_continues_a_killed_workflow(slurm, place, undisturbed, trials) -> None:
    for _ in trials("Slurm: kill -9 of snakemake", 1, 1):
        workflow = place.start("all", *PROFILE)
        wait(lambda: iterations(place) >= 5, "a training", 240.0)
        orphan = holder(place)["job"]
        os.killpg(workflow.pid, signal.SIGKILL)
        workflow.wait()
        said = called_again(place, undisturbed)
        assert f"{place.smoke}: cancelled 1 jobs of an earlier call" in said
        assert slurm.jobs()[orphan] == "CANCELLED"


def test_an_interrupted_workflow_leaves_no_job_and_is_continued(
    slurm, place, undisturbed, trials
) -> None:
    for _ in trials("Slurm: Ctrl-C of snakemake", 0, 1):
        workflow = place.start("all", *PROFILE)
        wait(lambda: iterations(place) >= 5, "a training", 240.0)
        os.killpg(workflow.pid, signal.SIGINT)
        said = workflow.communicate(timeout=120.0)[1]
        assert workflow.returncode not in (0, -signal.SIGKILL), said
        assert control("squeue", "--noheader", "--states=PENDING,RUNNING") == ""
        assert "cancelled" not in called_again(place, undisturbed)


def test_the_workflow_outlasts_an_outage_of_the_controller(
    slurm, place, undisturbed, trials
) -> None:
    def outage(job: str) -> None:
        slurm.end("slurmctld", signal.SIGKILL)
        time.sleep(OUTAGE)
        slurm.start_controller()

    for _ in trials("Slurm: slurmctld killed for 45 s", 0, 1):
        disturbed(place, outage)
        assert_same(place, undisturbed)


def untimed(place: Project) -> dict[str, object]:
    """Return `outcome` without the times of iterations."""
    found: dict[str, object] = dict(outcome(place))
    assert b"iteration time: " in (place.smoke / "claims.md").read_bytes()
    claims = (place.smoke / "claims.md").read_text().splitlines()
    found["claims.md"] = [line for line in claims if "iteration time: " not in line]
    for suffix in ("csv", "md", "tex", "html", "parquet"):
        del found[f"tables/table2.{suffix}"]
    table = pd.read_csv(place.smoke / "tables" / "table2.csv")
    found["table2"] = table.drop(columns="iteration_time_s").to_csv()
    return found


def test_a_refused_submission_is_not_retried_and_shows_the_message_of_sbatch(slurm, place):
    done = place.snakemake("all", *PROFILE, "--default-resources", "slurm_partition=gpuu")
    assert done.returncode == 1
    refusals = [line for line in done.stderr.splitlines() if "invalid partition" in line]
    assert len(refusals) == 1  # the training; the evaluations wait for it, in one group
    assert "sbatch call" not in done.stderr
    assert "with 1 failed" in done.stderr


def test_the_whole_workflow_gives_the_same_tables_as_without_slurm(
    slurm, tmp_path_factory, trials
) -> None:
    """Every method, table and figure of the smoke scale."""
    for _ in trials("Slurm: the whole graph, undisturbed", 0, 1):
        folder = tmp_path_factory.mktemp("whole")
        places = [copied(folder, folder / "slurm"), Project(folder, folder / "local")]
        for place, profile in zip(places, (PROFILE, ()), strict=True):
            done = place.snakemake("all", *profile)
            assert done.returncode == 0, done.stderr
        found, expected = map(untimed, places)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []


def test_open_claims_get_more_seeds_in_jobs_of_the_same_call(slurm, tmp_path, trials):
    for number in trials("Slurm: claims stay open after a look", 0, 1):
        place = half_decided(tmp_path / str(number))
        done = place.snakemake("decide", *PROFILE)
        assert done.returncode == 0, done.stderr
        seeds = [run.rpartition(".")[2] for run in sorted(place.runs("tafs_grpo"))]
        assert seeds == ["0", "1", "2"]
        outcome = json.loads((place.smoke / "decisions.json").read_bytes())
        assert [one["verdict"] for one in outcome["claims"]] == ["undecided", "reproduced"]
        assert "Nothing to be done" in place.snakemake("decide", *PROFILE).stderr
