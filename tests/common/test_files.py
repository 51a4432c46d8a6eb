"""A file is written completely or keeps its previous content."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file
from support import evaluated
from support import killable_training as killable

from tafs.common import files
from tafs.evaluation import evaluate


def _copy_with_mode(path: Path) -> None:
    source = path.with_name("source")
    source.write_text("content")
    source.chmod(0o700)
    shutil.copy(source, path)
    source.unlink()


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("content"),
    "tensors": lambda path: save_file({"a": torch.zeros(2)}, path),
    "arrays": lambda path: safetensors.numpy.save_file({"a": np.zeros(2)}, path),
    "table": lambda path: pd.DataFrame({"a": [1]}).to_parquet(path),
    "archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "copy": _copy_with_mode,
}


@pytest.fixture(params=[0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def modes(folder: Path) -> dict[str, int]:
    """The permissions of all files below a folder."""
    found = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.stat().st_mode & 0o777 for file in found}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_of_every_kind_has_the_umasks_mode(umask: int, kind: str, tmp_path: Path) -> None:
    for _ in range(2):  # also in place of a file with another mode
        files.atomic_write(tmp_path / "file", WRITERS[kind])
        assert modes(tmp_path) == {"file": 0o666 & ~umask}
        (tmp_path / "file").chmod(0o400)


@pytest.mark.parametrize("umask", [0o002, 0o077], ids=oct, indirect=True)
def test_every_file_of_a_trained_and_evaluated_run_has_the_umasks_mode(
    umask: int, tmp_path: Path
) -> None:
    run = evaluated.ready(tmp_path)
    process = killable.Process(lambda: killable.stage("evaluate", evaluate.evaluate, run))
    assert process.wait() == 0, process.said
    found = modes(run.folder)
    written = {run.adapter, run.snapshot(1), run.journal, run.samples, run.scores, run.images}
    assert {str(file.relative_to(run.folder)) for file in written} <= set(found)
    assert set(found.values()) == {0o666 & ~umask}


def test_a_file_that_cannot_be_opened_is_named_with_the_reason(tmp_path: Path) -> None:
    message = f"{tmp_path}: cannot be read \\(Is a directory\\)"
    with pytest.raises(IsADirectoryError, match=message):
        files.check_readable(tmp_path)
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        files.check_readable(tmp_path / "missing")


class Killed(BaseException):
    """Stands for SIGKILL: no `except OSError` catches it."""


def test_a_text_is_written_without_conversions_and_keeps_its_suffix_meanwhile(tmp_path) -> None:
    file = tmp_path / "new" / "a.json"
    files.atomic_text(file, "Zwölf\r\n\n")
    assert file.read_bytes() == "Zwölf\r\n\n".encode()
    assert list(file.parent.iterdir()) == [file]
    with files.atomic(file) as temporary:
        assert (temporary.suffix, temporary.parent) == (".json", file.parent)
        temporary.touch()


@pytest.mark.parametrize("shared", [False, True])
def test_only_the_one_writer_of_a_file_removes_what_a_killed_one_left(
    tmp_path: Path, shared: bool
) -> None:
    file, left = tmp_path / "run.json", tmp_path / ".tmp-1-run.json"
    left.write_text("half")
    files.atomic_text(file, "new", shared=shared)
    assert file.read_text() == "new"
    assert left.exists() == shared


def test_a_kill_at_any_step_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    left = 0  # steps until the kill

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args, **kwargs)

        return step

    for name in ("mkdir", "replace", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "write_bytes", counted(Path.write_bytes))
    seen = []
    for steps in range(6):
        path.write_text("old")
        left = steps
        try:
            files.atomic_text(path, "new")
            seen.append("done")
        except Killed:
            seen.append(path.read_text())
    assert seen == ["old"] * 4 + ["new", "done"]  # mkdir, write, fsync, replace, fsync


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_text("old")
    with killable.largest_file(4096), pytest.raises(OSError):
        files.atomic_text(path, "x" * 10_000)
    with killable.largest_file(4096), pytest.raises(OSError, match=f"{path}: cannot be written"):
        files.atomic_write(path, lambda t: save_file({"a": torch.zeros(10_000)}, t))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
