"""What a scale takes before it runs: jobs and why they would run, GPU-hours, disk, days.

Times are counts of network evaluations by the FLOPs of one (tafs/flops.py) over an assumed rate of
the device, corrected by what the scale's journals and evaluation logs have measured. What is to be
done, and why, is Snakemake's own account (tafs/dryrun.py).
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tafs import config, dryrun, journal, models, prompts, resources, rundir, workflow, worlds
from tafs.config import Run
from tafs.dryrun import Pending
from tafs.scheduling import Task, makespan

if TYPE_CHECKING:
    from tafs.flops import Textless

# Sustained FLOP/s where nothing is measured: 40 % of an H100's 989e12 dense bfloat16 products; one
# core with networks of the embedded world's size.
ASSUMED = {"cuda": 0.4 * 989e12, "cpu": 45e9}
SAID = {"cuda": "40 % of an H100's 989 dense bfloat16", "cpu": "one core, small networks"}
START_UP = {"cuda": 120.0, "cpu": 8.0}  # s; a job imports, and loads its models
PNG = 0.5  # of an image's bytes that its PNG file takes
STATES = 2 * 4  # generations of the resume state x adapter, average and AdamW's two moments
FLOAT = 4  # bytes
TEST_PROMPTS = {"pickapic": 2048}  # of sets that have to be fetched before they can be counted
STAGES = ("fetch", "canary", "train", "evaluate", "correlate", "judge")
ORDER = ("describe", "describe_evaluation", *STAGES, "contents", "compare", "track")
MODELLED = ("train", "evaluate", "correlate")
FIRST = {"judge": "evaluate", "evaluate": "train", "correlate": "train"}  # what a stage waits for
SOURCES = {"correlate": "evaluate"}  # whose measurements stand for a stage's
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

    def __init__(self, scale: config.Scale) -> None:
        self.scale = scale

    @cache  # noqa: B019 - one object a plan
    def _built(self, name: str) -> Textless | None:
        import torch

        from tafs import flops

        model = models.read()[name]
        if model.pipeline not in flops.CLASSES:
            return None
        if model.world == "shapes":
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
            lora=self.scale.lora if model.trainable else None,
        )

    def forward(self, name: str, resolution: int) -> float | None:
        """FLOPs of one evaluation of one image; None: the architecture is not known here."""
        return self._forward(self._twin(name), models.read()[name].resolution or resolution)

    @cache  # noqa: B019
    def _forward(self, name: str, resolution: int) -> float | None:
        from tafs import flops

        backbone = self._built(name)
        if backbone is None:
            return None
        backbone.resolution = resolution
        return flops.forward(backbone)

    @staticmethod
    def _twin(name: str) -> str:
        """The first model that computes the same: adapters that are merged leave no trace."""
        known = models.read()
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
    """Of one iteration, on all devices: images x `Method.cost` x a forward pass."""
    settings = description["settings"]
    images = settings["prompts_per_iteration"] * settings["group_size"]
    return float(images * description["cost"] * forward)


def evaluation_flops(evaluation: Mapping[str, Any], prompts: int, forward: float) -> float:
    """Of an evaluation's images; their rewards and decoding are not counted."""
    calls = sum(s["nfe"] * s["images_per_prompt"] for s in evaluation["settings"])
    return float(calls * prompts * forward)


