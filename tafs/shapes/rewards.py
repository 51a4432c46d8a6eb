"""The embedded world's rewards under the paper's names, on the real models' scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tafs.rewards.geneval import geneval_verdict
from tafs.data.prompts import Prompt
from tafs.rewards.registry import Reward
from tafs.shapes import scorers, weights
from tafs.shapes.detector import detect


def build(name: str, *, strict_geneval: bool = False) -> Reward:
    """One embedded reward, its weights verified against their manifest."""
    if name == "geneval":
        return Reward(name, GenEval(strict=strict_geneval), _same, differentiable=False)
    folder = weights.verify(name)
    if name in ("clip", "pickscore", "hpsv2"):
        model: torch.nn.Module = scorers.DualEncoder.load(folder)
        report = {"clip": _percent, "pickscore": _pickscore, "hpsv2": _same}[name]
        return Reward(name, Learned(model, folder, _same), report, differentiable=True)
    model = scorers.FusionScorer.load(folder)
    if name == "imagereward":
        return Reward(name, Learned(model, folder, _first), _same, differentiable=True)
    return Reward(name, Learned(model, folder, _unit_grade), _grade, differentiable=True)


class GenEval:
    """The exact detector under GenEval's verdict: graded for training, 0/1 for evaluation."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        verdicts = [geneval_verdict(d, p.row) for d, p in zip(detect(images), prompts, strict=True)]
        return torch.tensor([float(v.correct) if self.strict else v.graded for v in verdicts])


class Learned:
    """A trained scorer with its tokenizer; captions repeat, so their token ids are kept."""

    def __init__(
        self, model: torch.nn.Module, folder: Path, head: Callable[[Tensor], Tensor]
    ) -> None:
        from transformers import CLIPTokenizer

        self.model = model.eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.head = head
        self._ids: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        new = [text for text in dict.fromkeys(p.text for p in prompts) if text not in self._ids]
        if new:
            self._ids.update(zip(new, scorers.tokens(self.tokenizer, new), strict=True))
        ids = torch.stack([self._ids[p.text] for p in prompts]).to(images.device)
        return self.head(self.model(images, ids))


def _same(scores: Tensor) -> Tensor:
    return scores


def _first(outputs: Tensor) -> Tensor:
    return outputs[:, 0]


def _percent(scores: Tensor) -> Tensor:
    return 100 * scores


def _pickscore(scores: Tensor) -> Tensor:
    return scorers.TEMPERATURE * scores


def _unit_grade(logits: Tensor) -> Tensor:
    return scorers.grade(logits) / scorers.GRADES


def _grade(scores: Tensor) -> Tensor:
    return scorers.GRADES * scores
