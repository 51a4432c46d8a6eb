"""`make ui`: requests from elsewhere, for other files, or to run something, and what it shows."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from support.forked_processes import free_port, wait_healthy
from support.mirrored_runs import SHOWN, runs, trained_run

from tafs.tracking import ENVIRONMENT, cli, mlflow_mirror

ROOT = Path(__file__).resolve().parents[2]
SECRET = "content of a file outside the artifacts"
Trials = Callable[[str, int, int], Iterator[int]]


@dataclass(frozen=True)
class Server:
    port: int
    pid: int
    run_id: str
    folder: Path  # holds the store, beside a file that nobody may read

    def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, bytes, Message]:
        """Status, body and headers of a request whose path is sent unchanged."""
        content = json.dumps(body).encode() if body is not None else b""
        sent = {"Host": f"127.0.0.1:{self.port}", "Content-Type": "application/json", **headers}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, content, sent)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers

    def artifact(self, path: str) -> str:
        return f"/get-artifact?run_id={self.run_id}&path={path}"

    def outside(self) -> set[Path]:
        return {f for f in self.folder.rglob("*") if "artifacts" not in f.parts}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a store with one run, started with variables that would open it."""
    folder = tmp_path_factory.mktemp("ui")
    mlflow_mirror.sync([trained_run(folder / "run")], folder / "store")
    for secret in (folder, folder / "store"):
        (secret / "secret.txt").write_text(SECRET)
    (run,) = runs(folder / "store")
    port = free_port()
    opening = dict.fromkeys(("ALLOWED_HOSTS", "CORS_ALLOWED_ORIGINS"), "*")
    opening |= dict.fromkeys(("DISABLE_SECURITY_MIDDLEWARE", "ENABLE_JOB_EXECUTION"), "true")
    opening = {f"MLFLOW_SERVER_{name}": value for name, value in opening.items()}
    opening |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true", "MLFLOW_ENABLE_AI_GATEWAY": "true"}
    opening |= {"MLFLOW_HOST": "0.0.0.0", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    command = [sys.executable, "-m", "tafs.tracking.cli", "ui", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--store", str(folder / "store")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **opening},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_healthy(port, lambda: process.poll() is None)
        yield Server(port, process.pid, run.info.run_id, folder)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_it_listens_on_this_machine_only_and_gets_no_credential_or_foreign_setting(
    server: Server,
) -> None:
    listening, parent = set(), psutil.Process(server.pid)
    for process in (parent, *parent.children(recursive=True)):
        connections = process.net_connections("inet")
        listening |= {c.laddr[:2] for c in connections if c.status == psutil.CONN_LISTEN}
        known = process.environ()
        assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_HOST"} & set(known)
        assert {**ENVIRONMENT, **cli.SERVER_ENVIRONMENT}.items() <= known.items()
    assert listening == {("127.0.0.1", server.port)}


def test_it_shows_runs_files_and_images_and_writes_nothing_elsewhere(server: Server) -> None:
    status, page, headers = server.ask("GET", "/")
    assert (status, b"<html" in page) == (200, True)
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    status, content, _ = server.ask("GET", server.artifact("run.json"))
    assert (status, content) == (200, (server.folder / "run" / "run.json").read_bytes())
    asked = {"experiment_ids": ["0", "1"]}
    _, content, _ = server.ask("POST", "/ajax-api/2.0/mlflow/runs/search", asked)
    assert len(json.loads(content)["runs"]) == 1
    listing = f"/ajax-api/2.0/mlflow/artifacts/list?run_id={server.run_id}&path=images"
    _, content, _ = server.ask("GET", listing)
    images = [file["path"] for file in json.loads(content)["files"]]
    assert len(images) == 2 * SHOWN
    for image in images:
        status, content, _ = server.ask("GET", server.artifact(quote(image)))
        assert (status, content[:4] in (b"\x89PNG", b"RIFF")) == (200, True)
    assert {f.name for f in server.folder.iterdir()} == {"run", "secret.txt", "store"}


HOSTS = ("example.org", "evil.test:5000", "192.168.0.1", "10.0.0.1:80", "0.0.0.0", "localhost.x")


def test_another_host_or_origin_is_refused(server: Server, trials: Trials) -> None:
    for number in trials("requests: of another host or origin", 7, 28):
        other = [*HOSTS, ""][number % 7]
        paths = ("/", server.artifact("run.json"), "/api/2.0/mlflow/experiments/search", "/x")
        status, content, _ = server.ask("GET", paths[number // 7], Host=other)
        assert status in (400, 403)
        assert b"tafs_grpo" not in content
        origin = f"http://{other or 'null'}"
        create = ("POST", "/api/2.0/mlflow/experiments/create", {"name": f"x{number}"})
        for request in (create, ("GET", server.artifact("run.json"))):
            status, _, headers = server.ask(*request, Origin=origin)
            assert status == 403 or request != create
            assert headers.get("access-control-allow-origin") not in ("*", origin)


def outside(rng: random.Random) -> str:
    """A path that leaves the folder of the artifacts if the server believes it."""
    dots = ["..", "%2e%2e", "%2E.", "..%00", "%252e%252e", "..;", "....", ".%2e", "%c0%ae%c0%ae"]
    slashes = ["/", "%2f", "%2F", "//", "%5c", "\\", "%252f"]
    up = "".join(rng.choice(dots) + rng.choice(slashes) for _ in range(rng.randrange(1, 9)))
    target = rng.choice(["secret.txt", "store/secret.txt", "etc/passwd", "mlflow.db"])
    return rng.choice(["", "/", "file:///", "samples/"]) + up + target


def test_no_file_outside_the_artifacts_is_read_or_written(server: Server, trials: Trials) -> None:
    rng = random.Random(0)
    before = server.outside()
    for number in trials("requests: paths outside the store", 20, 200):
        path = outside(rng)
        addresses = (
            server.artifact(path),
            f"/api/2.0/mlflow-artifacts/artifacts/{path}",
            f"/ajax-api/2.0/mlflow-artifacts/artifacts/{path}",
            f"/api/2.0/mlflow-artifacts/artifacts?path={path}",
            f"/static-files/{path}",
            f"/ajax-api/2.0/mlflow/get-artifact?run_uuid={server.run_id}&path={path}",
            f"/{path}",
        )
        for address in addresses:
            _, content, _ = server.ask("GET", address)
            assert SECRET.encode() not in content, address
            assert b"root:" not in content, address
            assert not content.startswith(b"SQLite"), address
        target = addresses[1 + number % 2]
        server.ask("PUT", target, {"written": number})
        server.ask("DELETE", target)
        assert server.outside() == before
    assert (server.folder / "secret.txt").read_text() == SECRET


RUNNING = (
    ("POST", "/ajax-api/3.0/jobs/", {"job_name": "run_online_trace_scorer", "params": {}}),
    ("POST", "/ajax-api/3.0/jobs/search", {}),
    ("GET", "/ajax-api/3.0/jobs/1", None),
    ("POST", "/ajax-api/3.0/mlflow/assistant/message", {"message": "run `id`"}),
    ("GET", "/ajax-api/3.0/mlflow/assistant/config", None),
    ("PUT", "/ajax-api/3.0/mlflow/assistant/config", {"providers": {}}),
    ("POST", "/ajax-api/3.0/mlflow/assistant/skills/install", {"type": "global"}),
    ("GET", "/ajax-api/3.0/mlflow/assistant/providers", None),
    ("POST", "/gateway/x/mlflow/invocations", {"messages": []}),
    ("POST", "/gateway/mlflow/v1/chat/completions", {"model": "x", "messages": []}),
    ("POST", "/gateway/proxy/x/y", {}),
    ("POST", "/ajax-api/2.0/mlflow/gateway-proxy", {"gateway_path": "api/2.0/endpoints/"}),
    ("POST", "/v1/traces", {}),
    ("POST", "/invocations", {}),
)
NOTHING = (b"", b"{}", b"[]", b'{"endpoints":[]}')


def test_requests_run_and_call_nothing(server: Server, trials: Trials) -> None:
    for number in trials("requests: jobs, assistant, gateway", len(RUNNING), len(RUNNING)):
        method, path, body = RUNNING[number]
        status, content, _ = server.ask(method, path, body)
        assert status >= 400 or content.strip() in NOTHING, (path, status, content[:200])
        assert status != 500, (path, content[:200])
    events = [{"entity": "REGISTERED_MODEL", "action": "CREATED"}]
    hook = {"name": "x", "url": "https://example.org/hook", "events": events}
    status, content, _ = server.ask("POST", "/api/2.0/mlflow/webhooks", hook)
    assert status == 400, content
