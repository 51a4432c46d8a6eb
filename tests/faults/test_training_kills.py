"""A training that is killed continues to bit-identical files."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.killable_training import (
    assert_same_training,
    iterations,
    prepare,
    trained,
    training,
    wait_for,
)

from tafs.common import errors
from tafs.runtime.run_dir import RunDir

ITERATIONS = 20
SHORT = 6
# Two processes draw the same prompts as one, and take as many steps.
SHARED = {"prompts_per_iteration": 8, "group_size": 2, "micro_batch": 2}


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[RunDir, float]:
    """A short run, and how many seconds it takes."""
    start = time.monotonic()
    run = trained(prepare(tmp_path_factory.mktemp("short") / "run", SHORT, checkpoint_every=2))
    return run, time.monotonic() - start


def test_a_training_killed_at_a_random_point_ends_bit_identical(short, tmp_path, trials) -> None:
    expected, seconds = short
    draw = random.Random(5)
    for number in trials("training: kill -9 at a random point", 1, 20):
        delay = draw.uniform(0.0, seconds)
        for attempt in itertools.count():
            run = prepare(tmp_path / f"{number}-{attempt}", SHORT, checkpoint_every=2)
            [process] = training(run)
            time.sleep(delay)
            process.kill()
            if process.wait() == -signal.SIGKILL:
                break
            delay *= 0.8  # it had already ended
        assert_same_training(trained(run), expected)


@pytest.mark.parametrize(("processes", "name"), [(1, "one process"), (2, "two processes")])
def test_a_training_killed_at_every_step_ends_bit_identical(
    processes, name, tmp_path, trials
) -> None:
    run = prepare(tmp_path / "run", ITERATIONS, **SHARED)
    expected = None
    for step in trials(f"training: kill -9 at every step of 20, {name}", 0, ITERATIONS - 1):
        started = training(run, processes)
        wait_for(run, step + 1, started[0])
        # Kill the processes in turn; the others end by themselves.
        started[step % processes].kill()
        for process in started:
            assert process.wait() != 0
        assert iterations(run) >= step + 1
        if expected is None:
            expected = trained(prepare(tmp_path / "expected", ITERATIONS, **SHARED), processes)
        # Continue a copy after each kill, because the next one would hide its damage.
        whole = shutil.copytree(run.folder, tmp_path / f"after {step}")
        assert_same_training(trained(RunDir(Path(whole)), processes), expected)


def test_two_processes_near_their_time_limit_stop_together_and_continue(tmp_path) -> None:
    run = prepare(tmp_path / "run", 2, **SHARED)
    spent = ["--minutes=1", f"--started={int(time.time()) - 60}"]
    started = training(run, 2, spent)
    assert [process.wait() for process in started] == [errors.CONTINUE] * 2
    assert "saved after 1 of 2 iterations, to be continued: the time limit" in started[0].said
    assert "continued" not in started[1].said  # one of them prints it
    expected = trained(prepare(tmp_path / "expected", 2, **SHARED), 2)
    assert_same_training(trained(run, 2), expected)
