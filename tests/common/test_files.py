"""A file is written completely or keeps its previous content."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import killable_training as killable

from tafs.common import files


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
