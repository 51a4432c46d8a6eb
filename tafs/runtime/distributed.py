"""Several processes that train one run, one a GPU, on one machine or more, as torchrun starts them.

Where there is one process, `Processes`' methods return what they are given and torch.distributed is
never set up, so that code which uses them needs no second path.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from tafs.common.env import whole_number
from tafs.common.errors import RunFailed, ToBeContinued

TIMEOUT = 1800  # s that a process waits for the others; TAFS_DISTRIBUTED_TIMEOUT replaces it
GRACE = 10.0  # s in which the launcher ends the processes that another one's failure leaves


@dataclass(frozen=True)
class Processes:
    """This process among those that train a run together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    kind: str = "cpu"  # of their devices, or cuda

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes the run's files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        return torch.device("cuda", self.local_rank) if self.kind == "cuda" else torch.device("cpu")

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The processes' tensors, all of one shape, side by side along `dim` in order of rank.

        Raises:
            RunFailed: another process has ended or does not answer.
        """
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _others():
            dist.all_gather(parts, tensor)
        return torch.cat(parts, dim)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes: one exchange for all, in float64.

        Raises:
            RunFailed: another process has ended or does not answer.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten().double() for tensor in tensors])
        with _others():
            dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, asked: bool) -> bool:
        """Whether one of the processes asks.

        Raises:
            RunFailed: another process has ended or does not answer.
        """
        count = torch.tensor(float(asked))
        self.sum_([count])
        return bool(count > 0)


ALONE = Processes()


def from_environment(kind: str = "cpu") -> Processes:
    """This process's place, from the RANK, WORLD_SIZE and LOCAL_RANK that torchrun sets.

    Args:
        kind: of the devices, cpu or cuda.

    Raises:
        ValueError: one of them is missing or no number, or there is no GPU for this process; names
            it.
    """
    number = partial(whole_number, remedy="torchrun sets it")
    size = number("WORLD_SIZE", default="1", least=1)
    if size == 1:
        return ALONE
    here = Processes(number("RANK"), size, number("LOCAL_RANK"), kind)
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and here.local_rank >= gpus:
        raise ValueError(
            f"LOCAL_RANK: process {here.local_rank} of this machine has no GPU, only {gpus} are "
            f"visible; start it with torchrun --nproc-per-node={gpus}"
        )
    return here


@contextmanager
def connected(kind: str = "cpu") -> Iterator[Processes]:
    """This process's place, and its connection to the other processes inside the block.

    CPU tensors go over gloo, tensors on GPUs over NCCL. An exception inside the block ends the job:
    it is raised in the process in which it happened first; the others, which it leaves without a
    partner, end with exit code 1 and without a word, so that the cause stands alone. Processes
    that have agreed to stop leave by ToBeContinued or SystemExit.

    Raises:
        ValueError: as `from_environment`; or TAFS_DISTRIBUTED_TIMEOUT is no positive whole number.
        RunFailed: the other processes cannot be reached.
    """
    here = from_environment(kind)
    if here.size == 1:
        yield here
        return
    timeout = _timeout()
    gpu = here.device if here.device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    with _others():
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "gloo" if gpu is None else "cpu:gloo,cuda:nccl",
            store=store,
            rank=here.rank,
            world_size=here.size,
            timeout=timeout,
            device_id=gpu,
        )
    try:
        yield here
    except ToBeContinued:
        raise
    except Exception:
        if not _fails_first(store):
            # Whoever exits within the same second may be taken by torchrun for the cause.
            time.sleep(GRACE)
            sys.exit(1)
        raise
    # Not after a failure: leaving the group waits for processes that are stuck in an exchange.
    dist.destroy_process_group()


@contextmanager
def _others() -> Iterator[None]:
    """An exchange with the other processes; its failure is one line instead of the transport's."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RunFailed(f"another process has ended or does not answer: {reason}") from error


def _fails_first(store: dist.Store) -> bool:
    """Whether no other process has failed before this one."""
    try:
        return store.add("tafs/failures", 1) == 1
    except RuntimeError:  # the store went with the process that held it
        return True


def _timeout() -> timedelta:
    seconds = whole_number("TAFS_DISTRIBUTED_TIMEOUT", "give seconds", str(TIMEOUT), 1)
    return timedelta(seconds=seconds)
