"""main."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tafs.common import errors
from tafs.common.env import whole_number
from tafs.runtime import gpus
from tafs.runtime.run_dir import RunDir


def limit_threads() -> None:
    """One thread a process unless TAFS_THREADS says more: two jobs with one thread each do more
    work than one job with two, and the sums do not depend on the machine's size.

    Raises:
        ValueError: TAFS_THREADS is no whole number from 1; names it.
    """
    import torch

    torch.set_num_threads(whole_number("TAFS_THREADS", "give how many", "1", 1))


def run_stage(stage: str, work: Callable[[RunDir], None]) -> None:
    """`python -m tafs.STAGE RUN_DIR`, with one thread a process, and alone in that stage."""
    if len(sys.argv) != 2:
        print(f"usage: python -m tafs.{stage} RUN_DIR", file=sys.stderr)
        sys.exit(2)
    run = RunDir(Path(sys.argv[1]))
    what = f"{stage} {run.folder}"
    rank = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        what += f" (process {rank})"

    def within_memory() -> None:
        import torch

        # A training's launcher has taken all of its.
        if stage != "train" and run.description["settings"]["device"] == "cuda":
            gpus.claim(1)
        try:
            work(run)
        except torch.OutOfMemoryError as error:
            raise errors.RunFailed(
                "the GPU's memory does not suffice; lower micro_batch (training) or "
                f"evaluation.batch in config.yaml ({str(error).splitlines()[0]})"
            ) from None

    def alone() -> None:
        limit_threads()
        if rank != "0":  # the first process writes for all
            within_memory()
            return
        with run.alone(stage):
            run.failure(stage).unlink(missing_ok=True)
            within_memory()

    errors.run_cli(what, alone, lambda code, line: run.note_failure(stage, code, line))
