"""A trained run, and the same run evaluated without interruption."""

from __future__ import annotations

import pytest
from support import evaluated

from tafs.evaluation import evaluate
from tafs.runtime.run_dir import RunDir


@pytest.fixture(scope="session")
def ready(tmp_path_factory) -> RunDir:
    return evaluated.ready(tmp_path_factory.mktemp("ready"))


@pytest.fixture(scope="session")
def uninterrupted(ready, tmp_path_factory) -> RunDir:
    run = evaluated.copied(ready, tmp_path_factory.mktemp("uninterrupted"))
    evaluate.evaluate(run)
    return run
