"""A lock is one process's at a time and ends with it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tafs.common import locks

HOLD = """
import sys, time
from pathlib import Path
from tafs import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "lock"


@pytest.fixture
def other(file):
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_taken_once_and_again_when_it_is_free(file):
    with locks.held(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()
        with pytest.raises(locks.Busy), locks.held(file):
            pass
    with locks.held(file):
        pass


def test_the_holder_is_named(file, other, monkeypatch):
    with pytest.raises(locks.Busy, match=f"^process {other.pid} on .*, since 20"), locks.held(file):
        pass
    file.write_text(json.dumps({"pid": 7, "host": "h100-3", "job": "4711", "since": 0}))
    assert locks.holder(file).startswith("process 7 on h100-3 (Slurm job 4711), since 19")


def test_a_killed_process_leaves_no_lock(file, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locks.held(file):
        pass


def test_a_holder_is_waited_for(file, other):
    told = []

    def waiting(text: str) -> None:
        told.append(text)
        other.kill()

    with locks.held(file, waiting):
        assert other.wait() == -signal.SIGKILL
    assert [str(other.pid) in text for text in told] == [True]


def test_children_do_not_inherit_the_lock(file):
    with locks.held(file):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with locks.held(file):
            pass
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_holder_that_has_not_said_who_it_is_is_another_process(file, content):
    file.parent.mkdir()
    file.write_text(content)
    assert locks.holder(file) == "another process"


def test_a_link_in_a_locks_place_is_not_followed(file, tmp_path):
    other = tmp_path / "other"
    other.write_text("kept")
    file.parent.mkdir()
    file.symlink_to(other)
    with pytest.raises(OSError, match=str(file)), locks.held(file):
        pass
    assert other.read_text() == "kept"
