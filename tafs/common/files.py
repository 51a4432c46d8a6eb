"""SHA-256 of files, and atomic writes."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal; raises as `check_readable`."""
    check_readable(file)
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def atomic(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary file beside `path`; rename it to `path` when the block ends without error.

    `path` holds either its previous content or all of the new content, even after a crash of the
    machine. It has the umask's mode also if the writer sets another one: safetensors makes files
    that only their owner can read. The temporary name keeps the suffix, because some writers choose
    a format by it.

    Args:
        path: the file to write; its folder is created.
        shared: whether several processes may write `path` at once; the last one wins. Otherwise
            temporary files that a killed writer left are removed.

    Raises:
        OSError: the file cannot be written (safetensors' own error is converted).
        Exception: any error of the block. `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not shared:
        for left in path.parent.glob(f".tmp-*-{glob.escape(path.name)}"):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        give_umask_mode(temporary)
        fsync(temporary)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:  # raised for a full disk, among others
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with the temporary file of `atomic`."""
    with atomic(path) as temporary:
        write(temporary)


def atomic_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text atomically, in UTF-8 and without newline conversion; see `atomic`."""
    with atomic(path, shared=shared) as temporary:
        temporary.write_bytes(text.encode())


def give_umask_mode(file: Path) -> None:
    """Give a file the mode that a new file beside it gets.

    A new file tells it, because reading the umask would mean changing it for all threads.
    """
    new = file.with_name(f".tmp-{os.getpid()}-mode-{file.name}")
    try:
        new.touch()
        mode = stat.S_IMODE(new.stat().st_mode)
    finally:
        new.unlink(missing_ok=True)
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)


def check_readable(file: Path) -> None:
    """Open a file before a library does: safetensors reports every failure as a missing file.

    Raises:
        OSError: the file cannot be opened, of the class of the reason; names it and the reason.
    """
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise type(error)(f"{file}: cannot be read ({error.strerror})") from None


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
