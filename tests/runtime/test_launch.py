"""Starting the processes of a training, and finding the failure that ended them."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tafs.common import errors
from tafs.runtime import launch


def test_several_machines_start_one_launcher_each_and_meet_on_the_first(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    found = launch.on_machines(16, 2, "node-3", ["runs/x", "--minutes=5"])
    assert found == [
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"),
        *(sys.executable, "-m", "tafs.runtime.launch", "runs/x", "--minutes=5"),
        *("--processes=16", "--nodes=2", "--meet=node-3:29517"),
    ]


def test_several_machines_without_slurm_are_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(errors.RunFailed, match="only in a Slurm job; set the scale's nodes to 1"):
        launch.first_machine()


@pytest.mark.parametrize("given", ["--processes=0", "--nodes=2", "--processes=3 --nodes=2"])
def test_processes_that_machines_cannot_share_are_refused(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "runs/x", *given.split()])
    with pytest.raises(SystemExit, match="^2$"):
        launch.main()
    message = "--processes must be a positive multiple of --nodes\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        # A lost peer is never the cause, even where its time is earlier.
        ({0: (1, "PeerLost: another process has ended"), 1: (1, "NonFinite: nan")}, "1: nan"),
        ({0: (1, "PeerLost: another process has ended"), 1: (-9, "")}, "1: ended by SIGKILL"),
        ({0: (1, "PeerLost: another process has ended")}, "0: another process has ended"),
        # Nor is a process that the agent has ended.
        ({0: (-signal.SIGTERM, ""), 1: (7, "")}, "1: ended with exit code 7"),
        ({0: (1, "OSError: disk full"), 1: (1, "PeerLost: ended")}, "0: OSError: disk full"),
        ({0: (2, "ValueError: seed: wrong")}, "0: seed: wrong"),
    ],
)
def test_the_cause_of_a_failure_is_named(processes, expected, tmp_path):
    failures = {}
    for rank, (code, message) in processes.items():
        file = tmp_path / f"{rank}.json"
        if message:
            extra = {"extraInfo": {"py_callstack": "", "timestamp": str(100 + rank)}}
            file.write_text(json.dumps({"message": {"message": message, **extra}}))
        failures[rank] = ProcessFailure(rank, 4000 + rank, code, str(file))
    error = launch.cause(failures)
    assert str(error) == f"process {expected}"
    assert errors.exit_code(error) == (2 if "seed" in expected else 1)
