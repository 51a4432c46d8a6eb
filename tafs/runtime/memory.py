"""GPUs that run out of memory: one line, or smaller batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tafs.common import errors, files
from tafs.runtime.run_dir import RunDir


class Reduced(errors.ToBeContinued):
    """A stage ran out of GPU memory; the same command continues it with smaller batches."""


@contextmanager
def reported(remedy: str) -> Iterator[None]:
    """Report a GPU without free memory in one line.

    Raises:
        RunFailed: the memory did not suffice; with the remedy.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise errors.RunFailed(f"out of GPU memory; {remedy} ({reason})") from None


def kept(run: RunDir, stage: str) -> Path:
    """Return the file with the batch size of a stage that ran out of memory and goes on."""
    return run.folder / ".memory" / f"{stage}.json"


@contextmanager
def fitting(run: RunDir, stage: str, batch: int) -> Iterator[int]:
    """Yield the number of images per batch: `batch`, or less if it did not fit before.

    Where the GPU's memory does not suffice, half of that number is kept for the next attempt, and
    the stage is to be continued: its work is what its last saved state says. Batch sizes change
    only the rounding of results, so nothing is computed again for another one.

    Raises:
        Reduced: the memory did not suffice.
        torch.OutOfMemoryError: it does not suffice for a single image.
    """
    file = kept(run, stage)
    size = batch
    if file.is_file():
        size = min(batch, int(json.loads(file.read_bytes())["batch"]))
    try:
        yield size
    except torch.OutOfMemoryError as error:
        if size == 1:
            raise
        file.parent.mkdir(exist_ok=True)
        files.atomic_text(file, json.dumps({"batch": size // 2}))
        reason = str(error).splitlines()[0]
        raise Reduced(
            f"out of GPU memory with {size} images per batch, to be continued with {size // 2} "
            f"({reason})"
        ) from None
    file.unlink(missing_ok=True)
