"""The state of a run from its files, with locks that are held."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.finished import finish, finish_all

from tafs.common import errors
from tafs.orchestration import graph as graphs
from tafs.orchestration import status
from tafs.orchestration.graph import Graph, Job
from tafs.orchestration.status import State
from tafs.runtime.journal import Journal
from tafs.runtime.run_dir import STAGES, RunDir

ROOT = Path(__file__).resolve().parents[2]
TAFS, FLOW = "tafs_grpo.preference.shapes-flux.0", "flow_grpo.preference.shapes-flux.0"
BASE = "base.shapes.shapes-flux"
NOW = 10_000.0


@pytest.fixture(scope="module")
def smoke() -> Graph:
    return graphs.read({"scale": "smoke"}, ROOT / "config.yaml")


@pytest.fixture
def graph(smoke, tmp_path) -> Graph:
    moved = smoke.plan.config.model_copy(update={"results": str(tmp_path)})
    return Graph(dataclasses.replace(smoke.plan, config=moved))


def folder_of(graph: Graph, name: str) -> Path:
    folder = Path(graph.folder(name))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def look(graph: Graph, name: str = TAFS, now: float = NOW) -> State:
    return next(state for state in status.look(graph, now) if state.run == name)


def iterated(file: Path, *seconds: float, end: float = NOW - 10) -> None:
    """A journal whose last iteration ended at `end`."""
    for number, total in enumerate(seconds):
        time = end - sum(seconds[number + 1 :])
        rewards = {"clip": [50.0, 60.0 + number], "pickscore": [14.0, None]}
        fields = {"seconds": {"total": total}, "rewards": rewards, "time": time}
        Journal(file).append("iteration", iteration=number, **fields)


def lock(folder: Path, stage: str, **facts) -> Path:
    file = RunDir(folder).lock(stage)
    file.parent.mkdir(exist_ok=True)
    known = {"pid": 123, "host": "node3", "job": "", "since": NOW - 60}
    file.write_text(json.dumps({**known, **facts}))
    return file


@contextmanager
def working(folder: Path, stage: str, **facts) -> Iterator[None]:
    """The stage's lock is held inside."""
    with lock(folder, stage, **facts).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def failed(folder: Path, stage: str, **facts) -> None:
    file = RunDir(folder).failure(stage)
    file.parent.mkdir(exist_ok=True)
    known = {"stage": stage, "exit": 1, "message": "the loss is nan", "time": NOW - 5}
    file.write_text(json.dumps({**known, "seen": False, **facts}))


def reported(folder: Path, stage: str, **facts) -> None:
    file = folder / ".progress" / f"{stage}.json"
    file.parent.mkdir(exist_ok=True)
    known = {"total": 40, "done": 10, "first": 0, "started": NOW - 120, "updated": NOW - 20}
    file.write_text(json.dumps({"stage": stage, "run": folder.name, "note": "", **known, **facts}))


def test_a_run_without_files_is_waiting(graph):
    found = look(graph)
    assert found == State(TAFS, "waiting", (0, 2), "", None, None, None, "", "", (0, 2))
    assert look(graph, BASE).iterations is None


def test_a_run_whose_training_is_locked_is_training(graph):
    folder = folder_of(graph, TAFS)
    iterated(folder / ".state" / "journal.jsonl", 8.0)
    with working(folder, "train"):
        found = look(graph)
    reward, beat = "clip 60  pickscore -", NOW - 10
    expected = State(TAFS, "training", (1, 2), reward, 8.0, 8.0, beat, "node3:123", "", (0, 2))
    assert found == expected


def test_the_pace_is_the_median_of_the_last_iterations(graph):
    folder = folder_of(graph, TAFS)
    iterated(folder / ".state" / "journal.jsonl", 500.0, 9.0, 1.0, 2.0, 3.0, 4.0)
    with working(folder, "train"):
        assert look(graph).pace == 3.0


def test_a_released_lock_is_not_a_sign_of_life(graph):
    folder = folder_of(graph, TAFS)
    iterated(folder / ".state" / "journal.jsonl", 8.0)
    lock(folder, "train")
    assert look(graph).note == ""  # released by a launcher for its process
    lock(folder, "train", since=NOW - 600)
    found = look(graph)
    assert (found.state, found.where) == ("waiting", "")
    assert found.note == "train: its process has ended; start it again to continue"
    with RunDir(folder).lock("train").open("r+") as opened:  # reading it has not kept it
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_trained_run_is_evaluated_and_then_done(graph):
    folder = folder_of(graph, TAFS)
    iterated(folder / "journal.jsonl", 8.0, 8.0)
    finish(graph, Job("train", TAFS))
    assert (look(graph).state, look(graph).stages) == ("trained", (1, 2))
    reported(folder, "evaluate")
    with working(folder, "evaluate"):
        found = look(graph)
    # 10 of 40 steps took 100 s; the other 30 take 300 s, 20 s of which have passed.
    assert (found.state, found.left) == ("evaluating", 280.0)
    finish(graph, Job("evaluate", TAFS))
    assert (look(graph).state, look(graph).stages) == ("done", (2, 2))


@pytest.mark.parametrize(
    "scale, name, stage, state, stages",
    [
        ("smoke", TAFS, "train", "training", (1, 2)),  # although its files exist
        ("smoke", BASE, "trajectory_rewards", "scoring trajectories", (1, 2)),
        ("paper", "tafs_grpo.preference.flux-dev.0", "score_served", "scoring (server)", (2, 3)),
    ],
)
def test_a_run_is_in_the_stage_that_is_locked(tmp_path, scale, name, stage, state, stages):
    graph = graphs.read({"scale": scale, "results": str(tmp_path)}, ROOT / "config.yaml")
    folder = folder_of(graph, name)
    if name != BASE:
        (folder / "journal.jsonl").touch()
        finish(graph, Job("train", name))
    finish(graph, Job("evaluate", name))
    (folder / "images.json").touch()
    with working(folder, stage):
        found = look(graph, name)
    assert (found.state, found.stages) == (state, stages)


