"""The training loop: `python -m tafs.training.train RUN_DIR` trains the run of RUN_DIR/run.json.

It writes adapter.safetensors, journal.jsonl and snapshots/, which holds the adapter after the
iterations that run.json lists. During training, all of them and the resume state are in
RUN_DIR/.state, which survives a kill and is ignored if what it depends on has changed. The
evaluation deletes that folder, so that a training that Snakemake repeats finds nothing left to do.
All randomness comes from streams of (seed, name, iteration), so a resumed run draws the same
numbers as an uninterrupted one.

`torchrun --standalone --nproc-per-node=8 -m tafs.training.train RUN_DIR` trains the same run on
eight GPUs, and either command continues what the other started. Each process has an equal share of
the groups of every optimiser step. Prompts are drawn for the whole iteration, and the noise of each
image from streams named after its index in the iteration, so that neither the number of processes
nor the micro-batch changes a draw: the adapter depends on them only through rounding. The first
process writes all files, and all processes read the resume state, so RUN_DIR must be on a file
system that they share.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from tafs.common import errors
from tafs.common.files import sha256
from tafs.experiment import needs, run_inputs
from tafs.experiment.specs import RunSpec
from tafs.runtime import checkpoint, distributed, memory
from tafs.runtime.deadline import Deadline
from tafs.runtime.distributed import Processes
from tafs.runtime.main import run_stage
from tafs.runtime.run_dir import RunDir
from tafs.training.recorder import RunRecorder
from tafs.training.trainer import trainer_of


def train(
    run: RunDir, processes: Processes = distributed.ALONE, deadline: Deadline | None = None
) -> None:
    """Train a run from its newest usable state to its adapter, in each of its processes.

    Raises:
        NonFinite: too many rewards are missing, or another number is not finite.
        RunFailed: the processes do not see the same resume state.
        ToBeContinued: the job's time is nearly over, or a signal asked it to stop; the state is
            saved. The other processes exit with the same code instead. Or the GPU's memory did not
            suffice; training continues from the last saved state with smaller micro-batches.
        FileNotFoundError, ValueError: run.json or what it names is missing or wrong.
    """
    spec = run_inputs.run_spec(run)
    alike = f"{spec.variant}.{spec.task}.{spec.backbone}"
    settings = spec.model_dump(mode="json", include={"assets", "training", "resolution"})
    with memory.fitting(run, "train", spec.batch, alike, settings) as batch:
        _train(run, spec.with_batch(batch), processes, deadline or Deadline())


def _train(run: RunDir, spec: RunSpec, processes: Processes, deadline: Deadline) -> None:
    trainer = trainer_of(spec, processes)
    own = needs.training(spec)
    state = checkpoint.load(run.checkpoints, own, partial(_missing_snapshot, run))
    done = 0 if state is None else state.iteration
    found = processes.all_gather(torch.tensor([done]), dim=0).tolist()
    if len(set(found)) > 1:
        raise errors.RunFailed(
            f"{run.checkpoints}: the processes found states of different iterations ({found}, by "
            "rank); put the run on a file system that they share"
        )
    if state is not None:
        trainer.restore(state)
    recorder = RunRecorder(run, trainer, own, state) if processes.leads else None
    with deadline:
        for iteration in range(done, trainer.iterations):
            record = trainer.iterate(iteration)
            if recorder is not None:
                recorder.keep(record)
            deadline.tick()
            done = iteration + 1
            if processes.any(bool(deadline.expired)) and done < trainer.iterations:
                reason = deadline.expired or "another process was asked to stop"
                line = "" if recorder is None else recorder.pause(done, reason)
                # The launcher ends all processes after the first exit, so wait for the save.
                processes.any(False)
                if recorder is None:
                    sys.exit(errors.CONTINUE)
                raise errors.ToBeContinued(line)
        if recorder is not None:
            recorder.finish()


def _missing_snapshot(run: RunDir, state: checkpoint.State) -> str:
    """Name a snapshot of an earlier iteration that is damaged or missing; "" if there is none."""
    for name, digest in state.values["snapshots"].items():
        kept = run.state / "snapshots" / name
        if not kept.is_file() or sha256(kept) != digest:
            return f"snapshot {name} is damaged"
    return ""


def train_together(run: RunDir, deadline: Deadline) -> None:
    """Run `train` in each of the processes that were started together."""
    with distributed.connected(run_inputs.run_spec(run).assets.device) as processes:
        train(run, processes, deadline)


def main() -> None:
    run_stage("train", train_together)


if __name__ == "__main__":
    main()
