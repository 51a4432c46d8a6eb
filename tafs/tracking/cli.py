"""cli."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

if TYPE_CHECKING:
    pass
from tafs.tracking.mlflow_mirror import (
    ARTIFACTS,
    DATABASE,
    DEFAULT_STORE,
    ENVIRONMENT,
    HOST,
    Signature,
    Summary,
    _check_database,
    _one_line,
    _uri,
    sync,
)

# Of the server: nothing is called, nothing runs, no other page may show it.
SERVER_ENVIRONMENT = {
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS": "false",
    "MLFLOW_SERVER_JOB_ENABLE_PERIODIC_TASKS": "false",
    "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",
    "MLFLOW_SERVER_X_FRAME_OPTIONS": "DENY",
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "none",
}


FOREIGN = re.compile(r"^_?MLFLOW_|TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY(_ID)?$")


GUNICORN = "--worker-class=gthread --threads=4 --log-level=warning --no-control-socket"


def serve(store: Path, port: int) -> NoReturn:
    """Become MLflow's server on 127.0.0.1, for the browsers of this machine.

    Raises:
        ValueError: there is no store, or it is damaged.
        OSError: the port is taken.
    """
    database = store / DATABASE
    if not database.exists():
        raise ValueError(f"{store}: nothing is tracked yet; `make all` fills it")
    _check_database(database)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise OSError(f"port {port}: {error.strerror}; choose another with --port") from error
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", _uri(database), "--workers", "1"]
    command += ["--artifacts-destination", str((store / ARTIFACTS).resolve())]
    # Under gunicorn MLflow serves its Flask application alone: no assistant that runs commands, no
    # jobs, no calls of language models, none of which can be switched off under uvicorn.
    command += [f"--gunicorn-opts={GUNICORN}"]
    # What is set for MLflow elsewhere could open this server; no credential is of use to it.
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.search(name)}
    hosts = {"MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{port},localhost:{port}"}
    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    os.execve(command[0], command, {**kept, **ENVIRONMENT, **SERVER_ENVIRONMENT, **hosts})


def server_url(text: str) -> str:
    """A server's address as it can be used.

    Raises:
        ValueError: it is none, or holds what does not belong on a command line.
    """
    # Not repeated in the message: it may hold a password.
    if "@" in text or "?" in text or "#" in text:
        raise ValueError(
            "--server: an address without credentials or a query; they belong in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    parts = urlsplit(text)
    try:
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        valid = None
    if not valid:
        raise ValueError(f"--server {text}: not an address such as http://{HOST}:5000")
    return text.rstrip("/")


def _find(run_dirs: list[Path], parent: Path | None) -> list[Path]:
    inside = sorted(file.parent for file in parent.glob("*/run.json")) if parent else []
    return list(dict.fromkeys([*run_dirs, *inside]))


def _describe(done: Summary, place: object) -> str:
    details = f"{done.points} new points"
    if done.skipped:
        details += f", {done.skipped} values that are no finite numbers left out"
    if done.waiting:
        details += f", {done.waiting} runs not started"
    return f"{done.runs} runs in {place} ({details})"


def _complain(error: object) -> None:
    print(f"tracking: {_one_line(error)}", file=sys.stderr, flush=True)


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event and leave the block, in the middle of whatever it does.

    Where Python lets nothing be raised, as in a weak reference's callback, the event has to do.
    """
    stop = threading.Event()

    def interrupt(*_: object) -> None:
        if not stop.is_set():
            stop.set()
            raise KeyboardInterrupt

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            said(lost)

    said, sys.unraisablehook = sys.unraisablehook, unraisable
    previous = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt:
        pass
    finally:
        sys.unraisablehook = said
        for each, handler in previous.items():
            signal.signal(each, handler)


def keep_syncing(
    find: Callable[[], list[Path]], store: Path, server: str | None, seconds: float
) -> None:
    """Sync the folders that `find` names again and again, until interrupted.

    A line for each round that mirrored or failed; runs whose files are unchanged are passed over.
    """
    seen: dict[Path, Signature] = {}
    with _until_interrupted() as stop:
        while not stop.is_set():
            try:
                done = sync(find(), store, server, seen)
                if done.runs:
                    print(_describe(done, server or store), flush=True)
            # The next round may find the disk, the server or the run in order again.
            except Exception as error:
                _complain(error)
            stop.wait(seconds)


def main(arguments: list[str] | None = None) -> int:
    """The exit code, with one line on stderr: 2 for bad input, 1 if something could not be done."""
    parser = argparse.ArgumentParser(
        prog="python -m tafs.tracking.cli", description="MLflow's copy"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    syncing = commands.add_parser("sync", help="mirror run folders into the store or to a server")
    syncing.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR")
    syncing.add_argument("--runs", type=Path, metavar="FOLDER", help="all run folders in it")
    syncing.add_argument("--server", metavar="URL", help="a running MLflow server")
    syncing.add_argument(
        "--every", type=float, metavar="SECONDS", help="again and again, until interrupted"
    )
    serving = commands.add_parser("ui", help=f"browse the store on {HOST}")
    serving.add_argument("--port", type=int, default=5000)
    for command in (syncing, serving):
        command.add_argument("--store", type=Path, default=DEFAULT_STORE)
    given = parser.parse_args(arguments)
    try:
        if given.command == "ui":
            serve(given.store, given.port)
    except Exception as error:
        _complain(error)
        return 1
    try:
        server = server_url(given.server) if given.server is not None else None
        _check(given)
    except ValueError as error:
        _complain(error)
        return 2
    find = partial(_find, given.run_dirs, given.runs)
    try:
        if given.every:
            keep_syncing(find, given.store, server, given.every)
        else:
            print(_describe(sync(find(), given.store, server), server or given.store))
    # A copy that fails must not look like a run that fails: one line, whatever it was.
    except Exception as error:
        _complain(error)
        return 1
    return 0


def _check(given: argparse.Namespace) -> None:
    """Raise ValueError for a sync that could mirror nothing."""
    if not given.run_dirs and given.runs is None:
        raise ValueError("no runs: name their folders, or with --runs the folder that holds them")
    if given.every is not None and not 0 < given.every < threading.TIMEOUT_MAX:
        raise ValueError(f"--every {given.every}: a number of seconds above 0")
    # With --every it may appear later.
    if given.runs and given.every is None and not given.runs.is_dir():
        raise ValueError(f"--runs {given.runs}: no such folder")


if __name__ == "__main__":
    sys.exit(main())
