"""What happens around the jobs of one call of snakemake: locks, checks, live table, last words."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tafs.common import errors, locks
from tafs.common.yaml_files import ConfigError
from tafs.orchestration import graph, slurm, verdicts
from tafs.orchestration.graph import Job
from tafs.orchestration.live_table import LiveTable
from tafs.orchestration.retries import Retries
from tafs.orchestration.snakemake_hooks import (
    LOGGER,
    Key,
    decide_by_content,
    on_failure,
    remove_rate_limit,
    slurm_executor,
)
from tafs.runtime.run_dir import STAGES


class Session:
    """One call of snakemake: `start` before its jobs, `finish` after them.

    Args:
        config: what `snakemake --config` sets.
        workflow: Snakemake's object.

    Raises:
        SystemExit: it, config.yaml or a size of resources.yaml is wrong (exit code 2); prints one
            line.
    """

    def __init__(self, config: Mapping[str, Any], workflow: Any) -> None:
        try:
            self.graph = graph.read(config)
            self.graph.largest_memory()  # Snakemake prints a traceback where a size is missing
        except ConfigError as error:
            self._exit(str(error), errors.BAD_INPUT)
        self.root = Path(self.graph.root)
        self.submitted = self.root / ".locks" / "slurm.json"  # the last call's jobs in Slurm
        self.workflow = workflow
        self.jobs = [*self.graph.jobs(), *self.graph.decide_jobs()]
        known = {(job.rule, job.target) for job in self.jobs}
        decide_by_content(workflow, known, self.decide, self.root / ".snakemake")
        self._started = self._deciding = False
        title = f"scale {self.graph.plan.config.scale}"
        self.table = LiveTable(self.root / "runs", sys.stderr, title)

    def decide(self, forced: Collection[Key], asked: Collection[Key]) -> dict[Key, str]:
        """The jobs that have to run, with reasons; prints why finished ones run again."""
        scale = self.graph.plan.config.scale
        if ("decide", "") in asked and not self.graph.looks:
            line = f"config.yaml: scales.{scale}.decide: is not set; give {{seeds: [3, 5, 8]}}"
            self._exit(line, errors.BAD_INPUT)
        if ("tune", "") in asked and not self.graph.searched_methods:
            line = f"config.yaml: tuning: scale {scale!r} trains none of its methods on its tasks"
            self._exit(f"{line}; choose another scale", errors.BAD_INPUT)
        self._deciding = ("decide", "") in asked
        found = verdicts.pending(self.graph, {Job(*key) for key in forced}, self.jobs)
        again = Counter(
            (one.job.rule, one.reason)
            for one in found
            if one.again and one.job.rule in STAGES and (one.job.rule, one.job.target) in asked
        )
        for (rule, reason), count in again.items():
            print(f"{rule}: {count} to run again ({reason})", file=sys.stderr)
        return {(one.job.rule, one.job.target): one.reason for one in found}

    def look_inputs(self, look: str, checkpoints: Any) -> list[str]:
        """The files that a look reads.

        Args:
            checkpoints: Snakemake's, whose `get` makes it wait for the result of the look before.
        """
        number = self.graph.looks.index(look)
        for before in self.graph.looks[:number]:
            getattr(checkpoints, before).get()
        return self.graph.input_files(look)

    def start(self) -> None:
        """Refuse what cannot run; then show progress and watch for failures.

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
            locks.until_exit.enter_context(locks.held(self.root / ".locks" / "all"))
        except errors.RunFailed as error:
            self._exit(f"{self.root}: is in use by {error}; wait for it, or end it")
        except OSError as error:
            self._exit(f"{self.root}: {error}; make it writable for you")
        try:
            ended = slurm.end_orphans(self.submitted)
        except errors.RunFailed as error:
            self._exit(f"{self.root}: {error}")
        if ended:
            print(f"{self.root}: cancelled {ended} jobs of an earlier call", file=sys.stderr)
        remove_rate_limit(self.workflow)
        self._started = True
        self.table.start(logging.getLogger(LOGGER))
        retries = Retries(self.table)
        on_failure(self.workflow, retries.decide)
        executor = slurm_executor(self.workflow)
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
        if self._deciding:
            table.say(f"done in {table.elapsed()}: {self.root}/decisions.md")
            return
        folders = [f for f in (self.root / "tables", self.root / "figures") if f.is_dir()]
        made = " and ".join(f"{folder}/" for folder in folders or [self.root])
        table.say(f"done in {table.elapsed()}: {made}")
        log = self.root / "logs" / "track.log"
        if log.is_file() and "tracking: " in (text := log.read_text(encoding="utf-8")):
            table.say(f"{text.strip()}\nMLflow's copy is incomplete; `tafs sync` repeats it")
        for spec in self.graph.plan.tables:
            if any(row.variant == self.graph.plan.added_method for row in spec.rows):
                file = self.root / "tables" / f"{spec.name}.md"
                if file.is_file():
                    table.say(file.read_text(encoding="utf-8"))

    @staticmethod
    def _exit(line: str, code: int = 1) -> NoReturn:
        print(line, file=sys.stderr)
        sys.exit(code)
