"""Time training iterations of the published models at full size, on one GPU, without downloads.

    python benchmarks/rehearse.py --backbone flux --out flux.md
    python benchmarks/rehearse.py --compile --checkpointing --micro-batch 24 --out compiled.md
    python benchmarks/rehearse.py --backbone klein --task composition --resolution 1024

The network and autoencoder of FLUX.1-dev, SD3.5-M or FLUX.2-klein-base-4B and the task's reward
models have random weights, which take as long as trained ones. The training loop runs one iteration
of every method on them, with config.yaml's scale `paper`, or `one-gpu` for FLUX.2-klein. An
iteration finds its prompts' embeddings ready, so these and the tokens are drawn at random; the text
encoders are timed alone, and freed before the network is built.

Timed single calls of the models determine how many images the iterations have, so that all methods
end within --time-limit. The report in Markdown is rewritten after every method. A method that runs
out of memory, or produces numbers that are not finite, is listed as failed, and the next one runs.
"""

from __future__ import annotations

import argparse
import gc
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip

import diffusers
import pandas as pd
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from rehearse_models import MODELS, SIZES, Encoder, Rehearsed, Size, build, prompt, reward_models
from rehearse_report import Row, Setting, number, render
from torch import Tensor

from tafs import experiment
from tafs.common import errors, files
from tafs.data.prompts import Prompt
from tafs.experiment import Plan, RunSpec
from tafs.methods import registry as methods
from tafs.methods.base import Method
from tafs.methods.group_relative import GroupRelative
from tafs.models import catalog, flops
from tafs.models.base import fast_dtype
from tafs.rewards.metrics import METRICS
from tafs.rewards.registry import RewardSet
from tafs.runtime.main import limit_threads
from tafs.training.trainer import AHEAD, Trainer

ROOT = Path(__file__).resolve().parent.parent
SCALE, TASK, TABLE = "paper", "preference", "table2"
SCALES = {"klein": "one-gpu"}  # of the backbones that SCALE does not have
TIMED = "flux"  # the role of the backbone whose iteration times the paper publishes
GIB = 2**30
RESERVE = 0.15  # of the time left, for what single calls do not show
OUT_OF_MEMORY = (
    "out of GPU memory; give a smaller --micro-batch or --checkpointing, or leave out --keep-graphs"
)

# Peak of dense bfloat16 products in TFLOP/s, by a pattern of the GPU's name. Other boards with the
# same chip, and parts of a GPU, are slower and do not match.
PEAKS = {r"H100 80GB HBM3$": 989.0, r"H200$": 989.0, r"A100(?!.*MIG)": 312.0}


@dataclass(frozen=True)
class Calls:
    """Seconds of single calls on one micro-batch."""

    forward: float
    trained: float  # forward and backward
    reward: float  # decoding and scoring, with gradients if all rewards have them


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second call; the first one allocates, compiles and loads kernels."""
    work()
    start = clock(device)
    work()
    return clock(device) - start


@torch.no_grad()
def encoding_seconds(encoders: Iterable[Encoder], device: torch.device) -> float | None:
    """Seconds of encoding a prompt; None: the GPU's memory does not suffice."""
    total = 0.0
    try:
        for encoder in encoders:
            with flops.made_on(device, torch.bfloat16):
                model = encoder.kind(encoder.config).eval().requires_grad_(False)
            tokens = torch.randint(encoder.config.vocab_size, (1, encoder.tokens), device=device)
            encode = partial(model, input_ids=tokens, output_hidden_states=True)
            total += seconds_of(encode, device)
            del model, encode  # its memory is free before the next one is built
    except torch.OutOfMemoryError:
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return total


def time_calls(backbone: Rehearsed, rewards: RewardSet, prompt: Prompt, micro_batch: int) -> Calls:
    cond = backbone.encode([prompt.text] * micro_batch)
    x = torch.randn(micro_batch, *backbone.latent_shape, device=backbone.device)
    t = torch.full((micro_batch,), 0.5, device=backbone.device)

    @torch.no_grad()
    def forward() -> None:
        backbone.velocity(x, t, cond)

    def trained() -> None:
        backbone.velocity(x, t, cond).square().mean().backward()

    differentiable = all(reward.differentiable for reward in rewards.rewards)
    prompts = [prompt] * micro_batch

    def reward() -> None:
        with torch.set_grad_enabled(differentiable):
            images = backbone.decode(x.clone().requires_grad_(), fast_dtype(backbone.device))
            if not differentiable:
                rewards.score(images, prompts)
                return
            scores = rewards.differentiate(images, prompts)
            torch.stack(list(scores.values())).sum().backward()

    with backbone.reference():
        forward()  # the network without its adapter is compiled separately
    return Calls(*(seconds_of(work, backbone.device) for work in (forward, trained, reward)))


