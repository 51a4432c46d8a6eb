"""The paper's training iterations at full size, on one GPU and without any download.

    python benchmarks/rehearse.py --backbone flux --out flux.md
    python benchmarks/rehearse.py --backbone flux --compile --micro-batch 24 --out compiled.md

FLUX.1-dev's or SD3.5-M's network, autoencoder and the preference task's reward models (PickScore's
CLIP ViT-H-14, CLIP ViT-L-14) are built on the device with random weights, and the training loop
runs an iteration of every method on them, at the settings of config.yaml's scale `paper`. Random
weights take as long as trained ones. The text encoders are left out, since an iteration finds its
prompts' embeddings ready: embeddings of their shapes are drawn at random, captions' tokens too.

Printed in Markdown, for each method: evaluations, seconds per image by phase, utilisation, peak
memory, and one GPU's share of the paper's iteration beside the published time. Before the methods
run, single calls of the models are timed, and from these follows how many images each may have
within --time-limit.
"""

from __future__ import annotations

import argparse
import csv
import gc
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip

import diffusers
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tafs.common import errors
from tafs.data.prompts import Prompt
from tafs.experiment import runs as runs_
from tafs.experiment import schema, validate
from tafs.methods import registry as methods
from tafs.methods.base import Method, Trajectory
from tafs.methods.policy_gradient import PolicyGradient
from tafs.models import Conditioning, architectures, catalog, flops
from tafs.models.plugins.flux import FluxBackbone
from tafs.models.plugins.sd3 import SD3Backbone
from tafs.models.base import fast_dtype
from tafs.models.flops import Network, describe
from tafs.rewards import registry
from tafs.rewards.clip import CLIPScore, PickScore
from tafs.rewards.registry import RewardSet
from tafs.runtime import main as main_
from tafs.training.trainer import AHEAD, Trainer

ROOT = Path(__file__).resolve().parent.parent
SCALE, TASK, TABLE = "paper", "preference", "table2"
TIMED = "flux"  # the backbone whose iteration times the paper publishes
COMPARED = "flow_grpo"  # the method that the reference's iteration is to be shorter than
GIB = 2**30
RESERVE = 0.15  # of the time that is left: what single calls do not show

# Of dense bfloat16 products, in TFLOP/s, by what the GPU's name holds. Cards on other boards and
# parts of a card are slower, and their names do not match.
PEAKS = {r"H100 80GB HBM3$": 989.0, r"H200$": 989.0, r"A100(?!.*MIG)": 312.0}


# -- architectures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Everything that is built, and the side of the images in pixels."""

    resolution: int
    backbones: Mapping[str, Architecture]
    rewards: Mapping[str, Mapping[str, Any]]  # CLIPConfig's arguments, by the reward's name


def _clip(
    act: str,
    projection: int,
    text: tuple[int, int, int],
    vision: tuple[int, int, int],
    **image: int,
) -> dict[str, Any]:
    """`text` and `vision` are (width, layers, heads)."""

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": projection,
            "hidden_act": act,
        }

    return {
        "text_config": tower(*text),
        "vision_config": tower(*vision) | image,
        "projection_dim": projection,
    }


TINY_VAE = {"channels": (8, 8), "layers": 1, "groups": 4}

