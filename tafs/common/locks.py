"""One process at a time: a lock that ends with the process that holds it, also by `kill -9`.

A lock is a file that its holder keeps locked by flock(2), on one machine or over a file system that
several share. The file stays; it says who holds it, or held it last:
{"pid", "host", "job" (Slurm's, or ""), "since" (Unix seconds)}.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tafs.common.errors import RunFailed

NAMING = 20  # times that a holder is looked for who has just taken the lock
POLL = 1.0  # s between two tries: not every network file system wakes those who wait


class Busy(RunFailed):
    """Another process holds the lock; says which."""


@contextmanager
def held(
    file: Path, waiting: Callable[[str], None] | None = None, *, inherited: bool = False
) -> Iterator[None]:
    """The lock is this process's inside the block; its children do not inherit it.

    Args:
        waiting: called once with the holder in words where there is one, which is then waited for;
            None does not wait.
        inherited: it stays with this process where it becomes another program by exec.

    Raises:
        Busy: another process holds it and `waiting` is None.
        RunFailed: the file system has no locks.
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    os.set_inheritable(fd, inherited)
    try:
        if not _taken(fd, file):
            if waiting is None:
                raise Busy(holder(file))
            waiting(holder(file))
            while not _taken(fd, file):
                time.sleep(POLL)
        place = {"pid": os.getpid(), "host": socket.gethostname()}
        place |= {"job": os.environ.get("SLURM_JOB_ID", ""), "since": time.time()}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(place).encode(), 0)
        yield
    finally:
        os.close(fd)


def holder(file: Path) -> str:
    """Who a lock's file says holds it, in words."""
    for _ in range(NAMING):
        try:
            place = json.loads(file.read_bytes())
            job = f" (Slurm job {place['job']})" if place["job"] else ""
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(place["since"]))
            return f"process {place['pid']} on {place['host']}{job}, since {since}"
        except (OSError, ValueError, KeyError, TypeError):  # it is just being written
            time.sleep(0.05)
    return "another process"


def _taken(fd: int, file: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise RunFailed(
                f"{file}: its file system has no locks, so that two jobs could write one run; "
                "mount it with flock, or set `results` to a folder elsewhere"
            ) from None
        raise
    return True
