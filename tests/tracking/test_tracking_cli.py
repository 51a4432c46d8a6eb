"""`python -m tafs.tracking.cli`: exit codes, one-line errors, and repeated syncs."""

from __future__ import annotations

import base64
import hashlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.mirrored_runs import describe, runs, trained_run

from tafs.tracking import cli


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("runs") / "tafs_grpo.text.sd3.3")


def line(arguments: list[Any], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """The one line that a command prints to stderr, and nothing to stdout."""
    assert cli.main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:10]) == ("", 1, "tracking: ")
    return err[10:-1]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "no runs: give their folders"),
        (["--runs", "nowhere"], "--runs nowhere: no such folder"),
        (["run", "--every", "0"], "--every 0.0: not a number of seconds above 0"),
        (["run", "--every", "nan"], "--every nan: not a number of seconds above 0"),
        *(
            (["run", "--server", url], "argument --server: not an address such as http")
            for url in ("sqlite:///mlflow.db", "file:///mlruns", "databricks", "http://")
            + ("http://host:port", "http://me:secret@host:5000", "http://host/?token=secret")
        ),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["sync", *arguments])
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1)
    assert err.startswith(f"tracking: {complaint}")
    assert "secret" not in err


def test_a_broken_run_is_named_and_the_others_are_mirrored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, broken, whole = (tmp_path / name for name in ("missing", "broken", "whole"))
    describe(broken)
    (broken / "journal.jsonl").write_text("no JSON\n")
    trained_run(whole)
    sync = ["sync", broken, missing, whole, "--store", tmp_path / "store"]
    said = line(sync, capsys)
    assert said.startswith(f"2 of 3 runs failed: {broken}: {broken}/journal.jsonl, line 1")
    assert said.endswith(" (and 1 more)")
    assert len(runs(tmp_path / "store", "whole")) == 1
    # A workflow's copy must not fail the workflow.
    assert line([*sync, "--best-effort"], capsys, code=0) == said


def test_a_page_leads_to_the_copy_of_each_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, file = tmp_path / "store", tmp_path / "tracked.html"
    hostile, missing = tmp_path / "runs" / "<b>&'\"", tmp_path / "runs" / "missing"
    trained_run(hostile)
    sync = ["sync", hostile, missing, "--store", store, "--page", file, "--best-effort"]
    line(sync, capsys, code=0)  # the page is written also if a run fails
    text = file.read_text("utf-8")
    [info] = [run.info for run in runs(store, hostile.name)]
    path = f"#/experiments/{info.experiment_id}/runs/{info.run_id}"
    [(found, address)] = re.findall(r'data-path="(.*?)" href="(.*?)"', text)
    assert (found, address) == (path, f"http://127.0.0.1:5000/{path}")
    assert "<b>&'" not in text and 'id="missing"><td>missing</td><td>not copied</td>' in text
    assert "The last copy is incomplete:</b> 1 of 2 runs failed: " in text
    assert f"python -m tafs.tracking.cli ui --store {store}" in text
    # Its policy admits its own script and style alone.
    for kind, tag in (("script", "script"), ("style", "style")):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src &#39;sha256-{digest}&#39;;" in text
    server = "http://127.0.0.1:9"
    assert cli.main([*map(str, sync), "--server", server]) == 0
    assert f'value="{server}"' in file.read_text("utf-8")


def refuse(server: socket.socket) -> None:
    """Answer every request that credentials are missing, until the socket is closed."""
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize(
    "kind, reason",
    [("refuses", "401"), ("never answers", "timed out"), ("is gone", "Connection refused")],
)
def test_a_server_that_cannot_be_used_costs_seconds_and_is_one_line_without_credentials(
    finished, tmp_path, kind, reason, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    began = time.monotonic()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind != "is gone":
            server.listen()
        if kind == "refuses":
            threading.Thread(target=refuse, args=[server], daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        said = line(["sync", finished, "--store", tmp_path, "--server", url], capsys)
    assert time.monotonic() - began < 10
    assert said.startswith(f"{url}: MLflow cannot use it (")
    assert reason in said
    assert "MLFLOW_TRACKING_USERNAME" in said and "secret" not in said


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_repeated_syncs_find_new_runs_and_end_cleanly(tmp_path: Path, end: signal.Signals) -> None:
    # Tests that a script started in the background ignore SIGINT, and so would the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, store = tmp_path / "later", tmp_path / "store"
    first, second = (trained_run(tmp_path / "made" / name) for name in ("first", "second"))
    command = [sys.executable, "-m", "tafs.tracking.cli", "sync", "--every", "0.1"]
    loop = subprocess.Popen(
        [*command, "--store", str(store), "--runs", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert loop.stdout is not None and loop.stderr is not None
        folder.mkdir()
        first.rename(folder / first.name)
        assert loop.stdout.readline().startswith(f"1 runs in {store} (")
        # A round that fails prints a line, and the next ones go on.
        describe(folder / "broken")
        (folder / "broken" / "journal.jsonl").write_text("no JSON\n")
        assert f"runs failed: {folder}/broken" in loop.stderr.readline()
        second.rename(folder / second.name)
        while not runs(store, second.name):
            time.sleep(0.05)
        loop.send_signal(end)
        _, err = loop.communicate()
    finally:
        loop.kill()
    assert loop.returncode == 0
    # The runs are looked up here while they are written, which SQLite may refuse: one more line.
    failed = re.compile(r"tracking: \d of \d runs failed: ")
    assert [said for said in err.splitlines() if not failed.match(said)] == []


def test_the_browser_needs_a_store_that_mlflow_can_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothing is tracked yet" in line(["ui", "--store", tmp_path], capsys)
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    assert "it is only a copy: delete" in line(["ui", "--store", tmp_path], capsys)
