"""Metrics of a vision language model behind a chat server (vLLM or sglang, OpenAI's protocol)."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tafs.common.errors import RunFailed
from tafs.data.prompts import Prompt
from tafs.rewards.metrics import Metric, Reward
from tafs.rewards.registry import MISSING_SHARE

MAX_ANSWER = 1_000_000  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between attempts, doubled each time
AHEAD = 2  # batches that `ChatJudge.stream` asks about before their turn

_ADDRESS = re.compile(r"http://([\w.-]+|\[[\da-fA-F:]+\]):(\d{1,5})/?", re.ASCII)
_TRANSIENT = frozenset({429, 500, 502, 503, 504})
_REJECTED = frozenset({400, 413, 422})  # other images or captions may be accepted


class Missing(Exception):
    """An image has no score; the message is the reason, in one word. The run goes on."""


class Question(NamedTuple):
    """A question about an image, and how the server is to answer it."""

    text: str
    settings: Mapping[str, Any]  # further entries of the request, such as max_tokens


@dataclass(eq=False)
class ChatJudge(ABC):
    """Scores from a chat server's answers to questions; NaN where it gives none.

    Args:
        url: http://HOST:PORT of the server. Proxies are not used, redirects not followed.
        model: the name under which the server serves the model; "": the metric's version.
        workers: number of images that are asked about in parallel.
        timeout: seconds for connecting, and for an answer.
        attempts: attempts of a request that cannot connect, times out or is answered by 429 or 5xx.
        missing_share: share of the images that may have no score.
        images: total number of images that `missing_share` refers to; None: those of each call.
        side: images are sent at side x side pixels; None: at their own size.

    Raises:
        ValueError: `url` has another format.
    """

    metric: ClassVar[Metric]

    url: str
    model: str = ""
    _: KW_ONLY
    workers: int = 64
    timeout: float = 120.0
    attempts: int = 5
    missing_share: float = MISSING_SHARE
    images: int | None = None
    side: int | None = None

    def __post_init__(self) -> None:
        self.model = self.model or self.metric.version
        self.address = _address(self.url)
        self.asked = 0
        self.missing: Counter[str] = Counter()

    @abstractmethod
    def questions(self, prompt: Prompt) -> Sequence[Question]:
        """The questions about an image of the prompt, at least one.

        Raises:
            ValueError: the prompt has no questions; names it.
        """

    @abstractmethod
    def value(self, prompt: Prompt, answers: Sequence[Any]) -> float:
        """The published score of the answers, the first choice of a chat completion each.

        Raises:
            Missing: they give none.
        """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> training-scale scores [B], float32, or NaN.

        Raises:
            RunFailed: there is no server, it refuses the request, or too many scores are missing.
            ValueError: a prompt has no questions; names it.
        """
        [scores] = self.stream([(images, prompts)])
        return scores

    def stream(self, batches: Iterable[tuple[Tensor, Sequence[Prompt]]]) -> Iterator[Tensor]:
        """The scores of batches, in their order, each as a call would give them.

        The images of AHEAD further batches are asked about while the slowest of a batch are waited
        for, so that `workers` requests are under way at any time.

        Raises:
            RunFailed, ValueError: as for a call.
        """
        stopped = threading.Event()
        waiting: deque[tuple[torch.device, list[Future[float | str]]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for images, prompts in batches:
                    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
                    asked = [self.questions(prompt) for prompt in prompts]
                    work = zip(
                        pixels.permute(0, 2, 3, 1).cpu().numpy(), prompts, asked, strict=True
                    )
                    futures = [pool.submit(self._score, *one, stopped) for one in work]
                    waiting.append((images.device, futures))
                    if len(waiting) > AHEAD:
                        yield self._counted(*waiting.popleft())
                while waiting:
                    yield self._counted(*waiting.popleft())
            finally:
                stopped.set()  # after a failure, the remaining images are not tried

    def _score(
        self,
        pixels: np.ndarray,
        prompt: Prompt,
        questions: Sequence[Question],
        stopped: threading.Event,
    ) -> float | str:
        """The published score of an image, uint8 [H, W, 3]; or why it has none, in one word."""
        if stopped.is_set():
            return math.nan
        try:
            image = self._encoded(Image.fromarray(pixels))
            bodies = [self._body(image, question) for question in questions]
            answers = [_choice(self._ask(body, stopped)) for body in bodies]
            return self.value(prompt, answers)
        except Missing as reason:
            return math.nan if stopped.is_set() else str(reason)
        except RunFailed:
            stopped.set()
            raise

    def _counted(self, device: torch.device, futures: Sequence[Future[float | str]]) -> Tensor:
        """Wait for the scores of a batch; count those that are missing."""
        of = self.images or len(futures)
        allowed = int(self.missing_share * of)
        missing, values = Counter(self.missing if self.images else ()), []
        self.asked += len(futures)
        for future in futures:
            found = future.result()
            if isinstance(found, str):
                missing[found] += 1
                self.missing[found] += 1
                found = math.nan
                if missing.total() > allowed:
                    reasons = ", ".join(f"{n} {name}" for name, n in sorted(missing.items()))
                    raise RunFailed(
                        f"{self.metric.name}: {missing.total()} of {of} images have no score from "
                        f"{self.url} ({reasons}); at most {allowed} may be missing"
                    )
            values.append(found)
        return torch.tensor(values, dtype=torch.float32, device=device) / self.metric.scale

    def reward(self) -> Reward:
        return Reward(self.metric, self, self.details)

    def details(self) -> dict[str, str]:
        """The model, and how many images have been sent and have no score, by reason."""
        counts = {f"missing.{reason}": str(n) for reason, n in sorted(self.missing.items())}
        return {
            "version": self.model,
            "asked": str(self.asked),
            "missing": str(self.missing.total()),
            **counts,
        }

    def _encoded(self, image: Image.Image) -> str:
        """The URL that holds an image."""
        if self.side is not None and image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        data = io.BytesIO()
        image.save(data, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"

    def _body(self, image: str, question: Question) -> bytes:
        """The JSON of a chat completion's request."""
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": question.text},
        ]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            **question.settings,
        }
        return json.dumps(request).encode()

    def _ask(self, body: bytes, stopped: threading.Event) -> bytes:
        """The body of the answer; transient failures are retried.

        Raises:
            Missing: every attempt failed, or the call was stopped.
            RunFailed: there is no server, or it would refuse every request.
        """
        pause = FIRST_PAUSE
        for left in reversed(range(self.attempts)):
            try:
                status, answer = _request(
                    self.address, "POST", "/v1/chat/completions", self.timeout, body
                )
            except _Unreachable as error:
                if not left:
                    raise RunFailed(
                        f"{self.metric.name}: no server at {self.url} ({error}); start it or "
                        "correct its URL"
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
                if status in _REJECTED:
                    raise Missing(f"status_{status}")
                if status not in _TRANSIENT:
                    what = " ".join(answer[:200].decode(errors="replace").split())
                    raise RunFailed(
                        f"{self.metric.name}: {self.url} answers {status} to a request for the "
                        f"model {self.model!r}: {what}"
                    )
                if not left:
                    raise Missing(f"status_{status}")
            if stopped.wait(pause):
                break
            pause = min(2 * pause, LONGEST_PAUSE)
        raise Missing("stopped")


class _Unreachable(Exception):
    """The connection could not be opened."""


def wait_ready(url: str, timeout: float, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until the server has loaded its weights and lists its models.

    Args:
        url: http://HOST:PORT of the server.
        timeout: seconds.
        alive: whether the server's process still runs.

    Raises:
        RunFailed: the server is not ready in time, or has ended; names the URL.
        ValueError: `url` has another format.
    """
    address = _address(url)
    deadline = time.monotonic() + timeout
    while True:
        try:
            status, _ = _request(address, "GET", "/v1/models", 5.0)
            problem = f"status {status}"
            if status == 200:
                return
        except (_Unreachable, OSError, http.client.HTTPException, Missing) as error:
            problem = str(error)
        if not alive():
            raise RunFailed(f"the server at {url} ended before it was ready")
        if time.monotonic() + 1 > deadline:
            raise RunFailed(f"the server at {url} is not ready after {timeout:g} s ({problem})")
        time.sleep(1)


def _address(url: str) -> tuple[str, int]:
    """Host and port of http://HOST:PORT.

    Raises:
        ValueError: the URL has another format; names it.
    """
    found = _ADDRESS.fullmatch(url)
    if found is None or int(found[2]) > 65535:
        raise ValueError(f"{url!r} is not the address of a chat server, http://HOST:PORT")
    return found[1].strip("[]"), int(found[2])


def _request(
    address: tuple[str, int], method: str, path: str, timeout: float, body: bytes | None = None
) -> tuple[int, bytes]:
    """Status and body of one request on a new connection.

    http.client ignores the environment's proxies and does not follow redirects.

    Raises:
        _Unreachable: the connection could not be opened.
        TimeoutError, OSError, http.client.HTTPException: the exchange failed.
        Missing: the body is longer than MAX_ANSWER ("too_long").
    """
    deadline = time.monotonic() + timeout
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    with closing(http.client.HTTPConnection(*address, timeout=timeout)) as connection:
        try:
            connection.connect()
        except OSError as error:
            raise _Unreachable(error.strerror or str(error)) from None
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        answer = b""
        while part := response.read1(65536):
            answer += part
            if len(answer) > MAX_ANSWER:
                raise Missing("too_long")
            if time.monotonic() > deadline:
                raise TimeoutError
        return response.status, answer


def _choice(answer: bytes) -> Any:
    """The first choice of a chat completion.

    Raises:
        Missing: the answer is not a chat completion ("malformed").
    """
    try:
        return json.loads(answer)["choices"][0]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise Missing("malformed") from None


def text_of(choice: Any) -> str:
    """The text of a chat completion's choice.

    Raises:
        Missing: it has none ("malformed").
    """
    try:
        content = choice["message"]["content"]
    except (KeyError, TypeError):
        content = None
    if not isinstance(content, str):
        raise Missing("malformed")
    return content
