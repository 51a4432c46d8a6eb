"""How much of an iteration is the network: `python benchmarks/training_loop.py`.

For each method it alternates real iterations with the bare network calls that one needs (sampling
without gradients, forward and backward passes, decoding, reward models, in the same micro-batches)
and prints the ratio, then TAFS-GRPO's iteration time over Flow-GRPO's and what the count of
evaluations predicts, (NFE_old + 3 NFE_theta).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from tafs import config, rundir
from tafs.backbones.base import Backbone
from tafs.rewards import registry
from tafs.train import Trainer

ROOT = Path(__file__).resolve().parent.parent


def trainer(run: config.Run) -> Trainer:
    description = run.describe()
    rewards = registry.load(list(run.rewards), description["settings"]["world"])
    return Trainer(description, rundir.load_backbone(description), rewards)


def bare(run: Trainer) -> float:
    """Seconds of the network calls of one iteration, and nothing else."""
    backbone: Backbone = run.backbone
    images = run.groups * run.group_size
    batch = run.micro_batch
    with torch.no_grad():
        cond = backbone.encode(["a red ring"] * batch)
    x = torch.randn(batch, *backbone.latent_shape)
    owners = run.prompts[:1] * batch
    t = torch.full((batch,), 0.5)
    start = time.perf_counter()
    for _ in range(0, images, batch):
        with torch.no_grad():
            for _ in range(run.method.nfe_old):
                backbone.velocity(x, t, cond)
            for _ in run.method.scored_steps():
                run.rewards.score(backbone.decode(x, run.decode_dtype), owners)
        for _ in range(run.method.nfe_theta):
            backbone.velocity(x, t, cond).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Iteration time against its network calls.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scale", default="shapes")
    arguments = parser.parse_args()
    rundir.limit_threads()
    settings = config.read(ROOT / "config.yaml", {"scale": arguments.scale})
    runs = config.runs(settings)
    names = ("tafs_grpo", "flow_grpo")
    trainers = {n: trainer(next(r for r in runs.values() if r.variant == n)) for n in names}
    iteration: dict[str, list[float]] = {n: [] for n in names}
    overhead: dict[str, list[float]] = {n: [] for n in names}
    for name in names:  # warm up
        trainers[name].iterate(0)
    for repeat in range(arguments.repeats):
        for name in names:
            seconds = trainers[name].iterate(repeat + 1)["seconds"]["total"]
            iteration[name].append(seconds)
            overhead[name].append(seconds / bare(trainers[name]))
    for name in names:
        print(
            f"{name:10} iteration {statistics.median(iteration[name]):6.2f} s   "
            f"over its bare network calls {statistics.median(overhead[name]):.3f}"
        )
    ratios = [a / b for a, b in zip(iteration["tafs_grpo"], iteration["flow_grpo"], strict=True)]
    counts = [m.nfe_old + 3 * m.nfe_theta for m in (trainers[n].method for n in names)]
    print(
        f"TAFS-GRPO / Flow-GRPO {statistics.median(ratios):.3f}   "
        f"(evaluations predict {counts[0] / counts[1]:.3f})"
    )


if __name__ == "__main__":
    main()
