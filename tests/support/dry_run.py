"""What `snakemake --dry-run` would run."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

from tafs.orchestration.graph import Job

RULE = re.compile(r"(?:local)?(?:rule|checkpoint) (\w+):")
BLOCK = re.compile(r"^ *(?=(?:local)?(?:rule|checkpoint) \w+:$)", re.MULTILINE)
ROOT = Path(__file__).resolve().parents[2]
TARGET = re.compile(r"^ *wildcards: \w+=(.+)$", re.MULTILINE)


def dry_run(scale: str, results: Path | str, *options: str, target: str = "all") -> Counter[Job]:
    """The jobs of `snakemake TARGET` with these options, as Snakemake prints them."""
    config = ["--config", f"scale={scale}", f"results={results}"]
    command = ["snakemake", "--dry-run", target, *options, *config]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    blocks = BLOCK.split(done.stdout + done.stderr)
    found: Counter[Job] = Counter()
    for block in blocks[1:]:
        rule = RULE.match(block)
        wildcard = TARGET.search(block)
        assert rule
        found[Job(rule[1], wildcard[1] if wildcard else "")] += 1
    return found
