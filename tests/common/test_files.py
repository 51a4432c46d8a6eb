"""A file is written completely or keeps its previous content."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tafs.common import files


class Killed(BaseException):
    """Stands for SIGKILL: no `except OSError` catches it."""


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_temporary_file_keeps_the_suffix(tmp_path: Path) -> None:
    file = tmp_path / "new" / "grid.png"
    with files.atomic(file) as temporary:
        assert (temporary.suffix, temporary.parent) == (".png", file.parent)
        temporary.write_bytes(b"image")
    assert file.read_bytes() == b"image"
    assert list(file.parent.iterdir()) == [file]


def test_a_text_is_written_without_conversions(tmp_path: Path) -> None:
    files.atomic_text(tmp_path / "a.json", "Zwölf\r\n\n")
    assert (tmp_path / "a.json").read_bytes() == "Zwölf\r\n\n".encode()


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

    with largest_file(4096), pytest.raises(OSError):
        files.atomic_text(path, "x" * 10_000)
    with largest_file(4096), pytest.raises(OSError, match=f"{path}: cannot be written"):
        files.atomic_write(path, lambda t: save_file({"a": torch.zeros(10_000)}, t))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
