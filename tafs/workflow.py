"""What the Snakefile asks: the runs of the active scale, their files and their descriptions."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tafs import config
from tafs import method as methods
from tafs.config import Config, ConfigError, Run
from tafs.progress import Watcher

__all__ = ["ConfigError", "Plan", "read"]

OVERRIDES = ("scale", "results", "method")
WEIGHTS_MANIFEST = Path(__file__).parent / "shapes" / "weights" / "manifest.json"


class Plan:
    """The active scale's runs, as the graph needs them."""

    def __init__(self, settings: Config, compared: str | None = None) -> None:
        self.settings = settings
        self.compared = compared  # the method that `--config method=NAME` adds
        self.runs: dict[str, Run] = config.runs(settings)
        self.results = settings.results
        self.root = f"{settings.results}/{settings.scale}"
        self._watcher: Watcher | None = None

    @property
    def contents(self) -> str:
        """The text of tables.json: what every table and figure shows."""
        return config.to_json({"tables": config.tables(self.settings)})

    def results_of(self, kind: str, suffixes: Sequence[str]) -> list[str]:
        """The files of every table, or of every figure."""
        found = config.tables(self.settings)
        names = (
            [table["name"] for table in found]
            if kind == "tables"
            else [figure for table in found for figure in table["figures"].values()]
        )
        return [f"{self.root}/{kind}/{name}.{suffix}" for name in names for suffix in suffixes]

    @property
    def tuned(self) -> list[str]:
        """The methods that are searched."""
        return list(self.settings.tuning.grids) if self.settings.tuning else []

    def files(self, name: str, trained: bool = False) -> list[str]:
        """`name` in every run's folder, or the folders; `trained` leaves out the base models."""
        names = [n for n, run in self.runs.items() if run.trained or not trained]
        return [f"{self.root}/runs/{n}/{name}".rstrip("/") for n in names]

    @cache  # noqa: B019 - one plan a process
    def description(self, name: str) -> str:
        """run.json's text."""
        return config.to_json(self._run(name).describe())

    def method_source(self, name: str) -> str:
        return str(methods.source_file(self._run(name).method))

    @property
    def weights(self) -> str:
        """The list of the embedded models' files with their sums: other models rerun everything."""
        return str(WEIGHTS_MANIFEST)

    def adapter(self, name: str) -> list[str]:
        """The trained adapter, or nothing for a base model."""
        return [f"{self.root}/runs/{name}/adapter.safetensors"] if self._run(name).trained else []

    def watch(self) -> None:
        """Show the jobs' progress on standard error until `finish`."""
        self._watcher = Watcher(
            Path(self.root) / "runs", sys.stderr, f"scale {self.settings.scale}"
        )
        self._watcher.start(logging.getLogger("snakemake.logging"))

    def finish(self, succeeded: bool) -> None:
        """Take the live table away and say where the results are, or what has failed."""
        if self._watcher is None:
            return
        watcher = self._watcher
        watcher.stop()
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
            for table in config.tables(self.settings):
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
    settings = config.read(path, given)
    if method is None:
        return Plan(settings)
    return Plan(config.with_method(settings, str(method)), compared=str(method))