def test_a_failure_is_shown_until_the_stage_continues(graph):
    folder = folder_of(graph, TAFS)
    iterated(folder / ".state" / "journal.jsonl", 8.0)
    lock(folder, "train")
    failed(folder, "train")
    found = look(graph)
    assert (found.state, found.note) == ("failed", "train: the loss is nan (5 s ago)")
    with working(folder, "train", since=NOW - 1):
        assert look(graph).state == "training"
    iterated(folder / ".state" / "journal.jsonl", 8.0, end=NOW - 1)
    assert look(graph).state == "waiting"


@pytest.mark.parametrize(
    "code, state",
    [(1, "failed"), (errors.BAD_INPUT, "failed"), (errors.CONTINUE, "to be continued")],
)
def test_a_stage_that_saved_its_state_is_to_be_continued(graph, code, state):
    """The failure is the latest event although it is recorded in whole seconds."""
    folder = folder_of(graph, TAFS)
    iterated(folder / ".state" / "journal.jsonl", 8.0, end=NOW - 4.5)
    failed(folder, "train", exit=code, message="time limit", time=int(NOW - 5))
    found = look(graph)
    assert (found.state, found.note) == (state, "train: time limit (5 s ago)")


@pytest.mark.parametrize(
    "pace, silent, state",
    [
        *[(8.0, 899, "training"), (8.0, 901, "stalled")],
        *[(200.0, 1999, "training"), (200.0, 2001, "stalled")],
    ],
)
def test_a_run_that_is_silent_for_much_longer_than_its_pace_has_stalled(graph, pace, silent, state):
    folder = folder_of(graph, TAFS)
    iterated(folder / ".state" / "journal.jsonl", pace, end=NOW)
    with working(folder, "train", since=NOW - 1):
        assert look(graph, now=NOW + silent).state == state
    with working(folder, "train", since=NOW + silent - 5):  # a process that has just started
        assert look(graph, now=NOW + silent).state == "training"


INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.mark.parametrize(
    "answer, state",
    [("echo RUNNING", "training"), ("true", "lost"), (INVALID, "lost")]
    + [("echo 'Unable to contact slurm controller' >&2; exit 1", "training")],
)
def test_a_run_whose_slurm_job_is_gone_is_lost(graph, tmp_path, monkeypatch, answer, state):
    squeue = tmp_path / "squeue"
    asked = "--noheader --jobs=77 --format=%T"
    squeue.write_text(f'#!/bin/sh\n[ "$*" = "{asked}" ] || exit 9\n{answer}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    folder = folder_of(graph, TAFS)
    with working(folder, "train", job="77"):
        found = look(graph)
    assert (found.state, found.where) == (state, "node3:123 Slurm 77")
    assert found.note == (status.LOST if state == "lost" else "")
    # The locks of a node that fails are released.
    assert look(graph).state == ("lost" if state == "lost" else "waiting")
    failed(folder, "train")
    assert look(graph).state == "failed"


def test_without_squeue_no_run_is_lost(graph, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with working(folder_of(graph, TAFS), "train", job="77"):
        assert look(graph).state == "training"


def test_files_that_are_being_written_are_ignored(graph):
    folder = folder_of(graph, TAFS)
    reported(folder, "train")
    for file in (lock(folder, "train"), folder / ".progress" / "train.json"):
        file.write_text("{")
    assert look(graph).state == "waiting"


def test_time_left_is_that_of_all_trainings_divided_by_those_that_run():
    """3 x 2 s, 4 x 6 s, and 5 x 2 s of a run at its method's pace; two at a time."""

    def state(name: str, done: int, total: int, pace: float | None) -> State:
        return State(name, name, (done, total), "", pace, None, None, "", "", (0, 2))

    states = [
        state("training", 2, 5, 2.0),
        state("training", 1, 5, 6.0),
        state("waiting", 0, 5, None),
        State("done", "done", None, "", None, None, None, "", "", (2, 2)),
    ]
    assert status.training_left(states, ["a", "b", "a", "base"]) == (6 + 24 + 10) / 2
    assert status.training_left(states[2:], ["a", "base"]) is None


def test_the_exit_code_is_1_if_a_run_has_failed(graph, capsys):
    folder = folder_of(graph, TAFS)
    assert status.show(graph) == 0
    failed(folder, "train")
    iterated(folder_of(graph, FLOW) / "journal.jsonl", 1.0, 1.0)
    finish(graph, Job("train", FLOW))
    finish(graph, Job("evaluate", FLOW))
    capsys.readouterr()
    assert status.show(graph) == 1
    first, blank, head, run, *_ = capsys.readouterr().out.splitlines()
    assert first == "scale smoke: 1 failed, 5 waiting, 1 done; 2 of 14 jobs done"
    assert (blank, head.split()[:3]) == ("", ["run", "state", "iteration"])
    assert run.split()[:3] == [TAFS, "failed", "0/2"]
    assert "train: the loss is nan" in run


def test_the_table_is_printed_again_until_all_runs_are_done(graph, capsys):
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        for name in graph.plan.runs:
            (folder_of(graph, name) / "journal.jsonl").touch()
        finish_all(graph, STAGES)

    assert status.show(graph, 7.0, wait) == 0
    assert waits == [7.0]
    assert "7 done; 14 of 14 jobs done" in capsys.readouterr().out
