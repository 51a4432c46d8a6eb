"""What snakemake would run now and why, from a dry run of `all`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafs.orchestration import snakemake_hooks
from tafs.orchestration.graph import Job

LISTED = "Updated input files"  # the reason whose files are shown
FOLLOWS = "input files updated by another job"


@dataclass(frozen=True)
class Pending:
    """A job that would run."""

    job: Job
    reason: str  # Snakemake's, with all files

    @property
    def summary(self) -> str:
        """The reason without file names, except for those of updated input files.

        "Input files updated by another job" is left out if there is another reason.
        """
        parts = []
        for part in self.reason.split("; "):
            head, _, files = part.partition(": ")
            words = head[:1].lower() + head[1:].rstrip(".")
            if head == LISTED and files:
                words += f" ({', '.join(sorted(self._short(f) for f in files.split(', ')))})"
            parts.append(words)
        own = [part for part in parts if part != FOLLOWS]
        return "; ".join(own or parts)

    def _short(self, file: str) -> str:
        """A file's path in the run's folder, or else relative to this folder."""
        target = self.job.target
        inside = file.partition(f"/{target}/")[2] if target else ""
        return inside or file.removeprefix(f"{Path.cwd()}/")


def pending(config: Mapping[str, Any]) -> list[Pending]:
    """The jobs that `snakemake all --config KEY=VALUE...` would run; see `dry_run`."""
    settings = [f"{key}={value}" for key, value in config.items()]
    arguments = ["all", *(["--config", *settings] if settings else [])]
    return [
        Pending(Job(job.rule, next(iter(job.wildcards.values()), "")), job.reason)
        for job in snakemake_hooks.dry_run(arguments)
    ]
