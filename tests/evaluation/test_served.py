"""The chat server behind a metric: its process, its scores, and its failures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pandas as pd
import pytest
from support.chat_server import brightness_grade
from support.evaluated import copied

from tafs.assets.sources import ShapesAssets
from tafs.common import errors
from tafs.evaluation import check_rewards, image_archive, served
from tafs.rewards import chat, golden, unifiedreward
from tafs.rewards.unifiedreward import UnifiedReward
from tafs.runtime.run_dir import RunDir

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "chat_server.py"
SERVER = [sys.executable, str(SCRIPT), "{port}"]


def test_the_server_runs_inside_the_block_only(tmp_path):
    with served.serving(SERVER, tmp_path, tmp_path / "server.log") as url:
        assert urlopen(f"{url}/v1/models", timeout=5).status == 200
        assert url in (tmp_path / "server.log").read_text()
    with pytest.raises(OSError):
        urlopen(f"{url}/v1/models", timeout=5)


@pytest.mark.parametrize("stubborn", [False, True])
def test_the_servers_own_processes_end_with_it(tmp_path, monkeypatch, stubborn):
    """As of a server with one process per GPU; also if it ignores SIGTERM."""
    monkeypatch.setattr(served, "STOP_TIMEOUT_S", 0.2)
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    child = f"{ignore}import time; time.sleep(60)"
    code = ignore + (
        "import runpy, subprocess, sys\n"
        f"started = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(started.pid))\n"
        f"sys.argv = ['chat_server.py', sys.argv[1]]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    with served.serving([sys.executable, "-c", code, "{port}"], tmp_path, tmp_path / "log"):
        pid = (tmp_path / "pid").read_text()
        assert Path(f"/proc/{pid}").exists()
    deadline = time.monotonic() + 10
    while (state := _state(pid)) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state in ("", "Z")  # a zombie has ended


def _state(pid: str) -> str:
    done = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
    return done.stdout.strip()[:1]


@pytest.mark.parametrize(
    "code, message",
    [
        ("raise SystemExit('out of memory')", "ended before it was ready; .*log: out of memory"),
        ("import time; time.sleep(60)", "is not ready after 4 s.*log: loading"),
    ],
)
def test_a_server_that_does_not_start_is_quoted(tmp_path, monkeypatch, code, message):
    monkeypatch.setattr(served, "START_TIMEOUT_S", 4)
    command = [sys.executable, "-c", f"print('loading', flush=True); {code}"]
    log = tmp_path / "server.log"
    with pytest.raises(errors.RunFailed, match=message), served.serving(command, tmp_path, log):
        pass


def test_a_missing_program_is_named(tmp_path):
    starting = served.serving(["no-such-server"], tmp_path, tmp_path / "server.log")
    with pytest.raises(errors.RunFailed, match="no-such-server: cannot be started"), starting:
        pass


@pytest.mark.parametrize("part", ['{"image": 1}', "{}", "{0}", "{", "{port.x}", "{other}"])
def test_other_braces_in_a_command_are_refused(tmp_path, part):
    starting = served.serving(["serve", part], tmp_path, tmp_path / "server.log")
    with pytest.raises(ValueError, match="has braces other than those of {folder} and"), starting:
        pass


@pytest.mark.parametrize("given", ["", "serve me", "[1]", "[]", "{}", '"serve"', '["a", null]'])
def test_a_command_that_is_not_a_list_of_strings_is_refused(monkeypatch, given):
    monkeypatch.setenv("TAFS_SERVER", given)
    with pytest.raises(ValueError, match="TAFS_SERVER: not a command.*evaluation.server"):
        served._command("unifiedreward")


def test_each_metric_has_its_own_command(monkeypatch):
    monkeypatch.setenv("TAFS_SERVER", json.dumps({"geneval2": ["vllm", "serve"]}))
    assert served._command("geneval2") == ["vllm", "serve"]
    with pytest.raises(ValueError, match="no command of 'unifiedreward'; give it in evaluation"):
        served._command("unifiedreward")


class Impatient(UnifiedReward):
    """The client without long waits."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, timeout=3.0, attempts=2, **settings)


