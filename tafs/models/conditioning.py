"""What a network is told about the prompts of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompts of a batch.

    With classifier-free guidance, `negative` holds the conditioning of the negative prompt, also
    for B images.
    """

    embeds: Tensor  # [B, L, D] token embeddings
    pooled: Tensor  # [B, P] pooled embeddings; P = 0 for networks without them
    negative: Conditioning | None = None
    mask: Tensor | None = None  # [B, L] attention mask, for networks that take one

    def __getitem__(self, index: Any) -> Conditioning:
        negative = None if self.negative is None else self.negative[index]
        return replace(self.map(lambda tensor: tensor[index]), negative=negative)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply a function to all tensors except those of `negative`, which is dropped."""
        mask = None if self.mask is None else function(self.mask)
        return Conditioning(function(self.embeds), function(self.pooled), mask=mask)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate batches, without `negative`."""
        masks = [part.mask for part in parts if part.mask is not None]
        return Conditioning(
            torch.cat([part.embeds for part in parts]),
            torch.cat([part.pooled for part in parts]),
            mask=torch.cat(masks) if masks else None,
        )

    @property
    def nbytes(self) -> int:
        """The size of the tensors in bytes, without `negative`."""
        mask = 0 if self.mask is None else self.mask.nbytes
        return self.embeds.nbytes + self.pooled.nbytes + mask

    def repeat_interleave(self, times: int) -> Conditioning:
        """Repeat each prompt `times` times, in the order of a group's images."""
        return self[torch.arange(len(self.embeds)).repeat_interleave(times)]
