"""Estimates of what the jobs of a scale take: device time and disk space.

The time of a job is its network evaluations x the FLOPs of one, divided by an assumed rate of the
device, on a GPU plus the seconds of decoding and scoring its images, and corrected by the times in
the scale's journals and evaluation logs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tafs.assets import lockfile
from tafs.data import prompts
from tafs.experiment import needs, run_inputs
from tafs.experiment.schema import Scale
from tafs.experiment.specs import BEST, EvalSpec, RunSpec
from tafs.methods import GroupRelative, registry
from tafs.models import architectures, catalog
from tafs.orchestration.graph import Graph, Job
from tafs.runtime import journal, receipts, run_dir

# Sustained FLOP/s where nothing is measured, not counting blocks that are computed again. On an
# H100, the shares of its peak that sampling and update of TAFS-GRPO's iterations of FLUX.1-dev
# reach with compiled blocks, with these and without gradient checkpointing, and eagerly, as in
# evaluations (results/reference/gpu/); other models are assumed to reach the same. On one core,
# with networks of the embedded models' size.
PEAK = 989e12
COMPILED, COMPILED_UNCHECKED, EAGER = 0.47, 0.56, 0.35
CPU_RATE = 45e9
# Seconds on an H100 of decoding a pixel (512 px in bfloat16 as in training, compiled and not, and
# 1024 px in float32 as in evaluations) and of scoring an image by PickScore and CLIP
# (results/reference/gpu/). Other metrics are not measured and not counted.
DECODED_COMPILED, DECODED_EAGER, DECODED = 0.0101 / 512**2, 0.0211 / 512**2, 0.147 / 1024**2
SCORED, SCORED_TF32 = 0.0134, 0.0053
# Seconds on an H100 of the gradients of PickScore and CLIP with respect to an image's latents, in
# float32 and not compiled, per pixel: 0.147 s at 512 px in micro-batches of 6, 0.166 of 3 and 0.138
# of 12 (the rows "direction" of results/reference/gpu/h100-sweep.jsonl). Most is the decoder's.
GRADIENT = 0.147 / 512**2
# The methods that take these gradients at each of their steps, and the forward equivalents of a
# step; others take them once per image.
STEPWISE_GRADIENTS = {"reward_instruct": 1 + 3}
START_UP = {"cuda": 120.0, "cpu": 8.0}  # s for a job to import libraries and load models
PNG_RATIO = 0.5  # size of a PNG file relative to the image's pixels
STATE_COPIES = 2 * 4  # generations of the resume state x (adapter, average, AdamW's two moments)
FLOAT_BYTES = 4
TEST_PROMPTS = 2048  # assumed of a set that is not downloaded yet; as many as Pick-a-Pic has
MODELLED = ("train", "evaluate", "trajectory_rewards")
BASIS = {"trajectory_rewards": "evaluate"}  # stage -> the stage whose measurements correct it
HOUR, GB = 3600.0, 1e9


@dataclass(frozen=True)
class DeviceJob:
    """A job that takes device time."""

    stage: str
    run: str
    variant: str
    backbone: str
    devices: int
    flops: float | None  # of the whole job; None: not modelled
    scoring: float = 0.0  # s of a measured device that decoding and scoring take
    left: float = 1.0  # share that is not done yet

    @property
    def name(self) -> str:
        return f"{self.stage} {self.run}"


@dataclass(frozen=True)
class Disk:
    """Bytes of a run's large files."""

    adapters: int  # the last one and the snapshots
    samples: int
    state: int  # while it trains
    images: int  # until the server has scored them

    @property
    def kept(self) -> int:
        return self.adapters + self.samples


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a device.

    Args:
        training, judging: in trainings and in other jobs.
        measured: of the device on which decoding and scoring were measured; None: this one's.
    """

    training: float
    judging: float
    measured: Rates | None = None

    def of(self, stage: str) -> float:
        return self.training if stage == "train" else self.judging

    def seconds(self, stage: str, flops: float, scoring: float) -> float:
        """Seconds of FLOPs, and of what takes `scoring` seconds on the measured device."""
        slower = (self.measured or self).of(stage) / self.of(stage)
        return flops / self.of(stage) + slower * scoring


def assumed_rates(scale: Scale, runs: Iterable[RunSpec]) -> Rates:
    """The rates of a scale's devices; only trainings compile the network's blocks.

    That of trainings is the one with gradient checkpointing if one of the runs uses it.
    """
    if scale.device != "cuda":
        return Rates(CPU_RATE, CPU_RATE)
    recomputed = any(spec.trained and spec.assets.gradient_checkpointing for spec in runs)
    compiled = COMPILED if recomputed else COMPILED_UNCHECKED
    return Rates(PEAK * (compiled if scale.compile else EAGER), PEAK * EAGER)


def training_flops(spec: RunSpec, forward: float) -> float:
    """FLOPs of one training iteration on all devices; `forward`: of one network evaluation."""
    if spec.training is None:
        return 0.0
    images = spec.training.prompts_per_iteration * spec.training.group_size
    return float(images * spec.forward_equivalents * forward)


def evaluation_flops(evaluation: EvalSpec, prompt_count: int, forward: float) -> float:
    """FLOPs of generating an evaluation's images, without decoding and rewards."""
    calls = sum(setting.nfe * setting.images_per_prompt for setting in evaluation.settings)
    total = calls * prompt_count
    if len(evaluation.samplers) > 1:  # the choice of the sampler
        chosen = sum(setting.nfe for setting in evaluation.settings if setting.sampler == BEST)
        total += chosen * len(evaluation.samplers) * evaluation.validation_prompts
    return float(total * forward)


