"""UnifiedReward (Wang et al., arXiv 2503.05236): a vision language model that grades from 1 to 5.

The model runs in a chat server of its own (vLLM or sglang, OpenAI's protocol); this is the client.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from tafs.common.errors import RunFailed
from tafs.data.prompts import Prompt
from tafs.rewards.registry import MISSING_SHARE, Reward, check_images

GRADES = 5
MODEL = "UnifiedReward-7b-v1.5"
# The question for one image, as Flow-GRPO's reward asks it of this model (flow_grpo/rewards.py,
# `unifiedreward_score_sglang`, in https://github.com/yifan123/flow_grpo); it is part of the metric.
QUESTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described "
    "in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{caption}]"
)
SIDE = 512  # pixels; Flow-GRPO shows the model images of this size
MAX_TOKENS = 512
MAX_ANSWER = 1_000_000  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before the second try, doubled up to the longest

_SCORE = re.compile(r"Final Score:\**\s*(\S+)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_PASSING = frozenset({429, 500, 502, 503, 504})
_THIS_REQUEST = frozenset({400, 413, 422})  # another image or caption may be answered


class Missing(Exception):
    """An image has no score, for a reason in a word; no error of the run."""


class UnifiedReward:
    """Grades by a chat server, divided by 5; NaN where the server gives none.

    Args:
        url: of the server, http://HOST:PORT; proxies of the environment are not used and redirects
            not followed.
        model: the name under which the server serves it.
        workers: requests in flight.
        timeout: seconds for an answer, and for connecting.
        attempts: tries of a request that fails to connect, times out or is answered by 429 or 5xx.
        missing_share: of the images that may stay without a score.
        images: how many there are in all; None takes a call's own for all.
        side: images are shown to the model at side x side pixels.

    Raises:
        ValueError: a URL of another form.
    """

    name = "unifiedreward"

    def __init__(
        self,
        url: str,
        model: str = MODEL,
        *,
        workers: int = 64,
        timeout: float = 120.0,
        attempts: int = 5,
        missing_share: float = MISSING_SHARE,
        images: int | None = None,
        side: int = SIDE,
    ) -> None:
        self.url = url
        self.address = _address(url)
        self.model = model
        self.workers = workers
        self.timeout = timeout
        self.attempts = attempts
        self.missing_share = missing_share
        self.images = images
        self.side = side
        self.asked = 0
        self.missing: Counter[str] = Counter()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B] float32, the grade divided by 5 or NaN.

        Raises:
            ValueError: images of another form.
            RunFailed: no server, a server that refuses the request, or too many missing scores.
        """
        check_images(self.name, images, prompts)
        pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
        arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
        of = self.images or len(prompts)
        allowed = int(self.missing_share * of)
        before = self.missing if self.images else Counter[str]()
        call = _Call(len(prompts), allowed - before.total())

        def score(i: int) -> float:
            if call.stopped.is_set():
                return float("nan")
            try:
                return self._score(Image.fromarray(arrays[i]), prompts[i].text, call.stopped)
            except Missing as reason:
                call.miss(str(reason))
                return float("nan")
            except RunFailed:
                call.stopped.set()
                raise

        with ThreadPoolExecutor(max(1, min(self.workers, len(prompts)))) as pool:
            grades = list(pool.map(score, range(len(prompts))))
        missing = before + call.missing
        self.asked += call.images
        self.missing += call.missing
        if missing.total() > allowed:
            reasons = ", ".join(f"{count} {name}" for name, count in sorted(missing.items()))
            raise RunFailed(
                f"unifiedreward: gave up on {self.url} after {missing.total()} of {of} images "
                f"without a score ({reasons}); {allowed} may be missing"
            )
        scores = torch.tensor(grades, dtype=torch.float32, device=images.device)
        return scores / GRADES

    def report(self, scores: Tensor) -> Tensor:
        """Training-scale scores as grades from 1 to 5."""
        return GRADES * scores

    def reward(self) -> Reward:
        return Reward(
            self.name, self, self.report, differentiable=False, record=self.record, served=True
        )

    def record(self) -> dict[str, str]:
        """What scored, and of how many images it gave no score so far, by reason."""
        counts = {f"missing.{reason}": str(n) for reason, n in sorted(self.missing.items())}
        return {
            "name": self.name,
            "scale": "1-5",
            "version": self.model,
            "asked": str(self.asked),
            "missing": str(self.missing.total()),
            **counts,
        }

    def _score(self, image: Image.Image, caption: str, stopped: threading.Event) -> float:
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        body = json.dumps(self._question(image, caption)).encode()
        return grade(_content(self._ask(body, stopped)))

    def _question(self, image: Image.Image, caption: str) -> dict[str, Any]:
        data = io.BytesIO()
        image.save(data, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION.format(caption=caption)},
        ]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }

    def _ask(self, body: bytes, stopped: threading.Event) -> bytes:
        """The answer's body, after as many tries as it may take.

        Raises:
            Missing: every try failed, or the call has been given up.
            RunFailed: nothing listens, or the server refuses every such request.
        """
        pause = FIRST_PAUSE
        for left in reversed(range(self.attempts)):
            try:
                status, answer = self._post(body)
            except _Unreachable as error:
                if not left:
                    raise RunFailed(
                        f"unifiedreward: no server at {self.url} ({error}); start it or correct "
                        "its URL"
                    ) from None
            except TimeoutError:
                if not left:
                    raise Missing("timeout") from None
            except (OSError, http.client.HTTPException):
                if not left:
                    raise Missing("connection_lost") from None
            else:
                if status == 200:
                    return answer
                if status in _THIS_REQUEST:
                    raise Missing(f"status_{status}")
                if status not in _PASSING:
                    what = " ".join(answer[:200].decode(errors="replace").split())
                    raise RunFailed(
                        f"unifiedreward: {self.url} answers {status} to a request for the model "
                        f"{self.model!r}: {what}"
                    )
                if not left:
                    raise Missing(f"status_{status}")
            if stopped.wait(pause):
                break
            pause = min(2 * pause, LONGEST_PAUSE)
        raise Missing("stopped")

    def _post(self, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        return _request(
            self.address, "POST", "/v1/chat/completions", self.timeout, body=body, headers=headers
        )


class _Unreachable(Exception):
    """Nothing could be connected to."""


class _Call:
    """What the threads of one call share: missing scores, and when to give up."""

    def __init__(self, images: int, allowed: int) -> None:
        self.images = images
        self.allowed = allowed
        self.missing: Counter[str] = Counter()
        self.stopped = threading.Event()
        self._lock = threading.Lock()

    def miss(self, reason: str) -> None:
        """Count it, unless the call has been given up: what is then missing was not tried."""
        with self._lock:
            if not self.stopped.is_set():
                self.missing[reason] += 1
                if self.missing.total() > self.allowed:
                    self.stopped.set()


def grade(text: str) -> float:
    """The grade in an answer.

    Raises:
        Missing: it holds no number after "Final Score:", several different ones ("no_score"), or
            one outside [1, 5] ("out_of_range").
    """
    found = {match.strip("*").rstrip(".") for match in _SCORE.findall(text)}
    if len(found) != 1:
        raise Missing("no_score")
    [number] = found
    if not _NUMBER.fullmatch(number):
        raise Missing("no_score")
    if not 1 <= float(number) <= GRADES:
        raise Missing("out_of_range")
    return float(number)


def wait_ready(url: str, timeout: float, alive: Callable[[], bool] = lambda: True) -> None:
    """Return once the server lists its models; it loads the weights before.

    Raises:
        RunFailed: it does not within `timeout` seconds, or is no longer `alive`; names the URL.
        ValueError: a URL of another form.
    """
    address = _address(url)
    deadline = time.monotonic() + timeout
    while True:
        try:
            status, _ = _request(address, "GET", "/v1/models", timeout=5.0)
            problem = f"status {status}"
            if status == 200:
                return
        except (_Unreachable, OSError, http.client.HTTPException, Missing) as error:
            problem = str(error)
        if not alive():
            raise RunFailed(f"unifiedreward: the server at {url} has ended before it was ready")
        if time.monotonic() + 1 > deadline:
            raise RunFailed(f"unifiedreward: {url} is not ready after {timeout:g} s ({problem})")
        time.sleep(1)


def _address(url: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ValueError: not http://HOST:PORT; names the URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = parts.scheme == "http" and parts.hostname and "@" not in parts.netloc
    if not plain or port is None or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not the address of a chat server, http://HOST:PORT")
    return str(parts.hostname), port


def _request(
    address: tuple[str, int],
    method: str,
    path: str,
    timeout: float,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    """Status and body of one exchange on a connection of its own.

    http.client reads no proxy from the environment and follows no redirect.

    Raises:
        _Unreachable: no connection.
        TimeoutError, OSError, http.client.HTTPException: it broke.
        Missing: the body is longer than MAX_ANSWER ("too_long").
    """
    deadline = time.monotonic() + timeout
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        try:
            connection.connect()
        except OSError as error:
            raise _Unreachable(error.strerror or str(error)) from None
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        answer = b""
        while part := response.read1(65536):
            answer += part
            if len(answer) > MAX_ANSWER:
                raise Missing("too_long")
            if time.monotonic() > deadline:
                raise TimeoutError
        return response.status, answer
    finally:
        connection.close()


def _content(answer: bytes) -> str:
    """The text of a chat completion.

    Raises:
        Missing: it is none ("malformed").
    """
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise Missing("malformed") from None
    if not isinstance(content, str):
        raise Missing("malformed")
    return content