def predict(method: Method, calls: Calls) -> float:
    """An upper bound on the seconds of a method's evaluations and rewards of one micro-batch."""
    unit = max(calls.forward, calls.trained / 3)
    kl = 2  # evaluations for the journal's KL divergence
    # A method that differentiates its rewards may do so at every evaluation.
    scored = method.forward_equivalents
    if isinstance(method, GroupRelative):
        scored = len(method.scored_steps())
    return (method.forward_equivalents + kl) * unit + scored * calls.reward


def affordable(seconds: Mapping[str, float], available: float, most: int) -> int:
    """Choose the number of micro-batches that every method runs, at most `most`.

    Args:
        seconds: of one micro-batch, by method.
        available: seconds for all methods together.
    """
    one = sum(seconds.values())
    if one > available:
        raise ValueError(
            f"--time-limit: one micro-batch of each method takes about {one:.2g} s and "
            f"{max(available, 0):.2g} s are left; give more, a smaller --micro-batch or fewer "
            "--methods"
        )
    return min(most, int(available / one))


class Rehearsal(Trainer):
    """A trainer that counts each phase's evaluations and keeps the metrics' largest values."""

    backbone: Rehearsed

    def _update(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._maxima: list[float] = []
        learned = super()._update(*args, **kwargs)
        self.largest = dict(zip(learned, self._maxima, strict=False))  # without the last, the norm
        return learned

    def _mean(self, values: Tensor) -> float:  # called for the metrics, in their order
        self._maxima.append(values.max().item())
        return super()._mean(values)

    def iterate(self, iteration: int) -> dict[str, Any]:
        self.counts: list[Counter[bool]] = []
        return super().iterate(iteration)

    def _clock(self) -> float:  # called at the start and after sampling, rewards and update
        self.counts.append(self.backbone.evaluations.copy())
        return super()._clock()


def one_iteration(
    run: RunSpec,
    micro_batch: int,
    images: int,
    *,
    keep_graphs: bool = False,
    score_ahead: bool = False,
) -> RunSpec:
    """The run with one iteration of `images`, whose groups are micro-batches."""
    assert run.training is not None
    training = {
        "iterations": 1,
        "prompts_per_iteration": images // micro_batch,
        "group_size": micro_batch,
        "micro_batch": micro_batch,
        "keep_graphs": keep_graphs,
        "score_ahead": score_ahead,
    }
    # The iteration is too small to be divided among several optimiser steps.
    changed = {"hyperparameters": {**run.hyperparameters, "updates": 1}}
    return run.model_copy(update={**changed, "training": run.training.model_copy(update=training)})


def rehearse(
    run: RunSpec, backbone: Rehearsed, rewards: RewardSet, prompts: Sequence[Prompt]
) -> Row:
    """Measure one iteration of a method."""
    on_gpu = backbone.device.type == "cuda"
    for parameter in backbone.lora_parameters().values():
        parameter.grad = None
    gc.collect()  # the previous method's trainer
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(backbone.device)
    trainer = Rehearsal(run, backbone, rewards, prompts)
    images = trainer.groups * trainer.group_size
    begun = clock(backbone.device)
    seconds = trainer.iterate(0)["seconds"]
    kl = clock(backbone.device) - begun - seconds["total"]
    start, sampled, scored, end = trainer.counts
    sampling, updating = (
        {grad: (after[grad] - before[grad]) / images for grad in (False, True)}
        for before, after in ((start, sampled), (scored, end))
    )
    # Evaluations whose graphs are kept are not repeated in the update. A compiled network also has
    # gradients in sampling, but they are not kept.
    sampled_all = sampling[False] + sampling[True]
    trained = updating[True] + (sampling[True] if trainer.keep_graphs else 0)
    cost = sampled_all + updating[False] + 3 * trained
    # 1 unless the number of steps is drawn.
    mean = trainer.method.cost(trainer.group_size) / cost
    return Row(
        variant=run.variant,
        title=run.title,
        images=images,
        nfe_old=mean * sampled_all,
        nfe_theta=mean * trained,
        others=mean * updating[False],
        sample=mean * seconds["sample"] / images,
        reward=seconds["reward"] / images,
        update=mean * seconds["update"] / images,
        kl=kl,
        peak=torch.cuda.max_memory_allocated(backbone.device) / GIB if on_gpu else None,
        deviation=trainer.largest.get("ratio_deviation"),
    )


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the paper's iterations at full size.")
    add = parser.add_argument
    add("--backbone", choices=sorted(SIZES["full"].backbones), default="flux")
    add("--size", choices=SIZES, default="full")
    add("--resolution", type=int, help="of the images, in pixels; default: the scale's")
    add("--task", choices=("preference", "composition"), default=TASK, help="default: %(default)s")
    fit = f"default: those of config.yaml's {TABLE} that fit the task's rewards"
    add("--methods", nargs="+", metavar="METHOD", help=fit)
    add("--micro-batch", type=int, help="default: the scale's")
    add("--images", type=int, help="maximum per method; default: one GPU's share")
    either = argparse.BooleanOptionalAction
    add("--checkpointing", action=either, help="of gradients; default: the scale's")
    kept = "of all images, until the update; a training keeps those of its first update"
    add("--keep-graphs", action="store_true", help=kept)
    ahead = "score a micro-batch while the next one is sampled"
    add("--score-ahead", action="store_true", help=ahead)
    add("--tf32", action="store_true", help="reward models compute their products in TF32")
    add("--bf16-rewards", action="store_true", help="reward models have weights in bfloat16")
    add("--compile", action="store_true", help="compile the network's blocks and the decoder")
    backends = [backend.value for backend in AttentionBackendName]
    add("--attention", choices=backends, metavar="BACKEND", help="one of diffusers' backends")
    add("--time-limit", type=float, default=540.0, help="in seconds")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
    add("--peak-tflops", type=float, help="the GPU's peak of dense bfloat16 products")
    add("--out", type=Path, help="file for the report, which is also printed")
    return parser.parse_args(given)


def runs_of(plan: Plan, wanted: Sequence[str] | None, task: str = TASK) -> list[RunSpec]:
    """The methods' runs with the task's rewards, the reference method first."""
    config = plan.config
    rewards = config.tasks[task].rewards
    rigid = [name for name in rewards if not METRICS[name].differentiable]
    model = config.active.model_roles[TIMED]
    known = {
        run.variant: run
        for run in plan.runs.values()
        if run.trained and (run.task, run.backbone) == (TASK, model)
    }
    names = list(dict.fromkeys(wanted or config.experiments[TABLE].methods))
    for name in names:
        if name not in known:
            raise ValueError(f"--methods: unknown {name!r} (available: {', '.join(sorted(known))})")
    runs = []
    for run in (known[name] for name in names):
        method = methods.create(run.method, run.hyperparameters)
        if not rigid or not method.needs_reward_gradients:
            runs.append(run.model_copy(update={"task": task, "rewards": rewards}))
        elif wanted:
            raise ValueError(
                f"--methods: {run.variant} needs the rewards' gradients, and {rigid[0]} has none; "
                "leave it out"
            )
    return sorted(runs, key=lambda run: run.variant != config.compute_reference)


def peak_of(name: str, given: float | None) -> float | None:
    """FLOP/s of a GPU by its name; None if they are neither given nor known."""
    if given is not None:
        return given * 1e12
    known = (peak * 1e12 for pattern, peak in PEAKS.items() if re.search(pattern, name))
    return next(known, None)


def published_times() -> dict[str, float]:
    """Seconds of an iteration in the paper's Table 2, by the method's title."""
    table = pd.read_csv(ROOT / f"tafs/report/paper/{TABLE}.csv", index_col="method")
    return dict(table["iteration_time_s"].dropna())


def setting_of(
    options: argparse.Namespace,
    command: str,
    plan: Plan,
    size: Size,
    share: int,
    device: torch.device,
) -> Setting:
    scale = plan.config.active
    model = catalog.read()[MODELS[options.backbone]]
    as_published = (options.backbone, options.task) == (TIMED, TASK)
    as_published &= size.resolution == SIZES[options.size].resolution
    architecture = size.backbones[options.backbone]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_of(name, options.peak_tflops)
    speed = "" if peak is None else f" ({peak / 1e12:g} TFLOP/s of dense bfloat16 products)"
    return Setting(
        command=command,
        title=architecture.title,
        size=options.size,
        facts=(
            f"{name}{speed}; torch {torch.__version__}, diffusers {diffusers.__version__}",
            f"{size.resolution} x {size.resolution} pixels, {architecture.tokens} tokens per "
            f"prompt, guidance {model.guidance:g}, micro-batches of {options.micro_batch}",
            f"gradient checkpointing: {options.checkpointing}; compiled: {options.compile}; graphs "
            f"kept: {options.keep_graphs}; rewards in TF32: {options.tf32}, "
            f"in bfloat16: {options.bf16_rewards}, ahead: {options.score_ahead}; "
            f"attention backend: {options.attention or 'default'}",
            f"rewards: {', '.join(plan.config.tasks[options.task].rewards)}",
            "one iteration of each method, with as many images as were predicted to fit in "
            f"{options.time_limit:g} s for all",
        ),
        network=flops.describe(build(options.backbone, size, plan, flops.META)),
        peak=peak,
        share=share,
        iteration=f"scale {plan.config.scale}: {scale.prompts_per_iteration} prompts x "
        f"{scale.group_size} images on {scale.processes} GPUs",
        ahead=AHEAD,
        reference=plan.config.compute_reference,
        published=published_times() if as_published else {},
    )


def models_of(
    options: argparse.Namespace, plan: Plan, size: Size, device: torch.device
) -> tuple[Rehearsed, RewardSet]:
    """Backbone and rewards on the device, with the options' settings."""
    backbone = build(options.backbone, size, plan, device, checkpointing=options.checkpointing)
    torch.backends.cuda.matmul.allow_tf32 = options.tf32  # the network computes in bfloat16
    torch.backends.cudnn.allow_tf32 = options.tf32
    if options.attention:
        backbone.transformer.set_attention_backend(options.attention)
    if options.compile:
        backbone.compile()
    rewards = reward_models(list(plan.config.tasks[options.task].rewards), size, device)
    for reward in rewards.rewards if options.bf16_rewards else ():
        reward.cast(torch.bfloat16)
    return backbone, rewards


def work(options: argparse.Namespace, command: str) -> None:
    """Run all methods and write the report."""
    start = time.perf_counter()
    limit_threads()
    torch.manual_seed(0)
    plan = experiment.load({"scale": SCALES.get(options.backbone, SCALE)}, ROOT / "config.yaml")
    scale, size = plan.config.active, SIZES[options.size]
    size = replace(size, resolution=options.resolution or size.resolution)
    share = scale.prompts_per_iteration * scale.group_size // scale.processes
    runs = runs_of(plan, options.methods, options.task)
    batch = options.micro_batch = options.micro_batch or min(run.batch for run in runs)
    if options.checkpointing is None:
        options.checkpointing = any(run.assets.gradient_checkpointing for run in runs)
    most = min(options.images or share, share)
    if not 1 <= batch <= most or most % batch:
        raise ValueError(
            f"--micro-batch: {batch} does not divide the {most} images per method; choose a divisor"
        )
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this machine has no GPU; leave the option out or give cpu")
    setting = setting_of(options, command, plan, size, share, device)
    encoders = size.encoders[options.backbone]
    encoding = number(encoding_seconds(encoders, device))
    names = ", ".join(encoder.name for encoder in encoders)
    fact = f"text encoding, seconds per prompt: {encoding} ({names}, bfloat16)"
    setting = replace(setting, facts=(*setting.facts, fact))
    prompts = [prompt(n) for n in range(scale.prompts_per_iteration)]
    try:
        backbone, rewards = models_of(options, plan, size, device)
        backbone.prepare([prompt.text for prompt in prompts])
        calls = time_calls(backbone, rewards, prompts[0], batch)
    except torch.OutOfMemoryError:
        raise errors.RunFailed(f"a single evaluation: {OUT_OF_MEMORY}") from None
    log(
        f"{setting.title}, micro-batches of {batch} on {device}: forward {calls.forward:.3g} s, "
        f"forward and backward {calls.trained:.3g} s, rewards {calls.reward:.3g} s"
    )
    predicted = {
        run.variant: predict(methods.create(run.method, run.hyperparameters), calls) for run in runs
    }
    available = (1 - RESERVE) * (options.time_limit - (time.perf_counter() - start))
    images = affordable(predicted, available, most // batch) * batch
    rows: list[Row] = []
    failed: dict[str, str] = {}
    report = ""
    for place, run in enumerate(runs, start=1):
        try:
            kept, ahead = options.keep_graphs, options.score_ahead
            spec = one_iteration(run, batch, images, keep_graphs=kept, score_ahead=ahead)
            rows.append(rehearse(spec, backbone, rewards, prompts))
        except torch.OutOfMemoryError:
            failed[run.variant] = OUT_OF_MEMORY
        except errors.RunFailed as error:  # a number is not finite
            failed[run.variant] = str(error)
        log(f"{run.variant}: {failed.get(run.variant, 'measured')}")
        if rows:
            report = render(setting, rows, failed, [later.variant for later in runs[place:]])
            if options.out is not None:
                files.atomic_text(options.out, report)
    if not rows:
        raise errors.RunFailed(
            f"no method could be measured; {runs[-1].variant}: {failed.popitem()[1]}"
        )
    print(report, end="")


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    command = shlex.join(["python", "benchmarks/rehearse.py", *(given or sys.argv[1:])])
    errors.run_cli("rehearse", lambda: work(options, command))


if __name__ == "__main__":
    main()
