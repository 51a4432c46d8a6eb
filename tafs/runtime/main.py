"""The entry point that the stages of a run share: `python -m tafs.ROOM.STAGE RUN_DIR`."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from tafs.common import errors
from tafs.runtime import gpus, memory
from tafs.runtime.deadline import Deadline
from tafs.runtime.run_dir import RunDir

Work = Callable[[RunDir, Deadline], None]
PR_SET_PDEATHSIG = 1  # of prctl(2) on Linux


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to send this process a signal when its parent ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def limit_threads() -> None:
    """Use one CPU thread, so that the order of sums does not depend on the machine."""
    torch.set_num_threads(1)


def run_stage(stage: str, work: Work, options: argparse.Namespace | None = None) -> None:
    """Run one stage of the run that the command line names, as the only process in that stage.

    Args:
        options: of a parser that `arguments` returned; by default those of the command line. A GPU
            is claimed for each of its `processes`.

    An expected failure is one line, an exit code and the run's failure note. In a process that
    `tafs.runtime.launch` started, the launcher reports the failure instead.
    """
    if options is None:
        options = arguments(stage).parse_args()
    run = RunDir(options.run_dir)
    deadline = Deadline(60.0 * options.minutes or None, options.started)
    rank = os.environ.get("RANK", "0")

    def within_memory() -> None:
        # The launcher has claimed the GPUs of a training.
        if stage != "train" and run.device == "cuda":
            gpus.claim(getattr(options, "processes", 1))
        with memory.reported("use gradient_checkpointing, a lower resolution or a larger GPU"):
            work(run, deadline)

    def alone() -> None:
        limit_threads()
        if rank != "0":  # the first process writes the run's files
            within_memory()
            return
        with run.alone(stage):
            run.failure(stage).unlink(missing_ok=True)
            within_memory()

    def recorded() -> None:
        try:
            record(alone)()
        except errors.ToBeContinued as error:
            run.note_failure(stage, errors.CONTINUE, str(error))
            raise
        except Exception as error:
            code = errors.exit_code(error)
            if code is None:
                raise
            sys.exit(code)

    launched = "TORCHELASTIC_ERROR_FILE" in os.environ
    note = None if launched else lambda code, line: run.note_failure(stage, code, line)
    what = f"{stage} {run.folder}"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        what += f" (process {rank})"
    errors.run_cli(what, recorded if launched else alone, note)


def arguments(stage: str) -> argparse.ArgumentParser:
    """Return the parser of a stage's command line."""
    parser = argparse.ArgumentParser(prog=stage, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="results/SCALE/runs/NAME")
    parser.add_argument("--minutes", type=int, default=0, help="time limit; 0: none")
    parser.add_argument("--started", type=float, metavar="SECONDS", help="Unix time; default: now")
    return parser
