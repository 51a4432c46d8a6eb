"""The embedded autoencoder: a small AutoencoderKL, 4x downsampling, 8 latent channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from tafs.data import prompts
from tafs.data.plugins.shapes import FOLDER
from tafs.shapes.detector import detect
from tafs.shapes.render import render
from tafs.shapes.scenes import IMAGE_SIZE, sample_scene

LATENT_CHANNELS = 8
KL_WEIGHT = 1e-5
BATCH = 32


def build(block_out_channels: tuple[int, ...] = (8, 24, 48)) -> AutoencoderKL:
    """An untrained autoencoder in diffusers' layout.

    Its decoder is cheaper than one evaluation of the transformer, since every scored step decodes.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


# (size, seed) -> endless batches of images [size, 3, H, W] in [0, 1]
Batches = Callable[[int, int], Iterator[Tensor]]


def scene_batches(
    size: int, seed: int, split: str = "train", layout: str = "roomy"
) -> Iterator[Tensor]:
    """Endless batches of scenes of a split's captions; all tasks are equally likely."""
    rows = prompts.read(FOLDER / f"{split}.jsonl")
    rng = np.random.default_rng(seed)
    while True:
        drawn = prompts.draw(rows, size, rng)
        yield render([sample_scene(p.row, rng, layout) for p in drawn])


def train(
    steps: int,
    seed: int = 0,
    vae: AutoencoderKL | None = None,
    batches: Batches = scene_batches,
) -> AutoencoderKL:
    """Train with L1 and L2 loss and a small KL term; set scaling_factor and shift_factor."""
    torch.manual_seed(seed)
    vae = vae or build()
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2.5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2.5e-3, total_steps=steps, pct_start=0.05
    )
    targets = batches(BATCH, seed)
    for step in range(steps):
        target = next(targets) * 2 - 1
        posterior = vae.encode(target).latent_dist
        output = vae.decode(posterior.sample()).sample
        loss = (
            functional.l1_loss(output, target)
            + functional.mse_loss(output, target)
            + KL_WEIGHT * posterior.kl().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"vae step {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
    vae.eval()
    with torch.no_grad():
        images = next(batches(2048, seed + 1))
        latents = vae.encode(images * 2 - 1).latent_dist.sample()
    vae.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
    )
    return vae


@torch.no_grad()
def reconstruction_accuracy(vae: AutoencoderKL, images: int = 1000, seed: int = 99) -> float:
    """Share of held-out scenes in which the detector finds the same objects and colours."""
    originals = next(scene_batches(images, seed, "test", "dense"))
    latents = vae.encode(originals * 2 - 1).latent_dist.mode()
    decoded = (vae.decode(latents).sample + 1) / 2
    pairs = zip(detect(originals), detect(decoded), strict=True)
    same = [
        sorted((d.label, d.color) for d in a) == sorted((d.label, d.color) for d in b)
        for a, b in pairs
    ]
    return sum(same) / len(same)
