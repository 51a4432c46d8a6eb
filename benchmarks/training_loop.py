"""Compare iteration times with their network calls: `python benchmarks/training_loop.py`.

In every round, each method runs one real iteration; the same iteration without kept graphs and
with peft's own adapter layers; and the bare network calls that it needs, in the same micro-batches:
sampling without gradients, forward and backward passes, decoding and reward models. The table shows
medians over the rounds: seconds, the iteration's time relative to the plain one and to its bare
calls, and its ratio to TAFS-GRPO's iteration beside the ratio of network evaluations
(`Method.forward_equivalents`) and the ratio of the times in the paper's Tables 2 and 4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from tafs import experiment
from tafs.experiment import RunSpec
from tafs.methods.policy_gradient import PolicyGradient
from tafs.models import lora
from tafs.runtime.main import limit_threads
from tafs.training.trainer import Trainer, trainer_of

ROOT = Path(__file__).resolve().parent.parent
REFERENCE, TASK = "tafs_grpo", "preference"
# Seconds per iteration in Tables 2 and 4.
PAPER = {
    "tafs_grpo": 116,
    "tafs_n_annealed_1": 47,
    "tafs_n_annealed_5": 185,
    "flow_grpo": 248,
    "mix_grpo": 334,
    "dance_grpo": 646,
}


def bare(trainer: Trainer) -> float:
    """Seconds of the network calls of one iteration without anything else."""
    backbone, method = trainer.backbone, trainer.method
    assert isinstance(method, PolicyGradient)
    prompt = trainer.prompts[0]
    with torch.no_grad():
        cond = backbone.encode([prompt.text] * trainer.micro_batch)
    x = torch.randn(trainer.micro_batch, *backbone.latent_shape, device=backbone.device)
    t = torch.full((trainer.micro_batch,), 0.5, device=backbone.device)
    scored = len(method.scored_steps())
    start = time.perf_counter()
    for part in trainer.micro_batches():
        size = part.stop - part.start
        with torch.no_grad():
            for _ in range(int(method.nfe_old)):
                backbone.velocity(x[:size], t[:size], cond[:size])
            images = backbone.decode(x[:size].repeat(scored, 1, 1, 1), trainer.decode_dtype)
            trainer.rewards.score(images, [prompt] * len(images))
        for _ in range(method.nfe_theta):
            backbone.velocity(x[:size], t[:size], cond[:size]).sum().backward()
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
    seconds = time.perf_counter() - start
    for parameter in trainer.parameters.values():
        parameter.grad = None
    return seconds


def plain_trainer(run: RunSpec) -> Trainer:
    """A trainer of the run without kept graphs and with peft's own adapter layers."""
    assert run.training is not None
    training = run.training.model_copy(update={"keep_graphs": False})
    trainer = trainer_of(run.model_copy(update={"training": training}))
    for module in trainer.backbone.transformer.modules():
        if isinstance(module, lora.LoraLinear):
            module.__class__ = lora.Linear
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare iteration times with network calls.")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are measured")
    parser.add_argument("--scale", default="shapes")
    parser.add_argument("--backbone", default="shapes-flux")
    parser.add_argument("--methods", nargs="+", choices=PAPER, default=list(PAPER))
    options = parser.parse_args()
    limit_threads()
    plan = experiment.load({"scale": options.scale}, ROOT / "config.yaml")
    runs = {
        run.variant: run
        for run in reversed(list(plan.runs.values()))  # the first seed
        if (run.backbone, run.task) == (options.backbone, TASK)
    }
    if REFERENCE not in runs:
        parser.error(f"no run of {REFERENCE} on {options.backbone} at scale {options.scale}")
    wanted = {REFERENCE, *options.methods} & runs.keys()
    trainers = {name: trainer_of(runs[name]) for name in PAPER if name in wanted}
    plain = {name: plain_trainer(runs[name]) for name in trainers}
    iteration, faster, overhead = ({name: [] for name in trainers} for _ in range(3))
    for repeat in range(options.repeats + 1):
        for name, trainer in trainers.items():
            seconds = trainer.iterate(repeat)["seconds"]["total"]
            slower = plain[name].iterate(repeat)["seconds"]["total"]
            calls = bare(trainer)
            if repeat:  # the first round is a warm-up
                iteration[name].append(seconds)
                faster[name].append(seconds / slower)
                overhead[name].append(seconds / calls)
    reference = trainers[REFERENCE].method.forward_equivalents
    print(f"{'':18} seconds  of plain  over bare calls  ratio to TAFS-GRPO  of evaluations  paper")
    for name, trainer in trainers.items():
        pairs = zip(iteration[name], iteration[REFERENCE], strict=True)
        print(
            f"{name:18} {statistics.median(iteration[name]):7.2f} "
            f"{statistics.median(faster[name]):9.3f} "
            f"{statistics.median(overhead[name]):16.3f} "
            f"{statistics.median(a / b for a, b in pairs):19.3f} "
            f"{trainer.method.forward_equivalents / reference:15.3f} "
            f"{PAPER[name] / PAPER[REFERENCE]:6.2f}"
        )


if __name__ == "__main__":
    main()
