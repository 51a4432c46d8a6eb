"""The memory that evaluations take on a GPU, and the batches that fit."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tafs.experiment import gpu_memory
from tafs.experiment.gpu_memory import LOADED, WAITING, WEIGHT_BYTES
from tafs.experiment.specs import RunSpec
from tafs.models import architectures, catalog, memory_model
from tafs.models.architectures import Architecture
from tafs.models.base import decoded_together
from tafs.models.catalog import Model
from tafs.models.memory_model import FLOAT, GB, HALF, RESERVED, Parts, Setting
from tafs.orchestration.plan.estimate import Workload
from tafs.orchestration.plan.texts import amount, table
from tafs.rewards import metrics

WEIGHTS = "weights alone"  # the phase of a network whose activations are not modelled


@dataclass(frozen=True)
class EvaluationMemory:
    """An evaluation in a process with one GPU.

    Args:
        phases: images per batch -> the parts of the memory in each phase, in bytes; WEIGHTS is the
            only phase where activations are not modelled.
        batch: images per batch.
        most: images of the evaluation's largest setting.
    """

    phases: Callable[[int], Mapping[str, Parts]]
    batch: int
    most: int

    def largest(
        self, available: float | None = None, batch: int | None = None
    ) -> tuple[str, float]:
        """(the phase that takes most, its bytes); see `gpu_memory.TrainingMemory.largest`."""
        found = self.phases(batch or self.batch)
        totals = {phase: sum(parts.values()) for phase, parts in found.items()}
        if available is not None and totals.get("encoding", 0) > available:
            totals["encoding"] -= sum(found["encoding"][part] for part in WAITING)
        phase = max(totals, key=totals.__getitem__)
        return phase, totals[phase]

    def fitting(self, available: float) -> int | None:
        """The most images per batch that take at most `available` bytes; 0 if not even one does.

        None: the weights fit, and activations are not modelled.
        """
        phase, least = self.largest(available, 1)
        if phase == WEIGHTS:
            return None if least <= available else 0
        batches = range(1, self.most + 1)
        return bisect.bisect_right(
            batches, available, key=lambda batch: self.largest(available, batch)[1]
        )


def of_run(work: Workload, spec: RunSpec) -> EvaluationMemory | None:
    """The memory of a run's evaluation on the hub's models; None if it is not modelled.

    A model of unknown architecture that is only compared is known by its weights.
    """
    evaluation, model = work.evaluations[spec.name], catalog.read()[spec.backbone]
    architecture = work.architecture(spec.backbone)
    modelled = architecture is not None and model.pipeline in memory_model.BLOCKS
    if model.assets != "hub" or not evaluation.settings or (model.trainable and not modelled):
        return None
    count, _ = work.prompt_counts(spec.prompts, evaluation.prompts_per_tag)
    most = count * max(setting.images_per_prompt for setting in evaluation.settings)
    size, bytes_ = work.graph.sizes.of, WEIGHT_BYTES[spec.assets.dtype]
    # Each metric has models of its own, GenEval a CLIP too.
    judged = work.graph.source.metrics(spec.prompts, evaluation.optional_metrics)
    used = [name for metric in judged for name in metrics.plugin(metric).metric.resources]
    rewards = sum(LOADED.get(name) or size([name]) for name in used)
    # Of the pipeline, in 16 bits; a merged adapter takes no memory of its own.
    files = size(name for name in (model.resource, model.text_encoder) if name)
    if architecture is None or not modelled:
        weights = {WEIGHTS: {"pipeline": files * bytes_ / HALF, "rewards": rewards}}
        return EvaluationMemory(lambda batch: weights, evaluation.batch, most)
    rank = spec.training.lora.rank if spec.training else 0
    resolution = model.resolution or evaluation.resolution
    network = architectures.size(architecture, model, resolution, rank)
    known = network.weights + memory_model.autoencoder_weights(architecture.vae)

    def phases(batch: int) -> dict[str, Parts]:
        setting = Setting(
            resolution=resolution,
            lora_rank=rank,
            micro_batch=batch,
            gradient_checkpointing=False,
            weight_bytes=bytes_,
            quantize=spec.assets.quantize if model.trainable else "none",
            images=batch,
            rewards=rewards,
            text_encoders=max(0.0, files - HALF * known) * bytes_ / HALF,
            # Pipelines of compared models slice their batches.
            decoded=decoded_together(resolution) if model.trainable else 1,
        )
        return _phases(architecture, model, setting)

    return EvaluationMemory(phases, evaluation.batch, most)


def _phases(architecture: Architecture, model: Model, setting: Setting) -> dict[str, Parts]:
    """The parts of the memory in each phase of an evaluation, in bytes."""
    training = memory_model.phases(architecture, model, setting)
    found = {
        name: {k: v for k, v in training[former].items() if k != "average and AdamW's moments"}
        for name, former in (
            ("encoding", "encoding"),
            ("sampling", "sampling"),
            ("decoding", "scoring"),
        )
    }
    found["decoding"]["images"] = setting.micro_batch * 3 * setting.resolution**2 * FLOAT
    if model.trainable:  # text encoders are on the GPU while they encode, the decoder is float32
        return dict(found)
    encoders = found.pop("encoding")["text encoders"]
    for parts in found.values():
        parts["text encoders"] = encoders
        parts["autoencoder"] *= setting.weight_bytes / FLOAT
    return dict(found)


@dataclass(frozen=True)
class EvaluationNeed:
    """The memory of a GPU that the evaluations of a model take at most."""

    model: str
    prompts: str  # the prompt set, which decides the metrics
    batch: int  # in images
    bytes: int
    when: str  # the phase that takes most, or WEIGHTS
    # The largest batch in the scale's `gpu_memory`, 0: nothing fits. None: it names none, or
    # activations are not modelled.
    fitting: int | None


def needs(work: Workload) -> list[EvaluationNeed]:
    """What evaluations take, and what fits: of each model the one that takes most."""
    given = work.graph.scale.gpu_memory
    available = None if given is None else gpu_memory.usable(given)
    found: dict[str, EvaluationNeed] = {}
    for spec in work.graph.plan.runs.values() if work.graph.device == "cuda" else ():
        one = of_run(work, spec)
        if one is None:
            continue
        when, most = one.largest(available)
        if spec.backbone in found and found[spec.backbone].bytes >= round(most):
            continue
        fitting = None if available is None else one.fitting(available)
        need = EvaluationNeed(spec.backbone, spec.prompts, one.batch, round(most), when, fitting)
        found[spec.backbone] = need
    return [found[name] for name in sorted(found)]


def lines(work: Workload) -> list[str]:
    """The table of `needs`; no lines where nothing is modelled."""
    found, given = needs(work), work.graph.scale.gpu_memory
    if not found:
        return []
    rows = [["memory of evaluations", "prompts", "batch", "GB", "when", "fits"]]
    for need in found:
        unknown = need.when == WEIGHTS and need.fitting is None
        fits = "unknown" if unknown else str(need.fitting or "none")
        cells = [need.model, need.prompts, str(need.batch), amount(need.bytes / GB), need.when]
        rows.append([*cells, fits])
    if given is None:
        return ["", *table([row[:-1] for row in rows], left=(0, 1, 4))]
    free = f"{100 * RESERVED:.0f} % of which stay free"
    note = f"  fits: the largest batch in {given:g} GB, {free}."
    return ["", *table(rows, left=(0, 1, 4)), note]