class Workload:
    """The jobs of a graph that take device time, and the disk space of its runs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.runs, self.evaluations = graph.runs, graph.evaluations

    @cache  # noqa: B019 - one object per plan
    def architecture(self, name: str) -> architectures.Architecture | None:
        """The architecture of a model; None if it is not known."""
        model = catalog.read()[name]
        if model.pipeline not in {*architectures.SIZES, *architectures.COMPARED}:
            return None
        if model.assets != "hub":
            return architectures.of_folder(self.graph.source.pipeline_folder(model), model)
        return architectures.published(model, self.graph.source.settings.length(model))

    @cache  # noqa: B019 - one object per plan
    def network(self, name: str, resolution: int) -> architectures.Size | None:
        """The size of a network that can be trained; None if its architecture is not known."""
        model, architecture = catalog.read()[name], self.architecture(name)
        if architecture is None or model.pipeline not in architectures.SIZES:
            return None
        rank = self.graph.scale.lora.rank
        return architectures.size(architecture, model, model.resolution or resolution, rank)

    @cache  # noqa: B019 - one object per plan
    def forward(self, name: str, resolution: int) -> float | None:
        """FLOPs of one network evaluation of one image; None if they are not known."""
        model, architecture = catalog.read()[name], self.architecture(name)
        if architecture is None:
            return None
        rank = self.graph.scale.lora.rank if model.trainable else None
        return architectures.forward(architecture, model, model.resolution or resolution, rank)

    @cache  # noqa: B019 - one object per plan
    def prompt_counts(self, prompt_set: str, per_tag: int | None) -> tuple[int, int]:
        """(number of prompts that runs are evaluated on, number of those whose images are kept)."""
        try:
            known = self.graph.source.prompts(prompt_set, "test")
        except ValueError:  # not downloaded yet
            return min(TEST_PROMPTS, per_tag or TEST_PROMPTS), run_dir.SAMPLES_PER_TAG
        chosen = [known[i] for i in prompts.first_of_each(known, per_tag)]
        return len(chosen), len(prompts.first_of_each(chosen, run_dir.SAMPLES_PER_TAG))

    def jobs(self, every: Iterable[Job], pending: Iterable[Job]) -> list[DeviceJob]:
        """The device jobs among `every` job; those in `pending` are not done yet."""
        to_run = set(pending)
        stages = (*MODELLED, "score_served")
        return [self._job(job, job in to_run) for job in every if job.rule in stages]

    def _job(self, job: Job, to_run: bool) -> DeviceJob:
        spec, training = self.runs[job.target], job.rule == "train"
        done = self._trained_share(spec) if to_run and training else 0.0
        return DeviceJob(
            stage=job.rule,
            run=spec.name,
            variant=spec.variant,
            backbone=spec.backbone,
            devices=self.graph.scale.processes_of(job.rule),
            flops=self.flops(job.rule, spec),
            scoring=self.scoring(job.rule, spec),
            left=1 - done if to_run else 0.0,
        )

    def flops(self, stage: str, spec: RunSpec) -> float | None:
        """FLOPs of all of a stage of a run; None: not modelled."""
        evaluation = self.evaluations[spec.name]
        resolution = spec.resolution if stage == "train" else evaluation.resolution
        forward = self.forward(spec.backbone, resolution)
        if forward is None or stage == "score_served":
            return None
        if stage == "train":
            return spec.iterations * training_flops(spec, forward)
        if stage == "evaluate":
            count, _ = self.prompt_counts(spec.prompts, evaluation.prompts_per_tag)
            return evaluation_flops(evaluation, count, forward)
        trajectories = evaluation.trajectories
        return float(trajectories.nfe * trajectories.prompts * forward)

    def scoring(self, stage: str, spec: RunSpec) -> float:
        """Seconds of one H100 that decoding and scoring the images of a stage of a run take."""
        scale, evaluation = self.graph.scale, self.evaluations[spec.name]
        if scale.device != "cuda":
            return 0.0
        if stage == "train" and spec.training is not None:
            method = registry.create(spec.method, spec.hyperparameters)
            training = spec.training
            images = training.iterations * training.prompts_per_iteration * training.group_size
            pixels = spec.resolution**2
            decoded = DECODED_COMPILED if scale.compile else DECODED_EAGER
            each = decoded * pixels + (SCORED_TF32 if scale.tf32 else SCORED)
            steps = len(method.scored_steps()) if isinstance(method, GroupRelative) else 1
            seconds = steps * each
            if method.needs_reward_gradients:
                step = STEPWISE_GRADIENTS.get(spec.method)
                seconds += (method.forward_equivalents / step if step else 1) * GRADIENT * pixels
            return images * seconds
        each = DECODED * evaluation.resolution**2 + SCORED
        if stage == "trajectory_rewards":
            return evaluation.trajectories.nfe * evaluation.trajectories.prompts * each
        if stage != "evaluate":
            return 0.0
        count, _ = self.prompt_counts(spec.prompts, evaluation.prompts_per_tag)
        images = sum(setting.images_per_prompt for setting in evaluation.settings) * count
        if len(evaluation.samplers) > 1:
            chosen = sum(setting.sampler == BEST for setting in evaluation.settings)
            images += chosen * len(evaluation.samplers) * evaluation.validation_prompts
        return images * each

    def modelled(self, stage: str, spec: RunSpec, rates: Rates) -> float | None:
        """Seconds of one device that a stage of a run takes; None: not modelled."""
        flops = self.flops(stage, spec)
        return None if flops is None else rates.seconds(stage, flops, self.scoring(stage, spec))

    def _trained_share(self, spec: RunSpec) -> float:
        """The share of a training that its resume state has done."""
        folder = run_dir.RunDir(Path(self.graph.folder(spec.name)))
        file = folder.state / "journal.jsonl"
        if not file.is_file():
            return 0.0
        started = [record for record in journal.read(file) if record["kind"] == "start"]
        current = receipts.fingerprint(needs.training(spec))
        if not started or started[-1]["fingerprint"] != current:
            return 0.0  # the state of other settings, which is not continued
        done = journal.iterations(file)
        return (done[-1]["iteration"] + 1) / spec.iterations if done else 0.0

    def disk(self, spec: RunSpec) -> Disk:
        """Bytes of a run's large files."""
        evaluation = self.evaluations[spec.name]
        count, shown = self.prompt_counts(spec.prompts, evaluation.prompts_per_tag)
        pixels = 3 * evaluation.resolution**2
        images = sum(setting.images_per_prompt for setting in evaluation.settings) * count
        network = self.network(spec.backbone, spec.resolution) if spec.trained else None
        adapter = FLOAT_BYTES * network.adapter if network else 0
        return Disk(
            adapters=adapter * (1 + len(spec.snapshots)),
            samples=shown * len(evaluation.settings) * pixels,
            state=STATE_COPIES * adapter,
            images=int(PNG_RATIO * images * pixels) if evaluation.served else 0,
        )


