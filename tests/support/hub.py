"""A Hugging Face hub on 127.0.0.1 for the real client, and the necessary part of GitHub.

The files of models are in FOLDER/OWNER/NAME/, those of data sets in FOLDER/datasets/OWNER/NAME/ and
those of GitHub repositories in FOLDER/github/OWNER/NAME/. A repository has one revision, a digest
of its content. Weights are served like Git LFS files, with their SHA-256 as ETag, and other files
with git's hash.

    HF_HOME=... python tests/support/hub.py FOLDER -- COMMAND ...

runs a command that uses this hub; HF_HOME must not contain real models.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".pt", ".bin", ".model")
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
GITHUB_COMMIT = re.compile(r"/api/v3/repos/([^/]+/[^/]+)/commits/HEAD")
GITHUB_FILE = re.compile(r"/raw/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)")


@dataclass
class Faults:
    """Failures, by a file's path in its repository or by OWNER/NAME."""

    truncate_once: dict[str, int] = field(default_factory=dict)  # bytes before hanging up
    changed: set[str] = field(default_factory=set)  # their first byte is changed
    absent: set[str] = field(default_factory=set)  # listed, but answered with 404
    gated: set[str] = field(default_factory=set)  # repositories that need an accepted token
    accepted_tokens: set[str] = field(default_factory=set)
    known_tokens: set[str] = field(default_factory=set)  # valid, but without access to `gated`
    busy: set[str] = field(default_factory=set)  # repositories that answer 503


class Request(NamedTuple):
    method: str
    path: str
    range: str  # the header, or ""


class Content(NamedTuple):
    size: int
    sha256: str
    git: str  # the hash that git gives a blob of these bytes


@functools.cache
def _content(file: Path, size: int, mtime_ns: int) -> Content:
    data = file.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % size + data, usedforsecurity=False).hexdigest()
    return Content(size, hashlib.sha256(data).hexdigest(), git)


def content(file: Path) -> Content:
    state = file.stat()
    return _content(file, state.st_size, state.st_mtime_ns)


def listing(repository: Path) -> dict[str, Content]:
    files = sorted(file for file in repository.rglob("*") if file.is_file())
    return {file.relative_to(repository).as_posix(): content(file) for file in files}


def revision(repository: Path) -> str:
    """40 hexadecimal digits that depend on all files."""
    lines = [f"{name} {facts.git}\n" for name, facts in listing(repository).items()]
    return hashlib.sha1("".join(lines).encode(), usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range", "")))
        if found := API.fullmatch(path):
            self._api(*found.groups())
        elif found := FILE.fullmatch(path):
            self._file(*found.groups())
        elif found := GITHUB_COMMIT.fullmatch(path):
            repository = self.hub.folder / "github" / found[1]
            known = repository.is_dir()
            self._send(200 if known else 404, revision(repository).encode() if known else b"")
        elif found := GITHUB_FILE.fullmatch(path):
            repository = self.hub.folder / "github" / found[1]
            known = repository.is_dir() and revision(repository) == found[2]
            if known and (repository / found[3]).is_file():
                self._bytes(repository / found[3], found[3], {})
            else:
                self._send(404)
        else:
            self._send(404)

    def _repository(self, kind: str | None, name: str, wanted: str | None) -> Path | None:
        """The repository's folder; None after refusing the request."""
        repository = self.hub.folder / ("datasets" if kind else "") / name
        if not repository.is_dir():
            # The hub does not distinguish missing from private repositories.
            self._refuse(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            return None
        if self._token() and self._token() not in self._tokens():
            self._refuse(401, None, "Invalid credentials in Authorization header")
            return None
        if name in self.hub.faults.busy:
            self._refuse(503, None, "Service Unavailable")
            return None
        if wanted not in (None, "main", revision(repository)):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {wanted}")
            return None
        return repository

    def _tokens(self) -> set[str]:
        return self.hub.faults.accepted_tokens | self.hub.faults.known_tokens

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _api(self, kind: str, name: str, verb: str | None, wanted: str | None) -> None:
        repository = self._repository(kind if kind == "datasets" else None, name, wanted)
        if repository is None:
            return
        entries = listing(repository)
        if verb == "tree":
            answer: Any = [
                {"type": "file", "path": file, "size": facts.size, "oid": facts.git}
                | self._lfs(file, facts, "oid")
                for file, facts in entries.items()
            ]
        else:
            answer = {
                "id": name,
                "sha": revision(repository),
                "private": False,
                "gated": "auto" if name in self.hub.faults.gated else False,
                "siblings": [
                    {"rfilename": file, "size": facts.size, "blobId": facts.git}
                    | self._lfs(file, facts, "sha256")
                    for file, facts in entries.items()
                ],
            }
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def _lfs(file: str, facts: Content, digest: str) -> dict[str, Any]:
        if not file.endswith(LARGE):
            return {}
        return {"lfs": {digest: facts.sha256, "size": facts.size, "pointerSize": 134}}

    def _file(self, kind: str | None, name: str, wanted: str, file: str) -> None:
        repository = self._repository(kind, name, wanted)
        if repository is None:
            return
        if name in self.hub.faults.gated and self._token() not in self.hub.faults.accepted_tokens:
            status = 403 if self._token() else 401
            self._refuse(status, "GatedRepo", f"Access to model {name} is restricted.")
            return
        commit = revision(repository)
        if file not in listing(repository) or file in self.hub.faults.absent:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        facts = content(repository / file)
        tag = facts.sha256 if file.endswith(LARGE) else facts.git
        self._bytes(repository / file, file, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

    def _bytes(self, source: Path, file: str, headers: dict[str, str]) -> None:
        data = source.read_bytes()
        if file in self.hub.faults.changed:
            data = bytes([data[0] ^ 1]) + data[1:]
        size, status, start = len(data), 200, 0
        if ranged := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(ranged[1]), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}
        sent = data[start:]
        if self.command == "GET" and file in self.hub.faults.truncate_once:
            kept = self.hub.faults.truncate_once.pop(file)
            self._send(status, sent, headers, kept)
            self.close_connection = True
        else:
            self._send(status, sent, headers)

    def _refuse(
        self, status: int, code: str | None, message: str, more: dict[str, str] | None = None
    ) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, headers | {"Content-Type": "application/json"} | (more or {}))

    def _send(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        kept: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:kept])


class Hub:
    """The server, a context manager; `faults` can be changed, `requests` are those received."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults = Faults()
        self.requests: list[Request] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment with this hub and without a token."""
        ours = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        local = {"HF_ENDPOINT": self.url, "TAFS_GITHUB": self.url, "NO_PROXY": "127.0.0.1"}
        return kept | local | more


def main() -> None:
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        print("usage: python tests/support/hub.py FOLDER -- COMMAND ...", file=sys.stderr)
        sys.exit(2)
    if "HF_HOME" not in os.environ:
        print("HF_HOME: set it to a folder without real models", file=sys.stderr)
        sys.exit(2)
    with Hub(Path(sys.argv[1])) as hub:
        environment = hub.environment(HF_HOME=os.environ["HF_HOME"])
        done = subprocess.run(sys.argv[3:], env=environment, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
