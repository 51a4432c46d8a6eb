"""A full, broken or read-only disk ends a stage in one line and leaves existing files unchanged.

So does a file that the process may not read.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import synthetic
from support.killable_training import Process, prepare, stage, trained
from support.project_copy import ROOT

from tafs import experiment
from tafs.evaluation import evaluate
from tafs.experiment.specs import ReportSpec
from tafs.report import build
from tafs.runtime.run_dir import RunDir
from tafs.tracking import cli
from tafs.training import train

SIZE = 64_000_000  # bytes of the disk


@dataclass(frozen=True)
class Disk:
    """A small file system in memory."""

    folder: Path

    @contextmanager
    def with_room_for(self, size: int) -> Iterator[None]:
        """Leave `size` bytes free inside the block."""
        ballast = self.folder / "ballast"
        free = shutil.disk_usage(self.folder).free
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - size))
        try:
            yield
        finally:
            ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        remount = ["mount", str(self.folder), "-o"]
        subprocess.run([*remount, "remount,ro"], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run([*remount, "remount,rw"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield Disk(folder)
    subprocess.run(["umount", str(folder)], check=True)


NAMES = ("train", "evaluate", "report")


@dataclass(frozen=True)
class Stage:
    """A stage that runs in copies of a folder, and what it writes without faults."""

    name: str
    ready: Path
    work: Callable[[Path], None]
    size: int  # bytes of the folder afterwards
    writes: int  # calls that write
    outputs: dict[str, bytes]

    def run(self, folder: Path, spoil: Callable[[], object] = lambda: None) -> Process:
        def work() -> None:
            spoil()
            self.work(folder)

        process = Process(work)
        process.wait()
        return process

    def assert_harmless(self, folder: Path, process: Process) -> None:
        """Check that it ended in one line at most, wrote whole files only, and can continue."""
        assert "Traceback" not in process.said
        if process.code == 0:
            assert written(folder, self.outputs) == self.outputs
        else:
            assert process.code == 1
            [line] = [line for line in process.said.splitlines() if line.startswith(self.name)]
            assert len(line) < 600
        found = written(folder, self.outputs)
        assert [name for name in found if found[name] != self.outputs[name]] == []
        again = self.run(folder)
        assert again.code == 0, again.said
        assert written(folder, self.outputs) == self.outputs


def written(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def visible(folder: Path) -> dict[str, bytes]:
    """Read all files except hidden ones and those that contain times."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    timed = {folder / "journal.jsonl", folder / "receipts" / "train.json"}  # the second by digest
    names = [str(f.relative_to(folder)) for f in files if f not in timed]
    return written(folder, [name for name in names if "/." not in f"/{name}"])


def undisturbed(name: str, ready: Path, work: Callable[[Path], None]) -> Stage:
    folder = ready.parent.with_name(f"{name}-done") / ready.name
    shutil.copytree(ready, folder)
    before = visible(folder)

    def counting() -> None:
        count = failing(0, OSError())
        work(folder)
        print(f"\n{count()}", file=sys.stderr)

    process = Process(counting)
    assert process.wait() == 0, process.said
    found = {name: data for name, data in visible(folder).items() if before.get(name) != data}
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return Stage(name, ready, work, size, int(process.said.split()[-1]), found)


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, Stage]:
    scratch = tmp_path_factory.mktemp("stages")
    untrained = prepare(scratch / "train-ready" / "run", 2, "tafs_grpo", checkpoint_every=1)
    copy = shutil.copytree(untrained.folder, scratch / "evaluate-ready" / "run")
    evaluated = trained(RunDir(Path(copy)))
    plan = experiment.load({"scale": "smoke"}, ROOT / "config.yaml")
    spec = next(e for name, e in plan.evaluations.items() if name.startswith("tafs_grpo"))
    settings = tuple(s for s in spec.settings if s.iteration is None)
    text = spec.model_copy(update={"settings": settings}).to_json()
    (evaluated.folder / "evaluation.json").write_text(text)
    root = scratch / "report-ready" / "root"
    runs = synthetic.write_runs(root / "runs", seeds=1)
    table = synthetic.table_spec(runs, name="some", figures={"pareto": "pareto"})
    (root / "report_spec.json").write_text(ReportSpec(scale="smoke", tables=(table,)).to_json())

    def report(folder: Path) -> None:
        os.chdir(ROOT)  # contains claims.yaml
        sys.argv = ["tafs.report.build", str(folder)]
        build.main()

    ready: dict[str, tuple[Path, Callable[[Path], None]]] = {
        "train": (untrained.folder, lambda f: stage("train", train.train_together, RunDir(f))),
        "evaluate": (evaluated.folder, lambda f: stage("evaluate", evaluate.evaluate, RunDir(f))),
        "report": (root, report),
    }
    return {name: undisturbed(name, *given) for name, given in ready.items()}


