"""Measure what tracking costs a training whose server is dead: `python benchmarks/tracking.py`.

The same training runs alone, and beside `python -m tafs.tracking.cli sync --every` to a server
that refuses connections and to one that never answers. The table shows medians over the repeats of
the trainer's CPU and wall time. The row "alone again" shows the noise.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tafs.experiment import plan
from tafs.runtime.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent
REFUSES, SILENT = "the server is gone", "the server never answers"
PLACES = ("alone", REFUSES, "alone again", SILENT)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def prepare(folder: Path, iterations: int) -> RunDir:
    """Write the run.json of a TAFS-GRPO run of the smoke scale."""
    specs = plan.load({"scale": "smoke"}, ROOT / "config.yaml").runs.values()
    spec = next(spec for spec in specs if spec.variant == "tafs_grpo")
    assert spec.training is not None
    training = spec.training.model_copy(update={"iterations": iterations})
    spec = spec.model_copy(update={"training": training, "snapshots": ()})
    run = RunDir(folder / "runs" / spec.name)
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(spec.to_json(), encoding="utf-8")
    return run


def start_sync(folder: Path, server: socket.socket, every: float) -> subprocess.Popen[str]:
    """Sync in the background; return after the first sync has failed."""
    url = "http://{}:{}".format(*server.getsockname())
    command = [sys.executable, "-m", "tafs.tracking.cli", "sync", "--every", str(every)]
    command += ["--server", url, "--store", str(folder), "--runs", str(folder / "runs")]
    loop = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert loop.stderr
    line = loop.stderr.readline()
    if url not in line:
        raise RuntimeError(f"unexpected line of the sync: {line}")
    return loop


def train(place: str, iterations: int, every: float) -> tuple[float, float, bytes]:
    """The trainer's CPU seconds and wall seconds, and its adapter."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if place == SILENT:
            server.listen()
        run = prepare(Path(name), iterations)
        loop = start_sync(Path(name), server, every) if place in (REFUSES, SILENT) else None
        start = time.perf_counter()
        command = [sys.executable, "-m", "tafs.training.train", str(run.folder)]
        trainer = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
        _, status, used = os.wait4(trainer.pid, 0)
        wall = time.perf_counter() - start
        if loop:
            loop.terminate()
            loop.wait()
        if status:
            raise RuntimeError(f"the training failed ({status})")
        return used.ru_utime + used.ru_stime, wall, run.adapter.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description="What tracking costs a training.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between syncs")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    given = parser.parse_args()
    found = [
        [train(place, given.iterations, given.every) for place in given.places]
        for _ in range(given.repeats)
    ]
    print(f"{'':24} {'CPU s':>8} {'wall s':>8}")
    for place, results in zip(given.places, zip(*found, strict=True), strict=True):
        cpu, wall, _ = zip(*results, strict=True)
        print(f"{place:24} {statistics.median(cpu):8.1f} {statistics.median(wall):8.1f}")
    same = len({adapter for repeat in found for *_, adapter in repeat}) == 1
    print(f"the adapters are {'identical' if same else 'NOT identical'}")


if __name__ == "__main__":
    main()
