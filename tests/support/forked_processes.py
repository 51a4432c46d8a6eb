"""Syncs and MLflow servers as processes that start at once and can be killed at any time.

They are forks of one process that has imported everything.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
CONTEXT = multiprocessing.get_context("forkserver")
# uvicorn is first, because MLflow looks whether it is imported inside a server.
PRELOADED = ["uvicorn", "mlflow.cli", "mlflow.server.fastapi_app", "tafs.tracking.cli"]
PRELOADED += ["mlflow.store.tracking.rest_store", "mlflow.store.tracking.sqlalchemy_store"]
PRELOADED += ["mlflow.store.artifact.mlflow_artifacts_repo", "pyarrow.dataset", "pyarrow.parquet"]
CONTEXT.set_forkserver_preload([*PRELOADED, "PIL.PngImagePlugin", "PIL.WebPImagePlugin"])


def start_sync(arguments: list[str], log: Path) -> ForkServerProcess:
    """Start `python -m tafs.tracking.cli sync ARGUMENTS`."""
    return _start(_sync, arguments, log)


def _start(work: Any, arguments: list[str], log: Path) -> ForkServerProcess:
    process = CONTEXT.Process(target=work, args=(arguments, log), daemon=True)
    process.start()
    return process


def _log_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _sync(arguments: list[str], log: Path) -> None:
    from tafs.tracking import cli

    _log_to(log)
    code = cli.main(["sync", *arguments])
    sys.stdout.flush()
    os._exit(code)  # unloading the modules takes longer than a sync


def _serve(arguments: list[str], log: Path) -> None:
    import mlflow.cli
    import mlflow.server
    import uvicorn

    def in_place(command: list[str], extra_env: dict[str, str], **_: Any) -> None:
        os.environ.update(extra_env)
        uvicorn.main(command[command.index("uvicorn") + 1 :])

    _log_to(log)
    mlflow.server._exec_cmd = in_place
    mlflow.cli.cli(["server", *arguments])


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def wait_healthy(port: int, alive: Callable[[], bool]) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=60).close()
            return
        except OSError:
            assert alive() and time.monotonic() < end
            time.sleep(0.05)


class Server:
    """An MLflow server with a database that outlives it.

    Args:
        folder: for mlflow.db and artifacts/.
        empty: a database without runs to start with.
    """

    def __init__(self, folder: Path, empty: Path) -> None:
        self.folder, self.empty = folder, empty
        self.database, self.artifacts = folder / "mlflow.db", folder / "artifacts"
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.process: ForkServerProcess | None = None
        self.forget()

    def forget(self) -> None:
        """Be killed, and know nothing when started again."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        shutil.copyfile(self.empty, self.database)

    def start(self) -> None:
        """Return when it answers."""
        arguments = ["--host", HOST, "--port", str(self.port), "--workers", "1"]
        arguments += ["--backend-store-uri", f"sqlite:///{self.database}"]
        arguments += ["--artifacts-destination", str(self.artifacts)]
        log = self.folder / "log"
        self.process = _start(_serve, arguments, log)
        wait_healthy(self.port, self.process.is_alive)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None
