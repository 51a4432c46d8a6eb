"""Processes that start at once because their imports are done: MLflow servers and syncs for tests.

`python nursery.py` reads requests, a line of JSON each, and forks. A process is a real one with a
pid of its own, which may be killed at any time; an MLflow server runs by its own command line, only
not in a fresh interpreter. All are killed when the input ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from tafs.tracking import cli, mlflow_mirror

ROOT = Path(__file__).resolve().parents[2]
# What a server and a sync import only when they need it.
DONE = ["mlflow.server.fastapi_app", "mlflow.db", "mlflow.store.tracking.rest_store"]
DONE += ["mlflow.store.artifact.mlflow_artifacts_repo", "mlflow.store.tracking.sqlalchemy_store"]
DONE += ["pandas", "pyarrow.dataset", "pyarrow.parquet", "safetensors.numpy", "PIL.PngImagePlugin"]

# A server that is killed leaves these of what it was sent, and never shows them.
UPLOADING = ".artifact.uploading."
Contents = dict[tuple[str, str], Any]  # by experiment and run


class Nursery:
    """Starts processes, kills them, and waits for them."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **mlflow_mirror.ENVIRONMENT, "PYTHONPATH": path},
        )

    def _ask(self, **request: Any) -> int:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, program: str, arguments: list[str], output: Path) -> int:
        """The pid of `mlflow` or `tracking` with these arguments."""
        return self._ask(start=program, arguments=arguments, output=str(output))

    def wait(self, pid: int) -> int:
        """A process's exit code, or minus the signal that ended it."""
        return self._ask(wait=pid)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Server:
    """An MLflow server on a port of its own, over a database that outlives it.

    `empty` is a database to begin with.
    """

    def __init__(self, nursery: Nursery, folder: Path, empty: Path) -> None:
        self.nursery, self.folder, self.empty = nursery, folder, empty
        self.database, self.artifacts = folder / "mlflow.db", folder / "artifacts"
        with socket.socket() as free:
            free.bind((mlflow_mirror.HOST, 0))
            self.port = free.getsockname()[1]
        self.url = f"http://{mlflow_mirror.HOST}:{self.port}"
        self.pid: int | None = None
        self.forget()

    def forget(self) -> None:
        """Be gone, and know nothing when started."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        shutil.copyfile(self.empty, self.database)

    def start(self) -> None:
        """Return when it answers."""
        arguments = ["server", "--host", mlflow_mirror.HOST, "--port", str(self.port)]
        arguments += ["--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"]
        arguments += ["--artifacts-destination", str(self.artifacts)]
        log = self.folder / "log"
        self.pid = self.nursery.start("mlflow", arguments, log)
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=60).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(log.read_text())

    def kill(self) -> None:
        if self.pid is not None:
            pid, self.pid = self.pid, None
            self.nursery.kill(pid)

    def contents(self) -> Contents:
        return contents(self.database, self.artifacts)


def contents(database: Path, artifacts: Path) -> Contents:
    """All that a copy says of its runs, without MLflow's own ids and the tags of uploads."""

    def rows(select: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(database) as connection:
            return sorted(connection.execute(select).fetchall())

    found: Contents = {}
    runs = rows(
        "SELECT run_uuid, r.name, e.name, status, start_time, end_time, r.artifact_uri "
        "FROM runs r JOIN experiments e USING (experiment_id) WHERE r.lifecycle_stage = 'active'"
    )
    metrics = rows("SELECT run_uuid, key, step, timestamp, value, is_nan FROM metrics")
    latest = rows("SELECT run_uuid, key, step, timestamp, value, is_nan FROM latest_metrics")
    params = rows("SELECT run_uuid, key, value FROM params")
    tags = rows("SELECT run_uuid, key, value FROM tags")
    for uuid, name, experiment, *facts, address in runs:
        assert (experiment, name) not in found, f"{name} twice"
        folder = artifacts / address.removeprefix("mlflow-artifacts:/")
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        files = [file for file in files if not file.name.startswith(UPLOADING)]
        found[experiment, name] = {
            "facts": facts,
            "metrics": [row[1:] for row in metrics if row[0] == uuid],
            "latest": [row[1:] for row in latest if row[0] == uuid],
            "params": [row[1:] for row in params if row[0] == uuid],
            "tags": [
                row[1:]
                for row in tags
                if row[0] == uuid and not row[1].startswith(mlflow_mirror.UPLOADED)
            ],
            "artifacts": {str(file.relative_to(folder)): file.read_bytes() for file in files},
        }
    return found


def once_a_step(run: dict[str, Any]) -> bool:
    """Whether every curve has one value a step."""
    return max(Counter((key, step) for key, step, *_ in run["metrics"]).values()) == 1


def serve_requests() -> None:
    # Before mlflow, which looks whether it runs inside a server.
    import uvicorn  # isort: skip
    import mlflow.cli
    import mlflow.server

    for name in DONE:
        importlib.import_module(name)

    def in_place(command: list[str], extra_env: dict[str, str], **_: Any) -> None:
        os.environ.update(extra_env)
        uvicorn.main(command[command.index("uvicorn") + 1 :])

    mlflow.server._exec_cmd = in_place
    programs = {"mlflow": mlflow.cli.cli, "tracking": cli.main}
    gc.collect()
    gc.freeze()  # what the children share stays shared
    living = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            living.remove(request["wait"])
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        log = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        pid = os.fork()
        if not pid:
            for stream in (1, 2):
                os.dup2(log, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = programs[request["start"]](request["arguments"])
            sys.stdout.flush()
            os._exit(code)  # taking thousands of modules down takes longer than a sync
        os.close(log)
        living.add(pid)
        print(pid, flush=True)
    for pid in living:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve_requests()
