"""Measure what tracking costs a training whose server is dead: `python benchmarks/tracking.py`.

The same training runs alone, and beside `python -m tafs.tracking.cli sync --every` to a server
that refuses connections and to one that accepts them and never answers. The order changes with each
repeat. The table shows medians over the repeats and ratios to the training alone with their range:
of the trainer's CPU time, which other work on the machine hardly changes, and of its wall time. The
row "alone again" shows the noise.
"""

from __future__ import annotations

import argparse
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

from tafs.experiment import plan

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
ALONE, AGAIN = "alone", "alone again"
REFUSES, SILENT = "the server is gone", "the server never answers"
PLACES = (ALONE, REFUSES, AGAIN, SILENT)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def describe(folder: Path, iterations: int) -> Path:
    """Write the run.json of a TAFS-GRPO run of the smoke scale; the run's folder."""
    specs = plan.load({"scale": "smoke"}, ROOT / "config.yaml").runs.values()
    spec = next(spec for spec in specs if spec.variant == "tafs_grpo")
    assert spec.training is not None
    training = spec.training.model_copy(update={"iterations": iterations})
    spec = spec.model_copy(update={"training": training, "snapshots": ()})
    run = folder / "runs" / spec.name
    run.mkdir(parents=True)
    (run / "run.json").write_text(spec.to_json(), encoding="utf-8")
    return run


@contextmanager
def tracked(place: str, folder: Path, every: float) -> Iterator[None]:
    """Sync in the background; the first sync has failed before the block begins."""
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
            command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        try:
            assert loop.stderr
            line = loop.stderr.readline()
            if url not in line:
                raise RuntimeError(f"unexpected line of the sync: {line}")
            yield
        finally:
            loop.send_signal(signal.SIGTERM)
            loop.wait()


def train(place: str, iterations: int, every: float) -> tuple[float, float, bytes]:
    """The trainer's CPU seconds and wall seconds, and its adapter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = describe(folder, iterations)
        with tracked(place, folder, every):
            start = time.perf_counter()
            command = [sys.executable, "-m", "tafs.training.train", str(run)]
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            trainer = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **silent)
            _, status, used = os.wait4(trainer.pid, 0)
            wall = time.perf_counter() - start
        if status:
            raise RuntimeError(f"the training failed ({status})")
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
    same = "identical" if len(adapters) == 1 else "NOT identical"
    print(f"the {len(PLACES) * arguments.repeats} adapters are {same}")


if __name__ == "__main__":
    main()
