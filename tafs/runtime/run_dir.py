"""The folder of a run: its files, locks and failure notes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tafs.common import locks
from tafs.common.files import check_readable, sha256
from tafs.runtime import receipts

BASE = "base"  # stands for the untrained model in place of a method
# The stages of a run, in their order.
STAGES = ("train", "evaluate", "trajectory_rewards", "score_served")
SAMPLES_PER_TAG = 8  # prompts of each tag whose images samples.safetensors keeps


class RunDir:
    """The folder `results/SCALE/runs/NAME`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.adapter = folder / "adapter.safetensors"
        self.journal = folder / "journal.jsonl"
        self.scores = folder / "scores.parquet"
        self.samples = folder / "samples.safetensors"
        self.samplers = folder / "samplers.json"
        self.images = folder / "images.json"
        self.served_scores = folder / "served_scores.parquet"
        self.trajectory_rewards = folder / "trajectory_rewards.parquet"
        self.trajectory_images = folder / "trajectories.safetensors"
        self.snapshots = folder / "snapshots"
        self.eval_state = folder / ".eval_state"
        self.state = folder / ".state"
        self.checkpoints = self.state / "checkpoints"

    @cached_property
    def description(self) -> dict[str, Any]:
        """The content of run.json; see `read_json`."""
        return read_json(self.folder / "run.json")

    def snapshot(self, iteration: int) -> Path:
        """Return the adapter's file after an iteration that run.json lists in `snapshots`."""
        return self.snapshots / f"{iteration}.safetensors"

    def kept_snapshot(self, iteration: int) -> Path:
        """Return where a snapshot is kept until the training has ended."""
        return self.state / "snapshots" / self.snapshot(iteration).name

    @property
    def device(self) -> str:
        """The device type of the run's models, cpu or cuda; "" where run.json does not say."""
        return str(self.description.get("assets", {}).get("device", ""))

    def verified(self, iteration: int | None) -> Path:
        """Return the adapter's file, or a snapshot's, after comparing it with the receipt's hash.

        Raises:
            FileNotFoundError: the file or the training's receipt is missing.
            ValueError: the file has changed since training wrote it.
        """
        file = self.adapter if iteration is None else self.snapshot(iteration)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found; `python -m tafs.training.train` writes it")
        receipt = receipts.read(self.folder, "train")
        name = file.relative_to(self.folder).as_posix()
        if receipt is None or name not in receipt.files:
            raise FileNotFoundError(
                f"{receipts.path(self.folder, 'train')}: is missing or does not list {name}; the "
                "workflow trains the run again"
            )
        if sha256(file) != receipt.files[name].sha256:
            raise ValueError(
                f"{file}: is not the file that training wrote (its SHA-256 differs); delete it, "
                "and the workflow trains the run again"
            )
        return file

    def forget_training(self) -> None:
        """Remove the resume state of a finished training, unless it is being trained again."""
        self.verified(None)
        with suppress(locks.Busy), locks.held(self.lock("train")):
            self.clear_state()

    def clear_state(self) -> None:
        """Remove the resume state, if there is one."""
        if self.state.exists():
            shutil.rmtree(self.state)

    def lock(self, stage: str) -> Path:
        """Return the lock that the process working on a stage of the run holds."""
        return self.folder / ".locks" / stage

    def failure(self, stage: str) -> Path:
        """Return the file of the last failure: stage, exit (code), message, time, seen (or not)."""
        return self.folder / ".failed" / f"{stage}.json"

    @contextmanager
    def alone(self, stage: str) -> Iterator[None]:
        """Hold the lock of a stage inside the block, after waiting for its present holder.

        A job that a killed workflow left behind keeps running; waiting for it avoids doing its
        work twice.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: not found; snakemake writes it")

        def wait(holder: str) -> None:
            print(f"{stage} {self.folder}: waits for {holder}", file=sys.stderr, flush=True)

        with locks.held(self.lock(stage), wait):
            yield

    def note_failure(self, stage: str, code: int, message: str) -> None:
        """Write the file of `failure`, unless the disk is full: that must not hide the failure."""
        record = {"stage": stage, "exit": code, "message": message, "time": time.time()}
        record["seen"] = False
        file = self.failure(stage)
        temporary = file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(record), encoding="utf-8")
            os.replace(temporary, file)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object that snakemake wrote from config.yaml; errors name the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; snakemake writes it from config.yaml")
    check_readable(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: is not JSON ({error}); delete it and run snakemake") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: is not a JSON object; delete it and run snakemake")
    return content
