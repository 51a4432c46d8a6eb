"""Files: their SHA-256, and writing them atomically."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def _appearing_whole(file: Path) -> Iterator[BinaryIO]:
    """A new file that is on the disk entirely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("w+b") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which is put there in one step when the block has ended well.

    The temporary name keeps the suffix, by which some writers choose a format. `path` holds either
    what it held before or all of the new content, also after a crash of the machine. What a killed
    writer left is removed: no two processes may write one file at once.

    Raises:
        OSError: the file could not be written, also by safetensors; any error of the block. `path`
            is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".tmp-*-{glob.escape(path.name)}"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:  # is what it raises for a full disk
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """`atomic`, where `write` fills the file.

    Raises:
        OSError: the file could not be written; any error of `write`. `path` is as it was.
    """
    with atomic(path) as temporary:
        write(temporary)


def atomic_text(path: Path, text: str) -> None:
    """`atomic_write` for a text, in UTF-8 and with its newlines as they are.

    Raises:
        OSError: the file could not be written.
    """
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode()))


def _fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
