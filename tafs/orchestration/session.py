"""What happens around the jobs of one call of snakemake: locks, checks, live table, last words."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from tafs.common import errors, locks
from tafs.orchestration import slurm
from tafs.orchestration.graph import Graph
from tafs.orchestration.live_table import LiveTable
from tafs.orchestration.retries import Retries
from tafs.orchestration.snakemake_hooks import (
    LOGGER,
    on_failure,
    remove_rate_limit,
    slurm_executor,
)


class Session:
    """One call of snakemake: `start` before its jobs, `finish` after them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.root = Path(graph.root)
        self.submitted = self.root / ".locks" / "slurm.json"  # the last call's jobs in Slurm
        self._held = ExitStack()  # until this process ends
        self._started = False

    @cached_property
    def table(self) -> LiveTable:
        return LiveTable(self.root / "runs", sys.stderr, f"scale {self.graph.plan.config.scale}")

    def start(self, workflow: Any) -> None:
        """Refuse what cannot run; then show progress and watch for failures.

        Args:
            workflow: Snakemake's object.

        Raises:
            SystemExit: the scale's models are not pinned (exit code 2), or another call uses the
                results folder or it cannot be written (1); prints one line.
        """
        if not self.graph.source.pinned:
            self._exit(
                f"{self.graph.scale.lock}: not found; the scale "
                f"{self.graph.plan.config.scale!r} runs only with pinned models: run `make lock` "
                "where there is a network",
                errors.BAD_INPUT,
            )
        # Unlike Snakemake's own lock, this one ends with the process, also after `kill -9`.
        try:
            self._held.enter_context(locks.held(self.root / ".locks" / "all"))
        except errors.RunFailed as error:
            self._exit(f"{self.root}: is in use by {error}; wait for it, or end it")
        except OSError as error:
            self._exit(f"{self.root}: {error}; make it writable for you")
        self._cancel_orphans()
        remove_rate_limit(workflow)
        self._started = True
        self.table.start(logging.getLogger(LOGGER))
        retries = Retries(self.table)
        on_failure(workflow, retries.decide)
        executor = slurm_executor(workflow)
        if executor is not None:
            slurm.remember(self.submitted, slurm.Watch(executor, retries).run_name)

    def finish(self, succeeded: bool) -> None:
        """Remove the live table and print where the results are, or what failed."""
        if not self._started:
            return
        table = self.table
        table.stop()
        try:
            # Snakemake cancels the jobs that it knows, but not one that it is just submitting.
            left = slurm.end_orphans(self.submitted)
        except errors.RunFailed as error:  # the next call tries again
            table.say(str(error))
        else:
            if left and not succeeded:
                table.say(f"cancelled {left} jobs that were left in Slurm")
        if not succeeded:
            failed = f" with {table.failed} failed (see above)" if table.failed else ""
            table.say(
                f"stopped after {table.elapsed()}{failed}; other results are kept, and the same "
                "command continues from them"
            )
            return
        folders = [self.root / name for name in ("tables", "figures")]
        made = folders if all(folder.is_dir() for folder in folders) else [self.root]
        table.say(f"done in {table.elapsed()}: {' and '.join(f'{folder}/' for folder in made)}")
        log = self.root / "logs" / "track.log"
        if log.is_file() and "tracking: " in (text := log.read_text(encoding="utf-8")):
            table.say(f"{text.strip()}\nMLflow's copy is incomplete; `tafs sync` repeats it")
        for spec in self.graph.plan.tables:
            if any(row.variant == self.graph.plan.added_method for row in spec.rows):
                file = self.root / "tables" / f"{spec.name}.md"
                if file.is_file():
                    table.say(file.read_text(encoding="utf-8"))

    def _cancel_orphans(self) -> None:
        """Cancel the Slurm jobs that a killed call has left."""
        try:
            ended = slurm.end_orphans(self.submitted)
        except errors.RunFailed as error:
            self._exit(f"{self.root}: {error}")
        if ended:
            print(f"{self.root}: cancelled {ended} jobs of an earlier call", file=sys.stderr)

    @staticmethod
    def _exit(line: str, code: int = 1) -> NoReturn:
        print(line, file=sys.stderr)
        sys.exit(code)