SIZES = {
    "full": Size(
        resolution=512,
        backbones={"flux": architectures.FLUX_DEV, "sd3": architectures.SD35_MEDIUM},
        rewards={
            "pickscore": _clip(
                "gelu", 1024, (1024, 24, 16), (1280, 32, 16), image_size=224, patch_size=14
            ),
            "clip": _clip(
                "quick_gelu", 768, (768, 12, 12), (1024, 24, 16), image_size=224, patch_size=14
            ),
        },
    ),
    # Seconds on a processor.
    "tiny": Size(
        resolution=16,
        backbones={
            "flux": Architecture(
                title="FLUX.1-dev",
                transformer={
                    "patch_size": 1,
                    "in_channels": 64,
                    "num_layers": 1,
                    "num_single_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": 32,
                    "guidance_embeds": True,
                    "axes_dims_rope": (4, 6, 6),
                },
                vae=architectures.vae(**TINY_VAE, latents=architectures.FLUX_LATENTS),
                scheduler=architectures.FLUX_SCHEDULER,
                tokens=8,
            ),
            "sd3": Architecture(
                title="SD3.5-Medium",
                transformer={
                    "sample_size": 128,
                    "patch_size": 2,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 3,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 32,
                    "caption_projection_dim": 32,
                    "pooled_projection_dim": 32,
                    "pos_embed_max_size": 16,
                    "dual_attention_layers": (0, 1),
                    "qk_norm": "rms_norm",
                },
                vae=architectures.vae(**TINY_VAE, latents=architectures.SD3_LATENTS),
                scheduler=architectures.SD3_SCHEDULER,
                tokens=8,
            ),
        },
        rewards={
            "pickscore": _clip("gelu", 32, (32, 2, 2), (32, 2, 2), image_size=32, patch_size=16),
            "clip": _clip("quick_gelu", 32, (32, 2, 2), (32, 2, 2), image_size=32, patch_size=16),
        },
    ),
}


# -- models with random weights --------------------------------------------------------------------


class Rehearsed(flops.Textless):
    """One adapter for all methods, and a count of evaluations."""

    def __init__(self, pipeline: diffusers.DiffusionPipeline, **settings: Any):
        super().__init__(pipeline, **settings)
        self.evaluations: Counter[bool] = Counter()  # of images, by whether they have gradients

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.evaluations[torch.is_grad_enabled()] += len(x_t)
        return super().velocity(x_t, t, cond)

    def add_lora(self, rank: int, alpha: int, generator: torch.Generator) -> None:
        """At the first call only: what the adapter has learnt takes no time."""
        if not self.lora_parameters():
            super().add_lora(rank, alpha, generator)


class RandomFlux(Rehearsed, FluxBackbone):
    """FLUX.1."""


class RandomSD3(Rehearsed, SD3Backbone):
    """Stable Diffusion 3.5."""


CLASSES: dict[str, type[Rehearsed]] = {"flux": RandomFlux, "sd3": RandomSD3}


def build(
    name: str, size: Size, scale: schema.Scale, device: torch.device, *, checkpointing: bool = False
) -> Rehearsed:
    """A backbone as `Backbone.load` gives it, with an adapter, but for what its weights are."""
    backbone = flops.build(
        CLASSES[name],
        size.backbones[name],
        catalog.read()[scale.backbones[name]],
        resolution=size.resolution,
        dtype=getattr(torch, scale.dtype),
        device=device,
        lora_rank=scale.lora.rank,
    )
    if checkpointing:
        for module in (backbone.transformer, backbone.pipeline.vae):
            module.enable_gradient_checkpointing()
    return backbone


class RandomClip(CLIPScore):
    """The CLIP score of a model with random weights, for captions of random tokens."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        with flops.made_on(device, torch.float32):
            model = CLIPModel(CLIPConfig(**settings))
        self.side = self.crop = model.config.vision_config.image_size
        # What lies between reads files.
        super(CLIPScore, self).__init__(model, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, device)

    def tokenize(self, text: str) -> Tensor:
        text_config = self.model.config.text_config
        return torch.randint(text_config.vocab_size, (text_config.max_position_embeddings,))


class RandomPickScore(RandomClip, PickScore):
    """PickScore, likewise."""


REWARDS: dict[str, type[RandomClip]] = {"pickscore": RandomPickScore, "clip": RandomClip}


def reward_models(names: Sequence[str], size: Size, device: torch.device) -> RewardSet:
    return registry.load(names, lambda name: REWARDS[name](size.rewards[name], device).reward())


# -- how long it takes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """Seconds of single calls for one micro-batch."""

    forward: float
    trained: float  # forward and backward
    reward: float  # decoding and scoring, with the gradients of both


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of the second call: the first one allocates, compiles and loads kernels."""
    work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def time_calls(backbone: Rehearsed, rewards: RewardSet, prompt: Prompt, micro_batch: int) -> Calls:
    cond = backbone.encode([prompt.text] * micro_batch)
    x = torch.randn(micro_batch, *backbone.latent_shape, device=backbone.device)
    t = torch.full((micro_batch,), 0.5, device=backbone.device)

    @torch.no_grad()
    def forward() -> None:
        backbone.velocity(x, t, cond)

    def trained() -> None:
        backbone.velocity(x, t, cond).square().mean().backward()

    def reward() -> None:
        images = backbone.decode(x.clone().requires_grad_(), fast_dtype(backbone.device))
        scores = rewards.differentiate(images, [prompt] * micro_batch)
        torch.stack(list(scores.values())).sum().backward()

    with backbone.reference():
        forward()  # the network without its adapter is compiled apart
    return Calls(*(seconds_of(work, backbone.device) for work in (forward, trained, reward)))


