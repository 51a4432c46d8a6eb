"""Damage to the resume state is detected and costs at most one checkpoint interval."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.killable_training import Process

from tafs.runtime import checkpoint

NEEDS = {"seed": 1}


def content(iteration: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the small equivalent of a training's state."""
    generator = torch.Generator().manual_seed(iteration)
    names = [f"{kind}/{n}" for kind in ("lora", "ema", "optimizer") for n in range(4)]
    tensors = {name: torch.randn(16, 8, generator=generator) for name in names}
    return tensors, {"seconds": 1.5 * iteration, "optimizer": {"param_groups": [{"lr": 3e-4}]}}


def save(folder: Path, iteration: int) -> None:
    checkpoint.save(folder, NEEDS, iteration, *content(iteration))


def loaded(folder: Path) -> int:
    """Return the iteration of the loaded state, which must be as it was saved."""
    state = checkpoint.load(folder, NEEDS)
    assert state is not None
    tensors, values = content(state.iteration)
    assert state.values == values
    assert state.tensors.keys() == tensors.keys()
    assert all(torch.equal(state.tensors[name], tensors[name]) for name in tensors)
    return state.iteration


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    for iteration in (10, 20):
        save(folder, iteration)
    return folder


def newest(folder: Path) -> list[Path]:
    return sorted(max(p for p in folder.iterdir() if p.name.isdecimal()).iterdir())


@pytest.mark.parametrize("fault", ["one bit flipped", "truncated"])
def test_after_damage_to_the_newest_state_the_previous_one_is_used(
    saved, tmp_path, trials, fault
) -> None:
    draw = random.Random(7)
    for number in trials(f"checkpoint: {fault}", 10, 100):
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        file = draw.choice(newest(folder))
        data = bytearray(file.read_bytes())
        place = draw.randrange(len(data))
        if fault == "truncated":
            del data[place:]
        else:
            data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        # A bit of the manifest's white space may not change its meaning.
        whole = fault != "truncated" and file.name == checkpoint.MANIFEST
        assert loaded(folder) in ((10, 20) if whole else (10,))


def saving(folder: Path, step: int, after: bool) -> Callable[[], None]:
    """Return what saves, and kills its process around its fsync or rename number `step`."""
    taken = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == step and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **keywords)
            if taken == step and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def work() -> None:
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        save(folder, 30)

    return work


def test_a_kill_around_any_fsync_or_rename_costs_one_interval_at_most(
    saved, tmp_path, trials
) -> None:
    """Fsync of three files and their folder, the rename, fsync of the parent: six steps."""
    points = [(step, after) for step in range(1, 7) for after in (False, True)]
    ends = []
    for number in trials("checkpoint: kill -9 before or after an fsync or rename", 12, 12):
        step, after = points[number]
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        assert Process(saving(folder, step, after)).wait() == -signal.SIGKILL
        ends.append(loaded(folder))
        save(folder, 40)
        assert loaded(folder) == 40
        assert len(list(folder.iterdir())) == checkpoint.KEPT
    # Before the rename, the fifth step, the previous state is used, afterwards the new one.
    assert ends == [20] * 9 + [30] * 3
