"""Explicit randomness: a generator for every stream and step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def generator(
    seed: int, stream: str, *indices: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return the generator of one stream at one position, for example an iteration.

    Streams are named ("start", "step", ...), so that start noise and step noise never share
    numbers, and a resumed run draws the numbers that it would have drawn.
    """
    key = ":".join([str(seed), stream, *(str(i) for i in indices)])
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Generators:
    """The random numbers of a batch: each image has its own generator.

    An image draws the same numbers in every batch, whatever the batch's size.

    Args:
        images: a generator per image.
        shared: the source of choices that the whole batch has in common.
    """

    def __init__(self, images: Sequence[torch.Generator], shared: torch.Generator) -> None:
        self.images = images
        self.shared = shared

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, [B, *shape], float32 on the CPU."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.images])

    def rand(self, shape: Sequence[int] = ()) -> Tensor:
        """Numbers uniform on [0, 1), [B, *shape]."""
        return torch.stack([torch.rand(tuple(shape), generator=g) for g in self.images])

    def randint(self, high: int) -> Tensor:
        """Whole numbers uniform on 0 .. high - 1, [B]."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self.images])


def generators(
    seed: int, stream: str, *indices: int, images: Iterable[Sequence[int]], shared: int = 0
) -> Generators:
    """Return the generators of a batch.

    Args:
        images: the indices of each image, for example its prompt and its number.
        shared: the position of the generator that batches with the same value have in common.
    """
    return Generators(
        [generator(seed, stream, *indices, *image) for image in images],
        generator(seed, f"{stream}/shared", *indices, shared),
    )