class Work:
    """The jobs of a graph, and how much of them is left."""

    def __init__(self, graph: workflow.Plan) -> None:
        self.graph = graph
        self.networks = Networks(graph.settings.active)
        self.evaluations = config.evaluations(graph.settings)

    @cache  # noqa: B019
    def prompts(self, prompt_set: str, first: int | None) -> tuple[int, int]:
        """(prompts that runs are judged on, those whose images are kept); see `TEST_PROMPTS`."""
        world = worlds.of(self.graph.settings.active.model_dump(mode="json"))
        try:
            known = world.prompts(prompt_set, "test")
        except ValueError:  # not fetched yet
            count = TEST_PROMPTS[prompt_set]
            return min(count, first or count), rundir.SAMPLES_PER_TAG
        chosen = [known[i] for i in prompts.first_of_each(known, first)]
        return len(chosen), len(prompts.first_of_each(chosen, rundir.SAMPLES_PER_TAG))

    def judged(self, run: Run) -> tuple[dict[str, Any], int, int]:
        """(evaluation.json, its prompts, those whose images are kept)."""
        evaluation = self.evaluations[run.name]
        return evaluation, *self.prompts(run.prompts, evaluation["prompts"])

    def jobs(self, every: Iterable[Pending], pending: Iterable[Pending]) -> list[Job]:
        """Those of `every` job that take time on a device; `pending` are to be done."""
        to_run = {(job.rule, job.about) for job in pending}
        found = []
        for stage, name in ((job.rule, job.about) for job in every):
            if stage in (*MODELLED, "judge"):
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
        if stage == "judge":
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
        if not started or started[-1]["fingerprint"] != config.fingerprint(description, source):
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
        run = rundir.RunDir(folder)
        description = run.description
        if description["backbone"] not in models.read():
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
        locked = resources.read_lock(lock)
        return float(sum(locked[name].size for name in names if name in locked)), str(lock)
    known = resources.read()
    return sum(known[name].gigabytes * GB for name in names), str(resources.RESOURCES)


# -- the report ------------------------------------------------------------------------------------


def report(
    overrides: Mapping[str, Any],
    *,
    nodes: int | None = None,
    price: float | None = None,
    tflops: float | None = None,
    verbose: bool = False,
) -> str:
    """The whole plan as text of at most 100 columns.

    Args:
        overrides: what snakemake's --config holds.
        nodes: machines of the scale's `processes` / `nodes` devices; by default one that trains,
            at scales without GPUs all cores of this machine.
        price: of a device's hour.
        tflops: sustained by a device, in place of the assumed rate.

    Raises:
        ValueError: a mistake in config.yaml, a damaged file, too few nodes; in one line.
        RunFailed: snakemake cannot plan.
    """
    graph = workflow.read(overrides)
    scale = graph.settings.active
    with ThreadPoolExecutor() as pool:  # processes of their own, while networks are counted here
        dry_runs = [pool.submit(dryrun.jobs, overrides, forced=forced) for forced in (False, True)]
        work = Work(graph)
        rate = tflops * 1e12 if tflops else ASSUMED[scale.device]
        speed = Speed(rate, START_UP[scale.device], measured(work, rate))
        pending, every = (dry_run.result() for dry_run in dry_runs)
        jobs = work.jobs(every, pending)
    page = Page(graph, work, jobs, speed, price, assumed=tflops is None)
    return "\n".join(
        [
            *page.head(),
            *page.methods(),
            *page.stages(pending, every),
            *page.reasons(pending, verbose),
            *page.disk([job.about for job in every if job.rule == "fetch"]),
            *page.wall_time(nodes or default_nodes(scale)),
            *page.assumptions(),
        ]
    )


