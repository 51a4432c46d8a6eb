"""Which GPUs of this machine a job takes, where nothing else shares them out.

Snakemake counts a machine's GPUs, so that no more jobs run than there are GPUs for, but does not
say which job has which. Slurm does, and is left to it.
"""

from __future__ import annotations

import os
import random
import stat
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tafs.common import locks
from tafs.common.errors import RunFailed

CLAIMED = "TAFS_CLAIMED"  # set for the processes that a job starts
SHARED = "TAFS_SHARED"  # set by a workflow whose jobs share this machine, or a Slurm job of its own
_held = ExitStack()  # the GPUs of this process, until it ends


def claim(count: int) -> None:
    """Take so many GPUs for this process and those that it starts, and hide the others from them.

    Waits until so many are free at once: a job that was left behind may still have them. They are
    this process's until it ends, also where it becomes another program by exec.

    Raises:
        RunFailed: this machine has fewer, or cannot say how many, or the folder of the locks is
            another user's.
    """
    given = os.environ.get("SLURM_JOB_ID") and not os.environ.get(SHARED)
    if given or os.environ.get(CLAIMED):
        return
    known = _visible()
    if len(known) < count:
        raise RunFailed(f"the job needs {count} GPUs, and this machine shows {len(known)}")
    folder = Path(tempfile.gettempdir()) / f"tafs-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Everybody may write beside it: a link in another user's folder would have us write elsewhere.
    there = folder.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid() or there.st_mode & 0o022:
        raise RunFailed(f"{folder}: is not this user's own folder; delete it, or set TMPDIR")
    while True:
        taken = _free(folder, known, count)
        if taken:
            break
        time.sleep(random.uniform(0.5, 1.5))  # two jobs that want all must not meet for ever
    os.environ |= {"CUDA_VISIBLE_DEVICES": ",".join(taken), CLAIMED: "1"}


def _free(folder: Path, known: list[str], count: int) -> list[str]:
    """So many free GPUs, which are this process's now; [] if there are fewer."""
    found: list[str] = []
    with ExitStack() as stack:
        for gpu in known:
            try:
                stack.enter_context(locks.held(folder / gpu, inherited=True))
            except locks.Busy:
                continue
            found.append(gpu)
            if len(found) == count:
                _held.enter_context(stack.pop_all())
                return found
    return []


def _visible() -> list[str]:
    """Of this machine, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"this machine's GPUs cannot be counted: {error}") from None
    return [str(number) for number in range(len(listed.stdout.splitlines()))]