def failing(step: int, error: OSError) -> Callable[[], int]:
    """Make this process's write number `step` fail; return a counter of its writes."""
    taken = 0

    def counted(real: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal taken
            if writes(*arguments, **keywords):
                taken += 1
                if taken == step:
                    raise error
            return real(*arguments, **keywords)

        return call

    for name in ("write", "pwrite", "fsync", "replace", "mkdir", "ftruncate"):
        setattr(os, name, counted(getattr(os, name), lambda *_, **__: True))

    def opened_to_write(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return bool(set(mode) & set("wax+"))

    io.open = builtins.open = counted(builtins.open, opened_to_write)
    return lambda: taken


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_leaves_existing_files_unchanged(disk, stages, name, trials) -> None:
    tried, draw = stages[name], random.Random(name)
    for _ in trials(f"disk: no space left, {name}", 1, 12):
        folder = Path(shutil.copytree(tried.ready, disk.folder / name / tried.ready.name))
        with disk.with_room_for(draw.randrange(tried.size)):
            process = tried.run(folder)
        tried.assert_harmless(folder, process)
        shutil.rmtree(folder.parent)


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_write_leaves_existing_files_unchanged(stages, name, tmp_path, trials) -> None:
    tried, draw = stages[name], random.Random(name)
    for number in trials(f"disk: I/O error at a write, {name}", 1, 20):
        folder = Path(shutil.copytree(tried.ready, tmp_path / str(number) / tried.ready.name))
        error = OSError(errno.EIO, os.strerror(errno.EIO))
        step = 1 + draw.randrange(tried.writes)
        process = tried.run(folder, partial(failing, step, error))
        tried.assert_harmless(folder, process)


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_disk_leaves_existing_files_unchanged(disk, stages, name, trials) -> None:
    tried = stages[name]
    for _ in trials(f"disk: read-only, {name}", 0, 1):
        folder = Path(shutil.copytree(tried.ready, disk.folder / name / tried.ready.name))
        before = visible(folder)
        with disk.read_only():
            process = tried.run(folder)
        assert process.code == 1
        assert "Read-only file system" in process.said
        assert visible(folder) == before
        tried.assert_harmless(folder, process)
        shutil.rmtree(folder.parent)


def without_privileges() -> None:
    """Let the modes of files bind this process, also if it is root's."""
    version_3, this_process = 0x20080522, 0
    assert ctypes.CDLL(None).capset(struct.pack("Ii", version_3, this_process), bytes(24)) == 0


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("evaluate", "run.json"),
        ("evaluate", "adapter.safetensors"),
        ("report", "runs/*/scores.parquet"),
        ("report", "runs/*/samples.safetensors"),
        ("tracking", "run.json"),
        ("tracking", "adapter.safetensors"),
    ],
)
def test_a_file_that_may_not_be_read_is_named_with_the_reason(
    stages, name, pattern, tmp_path
) -> None:
    ready = stages["evaluate" if name == "tracking" else name].ready
    folder = Path(shutil.copytree(ready, tmp_path / ready.name))
    file = min(folder.glob(pattern))
    file.chmod(0)
    if name == "report":
        spec = json.loads((folder / "report_spec.json").read_text())
        spec["tables"][0]["figures"] = {"images": "images"}
        (folder / "report_spec.json").write_text(json.dumps(spec))

    def sync() -> None:
        without_privileges()
        sys.exit(cli.main(["sync", str(folder), "--store", str(tmp_path / "store")]))

    tracking = name == "tracking"
    process = Process(sync) if tracking else stages[name].run(folder, without_privileges)
    assert process.wait() == 1
    [line] = [line for line in process.said.splitlines() if line.startswith(name)]
    assert line.endswith(f"{file}: cannot be read (Permission denied)")
    assert "Traceback" not in process.said
