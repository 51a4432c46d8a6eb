"""The memory that trainings take on a GPU, and the micro-batches that fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tafs.assets import lockfile
from tafs.experiment.specs import RunSpec
from tafs.methods import registry
from tafs.models import architectures, catalog, memory
from tafs.models.memory import Setting
from tafs.orchestration.plan.estimate import GB, Workload
from tafs.rewards import metrics

WEIGHT_BYTES = {"float32": memory.FLOAT, "bfloat16": memory.HALF}
# The rewards whose gradients are modelled: ViT-H/14 or ViT-L/14 at 224 pixels.
# Those of other rewards count as nothing.
TOWERS: Mapping[str, float] = {
    "pickscore": memory.tower(1280, 32, 257),
    "hpsv2": memory.tower(1280, 32, 257),
    "clip": memory.tower(1024, 24, 257, quick_gelu=True),
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
        found = memory.phases(self.architecture, self.model, self.setting)
        totals = {phase: sum(parts.values()) for phase, parts in found.items()}
        phase = max(totals, key=totals.__getitem__)
        return phase, totals[phase]

    def fitting(self, available: float, *, checkpointing: bool) -> int:
        """The largest micro-batch that takes at most `available` bytes; 0 if none does."""
        fits = 0
        for batch in range(1, self.most + 1):
            changed = replace(self.setting, micro_batch=batch, gradient_checkpointing=checkpointing)
            found = memory.phases(self.architecture, self.model, changed)
            # Where text encoders do not fit beside them, these wait in host memory.
            waiting = ("network", "autoencoder")
            found["encoding"] = {k: v for k, v in found["encoding"].items() if k not in waiting}
            if max(sum(parts.values()) for parts in found.values()) > available:
                break
            fits = batch
        return fits


def of_run(work: Workload, spec: RunSpec) -> TrainingMemory | None:
    """The memory of a run's training on the hub's models; None if it is not modelled."""
    training, architecture = spec.training, work.architecture(spec.backbone)
    model = catalog.read()[spec.backbone]
    network = work.network(spec.backbone, spec.resolution)
    known_model = model.assets == "hub" and model.pipeline in memory.BLOCKS
    if training is None or architecture is None or network is None or not known_model:
        return None
    method = registry.create(spec.method, spec.hyperparameters)
    images = training.prompts_per_iteration * training.group_size // work.graph.scale.processes
    share = images // method.updates
    known = lockfile.read()
    used = [name for reward in spec.rewards for name in metrics.plugin(reward).metric.resources]
    published = memory.HALF * (network.weights + memory.autoencoder_weights(architecture.vae))
    setting = Setting(
        resolution=spec.resolution,
        lora_rank=training.lora.rank,
        micro_batch=min(training.micro_batch, share),
        gradient_checkpointing=spec.assets.gradient_checkpointing,
        weight_bytes=WEIGHT_BYTES[spec.assets.dtype],
        images=images,
        trained_steps=spec.nfe_theta or 1,
        kept_images=share if training.keep_graphs and method.keeps_graphs else 0,
        rewards=sum(known[name].gigabytes for name in used) * GB,
        reward_activations=(
            sum(TOWERS.get(reward, 0.0) for reward in spec.rewards)
            if method.needs_reward_gradients
            else None
        ),
        retained=method.retains_reward_graphs,
        # What is downloaded besides the network and the autoencoder, in 16 bits.
        text_encoders=max(0.0, known[model.resource].gigabytes * GB - published),
    )
    return TrainingMemory(architecture, model, setting, share)
