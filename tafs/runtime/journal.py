"""The journal of a run: append-only JSON Lines, the primary record of its training.

A line counts once its newline is written, so a process that is killed while writing loses that
line only. Every record has a `kind` ("start", "resume", "iteration", "end") and a `time`.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafs.common.files import check_readable


@dataclass(frozen=True)
class Journal:
    """Appends records to a file, from one process (rank 0)."""

    path: Path

    def append(self, kind: str, **fields: Any) -> None:
        """Write one record, and flush it to the disk; a failure leaves the file unchanged.

        Args:
            kind: of the record.
            fields: JSON; NaN and infinities are written as null. `time` (Unix seconds) is added
                unless it is given.
        """
        record = {"kind": kind, "time": time.time(), **fields}
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            end = _cut(fd)
            try:
                while line:
                    line = line[os.write(fd, line) :]
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, end)
                raise
        finally:
            os.close(fd)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the records in the order of writing, without an unfinished last line.

    Raises:
        OSError: the file does not exist (FileNotFoundError) or cannot be read; names it.
        ValueError: a complete line is not a record; names the file and the line.
    """
    check_readable(path)
    *lines, _ = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or "kind" not in record:
            raise ValueError(f"{path}, line {number}: not a record (an object with a `kind`)")
        records.append(record)
    return records


def iterations(path: Path) -> list[dict[str, Any]]:
    """Read the records of kind "iteration", sorted; of a repeated iteration, the last one."""
    latest = {r["iteration"]: r for r in read(path) if r["kind"] == "iteration"}
    return [latest[number] for number in sorted(latest)]


def _finite(value: Any) -> Any:
    """Copy a JSON value with None in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cut_unfinished_line(path: Path) -> None:
    """Truncate a last line without a newline, if the file exists."""
    if path.exists():
        with path.open("rb+") as file:
            _cut(file.fileno())


def _cut(fd: int) -> int:
    """Truncate an unfinished last line and return the new size."""
    size = end = os.fstat(fd).st_size
    while end and os.pread(fd, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(fd, end)
    return end
