"""What the jobs of a scale take: seconds of its devices, and disk.

Times are counts of network evaluations by the FLOPs of one (tafs/models/flops.py) over an assumed rate of
the device, corrected by what the scale's journals and evaluation logs have measured. What is to be
done is Snakemake's own account (tafs/orchestration/plan/dry_run.py).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tafs.assets import lockfile, sources
from tafs.data import prompts
from tafs.experiment import evaluations, runs, schema
from tafs.experiment.runs import Run
from tafs.models import catalog
from tafs.orchestration import graph as workflow
from tafs.orchestration.plan.dry_run import Pending
from tafs.runtime import journal, run_dir

if TYPE_CHECKING:
    from tafs.models.flops import Textless

# Sustained FLOP/s where nothing is measured: 40 % of an H100's 989e12 dense bfloat16 products; one
# core with networks of the embedded world's size.
ASSUMED = {"cuda": 0.4 * 989e12, "cpu": 45e9}
SAID = {"cuda": "40 % of an H100's 989 dense bfloat16", "cpu": "one core, small networks"}
START_UP = {"cuda": 120.0, "cpu": 8.0}  # s; a job imports, and loads its models
PNG = 0.5  # of an image's bytes that its PNG file takes
STATES = 2 * 4  # generations of the resume state x adapter, average and AdamW's two moments
FLOAT = 4  # bytes
TEST_PROMPTS = {"pickapic": 2048}  # of sets that have to be fetched before they can be counted
MODELLED = ("train", "evaluate", "trajectory_rewards")
SOURCES = {"trajectory_rewards": "evaluate"}  # whose measurements stand for a stage's
HOUR, GB = 3600.0, 1e9


@dataclass(frozen=True)
class Job:
    """One job of the graph that takes time on a device."""

    stage: str
    run: str
    variant: str
    backbone: str
    devices: int
    flops: float | None  # of all of it; None: not modelled
    left: float = 1.0  # the share of it that is to be done

    @property
    def name(self) -> str:
        return f"{self.stage} {self.run}"


# -- what is computed ------------------------------------------------------------------------------


class Networks:
    """The FLOPs of the scale's models, each built once and without weights."""

    def __init__(self, scale: schema.Scale) -> None:
        self.scale = scale

    @cache  # noqa: B019 - one object a plan
    def _built(self, name: str) -> Textless | None:
        import torch

        from tafs.models import flops

        model = catalog.read()[name]
        if model.pipeline not in flops.CLASSES:
            return None
        if model.assets == "shapes":
            from tafs.shapes import weights

            architecture = flops.of_folder(weights.verify(model.resource), model)
        elif model.resource in flops.PUBLISHED:
            architecture = flops.PUBLISHED[model.resource]
        else:
            return None
        return flops.build(
            flops.CLASSES[model.pipeline],
            architecture,
            model,
            resolution=model.resolution or self.scale.resolution,
            dtype=getattr(torch, self.scale.dtype),
            device=flops.META,
            lora_rank=self.scale.lora.rank if model.trainable else None,
        )

    def forward(self, name: str, resolution: int) -> float | None:
        """FLOPs of one evaluation of one image; None: the architecture is not known here."""
        return self._forward(self._twin(name), catalog.read()[name].resolution or resolution)

    @cache  # noqa: B019
    def _forward(self, name: str, resolution: int) -> float | None:
        from tafs.models import flops

        backbone = self._built(name)
        if backbone is None:
            return None
        backbone.resolution = resolution
        return flops.forward(backbone)

    @staticmethod
    def _twin(name: str) -> str:
        """The first model that computes the same: adapters that are merged leave no trace."""
        known = catalog.read()
        own = known[name]
        same = ("resource", "trainable", "guidance", "max_sequence_length", "resolution")
        return next(
            other
            for other, model in known.items()
            if all(getattr(model, key) == getattr(own, key) for key in same)
        )

    @cache  # noqa: B019
    def adapter(self, name: str) -> int:
        """Parameters of a trained model's adapter."""
        backbone = self._built(name)
        return sum(p.numel() for p in backbone.lora_parameters().values()) if backbone else 0


