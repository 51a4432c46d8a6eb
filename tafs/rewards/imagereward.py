"""ImageReward (Xu et al., 2023, arXiv 2304.05977): BLIP reads caption and image, an MLP scores."""

from __future__ import annotations

from pathlib import Path

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop

from tafs.rewards import compat, learned
from tafs.rewards.metrics import METRICS

VISION = "blip.visual_encoder"
TOKENS = 35  # per caption; longer ones are truncated


class ImageReward(learned.LearnedReward):
    """The standardised score of image-reward's own model: mean 0, standard deviation 1.

    `file` and `med_config` are those of THUDM/ImageReward, `tokenizer` the folder of
    bert-base-uncased's.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; names it and the remedy.
    """

    metric = METRICS["imagereward"]

    def __init__(
        self, file: Path, med_config: Path, tokenizer: Path, device: torch.device | str = "cpu"
    ) -> None:
        learned.require(self.name, file, med_config, tokenizer / "vocab.txt")
        state = learned.read_state(self.name, file)
        try:
            width, _, _, patch = state[f"{VISION}.patch_embed.proj.weight"].shape
        except KeyError as error:
            raise learned.damaged(self.name, file, f"it has no {error}") from None
        depth = learned.count_layers(state, f"{VISION}.blocks")
        try:
            model = compat.build_imagereward(
                med_config, tokenizer, width=width, depth=depth, patch=patch, device=device
            )
        except RuntimeError as error:
            raise ValueError(f"reward {self.name}: {error}") from None
        except ValueError as error:
            raise learned.damaged(self.name, med_config, error) from None
        learned.fill(self.name, model, state, file)
        first, *_, last = model.preprocess.transforms  # its resizing and its normalisation
        self.side = int(first.size)
        super().__init__(model, last.mean, last.std, device)
        model.mlp.register_forward_pre_hook(lambda _, given: (given[0].float(),))

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the weights; the MLP's, 0.2 % of them, stay float32, as scores need."""
        super().cast(dtype)
        self.model.mlp.to(torch.float32)

    def tokenize(self, text: str) -> Tensor:
        """Token ids and attention mask, [2, TOKENS]."""
        encoded = self.model.blip.tokenizer(
            text, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return torch.cat([encoded.input_ids, encoded.attention_mask])

    def resize(self, images: Tensor) -> Tensor:
        return center_crop(learned.resize_shorter_side(images, self.side), [self.side])

    def match(self, pixels: Tensor, captions: Tensor, owner: Tensor) -> Tensor:
        ids, mask = captions[owner].unbind(1)
        return self.model.score_gard(ids, mask, pixels)[:, 0]
