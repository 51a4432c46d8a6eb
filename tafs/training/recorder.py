"""The files of a run in training: journal, snapshots, resume state and adapter."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from tafs.common import files
from tafs.common.files import sha256
from tafs.runtime import checkpoint, receipts
from tafs.runtime.journal import Journal
from tafs.runtime.progress import Reporter
from tafs.runtime.receipts import Needs
from tafs.runtime.run_dir import RunDir
from tafs.training import provenance
from tafs.training.trainer import Trainer


class RunRecorder:
    """Writes a run's files, in the first process.

    Args:
        trainer: restored from `state`.
        needs: what the run's outcome depends on.
        state: where training continues; None: at the beginning.
    """

    def __init__(
        self, run: RunDir, trainer: Trainer, needs: Needs, state: checkpoint.State | None
    ) -> None:
        self.run = run
        self.trainer = trainer
        self.needs = needs
        self.journal = Journal(run.state / "journal.jsonl")
        if state is None:
            # A journal that exists now belongs to a run with other settings.
            run.clear_state()
            origin = provenance.collect(trainer.spec)
            fingerprint = receipts.fingerprint(needs)
            self.journal.append("start", run=run.name, fingerprint=fingerprint, provenance=origin)
        else:
            self.journal.append("resume", iteration=state.iteration, notes=state.notes)
        kept: dict[str, Any] = {"seconds": 0.0, "snapshots": {}} if state is None else state.values
        self.seconds: float = kept["seconds"]
        self.snapshots: dict[str, str] = kept["snapshots"]
        self.saved = 0 if state is None else state.iteration
        self.reporter = Reporter(run.folder, "train", trainer.iterations, self.saved)

    def keep(self, record: Mapping[str, Any]) -> None:
        """Write an iteration's record, and the snapshot and resume state if they are due."""
        run, trainer = self.run, self.trainer
        self.seconds += record["seconds"]["total"]
        self.journal.append("iteration", **record)
        # The rewards of the last scored step.
        last = (f"{name} {values[-1]:.3g}" for name, values in record["rewards"].items())
        self.reporter.advance("  ".join(last))
        done = record["iteration"] + 1
        if done in trainer.spec.snapshots:
            kept = run.kept_snapshot(done)
            trainer.export(kept)
            self.snapshots[kept.name] = sha256(kept)
        if done % trainer.checkpoint_every == 0 or done == trainer.iterations:
            self.save(done)

    def save(self, done: int) -> None:
        """Write the resume state after `done` iterations."""
        values = {"seconds": self.seconds, "snapshots": self.snapshots}
        self.trainer.save(self.run.checkpoints, self.needs, done, values)
        self.saved = done

    def pause(self, done: int, reason: str) -> str:
        """Save the state after `done` iterations for another job; return a message."""
        if self.saved != done:
            self.save(done)
        self.journal.append("pause", iteration=done, reason=reason)
        self.reporter.finish()
        total = self.trainer.iterations
        return f"saved after {done} of {total} iterations, to be continued: {reason}"

    def finish(self) -> None:
        """Write the finished run's adapter and journal, and move its snapshots in place."""
        run = self.run
        kept = {run.snapshot(n): run.kept_snapshot(n) for n in self.trainer.spec.snapshots}
        written = [run.adapter, run.journal, *kept]
        with receipts.replacing(run.folder, "train", self.needs, written):
            run.snapshots.mkdir(exist_ok=True)
            for file in {*run.snapshots.iterdir()} - {*kept}:  # of other settings
                file.unlink()
            for file, source in kept.items():
                files.atomic_write(file, partial(shutil.copyfile, source))
            self.trainer.export(run.adapter)
            digests = {**self.snapshots, run.adapter.name: sha256(run.adapter)}
            iterations = self.trainer.iterations
            self.journal.append("end", iterations=iterations, seconds=self.seconds, sha256=digests)
            files.atomic_text(run.journal, self.journal.path.read_text(encoding="utf-8"))
        self.reporter.finish()
