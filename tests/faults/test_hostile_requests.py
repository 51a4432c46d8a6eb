"""`make ui`: requests that come from elsewhere, ask for other files or want something to run."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support import synthetic

from tafs.tracking import cli, mlflow_mirror

ROOT = Path(__file__).resolve().parents[2]
SECRET = "canary-of-a-file-outside"
START_S = 180


@dataclass(frozen=True)
class Server:
    port: int
    pid: int
    run_id: str
    folder: Path  # the store stands in it, beside a file that nobody may read

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        host: str | None = None,
        **headers: str,
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers (in lower case) of a request whose path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = json.dumps(body).encode() if body is not None else b""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.putrequest(method, path, skip_host=True)
            sent = {
                "Host": host if host is not None else f"127.0.0.1:{self.port}",
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
                **named,
            }
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(content)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, answer.read(), found
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server(request, tmp_path_factory) -> Iterator[Server]:
    """A real server on a store with one run, started in an environment that would open it."""
    if not request.config.getoption("--torture"):
        pytest.skip("the server takes long to start")
    folder = tmp_path_factory.mktemp("ui")
    run = synthetic.write_run(
        folder / "runs", "tafs_grpo", prompts=12, images=1, iterations=2, nfe=(4,)
    )
    mlflow_mirror.sync([run], folder / "store")
    (folder / "secret.txt").write_text(SECRET)
    (folder / "store" / "secret.txt").write_text(SECRET)
    [artifacts] = (folder / "store" / "artifacts").glob("*/*/artifacts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opening = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": "*",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "*",
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true",
        "MLFLOW_ENABLE_AI_GATEWAY": "true",
        "MLFLOW_HOST": "0.0.0.0",
        "HF_TOKEN": "hf_canary",
        "AWS_SECRET_ACCESS_KEY": "aws_canary",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tafs.tracking.cli", "ui", "--store", str(folder / "store")]
        + ["--port", str(port)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **opening},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    found = Server(port, process.pid, artifacts.parent.name, folder)
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                assert found.ask("GET", "/health")[0] == 200
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.2)
        yield found
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def family(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.pid)
    return [parent, *parent.children(recursive=True)]


def test_it_listens_to_this_machine_alone(server):
    listening = {
        connection.laddr[:2]
        for process in family(server)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", server.port)}


def test_it_knows_no_credential_and_no_setting_from_elsewhere(server):
    for process in family(server):
        known = process.environ()
        assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_HOST"} & set(known)
        for name, value in {**mlflow_mirror.ENVIRONMENT, **cli.SERVER_ENVIRONMENT}.items():
            assert known[name] == value


def test_it_shows_the_runs(server):
    status, page, headers = server.ask("GET", "/")
    assert status == 200
    assert b"<html" in page
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    status, content, _ = server.ask("GET", artifact(server, "run.json"))
    assert status == 200
    assert json.loads(content)["method"] == "tafs_grpo"
    asked = {"experiment_ids": ["0", "1"]}
    status, content, _ = server.ask("POST", "/ajax-api/2.0/mlflow/runs/search", asked)
    assert status == 200
    assert json.loads(content)["runs"]


def artifact(server: Server, path: str) -> str:
    return f"/get-artifact?run_id={server.run_id}&path={path}"


HOSTS = (
    "example.org",
    "evil.test:5000",
    "192.168.0.1",
    "10.0.0.1:80",
    "0.0.0.0",
    "localhost.x",
    "",
)


def test_another_host_or_origin_is_refused(server, trials):
    for number in trials("requests: of another host or origin", 0, 4 * len(HOSTS)):
        other = HOSTS[number % len(HOSTS)]
        paths = ("/", artifact(server, "run.json"), "/api/2.0/mlflow/experiments/search", "/x")
        status, content, _ = server.ask("GET", paths[number // len(HOSTS)], host=other)
        assert status in (400, 403)
        assert b"tafs_grpo" not in content
        origin = f"http://{other or 'null'}"
        status, _, headers = server.ask(
            "POST", "/api/2.0/mlflow/experiments/create", {"name": f"x{number}"}, Origin=origin
        )
        assert status == 403
        assert headers.get("access-control-allow-origin") not in ("*", origin)
        _, _, headers = server.ask("GET", artifact(server, "run.json"), Origin=origin)
        assert headers.get("access-control-allow-origin") not in ("*", origin)


def outside(rng: random.Random) -> str:
    """A path that leaves the artifacts' folder if it is believed."""
    dots = ["..", "%2e%2e", "%2E.", "..%00", "%252e%252e", "..;", "....", ".%2e", "%c0%ae%c0%ae"]
    slashes = ["/", "%2f", "%2F", "//", "%5c", "\\", "%252f"]
    up = "".join(rng.choice(dots) + rng.choice(slashes) for _ in range(rng.randrange(1, 9)))
    target = rng.choice(["secret.txt", "store/secret.txt", "etc/passwd", "mlflow.db"])
    return rng.choice(["", "/", "file:///", "samples/"]) + up + target


def test_no_file_outside_the_artifacts_is_read_or_written(server, trials):
    rng = random.Random(0)
    before = {f for f in server.folder.rglob("*") if "artifacts" not in f.parts}
    for number in trials("requests: paths outside the store", 0, 200):
        path = outside(rng)
        addresses = (
            artifact(server, path),
            f"/api/2.0/mlflow-artifacts/artifacts/{path}",
            f"/ajax-api/2.0/mlflow-artifacts/artifacts/{path}",
            f"/api/2.0/mlflow-artifacts/artifacts?path={path}",
            f"/static-files/{path}",
            f"/ajax-api/2.0/mlflow/get-artifact?run_uuid={server.run_id}&path={path}",
            f"/{path}",
        )
        for address in addresses:
            _, content, _ = server.ask("GET", address.replace(" ", "%20"))
            assert SECRET.encode() not in content, address
            assert b"root:" not in content, address
            assert not content.startswith(b"SQLite"), address
        target = addresses[1 + number % 2]
        server.ask("PUT", target, {"written": number})
        server.ask("DELETE", target)
        assert {f for f in server.folder.rglob("*") if "artifacts" not in f.parts} == before
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


def test_nothing_is_run_or_called(server, trials):
    for number in trials("requests: jobs, assistant, gateway", 0, len(RUNNING)):
        method, path, body = RUNNING[number]
        status, content, _ = server.ask(method, path, body)
        assert status >= 400 or content.strip() in NOTHING, (path, status, content[:200])
        assert status != 500, (path, content[:200])


def test_no_address_is_called_back(server):
    status, content, _ = server.ask(
        "POST",
        "/api/2.0/mlflow/webhooks",
        {
            "name": "x",
            "url": "https://example.org/hook",
            "events": [{"entity": "REGISTERED_MODEL", "action": "CREATED"}],
        },
    )
    assert status == 400, content
