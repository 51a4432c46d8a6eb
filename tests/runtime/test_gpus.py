"""Jobs of one machine take different GPUs, and give them back by ending."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLAIM = """
import os, sys, time
from tafs import failures, gpus

def work():
    gpus.claim(int(sys.argv[1]))

failures.run_cli("claim", work)
say = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(600)"
os.execv(sys.executable, [sys.executable, "-c", say])
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Three GPUs, by number and by name, and no Slurm."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TAFS_"))}
    known = {"CUDA_VISIBLE_DEVICES": "0,3,GPU-7f"}
    return {**kept, **known, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def start(environment):
    """Starts a job that claims GPUs, becomes another program and says which it has."""
    started = []

    def job(count: int, **changes: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(count)],
            env={**environment, **changes},
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


def said(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


def test_jobs_take_different_gpus_and_a_killed_ones_are_free_again(start):
    first, second = start(2), start(1)
    taken = said(first).split(",") + said(second).split(",")
    assert sorted(taken) == ["0", "3", "GPU-7f"]
    waiting = start(2)
    first.kill()
    first.wait()
    assert len(said(waiting).split(",")) == 2


def test_what_slurm_or_the_jobs_launcher_has_given_stays(start):
    assert said(start(1, SLURM_JOB_ID="17")) == "0,3,GPU-7f"
    assert said(start(3)) == said(start(3, TAFS_CLAIMED="1")) == "0,3,GPU-7f"


def test_jobs_of_a_workflow_inside_a_slurm_job_share_what_it_has(start):
    inside = {"SLURM_JOB_ID": "17", "TAFS_SHARED": "1"}
    assert sorted([said(start(1, **inside)), *said(start(2, **inside)).split(",")]) == [
        *("0", "3", "GPU-7f")
    ]


def test_a_machine_with_fewer_gpus_is_one_line(start):
    process = start(4)
    assert process.wait() == 1
    assert process.stderr.read() == "claim: the job needs 4 GPUs, and this machine shows 3\n"


def test_a_machine_that_cannot_count_its_gpus_is_one_line(start, tmp_path, environment):
    del environment["CUDA_VISIBLE_DEVICES"]
    process = start(1, PATH=str(tmp_path))
    assert process.wait() == 1
    [line] = process.stderr.read().splitlines()
    assert line.startswith("claim: this machine's GPUs cannot be counted: ")


@pytest.mark.parametrize("kind", ["link", "writable"])
def test_a_folder_that_others_may_have_made_is_refused(start, tmp_path, kind):
    """Whoever puts links in it would have this user's jobs write over this user's files."""
    locks = tmp_path / f"tafs-gpus-{os.getuid()}"
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    if kind == "link":
        locks.symlink_to(theirs)
    else:
        locks.mkdir()
        locks.chmod(0o777)
    process = start(1)
    assert process.wait() == 1
    assert process.stderr.read() == (
        f"claim: {locks}: is not this user's own folder; delete it, or set TMPDIR\n"
    )
    assert list(theirs.iterdir()) == []
