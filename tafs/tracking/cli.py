"""Mirror runs to MLflow, and browse them: `python -m tafs.tracking.cli sync|ui`.

Credentials of a server are read from MLflow's own variables only.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tafs.common import collector
from tafs.tracking import ENVIRONMENT, index_page, mlflow_mirror
from tafs.tracking.mlflow_mirror import ARTIFACTS, DATABASE, DEFAULT_STORE, Copies, Seen, Summary

HOST = "127.0.0.1"
# Requests execute and call nothing, and no other page can embed the server's.
SERVER_ENVIRONMENT = {
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS": "false",
    "MLFLOW_SERVER_JOB_ENABLE_PERIODIC_TASKS": "false",
    "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",
    "MLFLOW_SERVER_X_FRAME_OPTIONS": "DENY",
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "none",
}
# Settings that could open the server, and credentials, which it does not need.
WITHHELD = re.compile(r"^_?MLFLOW_|TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY(_ID)?$")
# Under uvicorn, MLflow adds an assistant that runs commands, jobs and calls of language models.
GUNICORN = "--worker-class=gthread --threads=4 --log-level=warning --no-control-socket"


def serve(store: Path, port: int) -> NoReturn:
    """Replace this process by MLflow's server on 127.0.0.1."""
    if not (store / DATABASE).exists():
        raise ValueError(f"{store}: nothing is tracked yet; run `make all` or `tafs sync` first")
    with mlflow_mirror.locked(store):
        mlflow_mirror.open_store(store)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{(store / DATABASE).resolve()}"]
    command += ["--default-artifact-root", str((store / ARTIFACTS).resolve())]
    command += ["--no-serve-artifacts", "--workers=1", f"--gunicorn-opts={GUNICORN}"]
    kept = {name: value for name, value in os.environ.items() if not WITHHELD.search(name)}
    hosts = {"MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{port},localhost:{port}"}
    print(f"http://{HOST}:{port}  (Ctrl-C stops it)", flush=True)
    os.execve(command[0], command, {**kept, **ENVIRONMENT, **SERVER_ENVIRONMENT, **hosts})


def keep_syncing(sync: Callable[[], Summary], place: object, seconds: float) -> None:
    """Sync again and again until Ctrl-C or SIGTERM; print a line if a round did something.

    A signal ends the loop after the round that runs; a second one interrupts this round. Libraries
    log an exception at whatever point the first one would interrupt.
    """
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        while not ended.is_set():
            try:
                done = sync()
                if done.runs:
                    print(done.describe(place), flush=True)
            except Exception as error:  # the next round may find the server or disk repaired
                _report(error)
            ended.wait(seconds)
    except KeyboardInterrupt:
        pass


def _report(error: object) -> None:
    print(f"tracking: {mlflow_mirror.brief(error, 500)}", file=sys.stderr, flush=True)


@contextmanager
def noted(folder: Path | None, run_dirs: Sequence[Path]) -> Iterator[None]:
    """Write the receipt of the workflow's copy, if the results folder of a scale is given."""
    if folder is None:
        yield
        return
    from tafs.experiment import needs  # imports torch
    from tafs.runtime import receipts

    own = needs.tracking(folder, [run.name for run in run_dirs])
    with receipts.replacing(folder, "track", own, []):
        yield


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tracking: {message}\n")


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:]+\])(:[1-9]\d*)?(/[\w./~-]*)?", text):
        # The message does not repeat the address, which may contain a password.
        raise argparse.ArgumentTypeError(
            f"not an address such as http://{HOST}:5000; credentials belong in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return text.rstrip("/")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m tafs.tracking.cli", description="Mirror runs to MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="mirror run folders into the store or to a server")
    sync.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR")
    sync.add_argument("--runs", type=Path, metavar="FOLDER", help="all run folders in it")
    sync.add_argument("--server", type=_url, metavar="URL", help="a running MLflow server")
    sync.add_argument("--every", type=float, metavar="SECONDS", help="repeat until interrupted")
    sync.add_argument("--receipt", type=Path, metavar="FOLDER", help="note a success there")
    sync.add_argument("--page", type=Path, metavar="FILE", help="write a page of links there")
    sync.add_argument("--best-effort", action="store_true", help="a failure is not an error")
    ui = commands.add_parser("ui", help=f"browse the store on {HOST}")
    ui.add_argument("--port", type=int, default=5000)
    for command in (sync, ui):
        command.add_argument("--store", type=Path, default=DEFAULT_STORE)
    given = parser.parse_args(arguments)
    if given.command == "sync":
        if not given.run_dirs and not given.runs:
            sync.error("no runs: give their folders, or the folder that holds them with --runs")
        if given.every is not None and not 0 < given.every < threading.TIMEOUT_MAX:
            sync.error(f"--every {given.every}: not a number of seconds above 0")
        # With --every, the folder may appear later.
        if given.runs and not given.every and not given.runs.is_dir():
            sync.error(f"--runs {given.runs}: no such folder")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 1 after an error, or 0 with --best-effort."""
    given = _parse(arguments)
    seen: Seen = {}
    copies: Copies = {}

    def sync() -> Summary:
        inside = given.runs.glob("*/run.json") if given.runs else []
        found = list(dict.fromkeys([*given.run_dirs, *sorted(file.parent for file in inside)]))
        problem = ""
        try:
            return mlflow_mirror.sync(found, given.store, given.server, seen, copies)
        except Exception as error:
            problem = mlflow_mirror.brief(error)
            raise
        finally:
            if given.page:
                names = [folder.name for folder in found]
                index_page.write(given.page, names, copies, given.store, given.server, problem)

    try:
        if given.command == "ui":
            serve(given.store, given.port)
        place = given.server or given.store
        if given.every:
            keep_syncing(sync, place, given.every)
        else:
            with noted(given.receipt, given.run_dirs):
                print(sync().describe(place))
    except Exception as error:  # a mirror that fails must not look like a run that fails
        _report(error)
        return 0 if given.command == "sync" and given.best_effort else 1
    return 0


if __name__ == "__main__":
    collector.spare()
    sys.exit(main())
