"""Iteration times against their network calls: `python benchmarks/training_loop.py`.

In every round each method runs one real iteration, in turn, and the bare network calls that it
needs (sampling without gradients, forward and backward passes, decoding, reward models, in the same
micro-batches). Printed are the medians: seconds, how much the iteration takes over its bare calls,
and its ratio to TAFS-GRPO's beside what the count of evaluations predicts (`Method.forward_equivalents`) and what
the paper's Tables 2 and 4 print.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from tafs.experiment import runs, validate
from tafs.methods.policy_gradient import PolicyGradient
from tafs.models.base import Backbone
from tafs.rewards import registry
from tafs.runtime import main as main_
from tafs.runtime import run_dir
from tafs.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "tafs_grpo"
# Iteration times in seconds: Tables 2 and 4.
PAPER = {
    "tafs_grpo": 116,
    "tafs_n_annealed_1": 47,
    "tafs_n_annealed_5": 185,
    "flow_grpo": 248,
    "mix_grpo": 334,
    "dance_grpo": 646,
}


def trainer(run: runs.Run) -> Trainer:
    description = run.describe()
    rewards = registry.load(list(run.rewards), description["settings"]["world"])
    return Trainer(description, run_dir.load_backbone(description), rewards)


def bare(run: Trainer) -> float:
    """Seconds of the network calls of one iteration, and nothing else."""
    backbone: Backbone = run.backbone
    method = run.method
    assert isinstance(method, PolicyGradient)
    with torch.no_grad():
        cond = backbone.encode(["a red ring"] * run.micro_batch)
    x = torch.randn(run.micro_batch, *backbone.latent_shape)
    t = torch.full((run.micro_batch,), 0.5)
    scored = len(method.scored_steps())
    start = time.perf_counter()
    for part in run.micro_batches():
        size = part.stop - part.start
        few, at, of = x[:size], t[:size], cond[:size]
        with torch.no_grad():
            for _ in range(int(method.nfe_old)):
                backbone.velocity(few, at, of)
            images = backbone.decode(few.repeat(scored, 1, 1, 1), run.decode_dtype)
            run.rewards.score(images, run.prompts[:1] * len(images))
        for _ in range(method.nfe_theta):
            backbone.velocity(few, at, of).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Iteration time against its network calls.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scale", default="shapes")
    parser.add_argument("--backbone", default="shapes-flux")
    arguments = parser.parse_args()
    main_.limit_threads()
    settings = validate.read(ROOT / "config.yaml", {"scale": arguments.scale})
    known = [r for r in runs.runs(settings).values() if r.backbone == arguments.backbone]
    trainers = {
        name: trainer(next(r for r in known if r.variant == name and r.task == "preference"))
        for name in PAPER
        if any(r.variant == name and r.task == "preference" for r in known)
    }
    if REFERENCE not in trainers:
        parser.error(f"no run of {REFERENCE} on {arguments.backbone} at scale {arguments.scale}")
    iteration: dict[str, list[float]] = {name: [] for name in trainers}
    overhead: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(arguments.repeats + 1):
        for name, run in trainers.items():
            seconds = run.iterate(repeat)["seconds"]["total"]
            alone = bare(run)
            if repeat:  # the first round warms up
                iteration[name].append(seconds)
                overhead[name].append(seconds / alone)
    print(f"{'':18} seconds  over bare calls  ratio to TAFS-GRPO  evaluations predict  paper")
    for name, run in trainers.items():
        pairs = zip(iteration[name], iteration[REFERENCE], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"{name:18} {statistics.median(iteration[name]):7.2f} "
            f"{statistics.median(overhead[name]):16.3f} {ratio:19.3f} "
            f"{run.method.forward_equivalents / trainers[REFERENCE].method.forward_equivalents:20.3f} "
            f"{PAPER[name] / PAPER[REFERENCE]:6.2f}"
        )


if __name__ == "__main__":
    main()
