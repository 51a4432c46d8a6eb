"""How a training's processes are started."""

import subprocess
import sys

import pytest

from tafs.common import errors
from tafs.runtime import launch


def test_one_process_needs_no_launcher():
    assert launch.command("runs/x", 1, 1) == [sys.executable, "-m", "tafs.training.train", "runs/x"]


def test_several_processes_are_started_by_torchrun():
    found = launch.command("runs/x", 8, 1)
    assert found[1:5] == ["-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=8"]
    assert found[5:] == ["--standalone", "-m", "tafs.training.train", "runs/x"]


def test_several_machines_get_one_torchrun_each_and_meet_on_the_first(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    found = launch.command("runs/x", 16, 2, "node-3")
    assert found[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert "--nproc-per-node=8" in found
    assert {"--rdzv-id=17", "--rdzv-backend=c10d", "--rdzv-endpoint=node-3:29517"} < set(found)


def test_several_machines_without_slurm_are_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(errors.RunFailed, match="only in a Slurm job; set the scale's nodes to 1"):
        launch.first_machine()


@pytest.mark.parametrize("given", ["0", "-1", "two", ""])
def test_what_are_no_processes_is_one_line_and_exit_code_2(given):
    done = subprocess.run(
        [sys.executable, "-m", "tafs.runtime.launch", "runs/x"],
        env={"TAFS_PROCESSES": given},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"train runs/x: TAFS_PROCESSES: {given!r} is no whole number from 1; the workflow sets it\n"
    )