@pytest.fixture
def run(uninterrupted, tmp_path, monkeypatch) -> RunDir:
    """An evaluated run, whose images the chat server can score."""
    monkeypatch.setattr(unifiedreward, "UnifiedReward", Impatient)
    monkeypatch.setattr(chat, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(ShapesAssets, "folder", lambda self, resource: tmp_path / resource)
    monkeypatch.setenv("TAFS_SERVER", json.dumps(SERVER))
    return copied(uninterrupted, tmp_path)


def test_served_scores_join_the_other_scores(run, capsys):
    true = {
        tuple(key): brightness_grade((image.permute(1, 2, 0) * 255).round().byte().numpy())
        for part, images in image_archive.read(run.images, 8)
        for key, image in zip(part, images, strict=True)
    }
    served.score_served(run)
    table, others = pd.read_parquet(run.served_scores), pd.read_parquet(run.scores)
    assert set(table["metric"]) == {"unifiedreward"}
    assert set(table.columns) == set(others.columns)
    keys = ["run", "method", "seed", "iteration", "sampler", "nfe", "prompt", "tag", "image"]
    own = others[others["metric"] == "clip"]
    assert len(table.merge(own, on=keys, validate="one_to_one")) == len(table) == len(own)
    fields = list(image_archive.Key._fields)
    for *key, value in table[[*fields, "value"]].itertuples(index=False):
        assert value == pytest.approx(true[tuple(key)], abs=0.02)  # the client resizes the image
    assert not run.eval_state.exists()
    assert json.loads(capsys.readouterr().out)["asked"] == str(len(table))


def test_a_killed_job_asks_for_the_other_images_only(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(served, "BATCH", 5)
    undisturbed = copied(run, tmp_path / "whole")
    served.score_served(undisturbed)
    whole = capsys.readouterr().out
    add, left = served._Scored.add, [2]

    def killed(self: Any, *scored: Any) -> None:
        add(self, *scored)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    asked: list[int] = []
    ask = UnifiedReward._score
    with monkeypatch.context() as patched:
        patched.setattr(served._Scored, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            served.score_served(run)
    monkeypatch.setattr(
        UnifiedReward, "_score", lambda self, *image: asked.append(1) or ask(self, *image)
    )
    served.score_served(run)
    expected = pd.read_parquet(undisturbed.served_scores)
    assert sum(asked) == len(expected) - 2 * 5 > 0
    pd.testing.assert_frame_equal(pd.read_parquet(run.served_scores), expected)
    assert capsys.readouterr().out == whole
    # Other images have other needs, so nothing of them is kept.
    assert served._Scored.read(run, {"images": "other"}).values == []


@pytest.mark.parametrize(
    "fault, reason",
    [("nonsense=1.0", "no_score"), ("slow=1.0", "timeout")],
)
def test_a_server_that_answers_garbage_or_hangs_leaves_no_scores(run, monkeypatch, fault, reason):
    monkeypatch.setenv("TAFS_SERVER", json.dumps([*SERVER, fault]))
    with pytest.raises(errors.RunFailed, match=f"images have no score from .*{reason}"):
        served.score_served(run)
    assert not run.served_scores.exists() and run.eval_state.exists()


def test_a_server_that_dies_leaves_no_scores(run, monkeypatch):
    code = (
        "import os, runpy, sys\n"
        f"found = runpy.run_path({str(SCRIPT)!r})\n"
        "found['Handler'].do_POST = lambda self: os._exit(1)\n"
        "found['main']()\n"
    )
    monkeypatch.setenv("TAFS_SERVER", json.dumps([sys.executable, "-c", code, "{port}"]))
    with pytest.raises(errors.RunFailed, match="unifiedreward: .*http://127.0.0.1:"):
        served.score_served(run)
    assert not run.served_scores.exists() and run.eval_state.exists()


def test_the_server_must_reproduce_its_golden_scores(run, tmp_path, monkeypatch):
    file, out = tmp_path / "golden.json", tmp_path / "out.json"
    monkeypatch.setattr(ShapesAssets, "golden_scores", file)
    monkeypatch.setattr(ShapesAssets, "metrics", lambda self, *_: ("clip",))
    monkeypatch.setattr(golden, "SIDE", 24)
    check_rewards.check_rewards(run, out)
    assert set(json.loads(out.read_text())) == {"clip", "unifiedreward"}
    served.score_served(run)
    stored = json.loads(file.read_text())
    [expected] = stored["unifiedreward"].values()
    expected["disc"] += 0.2
    file.write_text(json.dumps(stored))
    with pytest.raises(errors.RunFailed, match="reward unifiedreward: the golden image 'disc'"):
        served.score_served(run)
