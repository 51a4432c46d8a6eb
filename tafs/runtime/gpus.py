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
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tafs.common import locks
from tafs.common.errors import RunFailed, shown

VARIABLE = "CUDA_VISIBLE_DEVICES"
NAME = re.compile(r"\d{1,4}|(GPU|MIG)-[\w/.-]+", re.ASCII)  # in VARIABLE
# Where PyTorch reads how it allocates a GPU's memory, at its first use, and the former name.
# Segments that grow leave less memory unused between batches of different sizes.
ALLOCATOR, FORMER_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE = "expandable_segments:True"
LISTED = re.compile(r"\s*(GPU|MIG) .*\(UUID: ((?:GPU|MIG)-[^)\s]+)\)")  # by nvidia-smi


def claim(count: int | None) -> int:
    """Wait for `count` free GPUs, reserve them for this process and its children, hide the others.

    Their memory is allocated in segments that grow, unless the environment says how it is.

    Args:
        count: None: all that are visible; of MIG slices, one.

    Returns:
        The number of GPUs.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES is not a list of this machine's GPUs.
        RunFailed: the machine has fewer GPUs or cannot list them, or the locks' folder belongs to
            another user.
    """
    given = os.environ.get(VARIABLE)
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        if given is None:
            raise RunFailed(
                f"this machine's GPUs cannot be counted ({error}); give them in {VARIABLE}"
            ) from None
        listing = None  # some containers have GPUs, but no nvidia-smi
    known = visible(given, listing)
    if count is None:
        count = 1 if any(name.startswith("MIG-") for name in known) else max(1, len(known))
    require(known, count)
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
    os.environ[VARIABLE] = ",".join(taken)
    if FORMER_ALLOCATOR not in os.environ:
        os.environ.setdefault(ALLOCATOR, EXPANDABLE)
    return count


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
                locks.until_exit.enter_context(stack.pop_all())
                return found
    return []


def visible(given: str | None, listing: str | None) -> list[str]:
    """Return the GPUs and MIG slices that jobs may use, as CUDA_VISIBLE_DEVICES names them.

    Args:
        given: the value of CUDA_VISIBLE_DEVICES; None: not set, which means all GPUs.
        listing: what `nvidia-smi --list-gpus` prints; None: unknown, the names are not checked.

    Raises:
        ValueError: `given` is empty, or has a name that is malformed, unknown, ambiguous or there
            twice; names it.
    """
    gpus = _listed(listing or "")
    if given is None:
        slices = [part for parts in gpus.values() for part in parts]
        # Numbers cannot select slices. A GPU that is divided into slices cannot be used as a whole.
        return [
            name
            for number, (gpu, parts) in enumerate(gpus.items())
            for name in (parts or [gpu if slices else str(number)])
        ]
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names or names[0] == "-1":
        raise _wrong(given, "hides all GPUs")
    uuids = [*gpus, *(part for parts in gpus.values() for part in parts)]
    found: dict[str, str] = {}  # by UUID, or by the name itself where UUIDs are unknown
    for name in names:
        if not NAME.fullmatch(name):
            raise _wrong(given, f"has {shown(name)}, neither the number nor the UUID of a GPU")
        same = [str(int(name))] if name.isdecimal() else [name]
        if listing is not None:
            if name.isdecimal():
                same = [*gpus][int(name) :][:1]
            else:  # CUDA accepts the start of a UUID
                same = [uuid for uuid in uuids if uuid.startswith(name)]
            if len(same) != 1:
                what = "more than one GPU" if same else f"none of this machine's {len(gpus)} GPUs"
                raise _wrong(given, f"has {shown(name)}, which is {what}")
        if same[0] in found:
            raise _wrong(given, f"has the GPU {shown(name)} twice")
        found[same[0]] = name
    return [*found.values()]


def require(known: Sequence[str], count: int) -> None:
    """Refuse a job (RunFailed) that needs more GPUs than there are, or several MIG slices."""
    if len(known) < count:
        raise RunFailed(
            f"the job needs {count} GPUs, and this machine shows {len(known)} "
            f"({', '.join(known) or 'none'}); lower `processes`, or show more of them in "
            f"{VARIABLE}"
        )
    if count > 1 and any(name.startswith("MIG-") for name in known):
        raise RunFailed(
            f"the job needs {count} whole GPUs, and this machine shows MIG slices, of which CUDA "
            "joins none; set `processes` to 1"
        )


def _listed(listing: str) -> dict[str, list[str]]:
    """Return the MIG slices of each GPU, all by their UUIDs, in the order of `nvidia-smi`."""
    gpus: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if match := LISTED.match(line):
            if match[1] == "GPU":
                gpus[match[2]] = []
            else:
                [*gpus.values()][-1].append(match[2])
    return gpus


def _wrong(given: str, what: str) -> ValueError:
    return ValueError(
        f"{VARIABLE}: {shown(given)} {what}; give different numbers or UUIDs of `nvidia-smi "
        "--list-gpus`, separated by commas, or unset it"
    )
