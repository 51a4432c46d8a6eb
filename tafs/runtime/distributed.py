"""Data-parallel training of one run by several processes, started by `tafs.runtime.launch`.

With one process, the methods of `Processes` return their arguments and torch.distributed is not
initialised, so callers need no second code path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tafs.common.errors import RunFailed

TIMEOUT = timedelta(minutes=30)  # that a process waits for the others


class PeerLost(RunFailed):
    """An exchange failed because another process has ended or does not answer."""


@dataclass(frozen=True)
class Processes:
    """This process's place among the processes that train one run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank within this machine
    kind: str = "cpu"  # device type: cpu or cuda

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        return torch.device("cuda", self.local_rank) if self.kind == "cuda" else torch.device("cpu")

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Concatenate the processes' tensors, of equal shape, along `dim` in order of rank.

        Raises:
            PeerLost: another process has ended or does not answer.
        """
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _peers():
            dist.all_gather(parts, tensor)
        return torch.cat(parts, dim)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one float64 all-reduce."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten().double() for tensor in tensors])
        with _peers():
            dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, asked: bool) -> bool:
        """Return whether `asked` is true in at least one process."""
        count = torch.tensor(float(asked))
        self.sum_([count])
        return bool(count > 0)


ALONE = Processes()


def from_environment(kind: str = "cpu") -> Processes:
    """Read this process's place from RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets.

    Raises:
        ValueError: this process has no GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    here = Processes(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]), kind)
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and here.local_rank >= gpus:
        raise ValueError(
            f"LOCAL_RANK: process {here.local_rank} of this machine has no GPU, only {gpus} are "
            f"visible; start {gpus} processes on each machine"
        )
    return here


@contextmanager
def connected(kind: str = "cpu") -> Iterator[Processes]:
    """Connect this process with the others of its run inside the block."""
    here = from_environment(kind)
    if here.size == 1:
        yield here
        return
    gpu = here.device if here.device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    with _peers():
        dist.init_process_group(
            "gloo" if gpu is None else "cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=gpu
        )
    yield here
    # Skipped after an error: leaving the group waits for processes that are stuck in an exchange.
    dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    """Convert the error of a failed exchange to a PeerLost."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise PeerLost(f"another process has ended or does not answer: {reason}") from error
