"""Client of UnifiedReward (Wang et al., arXiv 2503.05236), a model that grades from 1 to 5.

The vision language model runs in a separate chat server (vLLM or sglang, OpenAI's protocol).
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from tafs.common.errors import RunFailed
from tafs.data.prompts import Prompt
from tafs.rewards.metrics import METRICS, Metric, Reward
from tafs.rewards.registry import MISSING_SHARE

GRADES = 5
# The question of Flow-GRPO's reward (`unifiedreward_score_sglang` of flow_grpo/rewards.py in
# https://github.com/yifan123/flow_grpo), except: without its leading "<image>\n", which marks the
# image's place in a plain text prompt; here the image is a part of the message.
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
SIDE = 512  # pixels; the size at which Flow-GRPO sends images
MAX_TOKENS = 512
MAX_ANSWER = 1_000_000  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between attempts, doubled each time

_ADDRESS = re.compile(r"http://([\w.-]+|\[[\da-fA-F:]+\]):(\d{1,5})/?", re.ASCII)
_NUMBER = r"""
    [\s*_`"'\[(<{$]*+                         # Markdown, quotes, brackets
    (\d+(?:\.\d+)?) (?![\w%]|[.,]\d)          # not a part of another number or word
    [*_`"'\])>}$]*+
    (?: [ ]*(?:/|out[ ]of)[ ]*5(?:\.0+)?(?!\d|[.,]\d) )?
    (?! [ ]*(?:/|-|–|to|or|out[ ]of)[ *_]*\d ) # not a range, not of another scale
"""
_LABEL = r"""
    \bFinal[\s*_]+Score[*_`"'\s]*+ (?:\([^()]*\)[*_\s]*+)? (?: : | ： | = | \bis\b | \bof\b )
"""
_FLAGS = re.ASCII | re.IGNORECASE | re.VERBOSE
_SCORE = re.compile(_LABEL + _NUMBER, _FLAGS)
_ALONE = re.compile(rf"[*_\s]*+ (?:(?:Final|Score)[*_\s]*+:)? {_NUMBER} [*_.\s]*+", _FLAGS)
_TRANSIENT = frozenset({429, 500, 502, 503, 504})
_REJECTED = frozenset({400, 413, 422})  # other images or captions may be accepted


class Missing(Exception):
    """An image has no score; the message is the reason, in one word. The run goes on."""


@dataclass(eq=False)
class UnifiedReward:
    """Grades of a chat server divided by 5; NaN where the server gives none.

    Args:
        url: http://HOST:PORT of the server. Proxies are not used, redirects not followed.
        model: the name under which the server serves the model.
        workers: number of parallel requests.
        timeout: seconds for connecting, and for an answer.
        attempts: attempts of a request that cannot connect, times out or is answered by 429 or 5xx.
        missing_share: share of the images that may have no score.
        images: total number of images that `missing_share` refers to; None: those of each call.
        side: images are sent at side x side pixels.

    Raises:
        ValueError: `url` has another format.
    """

    metric: ClassVar[Metric] = METRICS["unifiedreward"]

    url: str
    model: str = metric.version
    _: KW_ONLY
    workers: int = 64
    timeout: float = 120.0
    attempts: int = 5
    missing_share: float = MISSING_SHARE
    images: int | None = None
    side: int = SIDE

    def __post_init__(self) -> None:
        self.address = _address(self.url)
        self.asked = 0
        self.missing: Counter[str] = Counter()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B] float32: the grade divided by 5, or NaN.

        Raises:
            RunFailed: there is no server, it refuses the request, or too many scores are missing.
        """
        pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
        arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
        of = self.images or len(prompts)
        allowed = int(self.missing_share * of)
        before = self.missing if self.images else Counter[str]()
        missing, stopped, lock = Counter(before), threading.Event(), threading.Lock()

        def score(i: int) -> float:
            if stopped.is_set():
                return math.nan
            try:
                body = self._body(Image.fromarray(arrays[i]), prompts[i].text)
                return grade(_content(self._ask(body, stopped)))
            except Missing as reason:
                with lock:
                    if not stopped.is_set():  # after a stop, the remaining images are not tried
                        missing[str(reason)] += 1
                        if missing.total() > allowed:
                            stopped.set()
                return math.nan
            except RunFailed:
                stopped.set()
                raise

        with ThreadPoolExecutor(max(1, min(self.workers, len(prompts)))) as pool:
            grades = list(pool.map(score, range(len(prompts))))
        self.asked += len(prompts)
        self.missing += missing - before
        if missing.total() > allowed:
            reasons = ", ".join(f"{count} {name}" for name, count in sorted(missing.items()))
            raise RunFailed(
                f"unifiedreward: {missing.total()} of {of} images have no score from {self.url} "
                f"({reasons}); at most {allowed} may be missing"
            )
        return torch.tensor(grades, dtype=torch.float32, device=images.device) / GRADES

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

    def _body(self, image: Image.Image, caption: str) -> bytes:
        """The JSON of a chat completion's request."""
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        data = io.BytesIO()
        image.save(data, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION.format(caption=caption)},
        ]
        question = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        return json.dumps(question).encode()

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
                if status in _REJECTED:
                    raise Missing(f"status_{status}")
                if status not in _TRANSIENT:
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


class _Unreachable(Exception):
    """The connection could not be opened."""


def grade(text: str) -> float:
    """The grade in an answer: the number after "Final Score:", or the number that the answer is.

    The published readers are Flow-GRPO's, which takes the first "Final Score:" before a digit from
    1 to 5, and UnifiedReward's (DiffusionDPO/sift_dpo_data.py in
    https://github.com/CodeGoat24/UnifiedReward), which takes the last. The grade is theirs where
    they agree on one; where they give 0, differ, or take a part of a number such as the 4 of 45,
    it is missing.

    Raises:
        Missing: there is no number or there are different ones ("no_score"), or it is outside
            [1, 5] ("out_of_range").
    """
    alone = _ALONE.fullmatch(text)
    grades = {float(number) for number in ([alone[1]] if alone else _SCORE.findall(text))}
    if len(grades) != 1:
        raise Missing("no_score")
    [found] = grades
    if not 1 <= found <= GRADES:
        raise Missing("out_of_range")
    return found


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
            raise RunFailed(f"unifiedreward: the server at {url} ended before it was ready")
        if time.monotonic() + 1 > deadline:
            raise RunFailed(f"unifiedreward: {url} is not ready after {timeout:g} s ({problem})")
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


def _content(answer: bytes) -> str:
    """The text of a chat completion.

    Raises:
        Missing: the answer is not a chat completion ("malformed").
    """
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise Missing("malformed")
    return content
