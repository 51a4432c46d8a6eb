"""GPUs that run out of memory: one line, or smaller batches."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import JsonValue

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


def kept(run: RunDir, stage: str, alike: str) -> Path:
    """The file with the batch size that fitted, for all runs of a folder that are `alike`."""
    name = re.sub(r"[^\w.-]", "_", f"{stage}.{alike}")
    return run.folder.parent / ".memory" / f"{name[:200]}.json"


@contextmanager
def fitting(
    run: RunDir, stage: str, batch: int, alike: str, settings: Mapping[str, JsonValue]
) -> Iterator[int]:
    """Yield the number of images per batch: `batch`, or less if it did not fit before.

    Where the GPU's memory does not suffice, half of that number is kept for the next attempt, and
    the stage is to be continued: its work is what its last saved state says. Batch sizes change
    only the rounding of results, so nothing is computed again for another one.

    Args:
        batch: that is asked for.
        alike: names the runs that begin with what fitted one of them.
        settings: what the memory depends on besides; with others, `batch` is tried again.

    Raises:
        Reduced: the memory did not suffice.
        torch.OutOfMemoryError: it does not suffice for a single image.
    """
    file = kept(run, stage, alike)
    asked: dict[str, JsonValue] = {"batch": batch, "settings": dict(settings), "gpu": _gpu()}
    size = _fitted(file, asked) or batch
    if size < batch:
        print(
            f"{stage} {run.folder}: {size} images per batch in place of {batch}, which did not "
            f"fit in the GPU's memory; delete {file} to try again",
            file=sys.stderr,
            flush=True,
        )
    try:
        yield size
    except torch.OutOfMemoryError as error:
        if size == 1:
            file.unlink(missing_ok=True)  # something else has to change first
            raise
        fitted = min(size // 2, _fitted(file, asked) or size)  # a run that is alike may have less
        file.parent.mkdir(exist_ok=True)
        files.atomic_text(file, json.dumps({"asked": asked, "batch": fitted}))
        reason = str(error).splitlines()[0]
        raise Reduced(
            f"out of GPU memory with {size} images per batch, to be continued with {fitted} "
            f"({reason})"
        ) from None


def _fitted(file: Path, asked: Mapping[str, JsonValue]) -> int | None:
    """The batch size in a file that `fitting` wrote; None: there is none for what is asked."""
    try:
        known = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    return int(known["batch"]) if known["asked"] == asked else None


def _gpu() -> int | None:
    """Bytes of this process's GPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
