"""Commands search their objects rarely for garbage; a library user decides for themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOW = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0));"


@pytest.mark.parametrize(
    ("work", "shown"),
    [
        ("import tafs.common.errors; print(gc.get_threshold())", ["(700, 10, 10)", "False"]),
        (
            "from tafs.common import errors;"
            "errors.run_cli('show', lambda: print(gc.get_threshold()))",
            ["(700, 10, 100)", "True"],
        ),
    ],
    ids=["a library's user", "a command"],
)
def test_only_commands_search_all_objects_rarely_and_not_at_exit(
    work: str, shown: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{SHOW}{work}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == shown
