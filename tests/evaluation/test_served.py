"""The server behind a metric: started, asked, stopped, and what is said when that fails."""

import json
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from tafs.common import errors
from tafs.evaluation import served

ROOT = Path(__file__).resolve().parents[2]
SERVER = [sys.executable, str(ROOT / "tests" / "support" / "chat_server.py"), "{port}"]


def test_the_server_is_there_inside_the_block_and_gone_after_it(tmp_path):
    with served.serving(SERVER, tmp_path, tmp_path / "server.log") as url:
        assert urlopen(f"{url}/v1/models", timeout=5).status == 200
        assert url in (tmp_path / "server.log").read_text()
    with pytest.raises(OSError):
        urlopen(f"{url}/v1/models", timeout=5)


def test_the_servers_own_processes_end_with_it(tmp_path):
    """As those of a server that puts one on each GPU."""
    child = "import time; time.sleep(60)"
    code = (
        "import runpy, subprocess, sys\n"
        f"started = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(started.pid))\n"
        f"sys.argv = ['chat_server.py', sys.argv[1]]\n"
        f"runpy.run_path({SERVER[1]!r}, run_name='__main__')\n"
    )
    with served.serving([sys.executable, "-c", code, "{port}"], tmp_path, tmp_path / "log"):
        pid = (tmp_path / "pid").read_text()
        assert Path(f"/proc/{pid}").exists()
    deadline = time.monotonic() + 10
    while (state := _state(pid)) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state in ("", "Z")  # a zombie waits for its new parent alone


def _state(pid: str) -> str:
    done = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
    return done.stdout.strip()[:1]


def test_a_server_that_ends_at_once_is_quoted(tmp_path):
    code = "print('loading', flush=True); raise SystemExit('out of memory')"
    command = [sys.executable, "-c", code]
    with (
        pytest.raises(errors.RunFailed, match="ended before it was ready; it said: out of memory"),
        served.serving(command, tmp_path, tmp_path / "server.log"),
    ):
        pass
    assert "loading" in (tmp_path / "server.log").read_text()


def test_a_program_that_is_not_there_is_named(tmp_path):
    with (
        pytest.raises(errors.RunFailed, match="no-such-server: cannot be started"),
        served.serving(["no-such-server"], tmp_path, tmp_path / "server.log"),
    ):
        pass


@pytest.mark.parametrize("given", [None, "", "serve me", json.dumps({"a": 1}), json.dumps([1])])
def test_a_command_that_is_no_list_is_refused_with_where_it_comes_from(monkeypatch, given):
    if given is None:
        monkeypatch.delenv("TAFS_SERVER", raising=False)
    else:
        monkeypatch.setenv("TAFS_SERVER", given)
    with pytest.raises(ValueError, match="TAFS_SERVER: holds no command.*evaluation.server"):
        served._command()
