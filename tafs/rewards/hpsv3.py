"""HPSv3 (Ma et al., 2025, arXiv 2508.03789): Qwen2-VL reads image and caption, an MLP scores.

Computed with transformers' Qwen2-VL. The package `hpsv3` needs another transformers and is not
needed to score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tafs.data.prompts import Prompt
from tafs.rewards import learned
from tafs.rewards.metrics import METRICS, Reward

PIXELS = 448 * 448  # of the resized image, about
REWARD_TOKEN = "<|Reward|>"  # noqa: S105 - the token whose hidden state is scored
# INSTRUCTION and prompt_with_special_token of hpsv3 1.0.0 in Qwen2-VL's chat template.
QUESTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>"
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text "
    "Alignment and give a overall score to estimate the human preference. Please provide a "
    "rating from 0 to 10, with 0 being the worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should "
    "be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or "
    "logical errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be "
    "clear and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, "
    "and other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the "
    "color scheme, composition, atmosphere, depth of field, and the overall creative appeal. "
    "The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as "
    "political, violent, or adult material. If such content is present, the image quality "
    "and satisfaction score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following "
    "sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., "
    "person, animal, object) align with the textual description. The subject should match "
    "the description in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic "
    "style, evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding "
    "elements in the image logically fit the scenario described in the prompt. The "
    "environment should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., "
    "colors, clothing, accessories, expressions, actions) are faithfully represented in the "
    "image. Minor deviations may be acceptable, but critical attributes should be "
    "preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt "
    "are captured in the image. The generated content should not introduce elements that "
    "conflict with or distort the original description.\n"
    "Textual prompt - {caption}\n"
    "\n"
    "\n"
    "\n"
    "Please provide the overall ratings of this image: <|Reward|>\n"
    "\n"
    "END\n"
    "<|im_end|>\n<|im_start|>assistant\n"
)


class HPSv3:
    """The mean of HPSv3's score, in bfloat16 on a GPU as published and in float32 on a CPU.

    As in the package, positions count image tokens one by one, without Qwen2-VL's positions in the
    image. Unlike the package, images are scored one at a time, so that no padding enters a score;
    resized pixels are not rounded to 8 bits, so that gradients reach the images; and images more
    than 200 times as long as wide are not refused.

    `file` is HPSv3.safetensors, `folder` holds config.json and tokenizer.json of Qwen2-VL.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; names it and the remedy.
    """

    metric = METRICS["hpsv3"]

    def __init__(self, file: Path, folder: Path, device: torch.device | str = "cpu") -> None:
        name = self.metric.name
        learned.require(name, file, folder / "config.json", folder / "tokenizer.json")
        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            state = load_file(file)
            rows, width = state["model.embed_tokens.weight"].shape
            head = {
                key.removeprefix("rm_head."): v
                for key, v in state.items()
                if key.startswith("rm_head.")
            }
        except (SafetensorError, KeyError) as error:
            raise learned.damaged(name, file, error) from None
        config: Any = Qwen2VLConfig.from_pretrained(folder, local_files_only=True)
        config.text_config.vocab_size = rows  # its tokens and REWARD_TOKEN
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.add_special_tokens([REWARD_TOKEN])
        self.reward_token = int(self.tokenizer.token_to_id(REWARD_TOKEN) or 0)
        if self.reward_token != rows - 1:
            reason = f"the tokenizer has {self.reward_token} tokens, the model reads {rows - 1}"
            raise learned.damaged(name, folder, reason)
        weights = {key: v for key, v in state.items() if not key.startswith("rm_head.")}
        kind: Any = Qwen2VLForConditionalGeneration
        model, found = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            raise learned.damaged(name, file, f"{missing[0]} is missing")
        self.model = model.model.to(self.device).eval().requires_grad_(False)
        self.head = nn.Sequential(
            *(nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU()),
            nn.Linear(16, 2),
        )
        learned.fill(name, self.head, head, file)
        self.head = self.head.to(self.device, torch.float32).eval().requires_grad_(False)
        vision = config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.frames = vision.temporal_patch_size
        self.image_token = int(config.image_token_id)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.model, self.head)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] on `device` -> [B] float32, differentiable."""
        pairs = zip(images, prompts, strict=True)
        return torch.stack([self.score(image, prompt.text) for image, prompt in pairs])

    def reward(self) -> Reward:
        return Reward(self.metric, self)

    def score(self, image: Tensor, caption: str) -> Tensor:
        """The score of an image [3, H, W], a scalar.

        Raises:
            ValueError: the caption has one of the model's special tokens; names it.
        """
        size = resized(image.shape[-2], image.shape[-1], self.patch * self.merge)
        pixels = (learned.resize(image[None], *size) - self.mean) / self.std
        grid = torch.tensor([[1, *(n // self.patch for n in size)]], device=self.device)
        seen = self.model.visual(self.patches(pixels).to(self.model.dtype), grid_thw=grid)
        seen = seen.pooler_output
        ids = self.tokens(caption, len(seen))
        text = self.model.language_model.embed_tokens(ids)
        inputs = text.masked_scatter((ids == self.image_token)[:, None], seen.to(text.dtype))
        hidden = self.model.language_model(inputs_embeds=inputs[None], use_cache=False)
        scored = hidden.last_hidden_state[0, ids == self.reward_token].float()
        return self.head(scored)[0, 0]

    def tokens(self, caption: str, count: int) -> Tensor:
        """The ids [L] of the question about a caption, with an image of `count` tokens."""
        pad = str(self.tokenizer.id_to_token(self.image_token))
        text = QUESTION.format(image=pad * count, caption=caption)
        ids = torch.tensor(self.tokenizer.encode(text).ids, device=self.device)
        found = [int(ids.eq(token).sum()) for token in (self.image_token, self.reward_token)]
        if found != [count, 1]:
            raise ValueError(
                f"reward {self.metric.name}: the prompt {caption!r} has a special token of the "
                "model; remove it"
            )
        return ids

    def patches(self, pixels: Tensor) -> Tensor:
        """Qwen2-VL's patches of an image [1, 3, H, W], merged ones adjacent, [patches, values]."""
        rows, columns = (n // (self.patch * self.merge) for n in pixels.shape[-2:])
        parts = pixels.view(3, rows, self.merge, self.patch, columns, self.merge, self.patch)
        ordered = parts.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]  # a frame before the pixels
        return ordered.expand(*[-1] * 5, self.frames, -1, -1).flatten(0, 3).flatten(1)


def resized(height: int, width: int, factor: int) -> tuple[int, int]:
    """The size at which an image is read: about PIXELS, in multiples of `factor` (smart_resize)."""
    rows, columns = (max(factor, round(n / factor) * factor) for n in (height, width))
    if rows * columns > PIXELS:
        scale = math.sqrt((height * width) / PIXELS)
        rows, columns = (max(1, int(n / scale / factor)) * factor for n in (height, width))
    elif rows * columns < PIXELS:
        scale = math.sqrt(PIXELS / (height * width))
        rows, columns = (math.ceil(n * scale / factor) * factor for n in (height, width))
    return rows, columns
