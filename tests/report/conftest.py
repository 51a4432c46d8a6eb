"""Run folders that the tests of the report share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import synthetic


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base model and two methods with two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    return synthetic.write_runs(folder, seeds=2, prompts=18, images=2, iterations=6, nfe=(1, 4, 8))


@pytest.fixture
def own_runs(runs: list[Path], tmp_path: Path) -> list[Path]:
    """A copy of `runs` that a test may change."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in runs]
