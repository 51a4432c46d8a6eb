"""How much of `make all`'s CPU time is not sampling, rewards or updates.

    rm -rf results/shapes; /usr/bin/time -v make all 2>time.txt
    python benchmarks/cpu_share.py results/shapes time.txt

Every job has one thread, so on idle cores a phase's seconds are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from tafs.runtime import journal


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of CPU time outside the work itself.")
    parser.add_argument("results", type=Path, help="results/SCALE")
    parser.add_argument("time", type=Path, help="the output of /usr/bin/time -v")
    arguments = parser.parse_args()
    text = arguments.time.read_text(errors="replace")
    seconds = [
        float(re.search(rf"{kind} time \(seconds\): ([\d.]+)", text)[1])  # type: ignore[index]
        for kind in ("User", "System")
    ]
    cpu = sum(seconds)
    phases = {"sample": 0.0, "reward": 0.0, "update": 0.0}
    for file in sorted(arguments.results.glob("runs/*/journal.jsonl")):
        for record in journal.iterations(file):
            for phase in phases:
                phases[phase] += record["seconds"][phase]
    for log in sorted(arguments.results.glob("logs/evaluate/*.log")):
        for line in log.read_text().splitlines():
            if line.startswith('{"evaluated"'):
                for phase, value in json.loads(line)["seconds"].items():
                    phases[phase] += value
    work = sum(phases.values())
    shares = "  ".join(f"{phase} {value:.0f} s" for phase, value in phases.items())
    print(f"CPU {cpu:.0f} s   {shares}")
    print(f"outside sampling, rewards and updates: {100 * (1 - work / cpu):.1f} %")


if __name__ == "__main__":
    main()
