"""Pretraining of the embedded words' models: `python -m tafs.words.pretrain TARGET`.

TARGET is "vae", the name of a base model, or "all". "score" evaluates the base models, and "cards"
writes the model cards. Everything is written to tafs/words/weights/.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from tafs.data import prompts
from tafs.data.plugins.words import FOLDER
from tafs.models import sampling
from tafs.models.base import Backbone
from tafs.shapes import pipelines, pretrain, text
from tafs.shapes.pretrain import Base, Recipe, World
from tafs.words import ROOT, captions, cards, rewards
from tafs.words.render import CHARACTERS, COLORS, render, sample_sign

MAX_TOKENS = 15  # of CLIP, which reads the colours letter by letter
RANDOM_SHARE = 0.5  # of the texts that are random strings; held-out words then differ less


def tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Tokenizers that read a quoted text character by character."""
    clip = text.clip_tokenizer([*CHARACTERS.lower(), '"'], MAX_TOKENS)
    pieces = [*CHARACTERS, '"', '▁"', "▁in", *("▁" + color for color in COLORS)]
    return clip, text.t5_tokenizer(pieces)


@cache
def _read(split: str) -> list[prompts.Prompt]:
    return prompts.read(FOLDER / f"{split}.jsonl")


def draw_texts(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of random captions without held-out texts; all tags are equally likely.

    Words alone are too few to learn spelling from, so a share are random strings of their lengths.
    """
    rng = np.random.default_rng(seed)
    held_out = {p.row["text"] for p in _read("test")}
    rows = []
    for prompt in prompts.draw(_read("train"), count, rng):
        row = dict(prompt.row)
        if rng.random() < RANDOM_SHARE:
            known = string.digits if row["tag"] == "numbers" else string.ascii_uppercase
            drawn = "".join(rng.choice(list(known), len(row["text"])))
            if drawn not in held_out:
                row = captions.row(row["tag"], drawn, row["color"])
        rows.append(row)
    return rows


def draw_signs(recipe: Recipe) -> tuple[list[str], Tensor]:
    """Captions and images [N, 3, H, W] of random texts."""
    rng = np.random.default_rng(recipe.seed)
    rows = draw_texts(recipe.scenes, recipe.seed)
    return [row["prompt"] for row in rows], _images(rows, rng)


def sign_batches(size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of images [size, 3, H, W] of random texts."""
    rng = np.random.default_rng(seed)
    while True:
        yield _images(draw_texts(size, int(rng.integers(2**31))), rng)


def _images(rows: list[dict[str, Any]], rng: np.random.Generator) -> Tensor:
    return render([sample_sign(row["text"], row["color"], rng) for row in rows])


@torch.no_grad()
def reconstruction_accuracy(vae: AutoencoderKL) -> float:
    """Share of the held-out captions' images whose text is read after reconstruction."""
    judged = _read("test")
    images = _images([dict(prompt.row) for prompt in judged], np.random.default_rng(99))
    decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
    scores = rewards.ocr().score((decoded / 2 + 0.5).clamp(0, 1), judged)
    return float((scores == 1).float().mean())


def ocr_scores(backbone: Backbone, images_per_prompt: int = 4, seed: int = 7) -> dict[str, Any]:
    """Scores on the test split by steps and sampler: mean, share of exact texts, and tags."""
    judged = _read("test")
    judged = [prompt for prompt in judged for _ in range(images_per_prompt)]
    tags = np.array([prompt.tag for prompt in judged])
    ocr = rewards.ocr()
    found: dict[str, Any] = {}
    for steps in (28, 8, 4, 2):
        found[str(steps)] = {}
        for sampler in sampling.SAMPLERS:
            images = pretrain.sample(backbone, [p.text for p in judged], sampler, steps, seed)
            scores = ocr.score(images, judged).numpy()
            by_tag = {tag: float(scores[tags == tag].mean()) for tag in captions.TAGS}
            means = {"overall": float(scores.mean()), "exact": float((scores == 1).mean())}
            found[str(steps)][sampler] = means | by_tag
    return {"ocr": found}


# Short, so that the models spell with errors that a reward can mend.
FLUX = Recipe(
    steps=2000, batch=64, scenes=40_000, warmup=150, ema=0.995, prompt_dropout=0.0, layout=""
)
SD3 = replace(FLUX, steps=700)  # learns to spell in fewer steps
WORDS = World(
    ROOT,
    "words-sd3/vae",
    2500,
    {
        "words-sd3": Base(partial(pipelines.build_sd3, layers=4, tokenizers=tokenizers), (SD3,)),
        "words-flux": Base(
            partial(pipelines.build_flux, layers=3, single_layers=3, tokenizers=tokenizers),
            (FLUX,),
        ),
    },
    sign_batches,
    draw_signs,
    reconstruction_accuracy,
    ocr_scores,
)


def main() -> None:
    args = pretrain.run(WORDS, (__doc__ or "").splitlines()[0])
    if args.target in ("score", "cards", "all"):
        cards.write()


if __name__ == "__main__":
    main()
