"""A run's folder: its description, its files, and the models and prompts that it names."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tafs.common import locks
from tafs.common.files import sha256
from tafs.runtime import checkpoint, journal

BASE = "base"  # the untrained model's place among the methods


SAMPLES_PER_TAG = 8  # prompts of each tag whose images samples.safetensors keeps


class RunDir:
    """results/SCALE/runs/NAME."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.adapter = folder / "adapter.safetensors"
        self.journal = folder / "journal.jsonl"
        self.scores = folder / "scores.parquet"
        self.samples = folder / "samples.safetensors"
        self.images = folder / "images.zip"
        self.served_scores = folder / "served_scores.parquet"
        self.trajectory_rewards = folder / "trajectory_rewards.parquet"
        self.snapshots = folder / "snapshots"
        self.eval_state = folder / ".eval_state"
        self.state = folder / ".state"
        self.checkpoints = self.state / "checkpoints"

    @cached_property
    def description(self) -> dict[str, Any]:
        """run.json.

        Raises:
            FileNotFoundError, ValueError: it is missing or no JSON object; names the file.
        """
        return read_json(self.folder / "run.json")

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json: how the run is judged; see `experiment.specs.EvalSpec`.

        Raises:
            FileNotFoundError, ValueError: it is missing or no JSON object; names the file.
        """
        return read_json(self.folder / "evaluation.json")

    def snapshot(self, iteration: int) -> Path:
        """The adapter after so many iterations, one of run.json's `snapshots`."""
        return self.snapshots / f"{iteration}.safetensors"

    def kept_snapshot(self, iteration: int) -> Path:
        """Where a snapshot lies until the training has ended."""
        return self.state / "snapshots" / self.snapshot(iteration).name

    @property
    def trained(self) -> bool:
        return bool(self.description["method"] != BASE)

    def verified(self, iteration: int | None) -> Path:
        """The adapter, or a snapshot, as training has left it.

        Raises:
            FileNotFoundError: it is not there; names it.
            ValueError: it has changed since; names it.
        """
        file = self.adapter if iteration is None else self.snapshot(iteration)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found; `python -m tafs.training.train` writes it")
        written: dict[str, str] = {}
        for record in journal.read(self.journal):
            written |= record.get("sha256", {})
        if sha256(file) != written.get(file.name):
            raise ValueError(
                f"{file}: is not what training wrote, by {self.journal.name}; remove it, and the "
                "workflow trains the run again"
            )
        return file

    def forget_training(self) -> None:
        """Remove the resume state of a run that has been trained, unless it is being trained.

        Raises:
            FileNotFoundError, ValueError: its adapter is not there, or not what training wrote.
        """
        self.verified(None)
        with suppress(locks.Busy), locks.held(self.lock("train")):
            self.clear_state()

    def clear_state(self) -> None:
        checkpoint.clear(self.state)

    def lock(self, stage: str) -> Path:
        """Held by the one process that works on a stage of the run."""
        return self.folder / ".locks" / stage

    def failure(self, stage: str) -> Path:
        """How the last try of a stage ended, if not well:
        {"stage", "exit" (code), "message", "time" (Unix seconds), "seen" (by the workflow)}."""
        return self.folder / ".failed" / f"{stage}.json"

    @contextmanager
    def alone(self, stage: str) -> Iterator[None]:
        """No other process works on this stage of the run inside the block.

        One that does is waited for: a job that a killed workflow left behind goes on, and what it
        has done is continued and not done twice.

        Raises:
            FileNotFoundError: there is no such run.
            failures.RunFailed, OSError: as `locks.held`.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: not found; snakemake writes it")

        def wait(holder: str) -> None:
            print(f"{stage} {self.folder}: waits for {holder}", file=sys.stderr, flush=True)

        with locks.held(self.lock(stage), wait):
            yield

    def note_failure(self, stage: str, code: int, message: str) -> None:
        """Write `failure`'s file; a disk that has no room for it must not hide the failure."""
        record = {"stage": stage, "exit": code, "message": message, "time": time.time()}
        file = self.failure(stage)
        temporary = file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps({**record, "seen": False}), encoding="utf-8")
            os.replace(temporary, file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object that snakemake wrote from config.yaml.

    Raises:
        FileNotFoundError, ValueError: it is missing or no JSON object; names the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; snakemake writes it from config.yaml")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no JSON object")
    return content
