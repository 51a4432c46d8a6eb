"""Assigning the GPUs of a machine to jobs that run on it at the same time.

Snakemake limits how many GPUs are used at once but does not say which job gets which. Each job
therefore locks its GPUs. The locks of a Slurm job are its own: Slurm has assigned its GPUs, and
numbers them from 0 in every job.
"""

from __future__ import annotations

import os
import random
import re
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tafs.common import locks
from tafs.common.errors import RunFailed

NAME = re.compile(r"\d+|(GPU|MIG)-[\w/.-]+")  # in CUDA_VISIBLE_DEVICES
_held = ExitStack()  # this process's locks, until it ends


def claim(count: int) -> None:
    """Wait for `count` free GPUs, reserve them for this process and its children, hide the others.

    Raises:
        RunFailed: the machine has fewer GPUs or cannot list them, or the locks' folder belongs to
            another user.
    """
    known = _visible()
    if len(known) < count:
        raise RunFailed(f"the job needs {count} GPUs, and this machine shows {len(known)}")
    job = os.environ.get("SLURM_JOB_ID", "")
    folder = Path(tempfile.gettempdir()) / f"tafs-gpus-{os.getuid()}{job and f'-{job}'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # The parent is writable by everybody: another user's folder could hold links to our files.
    there = folder.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid() or there.st_mode & 0o022:
        raise RunFailed(f"{folder}: is not this user's own folder; delete it, or set TMPDIR")
    taken = _take(folder, known, count)
    if not taken:
        print(f"waits until {count} of {len(known)} GPUs are free", file=sys.stderr, flush=True)
    while not taken:
        time.sleep(random.uniform(0.5, 1.5))  # random, so that two waiting jobs avoid a livelock
        taken = _take(folder, known, count)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def _take(folder: Path, known: list[str], count: int) -> list[str]:
    """Lock `count` free GPUs and return their names; [] if fewer are free."""
    found: list[str] = []
    with ExitStack() as stack:
        for gpu in known:
            try:
                stack.enter_context(locks.held(folder / gpu.replace("/", "-")))
            except locks.Busy:
                continue
            found.append(gpu)
            if len(found) == count:
                _held.enter_context(stack.pop_all())
                return found
    return []


def _visible() -> list[str]:
    """Return the machine's GPUs as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        wrong = [name for name in names if not NAME.fullmatch(name)]
        if wrong or len(set(names)) < len(names):
            raise RunFailed(
                f"CUDA_VISIBLE_DEVICES: {given!r} is not a list of different GPUs; give their "
                "numbers or UUIDs, or unset it"
            )
        return names
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"this machine's GPUs cannot be counted: {error}") from None
    return [str(number) for number in range(len(listed.stdout.splitlines()))]