def predict(method: Method, calls: Calls) -> float:
    """At most so many seconds take a method's evaluations and rewards of one micro-batch."""
    unit = max(calls.forward, calls.trained / 3)
    watched = 2  # evaluations behind the journal's divergence from the base model
    # A method that differentiates its rewards may do so at every evaluation.
    scored = (
        len(method.scored_steps())
        if isinstance(method, PolicyGradient)
        else method.forward_equivalents
    )
    return (method.forward_equivalents + watched) * unit + scored * calls.reward


def plan(seconds: Mapping[str, float], available: float, most: int) -> dict[str, int]:
    """How many micro-batches each method may run: one at least, `most` at most.

    Whoever has the fewest gets the next, the quickest first, while it fits.

    Args:
        seconds: of one micro-batch, by method.
        available: seconds for all of them.

    Raises:
        ValueError: one micro-batch of each takes longer.
    """
    left = available - sum(seconds.values())
    if left < 0:
        raise ValueError(
            f"--time-limit: one micro-batch of each method takes about {sum(seconds.values()):.0f} "
            f"s and {max(available, 0):.0f} s are left for it; give more, a smaller --micro-batch "
            "or fewer --methods"
        )
    chosen = dict.fromkeys(seconds, 1)
    while fitting := [n for n, s in seconds.items() if s <= left and chosen[n] < most]:
        name = min(fitting, key=lambda n: (chosen[n], seconds[n]))
        chosen[name] += 1
        left -= seconds[name]
    return chosen


# -- the methods -----------------------------------------------------------------------------------


class Rehearsal(Trainer):
    """A trainer that counts its evaluations."""

    backbone: Rehearsed

    def _rollout(self, texts: Sequence[str], iteration: int) -> list[Trajectory]:
        before = self.backbone.evaluations.copy()
        trajectories = super()._rollout(texts, iteration)
        self.sampling = self.backbone.evaluations - before
        return trajectories

    def _update(self, *arguments: Any) -> dict[str, Any]:
        before = self.backbone.evaluations.copy()
        learned = super()._update(*arguments)
        self.updating = self.backbone.evaluations - before
        return learned


@dataclass(frozen=True)
class Row:
    """What was measured of a method; evaluations and seconds are those of an image."""

    variant: str
    title: str
    images: int
    nfe_old: float  # evaluations in sampling
    nfe_theta: float  # evaluations with gradients in the update
    others: float  # evaluations without gradients in the update
    sample: float
    reward: float
    update: float
    watch: float  # seconds of the journal's divergence, once an iteration
    peak: float | None  # GiB; None where the device does not say

    @property
    def total(self) -> float:
        return self.sample + self.reward + self.update


def settings_of(run: runs_.Run, micro_batch: int, images: int) -> dict[str, Any]:
    """What of run.json a trainer reads: one iteration whose groups are micro-batches."""
    return {
        "method": run.method,
        # The iteration is too small to be shared out to several optimiser steps.
        "hyperparameters": {**run.hyperparameters, "updates": 1},
        "seed": run.seed,
        "rewards": dict(run.rewards),
        "settings": {
            **run.settings,
            "iterations": 1,
            "prompts_per_iteration": images // micro_batch,
            "group_size": micro_batch,
            "micro_batch": micro_batch,
        },
    }


