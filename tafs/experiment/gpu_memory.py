"""The memory that trainings take on a GPU, and the settings with which they fit into it.

A scale may leave `gradient_checkpointing` and `micro_batch` to the memory of its GPUs (`auto`). For
each training they then follow from its `gpu_memory`, and not from the machine that runs snakemake,
so that a plan is the same everywhere. Both change the rounding alone. Quantised weights change
results; where they are needed, the scale has to say so.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from tafs.assets import lockfile
from tafs.common.yaml_files import ConfigError
from tafs.experiment.schema import AUTO, UNSETTLED, Scale
from tafs.experiment.specs import RunSpec
from tafs.methods import registry
from tafs.models import architectures, catalog, memory_model
from tafs.models.base import decoded_together
from tafs.models.memory_model import GB, HALF, RESERVED, Setting
from tafs.models.quantization import Quantization
from tafs.rewards import metrics

# With so many images, an update without gradient checkpointing is faster than one of any number
# with it: by a quarter for FLUX.1-dev on an H100, compiled or not (results/reference/gpu/).
UNCHECKED = 4
# Bytes of reward models that are in half precision in their file and in float32 in memory.
LOADED = {"hpsv2": memory_model.FLOAT * 986_109_441}
WAITING = ("network", "autoencoder", "rewards")  # in host memory while prompts are encoded
FORMATS: tuple[Quantization, ...] = get_args(Quantization)
WEIGHT_BYTES = {"float32": memory_model.FLOAT, "bfloat16": HALF}
# The rewards whose gradients are modelled: ViT-H/14 or ViT-L/14 at 224 pixels.
# Those of other rewards count as nothing.
TOWERS: Mapping[str, float] = {
    "pickscore": memory_model.tower(1280, 32, 257),
    "hpsv2": memory_model.tower(1280, 32, 257),
    "clip": memory_model.tower(1024, 24, 257, quick_gelu=True),
}


@dataclass(frozen=True)
class TrainingMemory:
    """A training on one GPU."""

    architecture: architectures.Architecture
    model: catalog.Model
    setting: Setting
    most: int  # the micro-batch that is a whole optimiser step's images in a process

    def largest(self, available: float | None = None) -> tuple[str, float]:
        """(the phase that takes most, its bytes).

        Args:
            available: bytes of the GPU. Where text encoders do not fit beside what may wait in
                host memory, it does; None: nothing waits.
        """
        found = memory_model.phases(self.architecture, self.model, self.setting)
        totals = {phase: sum(parts.values()) for phase, parts in found.items()}
        if available is not None and totals["encoding"] > available:
            totals["encoding"] -= sum(found["encoding"][part] for part in WAITING)
        phase = max(totals, key=totals.__getitem__)
        return phase, totals[phase]

    def fitting(
        self, available: float, *, checkpointing: bool, quantize: Quantization | None = None
    ) -> int:
        """The largest micro-batch that takes at most `available` bytes; 0 if none does.

        Args:
            quantize: the format of the network's weights; None: the run's.
        """
        chosen = quantize or self.setting.quantize
        setting = replace(self.setting, gradient_checkpointing=checkpointing, quantize=chosen)

        def peak(batch: int) -> float:
            changed = replace(setting, micro_batch=batch)
            return replace(self, setting=changed).largest(available)[1]

        return bisect.bisect_right(range(1, self.most + 1), available, key=peak)

    def chosen(
        self,
        available: float,
        quantize: Quantization,
        checkpointing: bool | None = None,
        batch: int | None = None,
    ) -> tuple[bool, int]:
        """(gradient checkpointing, micro-batch) with which the training fits; 0: it does not.

        Args:
            checkpointing: None: without it where UNCHECKED images fit, or `batch` of them.
            batch: None: as many images as fit, or a few less that divide an optimiser step's.
        """
        if checkpointing is None:
            unchecked = self.fitting(available, checkpointing=False, quantize=quantize)
            checkpointing = unchecked < min(batch or UNCHECKED, self.most)
        fitting = self.fitting(available, checkpointing=checkpointing, quantize=quantize)
        if batch is not None:
            return checkpointing, batch if fitting >= min(batch, self.most) else 0
        # Compiled networks are compiled again for a last micro-batch of another size.
        equal = (n for n in range(fitting, fitting // 2, -1) if self.most % n == 0)
        return checkpointing, next(equal, fitting)


def usable(gigabytes: float) -> float:
    """The bytes of a GPU's memory that trainings may take."""
    return (1 - RESERVED) * gigabytes * GB


def least_quantized(trainings: Iterable[TrainingMemory], available: float) -> Quantization | None:
    """The format with the most bytes in which one image of each training fits; None: none does."""
    known = [*trainings]
    fitting = (
        q
        for q in FORMATS
        if all(one.fitting(available, checkpointing=True, quantize=q) for one in known)
    )
    return next(fitting, None)


