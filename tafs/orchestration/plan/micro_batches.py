"""The memory that trainings take on a GPU, and the micro-batches that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from tafs.assets import lockfile
from tafs.experiment.specs import RunSpec
from tafs.methods import registry
from tafs.models import architectures, catalog, memory_model
from tafs.models.base import decoded_together
from tafs.models.memory_model import Setting
from tafs.models.quantization import Quantization
from tafs.orchestration.plan.estimate import GB, Workload
from tafs.rewards import metrics

# With so many images, an update without gradient checkpointing is faster than one of any number
# with it: by a quarter for FLUX.1-dev on an H100, compiled or not (results/reference/gpu/).
UNCHECKED = 4
# Bytes of reward models that are in half precision in their file and in float32 in memory.
LOADED = {"hpsv2": memory_model.FLOAT * 986_109_441}
WEIGHT_BYTES = {"float32": memory_model.FLOAT, "bfloat16": memory_model.HALF}
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

    def largest(self) -> tuple[str, float]:
        """(the phase that takes most, its bytes)."""
        found = memory_model.phases(self.architecture, self.model, self.setting)
        totals = {phase: sum(parts.values()) for phase, parts in found.items()}
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
        largest = 0
        for batch in range(1, self.most + 1):
            changed = replace(setting, micro_batch=batch)
            found = memory_model.phases(self.architecture, self.model, changed)
            # Where text encoders do not fit beside them, these wait in host memory.
            waiting = ("network", "autoencoder")
            found["encoding"] = {k: v for k, v in found["encoding"].items() if k not in waiting}
            if max(sum(parts.values()) for parts in found.values()) > available:
                break
            largest = batch
        return largest


@dataclass(frozen=True)
class Keys:
    """What a scale may set so that its trainings fit on a GPU."""

    quantize: Quantization
    gradient_checkpointing: bool
    micro_batch: int

    def __str__(self) -> str:
        checkpointing = str(self.gradient_checkpointing).lower()
        return (
            f"quantize: {self.quantize}, gradient_checkpointing: {checkpointing}, "
            f"micro_batch: {self.micro_batch}"
        )


def fits(training: TrainingMemory, available: float) -> bool:
    """Whether a training takes at most `available` bytes with any keys."""
    formats = get_args(Quantization)
    return any(training.fitting(available, checkpointing=True, quantize=q) for q in formats)


def choose(trainings: Sequence[TrainingMemory], available: float) -> Keys | None:
    """The keys with which all trainings take at most `available` bytes; None: no such keys.

    Weights are quantised, which changes results, only where not even one image fits otherwise, and
    then as little as possible. Without gradient checkpointing where at least UNCHECKED images fit.
    """
    if not trainings:
        return None
    for quantize in get_args(Quantization):
        for checkpointing in (False, True):
            batch = min(
                one.fitting(available, checkpointing=checkpointing, quantize=quantize)
                for one in trainings
            )
            if batch >= (1 if checkpointing else UNCHECKED):
                return Keys(quantize, checkpointing, batch)
    return None


def of_run(work: Workload, spec: RunSpec) -> TrainingMemory | None:
    """The memory of a run's training on the hub's models; None if it is not modelled."""
    training, architecture = spec.training, work.architecture(spec.backbone)
    model = catalog.read()[spec.backbone]
    network = work.network(spec.backbone, spec.resolution)
    known_model = model.assets == "hub" and model.pipeline in memory_model.BLOCKS
    if training is None or architecture is None or network is None or not known_model:
        return None
    method = registry.create(spec.method, spec.hyperparameters)
    images = training.prompts_per_iteration * training.group_size // work.graph.scale.processes
    share = images // method.updates
    known = lockfile.read()
    used = [name for reward in spec.rewards for name in metrics.plugin(reward).metric.resources]
    published = memory_model.HALF * (
        network.weights + memory_model.autoencoder_weights(architecture.vae)
    )
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
        rewards=sum(LOADED.get(name, known[name].gigabytes * GB) for name in used),
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


@dataclass(frozen=True)
class MemoryNeed:
    """The memory of a GPU that the trainings of a method take; micro-batches are in images."""

    method: str
    task: str
    model: str
    micro_batch: int
    bytes: int
    when: str  # the phase that takes most
    # What fits in the memory that the user named; None: the user named none, 0: nothing fits.
    fitting_with_checkpointing: int | None
    fitting_without_checkpointing: int | None


def needs(
    found: Mapping[tuple[str, str, str], TrainingMemory], available: float | None
) -> list[MemoryNeed]:
    """What trainings take, by (method, task, model), and what fits in the available bytes."""
    records = []
    for key, one in found.items():
        phase, most = one.largest()
        fits: list[int | None] = [None, None]
        if available is not None:
            fits = [one.fitting(available, checkpointing=on) for on in (True, False)]
        records.append(MemoryNeed(*key, one.setting.micro_batch, round(most), phase, *fits))
    return records
