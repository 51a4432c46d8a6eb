"""Trainings in processes of their own, which can be killed, and what two of them must share.

The processes are forks, which need not import what is imported here.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from tafs.experiment import runs as runs_
from tafs.experiment import validate
from tafs.runtime import checkpoint, distributed, journal, main, run_dir
from tafs.training import train

ROOT = Path(__file__).resolve().parents[2]
WRITE = os.write  # the work may have spoilt it: it must not keep a fork from ending
TOLD = ("time", "seconds", "images_per_s")  # of a record: how long it took, and not what was done


def prepare(
    folder: Path, iterations: int, variant: str = "flow_grpo", **settings: Any
) -> run_dir.RunDir:
    """A run of smoke scale, by default of a method whose model is an average over its updates."""
    runs = runs_.runs(validate.read(ROOT / "config.yaml", {"scale": "smoke"}))
    description = next(r for r in runs.values() if r.variant == variant).describe()
    description["settings"] = {**description["settings"], "iterations": iterations, **settings}
    description["snapshots"] = [1, iterations // 2]
    run = run_dir.RunDir(folder)
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps(description))
    return run


class Process:
    """A fork that does some work and can be killed.

    Args:
        environment: of it, on top of this process's.
    """

    def __init__(self, work: Callable[[], None], environment: dict[str, str] | None = None) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            os.environ.update(environment or {})
            said = io.StringIO()
            code = 1
            try:
                with redirect_stderr(said):
                    work()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException as error:  # what would be a traceback
                said.write(f"Traceback: {type(error).__name__}: {error}\n")
            finally:
                try:
                    WRITE(write, said.getvalue().encode()[-60_000:])
                finally:
                    os._exit(code)
        os.close(write)
        self._read = read
        self.code: int | None = None
        self.said = ""

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, negative that of a signal; what it said is in `said`."""
        if self.code is None:
            with os.fdopen(self._read, "rb") as pipe:
                self.said = pipe.read().decode()
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
        return self.code


def stage(name: str, work: Callable[[run_dir.RunDir], None], run: run_dir.RunDir) -> None:
    """As `python -m tafs.NAME RUN_DIR`."""
    sys.argv = [f"tafs.{name}", str(run.folder)]
    main.run_stage(name, work)


def training(
    run: run_dir.RunDir, processes: int = 1, environment: dict[str, str] | None = None
) -> list[Process]:
    """The processes that train a run, as torchrun would have started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work() -> None:
        distributed.GRACE = 0.5
        stage("train", train.train_together, run)

    server = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    server |= environment or {}
    return [
        Process(work, {**server, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]


def trained(run: run_dir.RunDir, processes: int = 1) -> run_dir.RunDir:
    """The run, once it is trained."""
    started = training(run, processes)
    codes = [process.wait() for process in started]
    assert codes == [0] * processes, [process.said for process in started]
    return run


def iterations(run: run_dir.RunDir) -> int:
    """How many the training has recorded."""
    try:
        return len(journal.iterations(run.state / "journal.jsonl"))
    except FileNotFoundError:  # also where it is just begun anew
        return 0


def wait_for(run: run_dir.RunDir, count: int, process: Process) -> None:
    """Until the training has recorded so many iterations or ended."""
    while iterations(run) < count and not os.waitid(
        os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(0.001)


def assert_same_training(run: run_dir.RunDir, other: run_dir.RunDir) -> None:
    """Adapter, snapshots, optimiser, averages and journal, bit for bit.

    Random numbers come from streams of (seed, name, iteration) that have no state to be kept: what
    they are shows in all of these.
    """
    assert run.adapter.read_bytes() == other.adapter.read_bytes()
    for iteration in other.description["snapshots"]:
        assert run.snapshot(iteration).read_bytes() == other.snapshot(iteration).read_bytes()
    assert facts(run) == facts(other)
    states = [checkpoint.load(r.checkpoints, r.fingerprint()) for r in (run, other)]
    found, expected = (
        {name: tensor.numpy().tobytes() for name, tensor in state.tensors.items()}
        for state in states
    )
    assert {name.partition("/")[0] for name in expected} == {"lora", "ema", "optimizer"}
    assert found == expected
    kept = [{k: v for k, v in state.values.items() if k != "seconds"} for state in states]
    assert kept[0] == kept[1]


def facts(run: run_dir.RunDir) -> list[dict[str, Any]]:
    """What the journal says of every iteration, but for times."""
    records = journal.iterations(run.journal)
    return [{k: v for k, v in record.items() if k not in TOLD} for record in records]
