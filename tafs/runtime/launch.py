"""Starts a training in as many processes as the scale says: `python -m tafs.runtime.launch RUN_DIR`.

TAFS_PROCESSES (1 by default) of them on TAFS_NODES machines, which Slurm has to have given to the
job. The workflow takes both from config.yaml; they are no part of a run, which may go on with
others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tafs.common import errors
from tafs.common.env import whole_number
from tafs.runtime import gpus
from tafs.runtime import run_dir as rundir

PORT = 29500  # the first of those where torchrun's processes meet, on the job's first machine
PORTS = 1000  # jobs with the same first machine have different ones


def command(run_dir: str, processes: int, nodes: int, first: str = "") -> list[str]:
    """The command that trains; `first` is the job's first machine, where there are several."""
    python = [sys.executable, "-m"]
    if processes == 1:
        return [*python, "tafs.training.train", run_dir]
    torchrun = [*python, "torch.distributed.run", f"--nnodes={nodes}"]
    torchrun.append(f"--nproc-per-node={processes // nodes}")
    if nodes == 1:
        return [*torchrun, "--standalone", "-m", "tafs.training.train", run_dir]
    job = os.environ.get("SLURM_JOB_ID", "0")
    meeting = [f"--rdzv-id={job}", "--rdzv-backend=c10d"]
    meeting.append(f"--rdzv-endpoint={first}:{PORT + int(job) % PORTS}")
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    return [*srun, *torchrun, *meeting, "-m", "tafs.training.train", run_dir]


def first_machine() -> str:
    """Of this Slurm job; Snakemake's job step hides Slurm's list of them.

    Raises:
        RunFailed: this is no Slurm job, or Slurm does not answer.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    try:
        nodes = _answer("squeue", "--noheader", "--jobs", job, "--format", "%N")
        return _answer("scontrol", "show", "hostnames", nodes).splitlines()[0]
    except (OSError, IndexError, subprocess.CalledProcessError):
        raise errors.RunFailed(
            "several nodes train a run only in a Slurm job; set the scale's nodes to 1"
        ) from None


def _answer(*question: str) -> str:
    return subprocess.run(question, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    if len(sys.argv) != 2:
        print("usage: python -m tafs.runtime.launch RUN_DIR", file=sys.stderr)
        sys.exit(2)

    run = rundir.RunDir(Path(sys.argv[1]))

    def work() -> None:
        names = ("TAFS_PROCESSES", "TAFS_NODES")
        processes, nodes = (whole_number(name, "the workflow sets it", "1", 1) for name in names)
        started = command(sys.argv[1], processes, nodes, first_machine() if nodes > 1 else "")
        # The first process takes the lock for itself; here, so that the others, which would give
        # up waiting for it, start when it is free.
        with run.alone("train"):
            pass
        if run.description["settings"]["device"] == "cuda":
            gpus.claim(processes // nodes)
        os.execvp(started[0], started)

    errors.run_cli(
        f"train {run.folder}", work, lambda code, line: run.note_failure("train", code, line)
    )


if __name__ == "__main__":
    main()
