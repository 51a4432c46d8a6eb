"""A chat server on 127.0.0.1 that grades images by their mean brightness and can fail on purpose.

`with ChatServer(faults={"status_500": 0.3}) as server:` serves at server.url, or from a shell:
`python tests/support/chat_server.py PORT [FAULT=SHARE ...]`.
"""

from __future__ import annotations

import base64
import io
import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

FAULTS = (
    *("status_400", "status_429", "status_500", "redirect", "slow", "drop", "huge"),
    *("not_json", "nonsense", "out_of_range"),
)
REPLIES = {
    "huge": "x" * 2_000_000,
    "nonsense": "This image shows a lovely scene, well worth seeing.",
    "out_of_range": "Final Score: 7.5",
}


def brightness_grade(pixels: np.ndarray) -> float:
    """1 for black to 5 for white, to four digits; pixels uint8."""
    return round(1 + 4 * float(pixels.mean()) / 255, 4)


class ChatServer(ThreadingHTTPServer):
    """Grades from 1 to 5.

    Args:
        port: 0 selects a free one.
        model: the only model; requests for others are answered by 404.
        faults: fault of FAULTS -> share of the requests, spread evenly.
        delay: seconds of a slow answer.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        port: int = 0,
        model: str = "UnifiedReward-7b-v1.5",
        faults: Mapping[str, float] | None = None,
        delay: float = 5.0,
    ) -> None:
        unknown = set(faults or {}) - set(FAULTS)
        if unknown:
            raise ValueError(f"unknown fault {min(unknown)!r} (available: {', '.join(FAULTS)})")
        super().__init__(("127.0.0.1", port), Handler)
        self.model = model
        self.faults = dict(faults or {})
        self.delay = delay
        self.requests: list[dict[str, Any]] = []
        self.met: Counter[str] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, request: dict[str, Any]) -> str | None:
        """The fault whose share of the requests so far is short by one."""
        with self.lock:
            self.requests.append(request)
            for name, share in self.faults.items():
                if self.met[name] < int(share * len(self.requests) + 1e-9):
                    self.met[name] += 1
                    return name
        return None

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            with self.lock:
                self.in_flight -= 1

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": self.server.model}]})
        else:
            self.answer(404, {"error": {"message": "Not Found"}})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.answer(404, {"error": {"message": "Not Found"}})
            return
        if request["model"] != self.server.model:
            message = f"The model `{request['model']}` does not exist."
            self.answer(404, {"error": {"message": message}})
            return
        fault = self.server.next_fault(request)
        with self.server.counted():  # answers are not counted: clients go on before they return
            if fault == "slow":
                time.sleep(self.server.delay)
            value = brightness_grade(decode(request))
        if fault in ("status_400", "status_429", "status_500"):
            self.answer(int(fault[-3:]), {"error": {"message": "on purpose"}})
        elif fault == "redirect":
            self.answer(307, {}, {"Location": f"{self.server.url}/elsewhere"})
        elif fault == "drop":
            self.close_connection = True
        elif fault == "not_json":
            self.answer(200, "<html>busy</html>")
        else:
            grade = f"dog (object): 1\ncolor (attribute): 0\nFinal Score: {value}"
            if "Style Score" in question(request):
                axes = {"Alignment": value, "Coherence": (value + 1) / 2, "Style": 1}
                grade = "\n".join(f"{axis} Score (1-5): {x:.4f}" for axis, x in axes.items())
            yes = (value - 1) / 4 if request.get("logprobs") else None
            self.reply(REPLIES.get(str(fault), grade), yes)

    def reply(self, text: str, yes: float | None) -> None:
        """Answer with a text, and with a probability of yes as the first token if it is asked."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if yes is not None:
            likely = [("Y", yes), ("N", 1 - yes)]
            top = [{"token": t, "logprob": math.log(p)} for t, p in likely if p > 0]
            choice["logprobs"] = {"content": [{"token": top[0]["token"], "top_logprobs": top}]}
        self.answer(200, {"object": "chat.completion", "choices": [choice]})

    def answer(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # the client timed out
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def decode(request: Mapping[str, Any]) -> np.ndarray:
    """The pixels, uint8 [H, W, 3], of the only image in a request."""
    [message] = request["messages"]
    [image] = [part for part in message["content"] if part["type"] == "image_url"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


def question(request: Mapping[str, Any]) -> str:
    """The text of a request."""
    [message] = request["messages"]
    [text] = [part["text"] for part in message["content"] if part["type"] == "text"]
    return str(text)


def caption(request: Mapping[str, Any]) -> str:
    """The text of a request from its caption on."""
    return question(request).partition("Text Caption: ")[2]


def main() -> None:
    if len(sys.argv) < 2:
        print("usage: python tests/support/chat_server.py PORT [FAULT=SHARE ...]", file=sys.stderr)
        sys.exit(2)
    pairs = [argument.partition("=")[::2] for argument in sys.argv[2:]]
    server = ChatServer(int(sys.argv[1]), faults={k: float(v) for k, v in pairs})
    print(server.url, flush=True)
    with server:
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