Key = tuple[str, str, str]  # stage, variant, backbone


@dataclass(frozen=True)
class Speed:
    """The time that jobs take.

    Args:
        rates: of a device.
        start_up: s before a job begins to compute.
        ratios: measured time divided by modelled time.
    """

    rates: Rates
    start_up: float
    ratios: Mapping[Key, float]

    def ratio(self, job: DeviceJob) -> tuple[float, str]:
        """(the factor on the modelled time, "measured" | "scaled" | "modelled").

        "scaled": the median factor of other methods in the same stage on the same backbone.
        """
        stage = BASIS.get(job.stage, job.stage)
        own = self.ratios.get((stage, job.variant, job.backbone))
        if own is not None and stage == job.stage:
            return own, "measured"
        others = [r for (s, _, b), r in self.ratios.items() if (s, b) == (stage, job.backbone)]
        return (statistics.median(others), "scaled") if others else (1.0, "modelled")

    def computing(self, job: DeviceJob) -> float:
        """Seconds that the whole job computes; 0 if it is not modelled."""
        if job.flops is None:
            return 0.0
        seconds = self.rates.seconds(job.stage, job.flops, job.scoring)
        return seconds / job.devices * self.ratio(job)[0]

    def left(self, job: DeviceJob) -> float:
        """Seconds that the rest of a job takes, with its start-up."""
        return self.start_up + job.left * self.computing(job) if job.left else 0.0

    def whole(self, job: DeviceJob) -> float:
        """Seconds that the whole job takes, with its start-up."""
        return self.start_up + self.computing(job)


