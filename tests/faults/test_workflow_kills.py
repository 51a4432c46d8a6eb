"""kill -9 of snakemake: the same command goes on, and two of them do not meet."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import time

import pytest
from support.project_copy import Workplace, assert_same, reduced

from tafs.runtime import journal

ITERATIONS = 8


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Workplace, float]:
    """A finished workflow, and how many seconds it took."""
    place = reduced(tmp_path_factory.mktemp("project"), ITERATIONS)
    start = time.monotonic()
    done = place.snakemake("all")
    assert done.returncode == 0, done.stderr
    return place, time.monotonic() - start


def test_a_workflow_that_is_killed_is_continued_by_the_same_command(
    undisturbed, tmp_path, trials
) -> None:
    """Its jobs are left behind and go on; those of the next call wait for them."""
    expected, seconds = undisturbed
    places = (Workplace(expected.folder, tmp_path / str(n)) for n in itertools.count())
    place, kills = next(places), 0
    draw = random.Random(11)
    for _ in trials("workflow: kill -9 of snakemake at a random point", 1, 20):
        while not killed(place, draw.uniform(1.0, seconds / 2)):
            finish(place, expected)  # there was little left to do
            place, kills = next(places), 0
        kills += 1
        if kills == 4:  # or the later ones would find everything done
            finish(place, expected)
            place, kills = next(places), 0
    if kills:
        finish(place, expected)


def killed(place: Workplace, after: float) -> bool:
    """Start the workflow, and kill it after so many seconds if it has not ended before."""
    workflow = place.start("all", stderr=subprocess.DEVNULL)
    time.sleep(after)
    workflow.kill()
    return workflow.wait() == -signal.SIGKILL


def finish(place: Workplace, expected: Workplace) -> None:
    done = place.snakemake("all")
    assert done.returncode == 0, done.stderr
    assert_same(place, expected)
    assert list(place.smoke.glob("runs/*/.state")) == []
    assert list(place.smoke.glob("runs/*/.judged")) == []
    assert list(place.smoke.rglob(".tmp-*")) == []


def test_of_two_workflows_at_once_exactly_one_proceeds(undisturbed, tmp_path, trials) -> None:
    expected, _ = undisturbed
    for number in trials("workflow: two at once", 0, 3):
        place = Workplace(expected.folder, tmp_path / str(number))
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


def test_a_workflow_takes_up_what_another_ones_job_is_doing(undisturbed, tmp_path) -> None:
    """The job that the first call has left is waited for, and its work is not done twice."""
    expected, _ = undisturbed
    place = Workplace(expected.folder, tmp_path / "results")
    state = place.smoke / "runs" / "tafs_grpo.preference.shapes-flux.0" / ".state"
    workflow = place.start("all", stderr=subprocess.DEVNULL)
    while not (state / "journal.jsonl").exists():
        assert workflow.poll() is None
        time.sleep(0.05)
    workflow.kill()
    assert workflow.wait() == -signal.SIGKILL
    finish(place, expected)
    kinds = [record["kind"] for record in journal.read(state.parent / "journal.jsonl")]
    assert kinds.count("iteration") == ITERATIONS
    # A finished one that is called again takes its state up and does nothing.
    assert kinds[-2:] == ["resume", "end"]
