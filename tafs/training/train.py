"""The one training loop: `python -m tafs.training.train RUN_DIR` trains what RUN_DIR/run.json describes.

Writes adapter.safetensors, journal.jsonl and, after the iterations that run.json names, snapshots/.
Until then all of it and the resume state live in RUN_DIR/.state, which outlives a kill and is
refused when the run's fingerprint has changed. It is deleted when the run is evaluated and not
before: a workflow that was killed before it heard of a training's end calls for that training
again, which then has nothing left to do. All randomness comes from streams of (seed, name,
iteration), so a resumed run draws what an undisturbed one draws.

`torchrun --standalone --nproc-per-node=8 -m tafs.training.train RUN_DIR` trains the same run on eight GPUs,
and either command continues what the other began. Each process takes an equal part of the groups of
every optimiser step. Prompts and start noise are drawn for the whole iteration, the steps' noise
for each micro-batch by the place of its first image in the iteration; so where `micro_batch`
divides a process's images of a step, the draws do not depend on the number of processes, and what
is trained depends on it by the rounding of sums alone. The first process writes all files, and all
processes read the resume state: RUN_DIR must be on a file system that they share.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from tafs.common import errors
from tafs.common.files import sha256
from tafs.runtime import checkpoint, distributed, run_dir
from tafs.runtime import main as main_
from tafs.runtime.deadline import Deadline
from tafs.runtime.distributed import Processes
from tafs.training.recorder import RunRecorder
from tafs.training.trainer import trainer_of


def train(run: run_dir.RunDir, processes: Processes = distributed.ALONE) -> None:
    """Train a run from its newest usable state to its adapter, in each of its processes."""
    trainer = trainer_of(run.description, processes)
    fingerprint = run.fingerprint()
    state = checkpoint.load(run.checkpoints, fingerprint, partial(_missing_snapshot, run))
    done = 0 if state is None else state.iteration
    found = processes.all_gather(torch.tensor([done]), dim=0).tolist()
    if len(set(found)) > 1:
        raise errors.RunFailed(
            f"{run.checkpoints}: the processes found states of different iterations ({found}, in "
            f"order of rank); put the run on a file system that they share"
        )
    if state is not None:
        trainer.restore(state)
    keeper = RunRecorder(run, trainer, fingerprint, state) if processes.leads else None
    with Deadline.from_environment() as deadline:
        for iteration in range(done, trainer.iterations):
            record = trainer.iterate(iteration)
            if keeper is not None:
                keeper.keep(record)
            deadline.tick()
            done = iteration + 1
            if processes.any(bool(deadline.expired)) and done < trainer.iterations:
                reason = deadline.expired or "another process was asked to stop"
                line = "" if keeper is None else keeper.pause(done, reason)
                # torchrun ends the others soon after the first: not before the state is saved.
                processes.any(False)
                if keeper is None:
                    sys.exit(errors.CONTINUE)
                raise errors.ToBeContinued(line)
        if keeper is not None:
            keeper.finish()


def _missing_snapshot(run: run_dir.RunDir, state: checkpoint.State) -> str:
    """Which snapshot that was taken before a state is not as it was written; "" if all are."""
    for name, digest in state.values["snapshots"].items():
        kept = run.state / "snapshots" / name
        if not kept.is_file() or sha256(kept) != digest:
            return f"snapshot {name} is damaged"
    return ""


def train_together(run: run_dir.RunDir) -> None:
    """`train` in this process and in those that torchrun started beside it."""
    with distributed.connected(run.description["settings"]["device"]) as processes:
        train(run, processes)


def main() -> None:
    main_.run_stage("train", train_together)


if __name__ == "__main__":
    main()
