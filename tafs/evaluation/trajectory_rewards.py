"""Rewards of the images along the way: `python -m tafs.evaluation.trajectory_rewards RUN_DIR` (the paper's Table 7).

Annealed sampling sees an image at every evaluation. trajectory_rewards.parquet holds the rewards R^1..R^N
of one trajectory of each training prompt, a row per (prompt, step, metric): the table correlates
the early ones with that of the final image.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tafs.common import files, seeding
from tafs.evaluation import generate
from tafs.models import sampling
from tafs.models.base import Backbone
from tafs.runtime import main as main_
from tafs.runtime import run_dir
from tafs.runtime.progress import Reporter


@torch.no_grad()
def images_along(
    backbone: Backbone, texts: list[str], steps: int, generator: torch.Generator
) -> Tensor:
    """The images x0_hat^1..x0_hat^N of one annealed trajectory a prompt (Eqs. 4-7).

    Returns:
        [steps, prompts, 3, H, W] in [0, 1].
    """
    cond = backbone.encode(texts)
    grid = sampling.uniform_grid(steps).to(backbone.device)
    x = torch.randn(len(texts), *backbone.latent_shape, generator=generator).to(backbone.device)
    images = []
    for n in range(steps):
        t, s = grid[n].expand(len(x)), grid[n + 1].expand(len(x))
        v = backbone.velocity(x, t, cond)
        images.append(backbone.decode(sampling.x0_estimate(x, v, t)))
        x = sampling.anneal(x, v, t, s).sample(generator)
    return torch.stack(images)


def write(run: run_dir.RunDir) -> None:
    """Write the run's trajectory_rewards.parquet, of distinct training prompts.

    Raises:
        ValueError: there are not so many training prompts.
    """
    description, evaluation = run.description, run.evaluation
    world, prompt_set, seed = run.world, description["prompts"], generate.EVALUATION_SEED
    backbone = generate.load_model(run, None)
    rewards = world.rewards(world.metrics(prompt_set))
    steps, batch = evaluation["correlation"]["nfe"], evaluation["batch"]
    count, known = evaluation["correlation"]["prompts"], world.prompts(prompt_set, "train")
    if count > len(known):
        raise ValueError(f"correlation_prompts: {count}, but there are {len(known)} of training")
    chosen = np.random.default_rng(seed).choice(len(known), count, replace=False)
    drawn = [known[i] for i in sorted(chosen)]
    reporter = Reporter(run.folder, "trajectory_rewards", -(-len(drawn) // batch))
    parts = []
    backbone.prepare([prompt.text for prompt in drawn])
    for low in range(0, len(drawn), batch):
        part = drawn[low : low + batch]
        generator = seeding.generator(seed, "correlate", low)
        images = images_along(backbone, [prompt.text for prompt in part], steps, generator)
        scores = rewards.report(rewards.score(images.flatten(0, 1), part * steps))
        index = {
            "prompt": np.tile(np.arange(low, low + len(part)), steps),
            "step": np.repeat(np.arange(1, steps + 1), len(part)),
        }
        parts += [
            pd.DataFrame({**index, "metric": metric, "value": values.double().cpu().numpy()})
            for metric, values in scores.items()
        ]
        reporter.advance(f"{low + len(part)} prompts")
    table = pd.concat(parts, ignore_index=True).astype({"metric": "category"})
    files.atomic_write(run.trajectory_rewards, lambda path: table.to_parquet(path, index=False))
    reporter.finish()


def main() -> None:
    main_.run_stage("trajectory_rewards", write)


if __name__ == "__main__":
    main()
