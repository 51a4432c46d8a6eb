"""What the environment says in numbers."""

import os
import subprocess
import sys

import pytest

from tafs.common.env import whole_number


def test_a_value_is_read_and_its_absence_is_the_default(monkeypatch):
    monkeypatch.setenv("TAFS_THREADS", "12")
    assert whole_number("TAFS_THREADS", "give how many", "1") == 12
    monkeypatch.delenv("TAFS_THREADS")
    assert whole_number("TAFS_THREADS", "give how many", "1") == 1


@pytest.mark.parametrize("given", ["", "-1", "1.5", "two", "0", " 3", "1e3"])
def test_what_is_no_whole_number_from_the_least_on_is_named(given, monkeypatch):
    monkeypatch.setenv("TAFS_THREADS", given)
    with pytest.raises(ValueError) as raised:
        whole_number("TAFS_THREADS", "give how many", "1", 1)
    problem = f"TAFS_THREADS: {given!r} is no whole number from 1; give how many"
    assert str(raised.value) == problem


def test_a_stage_ends_in_one_line_for_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tafs.evaluation.evaluate", str(tmp_path)],
        env={**os.environ, "TAFS_THREADS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "TAFS_THREADS: '0' is no whole number from 1" in done.stderr
