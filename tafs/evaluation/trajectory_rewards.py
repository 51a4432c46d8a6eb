"""Rewards along annealed trajectories: `python -m tafs.evaluation.trajectory_rewards RUN_DIR`.

Annealed sampling estimates an image at every network evaluation. trajectory_rewards.parquet holds
the rewards R^1..R^N of one trajectory per training prompt, with a row per (prompt, step, metric).
The paper's Table 7 correlates the early rewards with that of the final image. The images of a few
prompts of each tag are in trajectories.safetensors, uint8 [prompts, steps, H, W, 3], with the
prompts' numbers, and their texts and tags in its metadata.
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from tafs.common import files, seeding
from tafs.data.prompts import first_of_each
from tafs.evaluation import generate
from tafs.evaluation.image_archive import pixels
from tafs.experiment import needs, run_inputs
from tafs.models import sampling
from tafs.models.base import Backbone
from tafs.runtime import memory, receipts
from tafs.runtime.main import run_stage
from tafs.runtime.progress import Reporter
from tafs.runtime.run_dir import RunDir

SHOWN_PER_TAG = 2  # prompts of each tag whose images are kept


@torch.no_grad()
def trajectory_images(
    backbone: Backbone, texts: list[str], steps: int, generators: seeding.Generators
) -> Tensor:
    """Decode the estimates x0_hat^1..x0_hat^N of one annealed trajectory per prompt (Eqs. 4-7).

    Returns:
        [steps, prompts, 3, H, W] in [0, 1].
    """
    cond = backbone.encode(texts)
    grid = sampling.uniform_grid(steps).to(backbone.device)
    x = generators.randn(backbone.latent_shape).to(backbone.device)
    images = []
    for n in range(steps):
        t, s = grid[n].expand(len(x)), grid[n + 1].expand(len(x))
        v = backbone.velocity(x, t, cond)
        images.append(backbone.decode(sampling.x0_estimate(x, v, t)))
        x = sampling.anneal(x, v, t, s).sample(generators)
    return torch.stack(images)


def write(run: RunDir) -> None:
    """Write the run's trajectory_rewards.parquet and trajectories.safetensors."""
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    stage, settings = "trajectory_rewards", run_inputs.memory_settings(spec, evaluation)
    with memory.fitting(run, stage, evaluation.batch, spec.backbone, settings) as fitting:
        _write(run, fitting)


def _write(run: RunDir, batch: int) -> None:
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    own = needs.trajectories(run, spec, evaluation)
    source, seed = run_inputs.asset_source(spec), generate.EVALUATION_SEED
    backbone = generate.load_model(run, spec, evaluation, None)
    rewards = source.rewards(source.metrics(spec.prompts))
    backbone.waiting = rewards.networks
    steps, count = evaluation.trajectories.nfe, evaluation.trajectories.prompts
    known = source.prompts(spec.prompts, "train")
    if count > len(known):
        raise ValueError(
            f"correlation_prompts: {count} is more than the {len(known)} training prompts; choose "
            "a smaller number in config.yaml"
        )
    chosen = np.random.default_rng(seed).choice(len(known), count, replace=False)
    drawn = [known[i] for i in sorted(chosen)]
    reporter = Reporter(run.folder, "trajectory_rewards", -(-len(drawn) // batch))
    shown = first_of_each(drawn, SHOWN_PER_TAG)
    tables, kept = [], []
    backbone.prepare([prompt.text for prompt in drawn])
    for low in range(0, len(drawn), batch):
        part = drawn[low : low + batch]
        places = [(index,) for index in range(low, low + len(part))]
        generators = seeding.generators(seed, "correlate", images=places)
        images = trajectory_images(backbone, [prompt.text for prompt in part], steps, generators)
        scores = rewards.report(rewards.score(images.flatten(0, 1), part * steps))
        index = {
            "prompt": np.tile(np.arange(low, low + len(part)), steps),
            "step": np.repeat(np.arange(1, steps + 1), len(part)),
        }
        tables += [
            pd.DataFrame({**index, "metric": metric, "value": values.double().cpu().numpy()})
            for metric, values in scores.items()
        ]
        kept += [pixels(images[:, p - low]) for p in shown if low <= p < low + len(part)]
        reporter.advance(f"{low + len(part)} prompts")
    table = pd.concat(tables, ignore_index=True).astype({"metric": "category"})
    stored = {"prompts": torch.tensor(shown), "images": torch.stack(kept)}
    texts = {"captions": [drawn[p].text for p in shown], "tags": [drawn[p].tag for p in shown]}
    metadata = {key: json.dumps(values) for key, values in texts.items()}
    written = [run.trajectory_rewards, run.trajectory_images]
    with receipts.replacing(run.folder, "trajectory_rewards", own, written):
        files.atomic_write(run.trajectory_rewards, lambda path: table.to_parquet(path, index=False))
        files.atomic_write(run.trajectory_images, lambda path: save_file(stored, path, metadata))
    reporter.finish()


def main() -> None:
    run_stage("trajectory_rewards", lambda run, _: write(run))


if __name__ == "__main__":
    main()