def training_flops(description: Mapping[str, Any], forward: float) -> float:
    """Of one iteration, on all devices: images x `Method.forward_equivalents` x a forward pass."""
    settings = description["settings"]
    images = settings["prompts_per_iteration"] * settings["group_size"]
    return float(images * description["forward_equivalents"] * forward)


def evaluation_flops(evaluation: Mapping[str, Any], prompts: int, forward: float) -> float:
    """Of an evaluation's images; their rewards and decoding are not counted."""
    calls = sum(s["nfe"] * s["images_per_prompt"] for s in evaluation["settings"])
    return float(calls * prompts * forward)


class Work:
    """The jobs of a graph, and how much of them is left."""

    def __init__(self, graph: workflow.Plan) -> None:
        self.graph = graph
        self.networks = Networks(graph.settings.active)
        self.evaluations = evaluations.evaluations(graph.settings)

    @cache  # noqa: B019
    def prompts(self, prompt_set: str, first: int | None) -> tuple[int, int]:
        """(prompts that runs are judged on, those whose images are kept); see `TEST_PROMPTS`."""
        world = sources.of(self.graph.settings.active.model_dump(mode="json"))
        try:
            known = world.prompts(prompt_set, "test")
        except ValueError:  # not fetched yet
            count = TEST_PROMPTS[prompt_set]
            return min(count, first or count), run_dir.SAMPLES_PER_TAG
        chosen = [known[i] for i in prompts.first_of_each(known, first)]
        return len(chosen), len(prompts.first_of_each(chosen, run_dir.SAMPLES_PER_TAG))

    def judged(self, run: Run) -> tuple[dict[str, Any], int, int]:
        """(evaluation.json, its prompts, those whose images are kept)."""
        evaluation = self.evaluations[run.name]
        return evaluation, *self.prompts(run.prompts, evaluation["prompts"])

    def jobs(self, every: Iterable[Pending], pending: Iterable[Pending]) -> list[Job]:
        """Those of `every` job that take time on a device; `pending` are to be done."""
        to_run = {(job.rule, job.about) for job in pending}
        found = []
        for stage, name in ((job.rule, job.about) for job in every):
            if stage in (*MODELLED, "score_served"):
                found.append(self._job(stage, self.graph.runs[name], (stage, name) in to_run))
        return found

    def _job(self, stage: str, run: Run, to_run: bool) -> Job:
        done = self._trained(run) if to_run and stage == "train" else 0.0
        return Job(
            *(stage, run.name, run.variant, run.backbone),
            devices=self.graph.settings.active.processes if stage == "train" else 1,
            flops=self._flops(stage, run),
            left=1 - done if to_run else 0.0,
        )

    def _flops(self, stage: str, run: Run) -> float | None:
        if stage == "score_served":
            return None
        if stage == "train":
            forward = self.networks.forward(run.backbone, run.settings["resolution"])
            description = run.describe()
            count = description["iterations"]
            return None if forward is None else count * training_flops(description, forward)
        evaluation, count, _ = self.judged(run)
        forward = self.networks.forward(run.backbone, evaluation["resolution"])
        if forward is None:
            return None
        if stage == "evaluate":
            return evaluation_flops(evaluation, count, forward)
        correlation = evaluation["correlation"]
        return float(correlation["nfe"] * correlation["prompts"] * forward)

    def _trained(self, run: Run) -> float:
        """The share of a training that its resume state has done."""
        file = Path(self.graph.root) / "runs" / run.name / ".state" / "journal.jsonl"
        if not file.is_file():
            return 0.0
        started = [r for r in journal.read(file) if r["kind"] == "start"]
        source = Path(self.graph.method_source(run.name))
        description = json.loads(self.graph.description(run.name))
        if not started or started[-1]["fingerprint"] != runs.fingerprint(description, source):
            return 0.0  # it belongs to other settings, and is not continued
        done = journal.iterations(file)
        return (done[-1]["iteration"] + 1) / run.settings["iterations"] if done else 0.0


