"""What `snakemake --dry-run` would run."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

from tafs.orchestration.graph import Job

ROOT = Path(__file__).resolve().parents[2]
TARGET = re.compile(r"^ *wildcards: \w+=(.+)$", re.MULTILINE)


def dry_run(scale: str, results: Path | str, *options: str) -> Counter[Job]:
    """The jobs of `snakemake all` with these options, as Snakemake prints them."""
    config = ["--config", f"scale={scale}", f"results={results}"]
    command = ["snakemake", "--dry-run", "all", *options, *config]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    blocks = re.split(r"^ *(?=(?:local)?rule \w+:$)", done.stdout + done.stderr, flags=re.MULTILINE)
    found: Counter[Job] = Counter()
    for block in blocks[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)
        target = TARGET.search(block)
        assert rule
        found[Job(rule[1], target[1] if target else "")] += 1
    return found
