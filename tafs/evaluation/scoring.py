"""Sampling and scoring images, in this process or in several that share the batches, one per GPU.

The batches are the same however many processes share them, and come back in their order. The
number of processes therefore changes no result, and work may be continued with another number.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tafs.common import collector, errors
from tafs.data.prompts import Prompt
from tafs.evaluation import generate, image_archive
from tafs.experiment.specs import EvalSetting
from tafs.rewards.registry import RewardSet
from tafs.runtime import deadline, gpus, progress
from tafs.runtime.main import end_with_parent, limit_threads

ENCODERS = 4  # threads that encode a batch's images


@dataclass(frozen=True)
class Work:
    """The images of one setting.

    Args:
        setting: with the sampler to use, not BEST.
        prompts: of the images.
        batch: images per batch.
        seed: of the images' noise.
        first: the index of the image to start with.
        shown: prompts whose first image is returned.
        encoded: whether all images are returned, as PNG files.
    """

    setting: EvalSetting
    prompts: Sequence[Prompt]
    batch: int
    seed: int
    first: int = 0
    shown: frozenset[int] = frozenset()
    encoded: bool = False

    @property
    def total(self) -> int:
        return len(self.prompts) * self.setting.images_per_prompt

    @property
    def batches(self) -> int:
        """The number of batches from `first` on."""
        return -(-(self.total - self.first) // self.batch)


class Scored(NamedTuple):
    """A batch."""

    keys: generate.Keys
    scores: dict[str, Tensor]  # by metric, [b], on the published scale, on the CPU
    shown: dict[int, Tensor]  # by prompt, uint8 [H, W, 3]
    files: list[bytes]
    seconds: dict[str, float]  # that one process took to "sample" and for the "reward"


class Scorer(Protocol):
    """Samples and scores images."""

    def score(self, work: Work) -> Iterator[Scored]:
        """Yield the batches in their order.

        Raises:
            torch.OutOfMemoryError: a GPU's memory does not suffice for a batch.
        """


class Local:
    """Scores in this process.

    Args:
        rewards: the metrics.
        load: iteration of training (None: the last one) -> model; called when images are needed.
    """

    def __init__(self, rewards: RewardSet, load: Callable[[int | None], Any]) -> None:
        self.rewards = rewards
        self._load = load
        self._loaded: tuple[int | None, Any] | None = None
        self._encoders = ThreadPoolExecutor(ENCODERS)

    def _model(self, iteration: int | None) -> Any:
        if self._loaded is None or self._loaded[0] != iteration:
            self._loaded = None  # its memory is free before the next one is loaded
            self._loaded = (iteration, self._load(iteration))
        return self._loaded[1]

    def score(self, work: Work, share: generate.Share = generate.ALL) -> Iterator[Scored]:
        """Yield the batches of a share of the work; see `Scorer`.

        A batch's images are encoded while the next one is sampled, which is lost if the caller
        stops in between.
        """
        encoding: deque[tuple[Scored, Iterator[bytes]]] = deque()
        for scored, pixels in self._batches(work, share):
            # From now on threads encode them.
            encoding.append((scored, self._encoders.map(image_archive.encode, pixels)))
            if len(encoding) > work.encoded:
                yield _with_files(*encoding.popleft())
        for last in encoding:
            yield _with_files(*last)

    def _batches(
        self, work: Work, share: generate.Share
    ) -> Iterator[tuple[Scored, Iterable[Tensor]]]:
        """Yield the batches without their files, and the images to encode, uint8 [H, W, 3]."""
        texts = [prompt.text for prompt in work.prompts]
        model = self._model(work.setting.iteration)
        drawn = generate.sample(
            model, texts, work.setting, work.batch, seed=work.seed, first=work.first, share=share
        )
        clock = time.perf_counter()
        for keys, images in drawn:
            sampled = time.perf_counter()
            found = self.rewards.score(images, [work.prompts[p] for p, _ in keys])
            scores = {name: s.cpu() for name, s in self.rewards.report(found).items()}
            seconds = {"sample": sampled - clock, "reward": time.perf_counter() - sampled}
            shown = {n: p for n, (p, image) in enumerate(keys) if image == 0 and p in work.shown}
            pixels = image_archive.pixels(images) if shown or work.encoded else images
            first = {prompt: pixels[n] for n, prompt in shown.items()}
            yield Scored(keys, scores, first, [], seconds), pixels if work.encoded else ()
            clock = time.perf_counter()


def _with_files(scored: Scored, files: Iterator[bytes]) -> Scored:
    return scored._replace(files=[*files])


class Shared:
    """Scores in `count` processes, each with its own models and GPU.

    They end with this process, and leave signals to it.

    Args:
        make: what each of them scores with; pickled.
    """

    def __init__(self, make: Callable[[], Local], count: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._workers: list[tuple[SpawnProcess, Connection]] = []
        visible = os.environ.get(gpus.VARIABLE, "")
        names = visible.split(",")  # as many as processes, if they use GPUs
        for rank in range(count):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(make, there), daemon=True)
            if visible:
                # Before any import of the process sees the GPUs.
                os.environ[gpus.VARIABLE] = names[rank % len(names)]
            worker.start()
            there.close()  # so that each side sees when the other one has ended
            self._workers.append((worker, here))
        if visible:
            os.environ[gpus.VARIABLE] = visible

    def close(self) -> None:
        """End the processes."""
        for worker, pipe in self._workers:
            worker.kill()
            worker.join()
            pipe.close()

    def score(self, work: Work) -> Iterator[Scored]:
        """Yield the batches in their order; to be exhausted before the next call.

        Raises:
            RunFailed: a process has ended.
        """
        count = len(self._workers)
        for rank in range(count):
            self._send(rank, (work, (rank, count)))
        done, setting = work.first, work.setting
        for number in range(work.batches):
            found = self._receive(number % count)
            done += len(found.keys)
            progress.tell(generate.label(setting), done, work.total)  # nobody hears the workers
            yield found

    def _send(self, rank: int, message: Any) -> None:
        try:
            self._workers[rank][1].send(message)
        except OSError:  # it has ended, and may have said why
            self._receive(rank)

    def _receive(self, rank: int) -> Scored:
        worker, pipe = self._workers[rank]
        try:
            found = pipe.recv()
        except (EOFError, OSError):
            worker.join()
            raise errors.RunFailed(
                f"process {rank} of {len(self._workers)} has ended with exit code "
                f"{worker.exitcode}; a negative one is the signal that ended it"
            ) from None
        if isinstance(found, Exception):
            raise found
        return _mapped(found, torch.from_numpy)


def _mapped(scored: Scored, change: Callable[[Any], Any]) -> Scored:
    """The batch with other arrays; tensors would travel in shared memory, which may be small."""
    scores = {name: change(values) for name, values in scored.scores.items()}
    return scored._replace(scores=scores, shown={p: change(x) for p, x in scored.shown.items()})


def _serve(make: Callable[[], Local], pipe: Connection) -> None:
    """Score what the pipe brings until its other end is closed."""
    end_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, *deadline.SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    collector.spare()
    limit_threads()
    try:
        scorer = make()
        while True:
            work, share = pipe.recv()
            for found in scorer.score(work, share):
                pipe.send(_mapped(found, Tensor.numpy))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        known = errors.exit_code(error) is not None or isinstance(error, torch.OutOfMemoryError)
        if not known:
            traceback.print_exc()
            error = errors.RunFailed(errors.one_line(f"{type(error).__name__}: {error}"))
        pipe.send(error)


@contextmanager
def scorer(make: Callable[[], Local], processes: int) -> Iterator[Scorer]:
    """A scorer with a number of processes, which end with the block."""
    if processes == 1:
        yield make()
        return
    shared = Shared(make, processes)
    try:
        yield shared
    finally:
        shared.close()
