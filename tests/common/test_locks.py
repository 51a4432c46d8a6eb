"""A lock is held by one process at a time and ends with it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tafs.common import locks
from tafs.common.errors import RunFailed

HOLD = """
import sys, time
from pathlib import Path
from tafs.common import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "lock"


@pytest.fixture
def other(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_can_be_taken_again_only_when_it_is_free(file: Path) -> None:
    busy = pytest.raises(locks.Busy, match=f"^process {os.getpid()}")
    with locks.held(file), busy, locks.held(file):
        pass
    with locks.held(file):
        pass


def test_the_holder_is_named(file: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(locks.Busy, match=f"^process {other.pid} on .*, since 20"), locks.held(file):
        pass
    file.write_text(json.dumps({"pid": 7, "host": "h100-3", "job": "4711", "since": 0}))
    assert locks.holder(file).startswith("process 7 on h100-3 (Slurm job 4711), since 19")


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}'])
def test_a_holder_that_is_not_written_yet_is_another_process(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    assert locks.holder(file) == "another process"


def test_waiting_names_the_holder_once_and_ends_when_it_is_killed(
    file: Path, other: subprocess.Popen[str]
) -> None:
    told = []

    def waiting(text: str) -> None:
        told.append(text)
        other.kill()

    with locks.held(file, waiting):
        assert other.wait() == -signal.SIGKILL
    assert [str(other.pid) in text for text in told] == [True]


@pytest.mark.parametrize("fork", [True, False])
def test_child_processes_do_not_inherit_the_lock(file: Path, fork: bool) -> None:
    with locks.held(file):
        if fork:
            pid = os.fork()
            if not pid:
                signal.pause()
        else:
            code = "import time; time.sleep(600)"
            pid = subprocess.Popen([sys.executable, "-c", code]).pid
    try:
        with locks.held(file):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    file: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    problem = f"^{file}: the file system does not support locks"
    with pytest.raises(RunFailed, match=problem), locks.held(file):
        pass


def test_a_symbolic_link_in_place_of_the_lock_is_not_followed(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("kept")
    file.parent.mkdir()
    file.symlink_to(other)
    with pytest.raises(OSError, match=str(file)), locks.held(file):
        pass
    assert other.read_text() == "kept"


def test_a_lock_until_the_process_ends_is_released_before_pythons_modules_are_gone(
    file: Path,
) -> None:
    """The handler that was registered first runs last."""
    script = (
        "import atexit, sys; from pathlib import Path; file = Path(sys.argv[1])\n"
        "def check():\n    with locks.held(file): print('free')\n"
        "atexit.register(check)\n"
        "from tafs.common import locks\n"
        "locks.until_exit.enter_context(locks.held(file))\n"
        "try:\n    check()\nexcept locks.Busy: print('held')\n"
    )
    command = [sys.executable, "-c", script, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("held\nfree\n", "")