def default_nodes(scale: config.Scale) -> int:
    """Those that one training takes; of a scale without GPUs this machine's cores."""
    if scale.device == "cpu":
        return max(scale.nodes, len(os.sched_getaffinity(0)) * scale.nodes // scale.processes)
    return scale.nodes


@dataclass(frozen=True)
class Page:
    """The parts of the report, a list of lines each."""

    graph: workflow.Plan
    work: Work
    all_jobs: Sequence[Job]
    speed: Speed
    price: float | None
    assumed: bool  # whether nobody has given the rate

    @property
    def unit(self) -> str:
        return "GPU" if self.graph.settings.active.device == "cuda" else "core"

    @property
    def _cost_head(self) -> list[str]:
        return [] if self.price is None else ["cost"]

    def _cost(self, hours: float) -> list[str]:
        return [] if self.price is None else [amount(hours * self.price)]

    def hours(self, jobs: Iterable[Job]) -> float:
        """Device-hours of all of the jobs."""
        return sum(self.speed.whole(j) * j.devices for j in jobs if j.flops) / HOUR

    def hours_left(self, jobs: Iterable[Job]) -> float:
        """Device-hours that are left of the jobs."""
        return sum(self.speed.left(j) * j.devices for j in jobs if j.flops) / HOUR

    @cached_property
    def disks(self) -> dict[str, Disk]:
        served = bool(self.graph.settings.active.evaluation.server)
        return {name: disk(self.work, run, served) for name, run in self.graph.runs.items()}

    def head(self) -> list[str]:
        trained = sum(run.trained for run in self.graph.runs.values())
        untrained = len(self.graph.runs) - trained
        return [
            f"Scale {self.graph.settings.scale} in {self.graph.root}/: {trained} runs are trained, "
            f"{untrained} models are judged as they are."
        ]

    def methods(self) -> list[str]:
        """What every method takes in all, whether it is done or not."""
        rows = []
        keys = dict.fromkeys((run.variant, run.backbone) for run in self.graph.runs.values())
        trained = sorted((key for key in keys if key[0] != config.BASE), key=lambda key: key)
        for variant, backbone in trained:
            mine = [j for j in self.all_jobs if (j.variant, j.backbone) == (variant, backbone)]
            rows.append(self._row(variant, backbone, mine))
        base = [job for job in self.all_jobs if job.variant == config.BASE]
        if base:
            rows.append(self._row("untrained", f"{len({j.backbone for j in base})} models", base))
        total = self._row("total", "", self.all_jobs)
        head = ["method", "model", "runs", "s/iter.", "", "train", "evaluate"]
        head += [f"{self.unit}-h", *self._cost_head, "disk"]
        return ["", *table([head, *rows, total], left=(0, 1, 4))]

    def _row(self, variant: str, backbone: str, jobs: Sequence[Job]) -> list[str]:
        trainings = [job for job in jobs if job.stage == "train"]
        others = [job for job in jobs if job.stage != "train"]
        names = {job.run for job in jobs}
        pace, basis = "", ""
        if trainings and backbone:
            first = trainings[0]
            iterations = self.graph.runs[first.run].settings["iterations"]
            pace = amount(self.speed.computing(first) / iterations)
            basis = self.speed.ratio(first)[1]
        hours = self.hours(jobs)
        return [
            *(variant, backbone, str(len(names)), pace, basis),
            *(amount(self.hours(part)) if part else "" for part in (trainings, others)),
            *(amount(hours), *self._cost(hours)),
            size(sum(self.disks[name].kept for name in names)),
        ]

    def stages(self, pending: Sequence[Pending], every: Sequence[Pending]) -> list[str]:
        """What is done and what remains, stage by stage."""
        total, left = (Counter(job.rule for job in jobs) for jobs in (every, pending))
        head = ["stage", "jobs", "done", "to run", f"{self.unit}-h left", *self._cost_head]
        rows = []
        for stage in (stage for stage in STAGES if total[stage]):
            hours = self.hours_left(job for job in self.all_jobs if job.stage == stage)
            known = stage in MODELLED
            numbers = [str(n) for n in (total[stage], total[stage] - left[stage], left[stage])]
            costs = self._cost(hours) if known else [""] * len(self._cost_head)
            rows.append([stage, *numbers, amount(hours) if known else "not modelled", *costs])
        others = [sum(c[r] for r in c if r not in (*STAGES, "all")) for c in (total, left)]
        rows.append(["others", str(others[0]), str(others[0] - others[1]), str(others[1]), ""])
        hours = self.hours_left(self.all_jobs)
        sums = [sum(total.values()) - total["all"], sum(left.values()) - left["all"]]
        numbers = [str(sums[0]), str(sums[0] - sums[1]), str(sums[1])]
        rows.append(["total", *numbers, amount(hours), *self._cost(hours)])
        width = len(head)
        return ["", *table([head, *([*row, ""][:width] for row in rows)], left=(0,))]

    def reasons(self, pending: Sequence[Pending], verbose: bool) -> list[str]:
        """Why jobs would run, in Snakemake's words."""
        jobs = [job for job in pending if job.rule != "all"]
        if not jobs:
            return ["", "Nothing has to run: everything is there and up to date."]
        lines = ["", "Why they would run, by Snakemake's account:"]
        order = {rule: place for place, rule in enumerate(ORDER)}
        groups = Counter((job.rule, job.summary) for job in jobs)
        for (rule, why), count in sorted(
            groups.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0])
        ):
            lines.append(f"  {count:4} {rule}: {why}")
            if verbose:
                own = [job for job in jobs if (job.rule, job.summary) == (rule, why)]
                lines += [f"         {job.about}" for job in own if job.about]
        return lines

    def disk(self, fetched: Sequence[str]) -> list[str]:
        disks = self.disks.values()
        kept = f"adapters {size(sum(d.adapters for d in disks))}, "
        kept += f"samples {size(sum(d.samples for d in disks))}"
        lines = ["", f"Disk: {size(sum(d.kept for d in disks))} are kept ({kept})."]
        states, images = [sum(getattr(d, kind) for d in disks) for kind in ("state", "images")]
        largest = max((d.state for d in disks), default=0)
        lines.append(
            f"  While it trains: resume states, {size(largest)} a run, {size(states)} of all runs."
        )
        if images:
            lines.append(
                f"  Until the judge has seen them: images, {size(images)} of all runs (PNG, at "
                f"{100 * PNG:.0f} % of their pixels' bytes)."
            )
        if fetched:
            total, source = downloads(self.graph, fetched)
            lines.append(f"  Downloads: {size(total)} in {len(fetched)} resources ({source}).")
        return lines

    def wall_time(self, nodes: int) -> list[str]:
        """By list scheduling of what is left."""
        scale = self.graph.settings.active
        per_node = scale.processes // scale.nodes
        tasks = [
            Task(j.name, self.speed.left(j), j.devices, (f"{FIRST[j.stage]} {j.run}",))
            if j.stage in FIRST
            else Task(j.name, self.speed.left(j), j.devices)
            for j in self.all_jobs
            if j.left and j.flops
        ]
        where = f"{nodes} node{'s' * (nodes > 1)} of {per_node} {self.unit}{'s' * (per_node > 1)}"
        return ["", f"Wall time on {where}: {duration(makespan(tasks, nodes, per_node))}."]

    def assumptions(self) -> list[str]:
        """Which figures are modelled, and what of."""
        bases = Counter(self.speed.ratio(job)[1] for job in self.all_jobs if job.stage == "train")
        said = SAID[self.graph.settings.active.device] if self.assumed else "as given"
        lines = [
            "",
            "Where the figures are from:",
            "  modelled  evaluations of the network x FLOPs of a forward pass / "
            f"{self.speed.rate / 1e12:.3g} TFLOP/s",
            f"            a {self.unit} ({said}{', assumed' if self.assumed else ''}); "
            f"{self.speed.start_up:.0f} s for a job to start, assumed",
            "  measured  median of the journals' seconds; of evaluations, what their logs say",
            "  scaled    modelled x measured / modelled of the other methods on the same model",
            f"  Of {sum(bases.values())} trainings "
            + ", ".join(f"{bases[b]} are {b}" for b in ("measured", "scaled", "modelled"))
            + ".",
            "  Not modelled: scoring by reward models (but where it is measured), decoding, the "
            "server that",
            "  judges, downloads, tables, queues.",
        ]
        unknown = sorted(
            {j.backbone for j in self.all_jobs if j.flops is None and j.stage in MODELLED}
        )
        if unknown:
            lines.append(f"  No architecture is known here of {', '.join(unknown)}.")
        return lines


# -- words and numbers -----------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Lines with columns of one width; those of `left` start at the left, numbers end right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def amount(value: float) -> str:
    """Three digits, and all before the point: 0.0123, 4.56, 78.9, 1,234."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in units of thousands."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def duration(seconds: float) -> str:
    """In the two largest units: 13 d 4 h, 2 h 5 min, 20 min 55 s."""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s"