def settled(scale: Scale, scale_name: str, runs: Mapping[str, RunSpec]) -> dict[str, RunSpec]:
    """The runs of a scale with values of its keys that are `auto`.

    Args:
        scale: of config.yaml.
        scale_name: its name there.
        runs: by name; they have any values of these keys, and the scale's of the others.

    Raises:
        ConfigError: a training does not fit, or its memory is not modelled; names it and the
            remedy.
    """
    if not scale.automatic or scale.gpu_memory is None:
        return dict(runs)
    where = f"config.yaml: scales.{scale_name}"
    available = usable(scale.gpu_memory)
    checkpointing = None if scale.gradient_checkpointing == AUTO else scale.gradient_checkpointing
    asked = None if scale.micro_batch == AUTO else scale.micro_batch
    found, unfit = dict(runs), {}
    for name, spec in runs.items():
        if spec.training is None:
            continue
        known = of_run(spec, scale.processes)
        if known is None:
            raise ConfigError(
                f"{where}.{scale.automatic[0]}: 'auto' needs a model of the memory of "
                f"{spec.backbone!r}, which there is not; give a value"
            )
        recompute, batch = known.chosen(available, scale.quantize, checkpointing, asked)
        if not batch:
            unfit[name] = known
        training = spec.training.model_copy(update={"micro_batch": batch})
        assets = spec.assets.model_copy(update={"gradient_checkpointing": recompute})
        found[name] = spec.model_copy(update={"assets": assets, "training": training})
    if unfit:
        first, *others = unfit
        more = f" and in {len(others)} more" if others else ""
        raise ConfigError(
            f"{where}.gpu_memory: {scale.gpu_memory:g} GB do not hold a micro-batch of "
            f"{asked or 1} in {first}{more}; {_remedy(scale, unfit.values(), available)}"
        )
    return found


def _remedy(scale: Scale, unfit: Iterable[TrainingMemory], available: float) -> str:
    """What makes the trainings fit, or may."""
    quantize = least_quantized(unfit, available)
    if quantize is None:
        return "use a larger GPU, or leave their tables out of `experiments`"
    if quantize != scale.quantize:
        return f"set quantize: {quantize}"
    fixed = [key for key in UNSETTLED if key not in scale.automatic]
    return f"set {' and '.join(fixed)} to auto"


def _reward_bytes(name: str, dtype: str) -> float:
    """Bytes of a reward's weights, whose files are in float32 but for those in LOADED."""
    metric, known = metrics.plugin(name).metric, lockfile.read()
    share = WEIGHT_BYTES[dtype] / WEIGHT_BYTES["float32"]
    return sum(
        LOADED.get(one, known[one].gigabytes * GB) * (share if one in metric.castable else 1)
        for one in metric.resources
    )


def of_run(spec: RunSpec, processes: int) -> TrainingMemory | None:
    """The memory of a run's training on the hub's models; None if it is not modelled.

    Args:
        processes: that share an iteration's images.
    """
    training, model = spec.training, catalog.read()[spec.backbone]
    known_model = model.assets == "hub" and model.pipeline in memory_model.BLOCKS
    architecture = architectures.published(model, spec.assets.length(model))
    if training is None or architecture is None or not known_model:
        return None
    network = architectures.size(
        architecture, model, model.resolution or spec.resolution, training.lora.rank
    )
    method = registry.create(spec.method, spec.hyperparameters)
    images = training.prompts_per_iteration * training.group_size // processes
    share = images // method.updates
    known = lockfile.read()
    published = HALF * (network.weights + memory_model.autoencoder_weights(architecture.vae))
    setting = Setting(
        resolution=spec.resolution,
        lora_rank=training.lora.rank,
        micro_batch=min(training.micro_batch, share),
        gradient_checkpointing=spec.assets.gradient_checkpointing,
        weight_bytes=WEIGHT_BYTES[spec.assets.dtype],
        quantize=spec.assets.quantize,
        images=images,
        trained_steps=spec.nfe_theta or 1,
        kept_images=share if training.keep_graphs and method.keeps_graphs else 0,
        score_ahead=training.score_ahead,
        rewards=sum(_reward_bytes(reward, spec.assets.rewards_dtype) for reward in spec.rewards),
        reward_activations=(
            sum(TOWERS.get(reward, 0.0) for reward in spec.rewards)
            if method.needs_reward_gradients
            else None
        ),
        retained=method.retains_reward_graphs,
        decoded=decoded_together(spec.resolution),
        # What is downloaded besides the network and the autoencoder, in 16 bits.
        text_encoders=max(0.0, known[model.resource].gigabytes * GB - published),
    )
    return TrainingMemory(architecture, model, setting, share)