def rehearse(
    run: runs_.Run,
    backbone: Rehearsed,
    rewards: RewardSet,
    prompts: Sequence[Prompt],
    micro_batch: int,
    images: int,
) -> Row:
    """One iteration of a method."""
    measured = backbone.device.type == "cuda"
    gc.collect()  # the trainer before this one
    if measured:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(backbone.device)
    trainer = Rehearsal(settings_of(run, micro_batch, images), backbone, rewards, prompts)
    start = time.perf_counter()
    seconds = trainer.iterate(0)["seconds"]
    synchronize(backbone.device)
    watch = time.perf_counter() - start - seconds["total"]
    sampling, updating = (
        {grad: count[grad] / images for grad in (False, True)}
        for count in (trainer.sampling, trainer.updating)
    )
    cost = sampling[False] + updating[False] + 3 * updating[True]
    mean = (
        trainer.method.forward_equivalents / cost
    )  # 1 but for methods that draw their number of steps
    return Row(
        variant=run.variant,
        title=run.title,
        images=images,
        nfe_old=mean * sampling[False],
        nfe_theta=mean * updating[True],
        others=mean * updating[False],
        sample=mean * seconds["sample"] / images,
        reward=seconds["reward"] / images,
        update=mean * seconds["update"] / images,
        watch=watch,
        peak=torch.cuda.max_memory_allocated(backbone.device) / GIB if measured else None,
    )


# -- the report ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all rows of a report share."""

    command: str
    title: str  # of the model
    size: str
    facts: Sequence[str]  # lines about machine and options
    network: Network
    peak: float | None  # FLOP/s
    share: int  # images of a GPU in the paper's iteration
    iteration: str  # what that is
    reference: str  # the variant that all are compared with
    published: Mapping[str, float]  # seconds of the paper's iteration, by title
    targeted: bool  # whether the targets are meant for this


COLUMNS = (
    "method",
    "images",
    "NFE_old",
    "NFE_theta",
    "sample s/image",
    "reward s/image",
    "update s/image",
    "MFU sample",
    "MFU update",
    "computed",
    "peak GiB",
    "s/iteration",
    "published s",
    "ratio",
    "published ratio",
)
NOTES = """\
- s/iteration is {share} images, one GPU's share of the paper's iteration ({iteration}), at the
  measured seconds per image. It leaves out what the GPUs exchange ({adapter:.3g} MiB of gradients
  an optimiser step), the text encoders, which run once in {ahead} iterations, and the divergence
  from the base model that the journal records (up to {watch:.3g} s an iteration).
- Ratios are to {reference}.
- MFU is model FLOP/s utilisation: the network's FLOPs over the phase's seconds and the GPU's peak,
  with one evaluation counting its forward pass in sampling and three in the update, and what
  gradient checkpointing computes again counting nothing. Autoencoder and rewards are not counted.
- `computed` is the update's with what is really computed there: the base model's weights are frozen
  and need no gradients, so that an evaluation with gradients takes {trained:.2f} forward passes.
- `peak GiB` is of allocated tensors, and of the worst moment of the iteration.
- A method that draws its number of steps is scaled from those drawn to their mean."""


def utilisation(evaluations: float, seconds: float, setting: Setting) -> float | None:
    """Of evaluations in units of one forward pass."""
    if setting.peak is None:
        return None
    return evaluations * setting.network.forward / seconds / setting.peak


def sampling_mfu(row: Row, setting: Setting) -> float | None:
    return utilisation(row.nfe_old, row.sample, setting)


def update_mfu(row: Row, setting: Setting, trained: float = 3.0) -> float | None:
    return utilisation(row.others + trained * row.nfe_theta, row.update, setting)