# -- how long it takes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Seconds of a job, by the model and what corrects it."""

    rate: float  # FLOP/s of a device
    start_up: float  # s
    ratios: Mapping[tuple[str, str, str], float]  # (stage, variant, backbone): measured / modelled

    def ratio(self, job: Job) -> tuple[float, str]:
        """What the model's seconds are multiplied by, and why: measured, scaled or modelled.

        Scaled is by the median of the other methods' ratios at the same stage and backbone.
        """
        stage = SOURCES.get(job.stage, job.stage)
        own = self.ratios.get((stage, job.variant, job.backbone))
        if own is not None and stage == job.stage:
            return own, "measured"
        others = [r for (s, _, b), r in self.ratios.items() if (s, b) == (stage, job.backbone)]
        return (statistics.median(others), "scaled") if others else (1.0, "modelled")

    def computing(self, job: Job) -> float:
        """Seconds that all of a job computes; 0 of one that is not modelled."""
        return (job.flops or 0.0) / (job.devices * self.rate) * self.ratio(job)[0]

    def left(self, job: Job) -> float:
        """Seconds that are left of a job, its start included."""
        return self.start_up + job.left * self.computing(job) if job.left else 0.0

    def whole(self, job: Job) -> float:
        """Seconds of all of a job, its start included."""
        return self.start_up + self.computing(job)


def measured(work: Work, rate: float) -> dict[tuple[str, str, str], float]:
    """(stage, variant, backbone) -> measured over modelled seconds, of all runs of the scale.

    Of training the median iteration over all runs of the method on the backbone; of evaluation the
    median over runs.

    Raises:
        ValueError: a journal or a description is damaged; names it.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    root, networks = Path(work.graph.root), work.networks
    processes = work.graph.settings.active.processes
    for folder in sorted(root.glob("runs/*")):
        if not (folder / "run.json").is_file():
            continue
        run = run_dir.RunDir(folder)
        description = run.description
        if description["backbone"] not in catalog.read():
            continue
        key = (description["variant"], description["backbone"])
        forward = networks.forward(description["backbone"], description["settings"]["resolution"])
        file = next((f for f in (run.state / "journal.jsonl", run.journal) if f.is_file()), None)
        if file is not None and forward is not None:
            modelled = training_flops(description, forward) / (processes * rate)
            seconds = [record["seconds"]["total"] for record in journal.iterations(file)]
            found.setdefault(("train", *key), []).extend(s / modelled for s in seconds)
        spent = _evaluation_seconds(root / "logs" / "evaluate" / f"{folder.name}.log")
        if spent is None or folder.name not in work.graph.runs:
            continue
        evaluation, count, _ = work.judged(work.graph.runs[folder.name])
        forward = networks.forward(description["backbone"], evaluation["resolution"])
        if forward is not None:
            modelled = evaluation_flops(evaluation, count, forward) / rate
            found.setdefault(("evaluate", *key), []).append(spent / modelled)
    return {key: statistics.median(ratios) for key, ratios in found.items() if ratios}


def _evaluation_seconds(log: Path) -> float | None:
    """What an evaluation that has ended says it took; None: there is none."""
    try:
        last = log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
        return float(sum(json.loads(last)["seconds"].values()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- disk ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """Bytes of a run."""

    adapters: int  # the last and its snapshots
    samples: int
    state: int  # while it trains
    images: int  # until they are judged

    @property
    def kept(self) -> int:
        return self.adapters + self.samples


def disk(work: Work, run: Run, served: bool) -> Disk:
    """What a run's large files take."""
    evaluation, count, shown = work.judged(run)
    pixels = 3 * int(evaluation["resolution"]) ** 2
    finals = sum(s["iteration"] is None for s in evaluation["settings"])
    drawn = sum(s["images_per_prompt"] for s in evaluation["settings"]) * count
    adapter = FLOAT * work.networks.adapter(run.backbone) if run.trained else 0
    return Disk(
        adapters=adapter * (1 + len(run.snapshots)),
        samples=shown * finals * pixels,
        state=STATES * adapter,
        images=int(PNG * drawn * pixels) if served else 0,
    )


def downloads(graph: workflow.Plan, names: Sequence[str]) -> tuple[float, str]:
    """(bytes of the resources, where their sizes are from)."""
    lock = Path(graph.lock)
    if lock.is_file():
        locked = lockfile.read_lock(lock)
        return float(sum(locked[name].size for name in names if name in locked)), str(lock)
    known = lockfile.read()
    return sum(known[name].gigabytes * GB for name in names), str(lockfile.RESOURCES)
