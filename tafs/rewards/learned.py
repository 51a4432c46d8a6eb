"""Base classes of the published reward models: frozen weights, differentiable preprocessing.

They score float32 images of any resolution. Each model's preprocessing works on tensors, so that
gradients reach the images. Where a model computes in bfloat16, pixels are prepared and embeddings
compared in float32. Weights are read from local files; nothing is downloaded. Functions that read a
checkpoint raise a FileNotFoundError or ValueError with the reward, the file and the remedy.
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
from tafs.rewards.metrics import Metric, Reward

KEPT_CAPTIONS = 32_768  # captions whose token ids are cached; more than Pick-a-Pic has prompts
KEPT_EMBEDDINGS = 4_096  # captions whose embeddings are cached on the device; 4 KiB each for 1,024


class LearnedReward(ABC):
    """A frozen, differentiable reward model on one device; a `metrics.Scorer`.

    The model is converted to float32; see `cast`. `mean` and `std` normalise the pixels of each
    channel.
    """

    metric: ClassVar[Metric]

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
    ) -> None:
        self.model: Any = model.to(device, torch.float32).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.dtype = torch.float32
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (mean, std)
        )
        self.token_ids = lru_cache(KEPT_CAPTIONS)(self.tokenize)

    @property
    def name(self) -> str:
        return self.metric.name

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.model,)

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the weights to `dtype`, in which the model computes from now on."""
        self.model.to(dtype)
        self.dtype = dtype

    @abstractmethod
    def tokenize(self, text: str) -> Tensor:
        """The model's input for one caption; every caption has the same shape."""

    @abstractmethod
    def resize(self, images: Tensor) -> Tensor:
        """Resize images [B, 3, H, W] in [0, 1] to the model's input size."""

    @abstractmethod
    def match(self, pixels: Tensor, captions: Tensor, owner: Tensor) -> Tensor:
        """Training-scale scores [B] of normalised pixels; captions[owner[i]] belongs to image i.

        The pixels are of the model's dtype, the scores float32.
        """

    def normalize(self, resized: Tensor) -> Tensor:
        """The model's input of resized images [B, 3, H, W] in [0, 1]."""
        return ((resized - self.mean) / self.std).to(self.dtype)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] on `device` -> [B] float32, differentiable."""
        # Images of a group share a caption, which is encoded once.
        rows = {text: row for row, text in enumerate(dict.fromkeys(p.text for p in prompts))}
        owner = torch.tensor([rows[p.text] for p in prompts], device=self.device)
        return self.match(self.normalize(self.resize(images)), self.captions([*rows]), owner)

    def captions(self, texts: Sequence[str]) -> Tensor:
        """What `match` reads of captions, a row each."""
        return torch.stack([self.token_ids(text) for text in texts]).to(self.device)

    def reward(self) -> Reward:
        return Reward(self.metric, self)


class DualEncoder(LearnedReward):
    """Scores are the cosine of the image's and the caption's embeddings.

    Each caption is encoded once and alone, so that its embedding has the same bits whichever others
    are scored with it.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
    ) -> None:
        super().__init__(model, mean, std, device)
        self.embedded = lru_cache(KEPT_EMBEDDINGS)(self._embedded)

    def cast(self, dtype: torch.dtype) -> None:
        super().cast(dtype)
        self.embedded.cache_clear()

    def captions(self, texts: Sequence[str]) -> Tensor:
        """Float32 embeddings [N, D] of norm 1."""
        return torch.stack([self.embedded(text) for text in texts])

    @torch.no_grad()
    def _embedded(self, text: str) -> Tensor:
        [embedding] = self.embed_captions(self.token_ids(text)[None].to(self.device)).float()
        return functional.normalize(embedding, dim=0)

    def embed(self, images: Tensor) -> Tensor:
        """Float32 embeddings [B, D] of images [B, 3, H, W] in [0, 1] on `device`, of any norm."""
        return self.embed_images(self.normalize(self.resize(images))).float()

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, D] of pixels, not normalised."""

    @abstractmethod
    def embed_captions(self, captions: Tensor) -> Tensor:
        """Embeddings [N, D] of token ids [N, L], not normalised."""

    def match(self, pixels: Tensor, captions: Tensor, owner: Tensor) -> Tensor:
        image = functional.normalize(self.embed_images(pixels).float(), dim=-1)
        return (image * captions[owner]).sum(-1)


def resize_shorter_side(images: Tensor, side: int) -> Tensor:
    """Resize images so that the shorter side has `side` pixels; bicubic, antialiased.

    Like PIL and torchvision on 8-bit images: columns before rows, clipped after each of the two
    passes. Unlike them, values are not rounded.
    """
    height, width = images.shape[-2:]
    return resize(images, *(int(side * n / min(height, width)) for n in (height, width)))


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize images as `resize_shorter_side` does."""
    for size in ((images.shape[-2], width), (height, width)):
        images = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return images


def resize_longer_side(images: Tensor, side: int) -> Tensor:
    """Resize images so that the longer side has `side` pixels and pad with black; bicubic.

    Not clipped, since hpsv2 resizes floats.
    """
    height, width = images.shape[-2:]
    size = [max(1, round(side * n / max(height, width))) for n in (height, width)]
    images = functional.interpolate(images, size, mode="bicubic", antialias=True)
    rows, columns = (side - n for n in size)
    border = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return functional.pad(images, border)


def require(name: str, *files: Path) -> None:
    """Refuse a checkpoint with missing files (FileNotFoundError)."""
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"reward {name}: {file} is missing; fetch the model again")


def pretrained(name: str, kind: Any, folder: Path) -> Any:
    """Load a model of transformers' class `kind` in float32; every weight must be in the folder."""
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
    # transformers initialises missing weights randomly; missing buffers are constants.
    weights = {weight for weight, _ in model.named_parameters()}
    if missing := sorted(weights & set(found["missing_keys"])):
        raise damaged(name, folder, f"{missing[0]} is missing")
    return model


def read_state(name: str, file: Path) -> dict[str, Any]:
    """Read a PyTorch checkpoint of tensors and plain values to the CPU."""
    require(name, file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage raises many classes, some of them private
        raise damaged(name, file, error) from None
    if not isinstance(content, Mapping):
        raise damaged(name, file, "it is not a state dict")
    return dict(content)


def count_layers(state: Mapping[str, Tensor], layers: str) -> int:
    """Number of layers that a state dict has under the prefix `layers`."""
    pattern = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    return len({match[1] for key in state if (match := pattern.match(key))})


def fill(name: str, model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load all of a model's weights from a state dict; surplus entries are ignored."""
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise damaged(name, file, str(error).splitlines()[-1].strip()) from None
    # Checkpoints of older releases may lack buffers, which are constants.
    weights = [key for key, _ in model.named_parameters() if key in set(missing)]
    if weights:
        raise damaged(name, file, f"{len(weights)} weights are missing, the first is {weights[0]}")


def damaged(name: str, file: Path, reason: object) -> ValueError:
    """The error for a damaged checkpoint, in one line."""
    first = (str(reason).splitlines() or [type(reason).__name__])[0]
    return ValueError(f"reward {name}: {file} is damaged ({first}); fetch the model again")
