"""Locks that name their holder and end with its process, even after `kill -9`.

A lock is a file that `filelock` locks with flock(2), on one machine or on a file system that
several machines share. The file is kept; it holds the current or last holder as JSON:
{"pid", "host", "job" (of Slurm, or ""), "since" (Unix seconds)}.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tafs.common.errors import RunFailed

READS = 20  # attempts to read a holder that has just taken the lock
POLL = 1.0  # s between two attempts to take the lock

# Locks entered here are held until this process ends. They are released while Python's modules
# still work; later, the release fails.
until_exit = ExitStack()
atexit.register(until_exit.close)


class Busy(RunFailed):
    """Another process holds the lock; the message describes it."""


@contextmanager
def held(file: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock inside the block. Child processes do not inherit it.

    Args:
        file: the lock's file; its folder is created.
        waiting: called with a description of the holder before waiting for it. None: do not wait.

    Raises:
        Busy: another process holds the lock and `waiting` is None.
        RunFailed: the file system does not support locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, poll_interval=POLL, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                raise Busy(holder(file)) from None
            waiting(holder(file))
            lock.acquire()
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise RunFailed(
                f"{file}: the file system does not support locks, so two jobs could write one run; "
                "mount it with flock, or set `results` to a folder elsewhere"
            ) from None
        raise
    try:
        yield
    finally:
        lock.release()


def holder(file: Path) -> str:
    """Describe the holder that a lock's file names."""
    for _ in range(READS):
        try:
            place = json.loads(file.read_bytes())
            job = f" (Slurm job {place['job']})" if place["job"] else ""
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(place["since"]))
            return f"process {place['pid']} on {place['host']}{job}, since {since}"
        except (OSError, ValueError, KeyError, TypeError):  # it is being written
            time.sleep(0.05)
    return "another process"


def _write_holder(fd: int) -> None:
    place = {"pid": os.getpid(), "host": socket.gethostname()}
    place |= {"job": os.environ.get("SLURM_JOB_ID", ""), "since": time.time()}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(place).encode(), 0)
