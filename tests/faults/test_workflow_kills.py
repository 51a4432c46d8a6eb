"""A killed workflow is continued by the same command, and two workflows exclude each other."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time

import pytest
from support.project_copy import Project, assert_same, reduced

from tafs.runtime import journal
from tafs.runtime.run_dir import RunDir

ITERATIONS = 8


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Project, float]:
    """A finished workflow, and how many seconds it took."""
    place = reduced(tmp_path_factory.mktemp("project"), ITERATIONS)
    start = time.monotonic()
    done = place.snakemake("all")
    assert done.returncode == 0, done.stderr
    return place, time.monotonic() - start


def test_the_same_command_continues_a_killed_workflow(undisturbed, tmp_path, trials) -> None:
    """Its jobs keep running; those of the next call wait for them."""
    expected, seconds = undisturbed
    places = (Project(expected.folder, tmp_path / str(n)) for n in itertools.count())
    place, kills = next(places), 0
    draw = random.Random(11)
    for _ in trials("workflow: kill -9 of snakemake at a random point", 1, 20):
        while not killed(place, draw.uniform(1.0, seconds / 2)):
            finish(place, expected)  # it had ended before the kill
            place, kills = next(places), 0
        kills += 1
        if kills == 4:  # later kills would find everything done
            finish(place, expected)
            place, kills = next(places), 0
    if kills:
        finish(place, expected)


def killed(place: Project, after: float) -> bool:
    """Start the workflow and kill it after some seconds, unless it has ended before."""
    workflow = place.start("all", stderr=subprocess.DEVNULL)
    time.sleep(after)
    workflow.kill()
    return workflow.wait() == -signal.SIGKILL


def finish(place: Project, expected: Project) -> None:
    done = place.snakemake("all")
    assert done.returncode == 0, done.stderr
    assert_same(place, expected)
    assert list(place.smoke.glob("runs/*/.state")) == []
    assert list(place.smoke.glob("runs/*/.eval_state")) == []
    assert list(place.smoke.rglob(".tmp-*")) == []


def test_one_of_two_workflows_at_once_proceeds(undisturbed, tmp_path, trials) -> None:
    expected, _ = undisturbed
    for number in trials("workflow: two at once", 0, 3):
        place = Project(expected.folder, tmp_path / str(number))
        both = [place.start("all"), place.start("all")]
        said = [workflow.communicate()[1] for workflow in both]
        codes = [workflow.returncode for workflow in both]
        assert sorted(codes) == [0, 1], said
        refused = codes.index(1)
        [line] = [line for line in said[refused].splitlines() if line.startswith(str(place.smoke))]
        other = both[1 - refused].pid
        assert line.startswith(f"{place.smoke}: is being made by process {other} on ")
        assert line.endswith("; wait for it, or end it")
        assert_same(place, expected)


def test_a_workflow_waits_for_the_running_job_of_a_killed_one(undisturbed, tmp_path) -> None:
    """Its work is not done twice."""
    expected, _ = undisturbed
    place = Project(expected.folder, tmp_path / "results")
    run = RunDir(place.smoke / "runs" / "tafs_grpo.preference.shapes-flux.0")
    workflow = place.start("all", stderr=subprocess.DEVNULL)
    while not (run.state / "journal.jsonl").exists():
        assert workflow.poll() is None
        time.sleep(0.05)
    job = json.loads((run.folder / ".locks" / "train").read_bytes())["pid"]
    os.kill(job, signal.SIGSTOP)
    try:
        workflow.kill()
        assert workflow.wait() == -signal.SIGKILL
        second = place.start("all")
        log = place.smoke / "logs" / "train" / f"{run.folder.name}.log"
        # Snakemake deletes the log before it starts the job again.
        while not log.exists() or f"process {job} on " not in log.read_text(encoding="utf-8"):
            assert second.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(job, signal.SIGCONT)
    said = second.communicate()[1]
    assert second.returncode == 0, said
    assert_same(place, expected)
    kinds = [record["kind"] for record in journal.read(run.journal)]
    assert kinds.count("iteration") == ITERATIONS
    # Training again after the end loads the state and does nothing.
    assert kinds[-2:] == ["resume", "end"]
