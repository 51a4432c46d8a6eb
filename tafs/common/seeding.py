"""Explicit randomness: every stream of every step has a generator of its own."""

from __future__ import annotations

import hashlib

import torch


def generator(
    seed: int, stream: str, *indices: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """The generator of one stream, at one place.

    Streams are named ("start", "step", "prompts", ...) so that the start noise and the step noise
    never share numbers, and a run resumed at iteration k draws what it would have drawn.
    """
    key = ":".join([str(seed), stream, *(str(i) for i in indices)])
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