def measured(work: Workload, rates: Rates) -> dict[Key, float]:
    """The ratios of measured to modelled time, from the files of the scale's runs.

    For training, the median over all iterations of all seeds; for evaluation, over runs.

    Raises:
        ValueError: a journal or run.json is damaged; names it.
    """
    found: dict[Key, list[float]] = {}
    processes = work.graph.scale.processes
    for name, planned in work.runs.items():
        run = run_dir.RunDir(Path(work.graph.folder(name)))
        if not (run.folder / "run.json").is_file():
            continue
        spec = run_inputs.run_spec(run)  # what was run; config.yaml may have changed since
        key = (spec.variant, spec.backbone)
        whole = work.modelled("train", spec, rates) if spec.trained else None
        file = next((f for f in (run.state / "journal.jsonl", run.journal) if f.is_file()), None)
        if file is not None and whole:
            modelled = whole / (processes * spec.iterations)
            seconds = [record["seconds"]["total"] for record in journal.iterations(file)]
            found.setdefault(("train", *key), []).extend(s / modelled for s in seconds)
        spent = _evaluation_seconds(Path(work.graph.root) / "logs" / "evaluate" / f"{name}.log")
        whole = work.modelled("evaluate", planned, rates) if spent is not None else None
        if spent is not None and whole:
            found.setdefault(("evaluate", *key), []).append(spent / whole)
    return {key: statistics.median(ratios) for key, ratios in found.items() if ratios}


def _evaluation_seconds(log: Path) -> float | None:
    """The time in the last line of a finished evaluation's log; None if there is none."""
    try:
        last = log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
        return float(sum(json.loads(last)["seconds"].values()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def downloads(lock: Path, names: Sequence[str]) -> tuple[float, str]:
    """(bytes of the resources, the file that holds their sizes)."""
    if lock.is_file():
        locked = lockfile.read_lock(lock)
        return float(sum(locked[name].size for name in names if name in locked)), str(lock)
    known = lockfile.read()
    return sum(known[name].gigabytes * GB for name in names), str(lockfile.RESOURCES)
