"""Jobs on one machine use different GPUs and release them when they end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLAIM = """
import os, sys, time
from tafs.common import errors
from tafs.runtime import gpus

errors.run_cli("claim", lambda: gpus.claim(int(sys.argv[1])))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
time.sleep(600)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a job that claims GPUs of a machine with three and prints them."""
    started = []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "0,3,GPU-7f", "TMPDIR": str(tmp_path)}
    environment |= {"PYTHONPATH": str(ROOT)}

    def job(count: int, **changes: str | None) -> subprocess.Popen[str]:
        changed = {**environment, **changes}
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(count)],
            env={name: value for name, value in changed.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield job
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout
    return process.stdout.readline().strip().split(",")


def refused(process: subprocess.Popen[str]) -> str:
    assert process.wait() == 1
    assert process.stderr
    [line] = process.stderr.read().splitlines()
    return line.removeprefix("claim: ")


def test_jobs_use_different_gpus_and_wait_for_free_ones(start: Start) -> None:
    first, second = start(2), start(1)
    assert sorted(said(first) + said(second)) == ["0", "3", "GPU-7f"]
    waiting = start(2)
    assert waiting.stderr
    assert waiting.stderr.readline() == "waits until 2 of 3 GPUs are free\n"
    first.kill()
    first.wait()
    assert len(said(waiting)) == 2


def test_slurm_jobs_do_not_share_locks_and_the_jobs_inside_one_do(start: Start) -> None:
    """Slurm numbers the GPUs of every job from 0."""
    assert said(start(3)) == said(start(3, SLURM_JOB_ID="17")) == ["0", "3", "GPU-7f"]
    inside = [said(start(n, SLURM_JOB_ID="18")) for n in (1, 2)]
    assert sorted(sum(inside, [])) == ["0", "3", "GPU-7f"]


@pytest.mark.parametrize(
    ("visible", "shown"), [("0,3,GPU-7f", 3), ("", 0), ("MIG-GPU-5c/7/0", 1), ("0, 1,", 2)]
)
def test_a_machine_with_too_few_gpus_is_refused(start: Start, visible: str, shown: int) -> None:
    line = refused(start(4, CUDA_VISIBLE_DEVICES=visible))
    assert line == f"the job needs 4 GPUs, and this machine shows {shown}"


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ("0,0", "CUDA_VISIBLE_DEVICES: '0,0' is not a list of different GPUs; give their numbers"),
        (
            "../x",
            "CUDA_VISIBLE_DEVICES: '../x' is not a list of different GPUs; give their numbers",
        ),
        (None, "this machine's GPUs cannot be counted: "),
    ],
)
def test_a_wrong_list_of_gpus_is_refused(start: Start, tmp_path: Path, visible, message) -> None:
    line = refused(start(1, CUDA_VISIBLE_DEVICES=visible, PATH=str(tmp_path)))
    assert line.startswith(message)


@pytest.mark.parametrize("kind", ["link", "writable"])
def test_a_lock_folder_of_another_user_is_refused(start: Start, tmp_path: Path, kind: str) -> None:
    """Links in such a folder would make jobs write over this user's files."""
    locks, theirs = tmp_path / f"tafs-gpus-{os.getuid()}", tmp_path / "theirs"
    theirs.mkdir()
    if kind == "link":
        locks.symlink_to(theirs)
    else:
        locks.mkdir()
        locks.chmod(0o777)
    line = f"{locks}: is not this user's own folder; delete it, or set TMPDIR"
    assert refused(start(1)) == line
    assert list(theirs.iterdir()) == []
