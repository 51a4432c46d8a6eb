"""What the Snakefile asks: the runs of the active scale, their files and their descriptions."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tafs.assets import cache as cache_
from tafs.assets import sources
from tafs.common import errors, locks
from tafs.common.yaml_files import ConfigError
from tafs.experiment import evaluations, validate
from tafs.experiment import runs as runs_
from tafs.experiment import tables as tables_
from tafs.experiment.runs import Run
from tafs.experiment.schema import Config
from tafs.methods import registry
from tafs.orchestration import slurm
from tafs.orchestration.live_table import Watcher
from tafs.orchestration.retries import Retries
from tafs.rewards.metrics import RESOURCES, SERVED
from tafs.runtime import gpus

__all__ = ["ConfigError", "Plan", "read"]

CPUS_PER_GPU = 8  # decoding, PNG files and a server's own processes need more than one
OVERRIDES = ("scale", "results", "method", "seeds")


class Plan:
    """The active scale's runs, as the graph needs them."""

    def __init__(self, settings: Config, compared: str | None = None) -> None:
        self.settings = settings
        self.compared = compared  # the method that `--config method=NAME` adds
        self.runs: dict[str, Run] = runs_.runs(settings)
        self.results = settings.results
        self.root = f"{settings.results}/{settings.scale}"
        self._watcher: Watcher | None = None
        self._held = ExitStack()  # until this process ends

    @property
    def contents(self) -> str:
        """The text of report_spec.json: what every table and figure shows."""
        return runs_.to_json({"tables": self._tables})

    def results_of(self, kind: str, suffixes: Sequence[str]) -> list[str]:
        """The files of every figure, or of every table (its `tables` or its `provenance`)."""
        names = (
            [figure for table in self._tables for figure in table["figures"].values()]
            if kind == "figures"
            else [table["name"] for table in self._tables]
        )
        return [f"{self.root}/{kind}/{name}.{suffix}" for name in names for suffix in suffixes]

    @property
    def tuned(self) -> list[str]:
        """The methods that are searched."""
        return list(self.settings.tuning.grids) if self.settings.tuning else []

    def files(self, name: str, trained: bool = False, judged: bool = False) -> list[str]:
        """`name` in every run's folder, or the folders; `trained` leaves out the base models,
        `judged` those whose images no table scores."""
        names = [
            n
            for n, run in self.runs.items()
            if (run.trained or not trained) and (self._evaluations[n]["settings"] or not judged)
        ]
        return [f"{self.root}/runs/{n}/{name}".rstrip("/") for n in names]

    @cache  # noqa: B019 - one plan a process
    def description(self, name: str) -> str:
        """run.json's text."""
        return runs_.to_json(self._run(name).describe())

    def evaluation(self, name: str) -> str:
        """evaluation.json's text."""
        self._run(name)
        return runs_.to_json(self._evaluations[name])

    @cached_property
    def _tables(self) -> list[dict[str, Any]]:
        return tables_.tables(self.settings)

    @cached_property
    def _evaluations(self) -> dict[str, dict[str, Any]]:
        return evaluations.evaluations(self.settings)

    @property
    def correlated(self) -> list[str]:
        """The step scores that tables correlate."""
        names = {
            name
            for table in self._tables
            for row in table["rows"]
            if table["kind"] == "correlation"
            for name in row["runs"]
        }
        return [f"{self.root}/runs/{name}/trajectory_rewards.parquet" for name in sorted(names)]

    def method_source(self, name: str) -> str:
        return str(registry.source_file(self._run(name).method))

    @property
    def metrics_files(self) -> tuple[str, ...]:
        """Of the stages that score a judged run's images."""
        served = self.settings.active.evaluation.server
        return ("scores.parquet", *(("served_scores.parquet",) if served else ()))

    def fetched(self, name: str, judging: bool = False) -> list[str]:
        """The marks of the resources that a run's training, or its judging, needs on the disk."""
        if self.settings.active.world != "hub":
            return []
        run = self._run(name)
        names = [run.backbone, *run.rewards]
        if judging:
            world = sources.of(dict(run.settings))
            names = [run.backbone, *world.metrics(run.prompts)]
        return [self.mark(r) for r in sources.resources_of(names, [run.prompts])]

    @property
    def images(self) -> list[str]:
        """The images that a server judges afterwards, a pattern of `run`."""
        served = self.settings.active.evaluation.server
        return [f"{self.root}/runs/{{run}}/images.zip"] if served else []

    @property
    def reward_check(self) -> list[str]:
        """What has to be right before anything is judged."""
        return [f"{self.root}/reward_check.json"] if self.settings.active.world == "hub" else []

    @property
    def check_run(self) -> str:
        """A run whose settings say where the rewards are."""
        return next(iter(self.runs))

    @property
    def served(self) -> list[str]:
        """The marks of what the judging server serves."""
        return [self.mark(resource) for resource in RESOURCES[SERVED]]

    @property
    def scored(self) -> list[str]:
        """The marks of what all rewards need, but for the served one."""
        names = [name for name in RESOURCES if name != SERVED]
        return [self.mark(resource) for resource in sources.resources_of(names)]

    def mark(self, resource: str) -> str:
        """The file that says that a resource is on the disk, verified."""
        return f"{self.root}/resources/{resource}"

    @property
    def lock(self) -> str:
        return self.settings.active.lock

    def locked(self, resource: str) -> str:
        """SHA-256 of a resource's entry in the lock file; another one fetches it again."""
        lock = Path(self.lock)
        return cache_.digest(resource, lock) if lock.is_file() else ""

    @property
    def environment(self) -> str:
        """What jobs know of the scale that is no part of their runs, as a shell's assignments.

        Jobs read what was fetched before; every look-up of a missing file would retry for long.
        """
        scale = self.settings.active
        known = {
            "HF_HUB_OFFLINE": "1",
            "TAFS_PROCESSES": str(scale.processes),
            "TAFS_NODES": str(scale.nodes),
            "TAFS_SERVER": json.dumps(list(scale.evaluation.server)),
        }
        text = " ".join(f"{name}={shlex.quote(value)}" for name, value in known.items())
        return text.replace("{", "{{").replace("}", "}}")  # Snakemake fills in what is in braces

    def needs(self, stage: str) -> dict[str, Any]:
        """Snakemake's resources of a stage's jobs; training is what takes several GPUs."""
        scale = self.settings.active
        processes = scale.processes if stage == "train" else 1
        nodes = scale.nodes if stage == "train" else 1
        memory = scale.memory_mb * processes // nodes

        def growing(wildcards: Any, attempt: int) -> int:  # by half with each failed try
            return memory * (1 + attempt) // 2

        found: dict[str, Any] = {"mem_mb": growing}
        if scale.device == "cuda":
            gpus = processes // nodes
            # Without a number of nodes Slurm may take the GPUs from several.
            found |= {"nodes": nodes, "cpus_per_task": CPUS_PER_GPU * gpus}
            found |= {"gres": f"gpu:{gpus}"} if nodes > 1 else {"gpu": gpus}
        if nodes > 1:
            found |= {"mpi": "srun", "tasks": nodes, "tasks_per_gpu": 0}
        return found

    def start(self, workflow: Any) -> None:
        """Refuse to run what cannot be run, and show the jobs' progress from now on.

        Args:
            workflow: Snakemake's own.

        Raises:
            SystemExit: the scale's models are not pinned (exit code 2), or its results are being
                made by another process or cannot be written (1); one line.
        """
        scale = self.settings.active
        if not sources.of(scale.model_dump(mode="json")).pinned:
            print(
                f"{scale.lock}: not found; the scale {self.settings.scale!r} runs only with pinned "
                "models: run `make lock` where there is a network",
                file=sys.stderr,
            )
            sys.exit(2)
        # Snakemake's own lock would outlive a kill and have to be taken away by hand; this one ends
        # with the process, so that the same command goes on.
        lock = locks.held(Path(self.root) / ".locks" / "all")
        try:
            self._held.enter_context(lock)
        except errors.RunFailed as error:
            print(f"{self.root}: is being made by {error}; wait for it, or end it", file=sys.stderr)
            sys.exit(1)
        except OSError as error:
            print(f"{self.root}: {error}; make it writable for you", file=sys.stderr)
            sys.exit(1)
        self._leave_no_orphans()
        if workflow.local_exec:
            os.environ[gpus.SHARED] = "1"
            # Its limit of submissions a second wakes Snakemake once a second for every job that has
            # ended, until that is a tenth of all the work; jobs of this machine need no such limit.
            workflow.scheduler.job_rate_limiter = None
        watcher = self.watch()
        retries = Retries(workflow.scheduler, watcher.runs, watcher.jobs)
        executor = workflow.scheduler._executor
        if type(executor).__module__ == slurm.EXECUTOR:
            slurm.remember(self._submitted, executor)
            slurm.Watch(executor, retries)

    @property
    def _submitted(self) -> Path:
        """Names the jobs that the last call has submitted to Slurm."""
        return Path(self.root) / ".locks" / "slurm.json"

    def _leave_no_orphans(self) -> None:
        """End what a call that was killed has left in Slurm."""
        try:
            ended = slurm.end_orphans(self._submitted)
        except errors.RunFailed as error:
            print(f"{self.root}: {error}", file=sys.stderr)
            sys.exit(1)
        if ended:
            print(f"{self.root}: cancelled {ended} jobs of an earlier call", file=sys.stderr)

    @property
    def short(self) -> str | None:
        """The group of the evaluations, of which several share a job where they are short."""
        return "judged" if self.settings.active.device == "cpu" else None

    def adapters(self, name: str) -> list[str]:
        """The trained adapter and its snapshots' folder, or nothing for a base model."""
        folder = f"{self.root}/runs/{name}"
        if not self._run(name).trained:
            return []
        return [f"{folder}/adapter.safetensors", f"{folder}/snapshots"]

    def watch(self) -> Watcher:
        """Show the jobs' progress on standard error until `finish`."""
        runs = Path(self.root) / "runs"
        self._watcher = Watcher(runs, sys.stderr, f"scale {self.settings.scale}")
        self._watcher.start(logging.getLogger("snakemake.logging"))
        return self._watcher

    def finish(self, succeeded: bool) -> None:
        """Take the live table away and say where the results are, or what has failed."""
        if self._watcher is None:
            return
        watcher = self._watcher
        watcher.stop()
        try:
            # Snakemake has awaited or cancelled what it knows, not what it was just submitting.
            left = slurm.end_orphans(self._submitted)
        except errors.RunFailed as error:  # the next call tries it again
            watcher.say(str(error))
        else:
            if left and not succeeded:
                watcher.say(f"cancelled {left} jobs that were left in Slurm")
        tables, figures = Path(self.root) / "tables", Path(self.root) / "figures"
        if not succeeded:
            failed = watcher.jobs.failed
            watcher.say(
                f"stopped after {watcher.elapsed()}"
                + (f" with {failed} failed (see above)" if failed else "")
                + "; other results are kept, and the same command continues from them"
            )
        elif tables.is_dir() and figures.is_dir():
            watcher.say(f"done in {watcher.elapsed()}: {tables}/ and {figures}/")
        else:  # only some of the files were asked for
            watcher.say(f"done in {watcher.elapsed()}: {self.root}/")
        if succeeded and self.compared:
            for table in self._tables:
                if any(row["variant"] == self.compared for row in table["rows"]):
                    watcher.say((tables / f"{table['name']}.md").read_text(encoding="utf-8"))

    def _run(self, name: str) -> Run:
        if name not in self.runs:
            raise ValueError(f"no run {name!r} at this scale (available: {', '.join(self.runs)})")
        return self.runs[name]


def read(overrides: Mapping[str, Any], path: Path = Path("config.yaml")) -> Plan:
    """The plan of config.yaml with snakemake's `--config KEY=VALUE` on top.

    Raises:
        ConfigError: one line that names the key.
    """
    for key in overrides:
        if key not in OVERRIDES:
            raise ConfigError(
                f"--config {key}: only {', '.join(OVERRIDES)} can be given on the command line; "
                f"everything else stands in {path}"
            )
    given = dict(overrides)
    method = given.pop("method", None)
    given.pop("seeds", None)
    settings = validate.read(path, given)
    _check_folder(Path(settings.results), path)
    if "seeds" in overrides:
        settings = validate.with_seeds(settings, overrides["seeds"])
    if method is None:
        return Plan(settings)
    return Plan(validate.with_method(settings, str(method)), compared=str(method))


def _check_folder(results: Path, path: Path) -> None:
    """Refuse a folder for results that cannot be made or written, before any job starts."""
    there = next(folder for folder in (results, *results.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise ConfigError(f"{path}: results: {there} is no folder; choose another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: results: {there} cannot be written; choose another path")
