"""recorder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from tafs.common import files
from tafs.common.files import sha256
from tafs.runtime import checkpoint, run_dir
from tafs.runtime.journal import Journal
from tafs.runtime.progress import Reporter
from tafs.training import provenance
from tafs.training.trainer import Trainer


class RunRecorder:
    """The files of a run in training, which one process writes for all."""

    def __init__(
        self,
        run: run_dir.RunDir,
        trainer: Trainer,
        fingerprint: str,
        state: checkpoint.State | None,
    ) -> None:
        self.run = run
        self.trainer = trainer
        self.fingerprint = fingerprint
        self.journal = Journal(run.state / "journal.jsonl")
        if state is None:
            # Nothing to continue: a journal that is there belongs to a run with other settings.
            run.clear_state()
            facts = {"run": run.name, "fingerprint": fingerprint}
            self.journal.append("start", **facts, provenance=provenance.collect(run.description))
        else:
            self.journal.append("resume", iteration=state.iteration, notes=state.notes)
        self.seconds: float = 0.0 if state is None else state.values["seconds"]
        self.snapshots: dict[str, str] = {} if state is None else state.values["snapshots"]
        self.saved = done = 0 if state is None else state.iteration
        self.reporter = Reporter(run.folder, "train", trainer.iterations, done)

    def keep(self, record: Mapping[str, Any]) -> None:
        """Write what is due after an iteration."""
        run, trainer = self.run, self.trainer
        self.seconds += record["seconds"]["total"]
        self.journal.append("iteration", **record)
        self.reporter.advance(_headline(record["rewards"]))
        done = record["iteration"] + 1
        if done in run.description["snapshots"]:
            kept = run.kept_snapshot(done)
            trainer.export(kept)
            self.snapshots[kept.name] = sha256(kept)
        every = run.description["settings"]["checkpoint_every"]
        if done % every == 0 or done == trainer.iterations:
            self.save(done)

    def save(self, done: int) -> None:
        facts = {"seconds": self.seconds, "snapshots": self.snapshots}
        self.trainer.save(self.run.checkpoints, self.fingerprint, done, facts)
        self.saved = done

    def pause(self, done: int, reason: str) -> str:
        """Save the state after `done` iterations, for another job to go on; the line to say so."""
        if self.saved != done:
            self.save(done)
        self.journal.append("pause", iteration=done, reason=reason)
        self.reporter.finish()
        total = self.trainer.iterations
        return f"saved after {done} of {total} iterations, to be continued: {reason}"

    def finish(self) -> None:
        """Put the finished run's files in their places."""
        run = self.run
        run.snapshots.mkdir(exist_ok=True)
        for iteration in run.description["snapshots"]:
            copy = partial(shutil.copyfile, run.kept_snapshot(iteration))
            files.atomic_write(run.snapshot(iteration), copy)
        self.trainer.export(run.adapter)
        digests = {**self.snapshots, run.adapter.name: sha256(run.adapter)}
        facts = {"iterations": self.trainer.iterations, "seconds": self.seconds}
        self.journal.append("end", **facts, sha256=digests)
        files.atomic_text(run.journal, self.journal.path.read_text(encoding="utf-8"))
        self.reporter.finish()


def _headline(rewards: dict[str, list[float]]) -> str:
    """The last scored step's rewards, for the person who watches."""
    return "  ".join(f"{name} {values[-1]:.3g}" for name, values in rewards.items())
