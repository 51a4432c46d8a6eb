"""What the published reward models share: frozen weights from local files, pixels, captions.

They score float32 images at any resolution: each model's own preprocessing is done on tensors, so
that a gradient reaches the image. Nothing is downloaded.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from tafs.data.prompts import Prompt
from tafs.rewards.registry import Reward, check_images

KEPT_CAPTIONS = 32_768  # token ids of this many captions are kept: all of Pick-a-Pic's prompts


class LearnedReward(ABC):
    """A frozen, differentiable reward model on one device; a `registry.Scorer`.

    Args:
        model: in float32 from here on.
        mean, std: of the pixels' normalisation, one a channel.
        device: where the model lies and where it expects the images.
    """

    name: ClassVar[str]  # of METRICS
    version: ClassVar[str]  # the published weights
    scale: ClassVar[str]  # what the training scale is
    reported: ClassVar[float] = 1.0  # reported score / training score

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
    ) -> None:
        self.model: Any = model.to(device, torch.float32).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (mean, std)
        )
        self.token_ids = lru_cache(KEPT_CAPTIONS)(self.tokenize)

    @abstractmethod
    def tokenize(self, text: str) -> Tensor:
        """What the model reads of one caption, of the same shape for every caption."""

    @abstractmethod
    def resize(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] at the model's size."""

    @abstractmethod
    def match(self, pixels: Tensor, captions: Tensor, owner: Tensor) -> Tensor:
        """Training-scale scores [B] of normalised pixels; captions[owner[i]] is image i's."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] on `device` -> [B] float32, with a gradient to the images.

        Raises:
            ValueError: the images or their number are not as said; names the reward.
        """
        check_images(self.name, images, prompts)
        # A group of images shares its caption, which is encoded once.
        rows = {text: row for row, text in enumerate(dict.fromkeys(p.text for p in prompts))}
        captions = torch.stack([self.token_ids(text) for text in rows]).to(self.device)
        owner = torch.tensor([rows[p.text] for p in prompts], device=self.device)
        return self.match((self.resize(images) - self.mean) / self.std, captions, owner)

    def report(self, scores: Tensor) -> Tensor:
        """Training-scale scores on the scale on which the metric is published."""
        return self.reported * scores

    def reward(self) -> Reward:
        return Reward(self.name, self, self.report, differentiable=True, record=self.record)

    def record(self) -> dict[str, str]:
        """For a result's provenance."""
        return {"name": self.name, "scale": self.scale, "version": self.version}


class DualEncoder(LearnedReward):
    """Scores by the cosine of the image's and the caption's embeddings."""

    scale = "cosine"

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, D], of any length."""

    @abstractmethod
    def embed_captions(self, captions: Tensor) -> Tensor:
        """Embeddings [N, D] of token ids [N, L], of any length."""

    def match(self, pixels: Tensor, captions: Tensor, owner: Tensor) -> Tensor:
        image = functional.normalize(self.embed_images(pixels), dim=-1)
        caption = functional.normalize(self.embed_captions(captions), dim=-1)
        return (image * caption[owner]).sum(-1)


def resize_shorter_side(images: Tensor, side: int) -> Tensor:
    """Bicubic and antialiased, so that the shorter side has `side` pixels.

    As PIL and torchvision do it in 8 bits, columns before rows and clipped after each of the two
    passes, but without rounding.
    """
    height, width = images.shape[-2:]
    new_height, new_width = (int(side * n / min(height, width)) for n in (height, width))
    for size in ((height, new_width), (new_height, new_width)):
        images = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return images


def resize_longer_side(images: Tensor, side: int) -> Tensor:
    """Bicubic and antialiased, so that the longer side has `side` pixels; the rest is black.

    HPSv2 resizes real numbers, so nothing is clipped.
    """
    height, width = images.shape[-2:]
    size = [round(side * n / max(height, width)) for n in (height, width)]
    images = functional.interpolate(images, size, mode="bicubic", antialias=True)
    rows, columns = (side - n for n in size)
    border = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return functional.pad(images, border)


def require(name: str, *files: Path) -> None:
    """Refuse a checkpoint of which a file is missing.

    Raises:
        FileNotFoundError: names the reward, the file and the remedy.
    """
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"reward {name}: {file} is missing; fetch the model again")


def pretrained(name: str, kind: Any, folder: Path) -> Any:
    """A model of transformers' class `kind`, in float32, whose every weight comes from the folder.

    Raises:
        ValueError: a file is missing or damaged; names the reward, the folder and the remedy.
    """
    try:
        model, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise damaged(name, folder, error) from None
    # transformers draws what is missing at random and goes on; buffers are constants.
    weights = {weight for weight, _ in model.named_parameters()}
    if missing := sorted(weights & set(found["missing_keys"])):
        raise damaged(name, folder, f"{missing[0]} is missing")
    return model


def read_state(name: str, file: Path) -> dict[str, Any]:
    """The content of a PyTorch checkpoint of tensors and plain values, on the CPU.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged; names reward, file and remedy.
    """
    require(name, file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows as any of many classes, some of them private
        raise damaged(name, file, error) from None
    if not isinstance(content, Mapping):
        raise damaged(name, file, "it holds no state")
    return dict(content)


def count_layers(state: Mapping[str, Tensor], layers: str) -> int:
    """How many layers a state has under the name `layers`."""
    pattern = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    return len({match[1] for key in state if (match := pattern.match(key))})


def fill(name: str, model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Give a model its weights, all of them; what a state holds beyond is left out.

    Raises:
        ValueError: a weight is missing or of another shape; names reward, file and weight.
    """
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise damaged(name, file, str(error).splitlines()[-1].strip()) from None
    # Buffers are constants; checkpoints of older releases may lack them.
    weights = [key for key, _ in model.named_parameters() if key in set(missing)]
    if weights:
        raise damaged(name, file, f"{len(weights)} weights are missing, the first is {weights[0]}")


def damaged(name: str, file: Path, reason: object) -> ValueError:
    """The error for a checkpoint that is not what it should be, in one line."""
    first = (str(reason).splitlines() or [type(reason).__name__])[0]
    return ValueError(f"reward {name}: {file} is damaged ({first}); fetch the model again")
