"""What snakemake would run now, and why, by its own account: a dry run of `all`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafs.common import errors

TOTAL = re.compile(r"^total\s+(\d+)$", re.MULTILINE)
FACT = re.compile(r"^ {4,8}(\w+): (.*)$", re.MULTILINE)  # a group's jobs stand further in
NAMED = "Updated input files"  # the reason whose files say more than its words
FOLLOWS = "input files updated by another job"


@dataclass(frozen=True)
class Pending:
    """A job that would run."""

    rule: str
    about: str  # the run or the resource; "" for what is made of all of them
    reason: str  # in Snakemake's words, with all files

    @property
    def summary(self) -> str:
        """The reason without the files that it needs not name.

        That an earlier job of the same plan comes first is left out where there is another reason.
        """
        parts = []
        for part in self.reason.split("; "):
            head, _, files = part.partition(": ")
            words = head[:1].lower() + head[1:].rstrip(".")
            if head == NAMED and files:
                words += f" ({', '.join(sorted(self._short(f) for f in files.split(', ')))})"
            parts.append(words)
        own = [part for part in parts if part != FOLLOWS]
        return "; ".join(own or parts)

    def _short(self, file: str) -> str:
        """A file of the run itself by what it is in every run's folder, others from here."""
        inside = file.partition(f"/{self.about}/")[2] if self.about else ""
        return inside or file.removeprefix(f"{Path.cwd()}/")


def jobs(settings: Mapping[str, Any], *, forced: bool = False) -> list[Pending]:
    """The jobs that `snakemake all --config KEY=VALUE...` would run in this folder.

    Args:
        settings: KEY -> VALUE of --config.
        forced: all jobs of the graph, whether they are done or not.

    Raises:
        RunFailed: snakemake refuses, with its last line, or prints what cannot be read.
    """
    command = [sys.executable, "-m", "snakemake", "all", "--dry-run", "--quiet", "host"]
    command += ["--forceall"] if forced else []
    command += ["--config", *(f"{key}={value}" for key, value in settings.items())]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"}
    )
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise errors.RunFailed(f"snakemake --dry-run: {lines[-1]}")
    return parse(done.stdout + done.stderr)


def parse(printed: str) -> list[Pending]:
    """The jobs in a dry run's output.

    Raises:
        RunFailed: they are not as many as it says.
    """
    found = []
    for text in re.split(r"^ *(?:local)?rule ", printed, flags=re.MULTILINE)[1:]:
        facts = dict(FACT.findall(text))
        wildcards = dict(
            pair.split("=", 1) for pair in facts.get("wildcards", "").split(", ") if pair
        )
        about = wildcards.get("run") or wildcards.get("resource") or ""
        found.append(Pending(text.partition(":")[0], about, facts.get("reason", "")))
    total = TOTAL.search(printed)
    if len(found) != (int(total.group(1)) if total else 0):
        raise errors.RunFailed(
            f"snakemake --dry-run: {len(found)} jobs can be read of "
            f"{total.group(1) if total else 0}; its output has another form than snakemake 9's"
        )
    return found
