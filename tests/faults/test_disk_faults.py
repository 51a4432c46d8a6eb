"""A full, broken or read-only disk: one line, and what was there is as it was."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import shutil
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

from tafs.evaluation import evaluate
from tafs.experiment import evaluations, validate
from tafs.report import build
from tafs.runtime import run_dir
from tafs.training import train

SIZE = 64_000_000  # bytes of the disk


@dataclass(frozen=True)
class Disk:
    """A file system of its own, in memory."""

    folder: Path

    @contextmanager
    def with_room_for(self, size: int) -> Iterator[None]:
        """Nearly full inside the block."""
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
        self._remount("ro")
        try:
            yield
        finally:
            self._remount("rw")

    def _remount(self, how: str) -> None:
        command = ["mount", "-o", f"remount,{how}", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield Disk(folder)
    subprocess.run(["umount", str(folder)], check=True)


# -- what writes -----------------------------------------------------------------------------------

NAMES = ("train", "evaluate", "compare")


@dataclass(frozen=True)
class Stage:
    """A stage that is run in copies of a folder, and what it writes undisturbed."""

    name: str
    ready: Path
    work: Callable[[Path], None]
    size: int  # bytes in the end
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
        """It ended well or in one line, all files that are there are whole, and it can go on."""
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
    """All files but hidden ones, and those that tell times."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    names = [str(f.relative_to(folder)) for f in files if f.name != "journal.jsonl"]
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
    judged = trained(run_dir.RunDir(Path(copy)))
    plan = evaluations.evaluations(validate.read(ROOT / "config.yaml", {"scale": "smoke"}))
    how = dict(next(h for name, h in plan.items() if name.startswith("tafs_grpo")))
    how["settings"] = [s for s in how["settings"] if s["iteration"] is None]
    (judged.folder / "evaluation.json").write_text(json.dumps(how))
    root = scratch / "compare-ready" / "root"
    runs = synthetic.write_runs(root / "runs", seeds=1)
    table = {**synthetic.table2(runs, name="some"), "figures": {"pareto": "pareto"}}
    (root / "report_spec.json").write_text(json.dumps({"tables": [table]}))

    def compare(folder: Path) -> None:
        os.chdir(ROOT)  # where claims.yaml is
        sys.argv = ["tafs.report.build", str(folder)]
        build.main()

    def of(name: str, work: Callable[[run_dir.RunDir], None]) -> Callable[[Path], None]:
        return lambda folder: stage(name, work, run_dir.RunDir(folder))

    return {
        "train": undisturbed("train", untrained.folder, of("train", train.train_together)),
        "evaluate": undisturbed("evaluate", judged.folder, of("evaluate", evaluate.evaluate)),
        "compare": undisturbed("compare", root, compare),
    }


# -- what fails ------------------------------------------------------------------------------------


def failing(step: int, error: OSError) -> Callable[[], int]:
    """From now on this process's write of that number fails; how many there were so far."""
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
def test_a_full_disk_leaves_what_was_there(disk, stages, name, trials) -> None:
    tried, draw = stages[name], random.Random(name)
    for number in trials(f"disk: no space left, {name}", 1, 12):
        folder = disk.folder / f"{name}-{number}" / tried.ready.name
        shutil.copytree(tried.ready, folder)
        with disk.with_room_for(draw.randrange(tried.size)):
            process = tried.run(folder)
        tried.assert_harmless(folder, process)
        shutil.rmtree(folder.parent)


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_write_leaves_what_was_there(stages, name, tmp_path, trials) -> None:
    tried, draw = stages[name], random.Random(name)
    for number in trials(f"disk: I/O error at a write, {name}", 1, 20):
        folder = tmp_path / str(number) / tried.ready.name
        shutil.copytree(tried.ready, folder)
        error = OSError(errno.EIO, os.strerror(errno.EIO))
        step = 1 + draw.randrange(tried.writes)
        process = tried.run(folder, partial(failing, step, error))
        tried.assert_harmless(folder, process)


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_disk_leaves_what_was_there(disk, stages, name, trials) -> None:
    tried = stages[name]
    for number in trials(f"disk: read-only, {name}", 0, 1):
        folder = disk.folder / f"{name}-{number}" / tried.ready.name
        shutil.copytree(tried.ready, folder)
        before = visible(folder)
        with disk.read_only():
            process = tried.run(folder)
        assert process.code == 1
        assert "Read-only file system" in process.said
        assert visible(folder) == before
        tried.assert_harmless(folder, process)
        shutil.rmtree(folder.parent)