def trained_cost(setting: Setting) -> float:
    """Forward passes that an evaluation with gradients takes."""
    return setting.network.trained / setting.network.forward


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def cells(row: Row, setting: Setting, reference: Row | None) -> list[str]:
    published = setting.published.get(row.title)
    compared = setting.published.get(reference.title) if reference else None
    return [
        row.title,
        str(row.images),
        number(row.nfe_old),
        number(row.nfe_theta),
        number(row.sample),
        number(row.reward),
        number(row.update),
        percent(sampling_mfu(row, setting)),
        percent(update_mfu(row, setting)),
        percent(update_mfu(row, setting, trained_cost(setting))),
        number(row.peak),
        number(setting.share * row.total),
        number(published),
        number(row.total / reference.total if reference else None),
        number(published / compared if published and compared else None),
    ]


def targets(rows: Mapping[str, Row], setting: Setting) -> list[str]:
    """How the reference method's figures stand to what they should be."""
    row, other = rows.get(setting.reference), rows.get(COMPARED)
    if row is None:
        return []
    sampling, update = sampling_mfu(row, setting), update_mfu(row, setting)
    iteration, published = setting.share * row.total, setting.published[row.title]
    ratio = row.total / other.total if other else None
    verdicts = [
        ("MFU in sampling", percent(sampling), "at least 45 %", sampling and sampling >= 0.45),
        ("MFU in the update", percent(update), "at least 40 %", update and update >= 0.40),
        ("s/iteration", number(iteration), f"at most {published:g}", iteration <= published),
        (f"ratio to {COMPARED}", number(ratio), "at most 0.47", ratio and ratio <= 0.47),
    ]
    return [
        f"- {what}: {value} ({wanted}: {'-' if met is None else 'met' if met else 'not met'})"
        for what, value, wanted, met in verdicts
    ]


def render(setting: Setting, rows: Sequence[Row], pending: Sequence[str] = ()) -> str:
    """The report in Markdown; `pending` are the methods that have not run yet."""
    by_variant = {row.variant: row for row in rows}
    reference = by_variant.get(setting.reference)
    network = setting.network
    table = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)]]
    table += [cells(row, setting, reference) for row in rows]
    lines = [
        f"# Rehearsal: {setting.title}, {setting.size} size, random weights",
        "",
        f"`{setting.command}`",
        "",
        *(f"- {fact}" for fact in setting.facts),
        f"- network: {network.parameters / 1e9:.4g} billion parameters and "
        f"{network.adapter / 1e6:.4g} million of the adapter; {network.forward / 1e12:.4g} TFLOP "
        f"an evaluation of an image, {network.trained / 1e12:.4g} with the adapter's gradients",
        "",
        *(f"| {' | '.join(line)} |" for line in table),
        "",
    ]
    if pending:
        lines += [f"Not run: {', '.join(pending)}.", ""]
    if setting.targeted:
        lines += [f"Targets ({setting.reference}):", "", *targets(by_variant, setting), ""]
    notes = NOTES.format(
        share=setting.share,
        iteration=setting.iteration,
        ahead=AHEAD,
        adapter=network.adapter * 4 / 2**20,
        watch=max(row.watch for row in rows),
        reference=setting.reference,
        trained=trained_cost(setting),
    )
    return "\n".join([*lines, notes, ""])


def published_times() -> dict[str, float]:
    """Seconds of an iteration by the method's title: Table 2."""
    with (Path(tafs.__file__).parent / "paper" / f"{TABLE}.csv").open(
        encoding="utf-8", newline=""
    ) as file:
        rows = csv.DictReader(file)
        return {
            row["method"]: float(row["iteration_time_s"]) for row in rows if row["iteration_time_s"]
        }


