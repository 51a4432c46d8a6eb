"""Pretraining of the embedded models: `python -m tafs.shapes.pretrain TARGET`.

TARGET is "vae", the name of a base model or reward model, or "all". "score" evaluates the base
models, and "cards" writes the model cards. Everything is written to tafs/shapes/weights/.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tafs.common import seeding
from tafs.data import prompts
from tafs.data.geneval_rows import TASKS
from tafs.data.plugins.shapes import FOLDER
from tafs.models import loading, sampling
from tafs.models.base import Backbone
from tafs.rewards.geneval import geneval_verdict
from tafs.shapes import cards, pretrain_rewards, vae, weights
from tafs.shapes.detector import detect
from tafs.shapes.pipelines import SETTINGS, build_flux, build_sd3, scheduler
from tafs.shapes.render import render
from tafs.shapes.scenes import sample_scene

# Harder tasks are drawn more often.
TASK_SHARES = {
    "single_object": 0.06,
    "two_object": 0.14,
    "counting": 0.20,
    "colors": 0.10,
    "position": 0.22,
    "color_attr": 0.28,
}


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a base model. Times are logit-normal (Esser et al., 2024)."""

    steps: int = 3800
    batch: int = 128
    scenes: int = 60_000
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    logit_mean: float = 0.2
    prompt_dropout: float = 0.1
    layout: str = "roomy"  # of the scenes
    text_encoders: bool = True  # whether they are trained too
    seed: int = 0


def draw_scenes(recipe: Recipe) -> tuple[list[str], Tensor]:
    """Captions and images [N, 3, H, W] of random scenes of the training prompts."""
    rng = np.random.default_rng(recipe.seed)
    rows = prompts.read(FOLDER / "train.jsonl")
    drawn = prompts.draw(rows, recipe.scenes, rng, TASK_SHARES)
    scenes = [sample_scene(p.row, rng, recipe.layout) for p in drawn]
    return [p.text for p in drawn], render(scenes)


@torch.no_grad()
def encode_images(autoencoder: AutoencoderKL, images: Tensor, chunk: int = 512) -> Tensor:
    """Normalised latents of the images, [N, C, h, w]."""
    config = autoencoder.config
    parts = [
        (autoencoder.encode(part * 2 - 1).latent_dist.mode() - config.shift_factor)
        * config.scaling_factor
        for part in images.split(chunk)
    ]
    return torch.cat(parts)


Draw = Callable[[Recipe], tuple[list[str], Tensor]]


