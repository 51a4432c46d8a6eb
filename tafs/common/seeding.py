"""Explicit randomness: a generator for every stream and step."""

from __future__ import annotations

import hashlib

import torch


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
