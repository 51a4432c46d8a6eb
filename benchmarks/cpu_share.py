"""The share of CPU time of `make all` outside sampling, rewards and updates.

    rm -rf results/shapes; /usr/bin/time -v make all 2>time.txt
    python benchmarks/cpu_share.py results/shapes time.txt

Every job has one thread, so on idle cores the seconds of a phase are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from tafs.runtime import journal


def phase_seconds(results: Path) -> dict[str, float]:
    """Seconds of each phase, from the journals of trainings and the logs of evaluations."""
    phases = {"sample": 0.0, "reward": 0.0, "update": 0.0}
    for file in sorted(results.glob("runs/*/journal.jsonl")):
        for record in journal.iterations(file):
            for phase in phases:
                phases[phase] += record["seconds"][phase]
    for log in sorted(results.glob("logs/evaluate/*.log")):
        for line in log.read_text(encoding="utf-8").splitlines():
            if line.startswith('{"evaluated"'):
                for phase, value in json.loads(line)["seconds"].items():
                    phases[phase] += value
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of CPU time outside the phases.")
    parser.add_argument("results", type=Path, help="results/SCALE")
    parser.add_argument("time", type=Path, help="the output of /usr/bin/time -v")
    options = parser.parse_args()
    text = options.time.read_text(errors="replace")
    found = re.findall(r"(?:User|System) time \(seconds\): ([\d.]+)", text)
    if len(found) != 2:
        parser.error("the second file is not the output of /usr/bin/time -v")
    cpu = sum(map(float, found))
    phases = phase_seconds(options.results)
    shares = "  ".join(f"{phase} {value:.0f} s" for phase, value in phases.items())
    print(f"CPU {cpu:.0f} s   {shares}")
    print(f"outside sampling, rewards and updates: {1 - sum(phases.values()) / cpu:.1%}")


if __name__ == "__main__":
    main()
