"""What tracking costs a training whose server is dead: `python benchmarks/tracking.py`.

A real training, alone and beside `python -m tafs.tracking.cli sync --every` to a server that refuses
connections and to one that takes them and never answers, in turn and every time in another order.
Printed are the medians over the repeats of the ratios to the training alone: of the trainer's CPU
time, which other work on the machine changes little, and of its wall time, with their ranges. What
"alone again" differs by is the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tafs.experiment import runs as runs_
from tafs.experiment import validate

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
ALONE, AGAIN = "alone", "alone again"
REFUSES, SILENT = "the server is gone", "the server never answers"
PLACES = (ALONE, REFUSES, AGAIN, SILENT)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def describe(folder: Path, iterations: int) -> Path:
    runs = runs_.runs(validate.read(ROOT / "config.yaml", {"scale": "smoke"}))
    description = next(r for r in runs.values() if r.variant == "tafs_grpo").describe()
    description["settings"] = {**description["settings"], "iterations": iterations}
    description["snapshots"] = []
    run = folder / "runs" / description["name"]
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(description))
    return run


@contextmanager
def tracked(place: str, folder: Path, every: float) -> Iterator[None]:
    """A sync loop that has met the server before the block begins."""
    if place in (ALONE, AGAIN):
        yield
        return
    with socket.socket() as server:
        server.bind((HOST, 0))
        if place == SILENT:
            server.listen()
        url = f"http://{HOST}:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "tafs.tracking.cli", "sync", "--every", str(every)]
        command += ["--server", url, "--store", str(folder), "--runs", str(folder / "runs")]
        loop = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, text=True
        )
        try:
            assert loop.stderr
            line = loop.stderr.readline()
            if url not in line:
                raise RuntimeError(f"sync said: {line}")
            yield
        finally:
            loop.send_signal(signal.SIGTERM)
            loop.wait()


def train(place: str, iterations: int, every: float) -> tuple[float, float, bytes]:
    """The trainer's CPU and wall seconds, and its adapter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = describe(folder, iterations)
        with tracked(place, folder, every):
            start = time.perf_counter()
            trainer = subprocess.Popen(
                [sys.executable, "-m", "tafs.training.train", str(run)],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            _, status, used = os.wait4(trainer.pid, 0)
            wall = time.perf_counter() - start
        if status:
            raise RuntimeError(f"training failed ({status})")
        return used.ru_utime + used.ru_stime, wall, (run / "adapter.safetensors").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description="What tracking costs a training.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between syncs")
    arguments = parser.parse_args()
    cpu: dict[str, list[float]] = {place: [] for place in PLACES}
    wall: dict[str, list[float]] = {place: [] for place in PLACES}
    adapters = set()
    for repeat in range(arguments.repeats):
        first = repeat % len(PLACES)
        for place in PLACES[first:] + PLACES[:first]:
            used, took, adapter = train(place, arguments.iterations, arguments.every)
            cpu[place].append(used)
            wall[place].append(took)
            adapters.add(adapter)
    print(f"{'':24} {'CPU s':>7} {'ratio':>22} {'wall s':>8} {'ratio':>22}")
    for place in PLACES:
        cells = []
        for kind in (cpu, wall):
            ratios = [a / b for a, b in zip(kind[place], kind[ALONE], strict=True)]
            spread = f"[{min(ratios):.3f}, {max(ratios):.3f}]"
            cells.append(f"{statistics.median(kind[place]):8.1f}")
            cells.append(f"{statistics.median(ratios):6.3f} {spread:>15}")
        print(f"{place:24}", *cells)
    same = "the same" if len(adapters) == 1 else "NOT the same"
    print(f"the {len(PLACES) * arguments.repeats} adapters are {same}, bit for bit")


if __name__ == "__main__":
    main()