def train(
    backbone: Backbone, recipe: Recipe, draw: Draw = draw_scenes, log_every: int = 200
) -> dict[str, float]:
    """Train the transformer, and the text encoders if the recipe says so; keep the EMA weights.

    `draw` returns the captions and images [N, 3, H, W] that a recipe learns from.
    """
    torch.manual_seed(recipe.seed)
    captions, images = draw(recipe)
    latents = encode_images(backbone.pipeline.vae, images)
    del images
    components = backbone.pipeline.components
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    names = ["transformer", *(encoders if recipe.text_encoders else ())]
    names = [name for name in names if components.get(name)]
    embed = backbone.embed if recipe.text_encoders else backbone.encode
    trained = nn.ModuleDict({name: components[name] for name in names})
    trained.train().requires_grad_(True)
    parameters = list(trained.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, recipe))
    generator = seeding.generator(recipe.seed, "pretrain")
    start = time.monotonic()
    loss_sum = 0.0
    for step in range(recipe.steps):
        index = torch.randint(len(latents), (recipe.batch,), generator=generator)
        x_0 = latents[index]
        drop = torch.rand(recipe.batch, generator=generator) < recipe.prompt_dropout
        texts = [
            "" if d else captions[i] for i, d in zip(index.tolist(), drop.tolist(), strict=True)
        ]
        normal = torch.randn(recipe.batch, generator=generator)
        t = torch.sigmoid(normal + recipe.logit_mean)
        noise = torch.randn(x_0.shape, generator=generator)
        t_ = t.view(-1, 1, 1, 1)
        prediction = backbone.velocity((1 - t_) * x_0 + t_ * noise, t, embed(texts))
        loss = (prediction - (noise - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(recipe.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        loss_sum += loss.item()
        if (step + 1) % log_every == 0:
            elapsed = time.monotonic() - start
            print(
                f"step {step + 1}/{recipe.steps} loss {loss_sum / log_every:.4f} "
                f"{elapsed:.0f} s, {elapsed / (step + 1) * (recipe.steps - step - 1):.0f} s left",
                flush=True,
            )
            loss_sum = 0.0
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    trained.eval().requires_grad_(False)
    return {"seconds": time.monotonic() - start, "steps": recipe.steps}


def _cosine(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then cosine decay to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def sample(backbone: Backbone, texts: Sequence[str], sampler: str, steps: int, seed: int) -> Tensor:
    """An image of each text, [B, 3, H, W] in [0, 1]; `seed` is that of the noise."""
    cond = backbone.encode(texts)
    images = [(image,) for image in range(len(texts))]
    start, noise = (seeding.generators(seed, name, images=images) for name in ("start", "step"))
    chosen = sampling.SAMPLERS[sampler]
    x = sampling.integrate(
        lambda x, t: backbone.velocity(x, t, cond),
        start.randn(backbone.latent_shape),
        sampling.uniform_grid(steps) if chosen.uniform else backbone.time_grid(steps),
        chosen.step,
        noise,
    )
    return backbone.decode(x)


def strict_geneval(
    backbone: Backbone,
    sampler: str,
    steps: int,
    images_per_prompt: int = 4,
    seed: int = 7,
) -> dict[str, float]:
    """Strict GenEval accuracy on the test split: the mean of each task, and `overall`.

    Args:
        backbone: the model.
        sampler: a key of sampling.SAMPLERS.
        steps: number of its steps.
        images_per_prompt: images per prompt.
        seed: of the noise.
    """
    judged = prompts.read(FOLDER / "test.jsonl")
    judged = [prompt for prompt in judged for _ in range(images_per_prompt)]
    images = sample(backbone, [p.text for p in judged], sampler, steps, seed)
    verdicts: dict[str, list[bool]] = {task: [] for task in TASKS}
    for prompt, detections in zip(judged, detect(images), strict=True):
        verdicts[prompt.tag].append(geneval_verdict(detections, prompt.row).correct)
    scores = {task: sum(v) / len(v) for task, v in verdicts.items()}
    return {"overall": sum(scores.values()) / len(scores), **scores}


def scene_scores(backbone: Backbone) -> dict[str, Any]:
    """Strict GenEval accuracy of a base model with all samplers."""
    scores = {
        str(steps): {name: strict_geneval(backbone, name, steps) for name in sampling.SAMPLERS}
        for steps in (28, 8, 4, 2)
    }
    more = {
        str(steps): {
            name: strict_geneval(backbone, name, steps, images_per_prompt=10, seed=12345)["overall"]
            for name in sampling.SAMPLERS
        }
        for steps in (28, 4)
    }
    return {"strict_geneval": scores, "strict_geneval_other_noise": more}


@dataclass(frozen=True)
class Base:
    """A base model.

    Each recipe is one cosine cycle (warm restarts, Loshchilov & Hutter, 2017) on scenes of its own
    seed. It starts from the saved weights of the previous cycle. The last cycle is on dense scenes.
    """

    build: Callable[[AutoencoderKL], Backbone]
    recipes: tuple[Recipe, ...]


DENSE = Recipe(steps=600, scenes=30_000, lr=1e-3, warmup=50, layout="dense", text_encoders=False)
BASES = {
    "shapes-sd3": Base(
        build_sd3, (Recipe(), Recipe(steps=1600, lr=1e-3, seed=2), replace(DENSE, seed=12))
    ),
    "shapes-flux": Base(
        build_flux,
        (Recipe(steps=4500, seed=1), Recipe(steps=4500, seed=3), replace(DENSE, seed=11)),
    ),
}


@dataclass(frozen=True)
class World:
    """An embedded world: what its autoencoder and base models learn from, and their scores.

    Args:
        root: the folder of its weights.
        autoencoder: the folder of its autoencoder in it.
        vae_steps: of its training.
        bases: its base models.
        batches: the images that the autoencoder learns from.
        draw: the captions and images that a base model learns from.
        reconstruction: the share of images that the autoencoder keeps.
        scores: the scores of a base model, for its card.
    """

    root: Path
    autoencoder: str
    vae_steps: int
    bases: Mapping[str, Base]
    batches: vae.Batches
    draw: Draw
    reconstruction: Callable[[AutoencoderKL], float]
    scores: Callable[[Backbone], dict[str, Any]]


SHAPES = World(
    weights.ROOT,
    weights.VAE,
    4000,
    BASES,
    vae.scene_batches,
    draw_scenes,
    vae.reconstruction_accuracy,
    scene_scores,
)


def pretrain_vae(world: World) -> None:
    """Train a world's autoencoder."""
    start = time.monotonic()
    autoencoder = vae.train(world.vae_steps, batches=world.batches)
    folder = world.root / world.autoencoder
    weights.save_module(autoencoder, folder)
    facts = {
        "steps": world.vae_steps,
        "seconds": round(time.monotonic() - start),
        "reconstruction_accuracy": world.reconstruction(autoencoder),
    }
    weights.write_facts(folder, facts)
    print(json.dumps(facts))


def pretrain_base(world: World, name: str, cycle: int, given: dict[str, Any]) -> None:
    """Train one cycle of a base model, from scratch or from the weights of the previous cycle.

    Raises:
        ValueError: the weights of the previous cycle are missing.
    """
    recipe = replace(world.bases[name].recipes[cycle], **given)
    folder = world.root / name
    if cycle:
        done = weights.read_facts(folder)["cycles"]
        if len(done) < cycle:
            raise ValueError(f"{folder}: no weights of cycle {cycle - 1}; train this cycle first")
        done = done[:cycle]
        backbone = loading.load(folder, **SETTINGS)
    else:
        done = []
        torch.manual_seed(recipe.seed)
        autoencoder = AutoencoderKL.from_pretrained(
            world.root / world.autoencoder, local_files_only=True, dtype=torch.float32
        )
        backbone = world.bases[name].build(autoencoder)
    facts = train(backbone, recipe, world.draw)
    weights.save_pipeline(backbone.pipeline, folder)
    weights.write_facts(folder, {"cycles": [*done, {**facts, "recipe": asdict(recipe)}]})
    score_base(world, name)


def score_base(world: World, name: str) -> None:
    """Add the scores of the shipped (rounded) weights to the facts."""
    folder = world.root / name
    scheduler(name).save_pretrained(folder / "scheduler")
    found = world.scores(loading.load(folder, **SETTINGS))
    weights.write_facts(folder, {**weights.read_facts(folder), **found})
    print(json.dumps(found, indent=1))


def run(world: World, description: str, others: Sequence[str] = ()) -> argparse.Namespace:
    """Train the parts of a world that the command line names, and return what it says.

    `others` are further targets, which are the caller's.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("target", choices=("vae", *world.bases, *others, "score", "cards", "all"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cycle", type=int, default=0, help="first cycle of a model's recipes")
    for name, default in asdict(Recipe()).items():
        if not isinstance(default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.target in ("vae", "all"):
        pretrain_vae(world)
    given = {n: v for n in asdict(Recipe()) if (v := getattr(args, n, None)) is not None}
    for name, base in world.bases.items():
        if args.target in (name, "all"):
            for cycle in range(args.cycle, len(base.recipes)):
                pretrain_base(world, name, cycle, given)
        if args.target == "score":
            score_base(world, name)
    return args


def main() -> None:
    args = run(SHAPES, __doc__.splitlines()[0], pretrain_rewards.NAMES)
    # The first cycle of the others starts from that of `clip`.
    cycles = max(map(len, pretrain_rewards.RECIPES.values()))
    for cycle in range(args.cycle, cycles):
        for name, recipes in pretrain_rewards.RECIPES.items():
            if args.target in (name, "all") and cycle < len(recipes):
                found = pretrain_rewards.pretrain(name, cycle)
                print(name, cycle, json.dumps(found), flush=True)
    if args.target in ("score", "cards", "all"):
        cards.write()


if __name__ == "__main__":
    main()
