"""The embedded reward models under the published models' names and on their scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from tafs.data.prompts import Prompt
from tafs.rewards.geneval import geneval_verdict
from tafs.rewards.metrics import METRICS, Reward
from tafs.shapes import scorers, weights
from tafs.shapes.detector import detect
from tafs.shapes.scenes import IMAGE_SIZE

Model = scorers.DualEncoder | scorers.FusionScorer

# The scorer of each learned reward, and its output on the training scale.
LEARNED: dict[str, tuple[type[Model], Callable[[Tensor], Tensor]]] = {
    "pickscore": (scorers.DualEncoder, lambda cosine: cosine),
    "clip": (scorers.DualEncoder, lambda cosine: cosine),
    "hpsv2": (scorers.DualEncoder, lambda cosine: cosine),
    "imagereward": (scorers.FusionScorer, lambda outputs: outputs[:, 0]),
    "unifiedreward": (
        scorers.FusionScorer,
        lambda logits: scorers.grade(logits) / scorers.GRADES,
    ),
}


def build(name: str, device: str = "cpu", *, strict_geneval: bool = False) -> Reward:
    """Load an embedded reward.

    Args:
        name: "geneval" or a key of LEARNED.
        device: of the learned rewards' models.
        strict_geneval: GenEval's 0/1 verdict instead of the graded credit.

    Raises:
        ValueError: its weights are missing or altered; names the file.
    """
    own = METRICS[name]
    metric = replace(own, version=f"shapes {name}", resources=(), castable=(), served=False)
    if name == "geneval":
        return Reward(metric, GenEval(strict=strict_geneval))
    kind, head = LEARNED[name]
    folder = weights.verify(name)
    return Reward(metric, Learned(name, kind.load(folder).to(device), folder, head))


class GenEval:
    """GenEval on the exact detector's objects: graded for training, 0/1 for evaluation."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        verdicts = [geneval_verdict(d, p.row) for d, p in zip(detect(images), prompts, strict=True)]
        scores = [float(v.correct) if self.strict else v.graded for v in verdicts]
        return torch.tensor(scores, device=images.device)


class Learned:
    """An embedded scorer with its tokenizer; token ids of captions are cached."""

    def __init__(
        self, name: str, model: Model, folder: Path, head: Callable[[Tensor], Tensor]
    ) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.networks = (self.model,)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.head = head
        self._ids: dict[str, Tensor] = {}

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images [B, 3, H, W] in [0, 1], by a dual encoder."""
        self._check(images)
        encoder: Any = self.model
        return encoder.embed_images(images)

    def _check(self, images: Tensor) -> None:
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"reward {self.name}: images must be [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], "
                f"not {list(images.shape)}"
            )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self._check(images)
        new = [text for text in dict.fromkeys(p.text for p in prompts) if text not in self._ids]
        if new:
            self._ids.update(zip(new, scorers.tokens(self.tokenizer, new), strict=True))
        ids = torch.stack([self._ids[p.text] for p in prompts]).to(images.device)
        return self.head(self.model(images, ids))
