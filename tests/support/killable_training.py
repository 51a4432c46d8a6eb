"""Trainings in forked processes that tests can kill, and the comparison of two trainings.

Forks need not import again what the test process has imported.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
from support.forked_processes import free_port

from tafs import experiment
from tafs.experiment import needs, run_inputs
from tafs.runtime import checkpoint, journal, main
from tafs.runtime.run_dir import RunDir
from tafs.training import train
from tafs.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
WRITE = os.write  # tests make os.write fail in the fork, which must still report
TIMES = ("time", "seconds", "images_per_s")  # keys of a record that differ between equal runs


def prepare(
    folder: Path,
    iterations: int,
    variant: str = "flow_grpo",
    hyperparameters: Mapping[str, Any] | None = None,
    **settings: Any,
) -> RunDir:
    """Write run.json of a smoke-scale run; `settings` are fields of `TrainingSpec`."""
    runs = experiment.load({"scale": "smoke"}, ROOT / "config.yaml").runs.values()
    spec = next(run for run in runs if run.variant == variant)
    assert spec.training is not None
    changed = {
        "training": spec.training.model_copy(update={"iterations": iterations, **settings}),
        "hyperparameters": {**spec.hyperparameters, **(hyperparameters or {})},
        "snapshots": tuple(sorted({1, iterations // 2})),
    }
    run = RunDir(folder)
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(spec.model_copy(update=changed).to_json())
    return run


@contextmanager
def before(patch: pytest.MonkeyPatch, method: str, at: int, action: Any) -> Iterator[None]:
    """Inside the block, call `action` before the Trainer's `iterate` or `save` of one iteration."""
    original = getattr(Trainer, method)

    def called(self: Trainer, *given: Any) -> Any:
        if at == given[0 if method == "iterate" else 2]:
            action()
        return original(self, *given)

    with patch.context() as inner:
        inner.setattr(Trainer, method, called)
        yield


def interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside the block, writing beyond `size` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Process:
    """A fork that runs `work` with some variables added to its environment, and can be killed."""

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
            except BaseException as error:
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
        """Return its exit code, or minus the signal that ended it; `said` is its stderr."""
        if self.code is None:
            with os.fdopen(self._read, "rb") as pipe:
                self.said = pipe.read().decode()
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
        return self.code


def stage(name: str, work: main.Work, run: RunDir, options: Sequence[str] = ()) -> None:
    """Run a stage as its command `python -m ... RUN_DIR OPTIONS` does."""
    sys.argv = [name, str(run.folder), *options]
    main.run_stage(name, work)


def training(run: RunDir, processes: int = 1, options: Sequence[str] = ()) -> list[Process]:
    """Start the processes that train a run together."""
    server = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    server["WORLD_SIZE"] = str(processes)
    return [
        Process(
            lambda: stage("train", train.train_together, run, options),
            {**server, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]


def trained(run: RunDir, processes: int = 1) -> RunDir:
    """Train a run to its end."""
    started = training(run, processes)
    codes = [process.wait() for process in started]
    assert codes == [0] * processes, [process.said for process in started]
    return run


def iterations(run: RunDir) -> int:
    """Count the iterations that the training has recorded."""
    try:
        return len(journal.iterations(run.state / "journal.jsonl"))
    except FileNotFoundError:  # not started yet
        return 0


def wait_for(run: RunDir, count: int, process: Process) -> None:
    """Wait until the training has recorded `count` iterations or ended."""
    while iterations(run) < count and not os.waitid(
        os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(0.001)


def assert_same_training(run: RunDir, other: RunDir) -> None:
    """Compare adapters, snapshots, optimisers, averages and journals bit for bit.

    Random streams have no state; equal numbers show in all of these.
    """
    assert run.adapter.read_bytes() == other.adapter.read_bytes()
    for iteration in run_inputs.run_spec(other).snapshots:
        assert run.snapshot(iteration).read_bytes() == other.snapshot(iteration).read_bytes()
    assert records(run) == records(other)
    states = [
        checkpoint.load(r.checkpoints, needs.training(run_inputs.run_spec(r))) for r in (run, other)
    ]
    found, expected = (
        {name: tensor.numpy().tobytes() for name, tensor in state.tensors.items()}
        for state in states
    )
    assert {name.partition("/")[0] for name in expected} == {"lora", "ema", "optimizer"}
    assert found == expected
    kept = [{k: v for k, v in state.values.items() if k != "seconds"} for state in states]
    assert kept[0] == kept[1]


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def records(run: RunDir) -> list[dict[str, Any]]:
    """Return the journal's record of every iteration without times."""
    records = journal.iterations(run.journal)
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]