# -- the command -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description="The paper's iterations at full size with random weights.")
    parser.add_argument("--backbone", choices=sorted(CLASSES), default="flux")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help=f"by default those of config.yaml's {TABLE}"
    )
    parser.add_argument("--micro-batch", type=_count, help="by default the paper's scale's")
    parser.add_argument(
        "--images", type=_count, help="of a method at most; by default a GPU's share"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="of gradients")
    parser.add_argument("--compile", action="store_true", help="the network's blocks")
    parser.add_argument("--attention", help="one of diffusers' attention backends")
    parser.add_argument("--time-limit", type=_positive, default=540.0, help="in seconds")
    parser.add_argument("--device", help="by default the GPU, where there is one")
    parser.add_argument("--peak-tflops", type=_positive, help="of dense bfloat16 products")
    parser.add_argument("--out", type=Path, help="where the report goes besides the terminal")
    return parser.parse_args(given)


def device_of(name: str | None) -> torch.device:
    """Raises ValueError: no such device on this machine; names it."""
    gpus = torch.cuda.device_count()
    name = name or ("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: {name!r} is no device; give cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {name!r} cannot be used; give cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"--device: {name!r} is not there, this machine shows {gpus} GPUs")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def runs_of(settings: schema.Config, wanted: Sequence[str] | None) -> list[runs_.Run]:
    """The methods' runs on the task, in the order asked for.

    Raises:
        ValueError: an unknown method; lists those there are.
    """
    model = settings.active.backbones[TIMED]
    known = {
        run.variant: run
        for run in runs_.runs(settings).values()
        if run.trained and run.task == TASK and run.backbone == model
    }
    names = list(dict.fromkeys(wanted or settings.experiments[TABLE].methods))
    for name in names:
        if name not in known:
            raise ValueError(f"--methods: unknown {name!r} (available: {', '.join(sorted(known))})")
    return [known[name] for name in names]


def share_of(scale: schema.Scale) -> int:
    """Images of one GPU in the paper's iteration."""
    return scale.prompts_per_iteration * scale.group_size // scale.processes


def micro_batches(images: int | None, micro_batch: int, share: int) -> int:
    """How many a method may have at most.

    Raises:
        ValueError: the images are no whole number of them, or a GPU has fewer; names the option.
    """
    if micro_batch > share:
        raise ValueError(f"--micro-batch: {micro_batch} is above the {share} images of a GPU")
    if images is not None and images % micro_batch:
        raise ValueError(f"--images: {images} is no multiple of the micro-batch's {micro_batch}")
    return (images or share) // micro_batch


def choose_attention(backbone: Rehearsed, name: str) -> None:
    """Raises ValueError: there is no such attention backend here."""
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise ValueError(f"--attention: unknown {name!r} (available: {', '.join(known)})")
    try:
        backbone.transformer.set_attention_backend(name)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--attention: {name!r} cannot be used here ({reason})") from None


def peak_of(name: str, given: float | None) -> float | None:
    """FLOP/s of a GPU by its name; None where they are neither given nor known."""
    if given is not None:
        return given * 1e12
    known = (peak * 1e12 for pattern, peak in PEAKS.items() if re.search(pattern, name))
    return next(known, None)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def within_memory(options: argparse.Namespace, device: torch.device, what: str) -> Iterator[None]:
    """Raises ValueError: the GPU's memory does not suffice; names the option that helps."""
    try:
        yield
    except torch.OutOfMemoryError:
        remedy = "run it on a GPU with more memory"
        if options.micro_batch > 1:
            remedy = f"give fewer images than {options.micro_batch} to --micro-batch"
        if options.no_checkpointing:
            remedy = "leave out --no-checkpointing"
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        raise ValueError(f"{what}: the GPU's {total:.0f} GiB do not suffice; {remedy}") from None


def ready(
    options: argparse.Namespace, settings: schema.Config, size: Size, device: torch.device
) -> tuple[Rehearsed, RewardSet]:
    """The models on the device, with the options' settings."""
    scale = settings.active
    checkpointing = scale.gradient_checkpointing and not options.no_checkpointing
    backbone = build(options.backbone, size, scale, device, checkpointing=checkpointing)
    if options.attention:
        choose_attention(backbone, options.attention)
    if options.compile:
        for block in backbone.blocks:
            block.compile()
    return backbone, reward_models(list(settings.tasks[TASK].rewards), size, device)


def setting_of(
    options: argparse.Namespace,
    command: str,
    settings: schema.Config,
    size: Size,
    device: torch.device,
    network: Network,
) -> Setting:
    scale, model = settings.active, catalog.read()[settings.active.backbones[options.backbone]]
    architecture = size.backbones[options.backbone]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_of(name, options.peak_tflops)
    speed = "" if peak is None else f" ({peak / 1e12:g} TFLOP/s of dense bfloat16 products)"
    checkpointing = scale.gradient_checkpointing and not options.no_checkpointing
    return Setting(
        command=command,
        title=architecture.title,
        size=options.size,
        facts=(
            f"{name}{speed}; torch {torch.__version__}, diffusers {diffusers.__version__}",
            f"{size.resolution} x {size.resolution} pixels, {architecture.tokens} tokens a prompt, "
            f"guidance {model.guidance:g}",
            f"micro-batches of {options.micro_batch}, gradient checkpointing "
            f"{'on' if checkpointing else 'off'}, blocks "
            f"{'compiled' if options.compile else 'not compiled'}, attention "
            f"{options.attention or 'as by default'}",
            "one iteration of each method, of as many images as were planned for all to end "
            f"within {options.time_limit:g} s",
        ),
        network=network,
        peak=peak,
        share=share_of(scale),
        iteration=f"{scale.prompts_per_iteration} prompts x {scale.group_size} images on "
        f"{scale.processes} GPUs",
        reference=settings.reference,
        published=published_times() if options.backbone == TIMED else {},
        targeted=options.backbone == TIMED and options.size == "full",
    )


def work(options: argparse.Namespace, command: str) -> None:
    start = time.perf_counter()
    main_.limit_threads()
    torch.manual_seed(0)
    settings = validate.read(ROOT / "config.yaml", {"scale": SCALE})
    scale, size = settings.active, SIZES[options.size]
    options.micro_batch = options.micro_batch or scale.micro_batch
    device = device_of(options.device)
    runs = runs_of(settings, options.methods)
    most = micro_batches(options.images, options.micro_batch, share_of(scale))
    network = describe(build(options.backbone, size, scale, torch.device("meta")))
    setting = setting_of(options, command, settings, size, device, network)
    prompts = [Prompt(f"prompt {n}", {}) for n in range(scale.prompts_per_iteration)]
    tell(f"{setting.title}, {setting.size} size, on {device}")
    with within_memory(options, device, "a single evaluation"):
        backbone, rewards = ready(options, settings, size, device)
        backbone.prepare([prompt.text for prompt in prompts])
        calls = time_calls(backbone, rewards, prompts[0], options.micro_batch)
    tell(
        f"a micro-batch of {options.micro_batch}: forward {calls.forward:.3g} s, forward and "
        f"backward {calls.trained:.3g} s, rewards {calls.reward:.3g} s"
    )
    predicted = {
        run.variant: predict(methods.create(run.method, dict(run.hyperparameters)), calls)
        for run in runs
    }
    available = (1 - RESERVE) * (options.time_limit - (time.perf_counter() - start))
    chosen = plan(predicted, available, most)
    images = {name: count * options.micro_batch for name, count in chosen.items()}
    tell("images: " + ", ".join(f"{name} {count}" for name, count in images.items()))
    rows: list[Row] = []
    for place, run in enumerate(runs, start=1):
        with within_memory(options, device, run.variant):
            count = images[run.variant]
            rows.append(rehearse(run, backbone, rewards, prompts, options.micro_batch, count))
        tell(f"{run.variant}: {rows[-1].total:.4g} s an image")
        report = render(setting, rows, [later.variant for later in runs[place:]])
        # What is measured outlives a later method's failure.
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(report, encoding="utf-8")
    print(report, end="")


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    used = sys.argv[1:] if given is None else given
    command = shlex.join(["python", "benchmarks/rehearse.py", *used])
    errors.run_cli("rehearse", lambda: work(options, command))


if __name__ == "__main__":
    main()
