"""`tafs plan`: what a scale takes, as text of at most 100 columns or as a record."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from tafs.experiment.schema import Scale
from tafs.orchestration import graph as graphs
from tafs.orchestration import verdicts
from tafs.orchestration.graph import Graph, Job
from tafs.orchestration.plan import evaluation_memory, gpu_needs
from tafs.orchestration.plan.estimate import (
    HOUR,
    MODELLED,
    PNG_RATIO,
    START_UP,
    DeviceJob,
    Disk,
    Rates,
    Speed,
    Workload,
    assumed_rates,
    downloads,
    measured,
)
from tafs.orchestration.plan.schedule import Task, makespan
from tafs.orchestration.plan.texts import amount, size, table
from tafs.orchestration.verdicts import Pending
from tafs.runtime.progress import duration
from tafs.runtime.run_dir import BASE
from tafs.runtime.run_dir import STAGES as RUN_STAGES

STAGES = ("fetch", "check_rewards", "check_base", *RUN_STAGES)
ORDER = ("describe", "describe_evaluation", *STAGES, "report_spec", "compare", "track")
# stage -> the stage of the same run that it waits for
AFTER = {"evaluate": "train", "trajectory_rewards": "train", "score_served": "evaluate"}
ASSUMPTION = {
    "cuda": "measured with FLUX.1-dev at 512 pixels, on an H100; assumed of other models and sizes",
    "cpu": "one core, small networks, assumed",
}


def report(
    overrides: Mapping[str, Any],
    *,
    nodes: int | None = None,
    price: float | None = None,
    tflops: float | None = None,
    gpu_memory: float | None = None,
    verbose: bool = False,
) -> str:
    """The whole text.

    Args:
        overrides: as `snakemake --config` takes them.
        nodes: number of machines with the scale's `processes` / `nodes` devices each. None: the
            number that one training takes; at scales without GPUs, all cores of this machine.
        price: of a device for an hour.
        tflops: sustained rate of a device; decoding and scoring are then as much slower than on
            an H100. None: `assumed_rates`.
        gpu_memory: GB of a GPU; None: the scale's.
        verbose: list every job with its reason.

    Raises:
        ValueError: config.yaml is wrong, a file is damaged or there are too few nodes; one line.
    """
    page = _page(overrides, price, tflops, gpu_memory)
    memory = (gpu_needs.lines(page.graph), evaluation_memory.lines(page.work))
    parts = [page.head(), page.methods(), *memory, page.stages()]
    parts += [page.reasons(verbose), page.disk(), page.wall_time(nodes), page.decide()]
    return "\n".join(chain(*parts, page.assumptions()))


def record(
    overrides: Mapping[str, Any],
    *,
    nodes: int | None = None,
    price: float | None = None,
    tflops: float | None = None,
    gpu_memory: float | None = None,
) -> dict[str, Any]:
    """The same as JSON values: times in hours of a device or in seconds, sizes in bytes.

    The arguments and errors are those of `report`.
    """
    page = _page(overrides, price, tflops, gpu_memory)
    nodes, seconds = page.makespan(nodes)
    fetched, downloaded, source = page.downloads
    return {
        "scale": page.graph.plan.config.scale,
        "root": page.graph.root,
        "device": page.unit,
        "methods": [asdict(total) for total in page.totals()],
        "total": asdict(page.total("total", "", page.jobs)),
        "memory": [asdict(need) for need in gpu_needs.trainings(page.graph)],
        "evaluation_memory": [asdict(need) for need in evaluation_memory.needs(page.work)],
        "hours_left": page.hours_left,
        "cost_left": None if price is None else price * page.hours_left,
        "downloads": {"bytes": downloaded, "resources": fetched, "source": source},
        "wall_time": {"nodes": nodes, "seconds": seconds},
        "rate": {
            "flops": page.speed.rates.training,
            "evaluation_flops": page.speed.rates.judging,
            "assumed": page.assumed,
        },
        "to_run": [
            {"rule": one.job.rule, "target": one.job.target, "reason": one.reason}
            for one in page.pending
            if one.job.rule != "all"
        ],
    }


def _page(
    overrides: Mapping[str, Any],
    price: float | None,
    tflops: float | None,
    gpu_memory: float | None,
) -> Page:
    graph = graphs.read(overrides, gpu_memory=gpu_memory)
    work = Workload(graph)
    rates = assumed_rates(graph.scale, graph.runs.values())
    if tflops:
        rates = Rates(tflops * 1e12, tflops * 1e12, measured=rates)
    every, pending = list(graph.jobs()), verdicts.pending(graph)
    return Page(
        graph=graph,
        work=work,
        every=every,
        pending=pending,
        jobs=work.jobs(every, (one.job for one in pending)),
        speed=Speed(rates, START_UP[graph.device], measured(work, rates)),
        price=price,
        assumed=tflops is None,
    )


def default_nodes(scale: Scale) -> int:
    """The nodes of one training; without GPUs, one for each training that fits on this machine."""
    if scale.device != "cuda":
        return max(scale.nodes, len(os.sched_getaffinity(0)) * scale.nodes // scale.processes)
    return scale.nodes


@dataclass(frozen=True)
class Total:
    """What the runs of a method on a model take, finished or not."""

    method: str
    model: str
    runs: int
    seconds_per_iteration: float | None
    basis: str  # of that time: measured, scaled or modelled
    train_hours: float | None  # of one device, as all hours; None: nothing to train
    evaluate_hours: float | None
    hours: float
    cost: float | None
    disk: int  # bytes that are kept


@dataclass(frozen=True)
class Page:
    """The parts of the text, a list of lines each."""

    graph: Graph
    work: Workload
    every: Sequence[Job]
    pending: Sequence[Pending]
    jobs: Sequence[DeviceJob]
    speed: Speed
    price: float | None
    assumed: bool  # the rate is not given by the user

    @property
    def _on_gpus(self) -> bool:
        return self.graph.scale.device == "cuda"

    @property
    def unit(self) -> str:
        return "GPU" if self._on_gpus else "core"

    @property
    def _cost_head(self) -> list[str]:
        return [] if self.price is None else ["cost"]

    def _costs(self, hours: float) -> list[str]:
        """Device-hours, and their cost if the price is known."""
        return [amount(hours), *([] if self.price is None else [amount(hours * self.price)])]

    @staticmethod
    def _hours(jobs: Iterable[DeviceJob], seconds: Callable[[DeviceJob], float]) -> float:
        """Device-hours of the jobs that are modelled."""
        return sum(seconds(job) * job.devices for job in jobs if job.flops) / HOUR

    @cached_property
    def disks(self) -> dict[str, Disk]:
        return {name: self.work.disk(spec) for name, spec in self.graph.plan.runs.items()}

    def head(self) -> list[str]:
        runs = self.graph.plan.runs.values()
        trained = sum(run.trained for run in runs)
        return [
            f"Scale {self.graph.plan.config.scale} in {self.graph.root}/: {trained} training runs, "
            f"{len(runs) - trained} untrained models to evaluate."
        ]

    def totals(self) -> list[Total]:
        """The total of each method on each model, and of the untrained models."""
        groups: dict[tuple[str, str], list[DeviceJob]] = {}
        for job in self.jobs:
            key = (job.variant, job.backbone if job.variant != BASE else "")
            groups.setdefault(key, []).append(job)
        base = groups.pop((BASE, ""), [])
        found = [self.total(*key, own) for key, own in sorted(groups.items())]
        if base:
            found.append(self.total("untrained", f"{len({j.backbone for j in base})} models", base))
        return found

    def methods(self) -> list[str]:
        """A line per total."""
        head = ["method", "model", "runs", "s/iter.", "", "train", "evaluate"]
        head += [f"{self.unit}-h", *self._cost_head, "disk"]
        rows = [*self.totals(), self.total("total", "", self.jobs)]
        return ["", *table([head, *(self._row(one) for one in rows)], left=(0, 1, 4))]

    def total(self, method: str, model: str, jobs: Sequence[DeviceJob]) -> Total:
        """The total of some jobs."""
        trainings = [job for job in jobs if job.stage == "train"]
        others = [job for job in jobs if job.stage != "train"]
        runs = {job.run for job in jobs}
        pace, basis = None, ""
        if trainings and model:
            iterations = self.graph.plan.runs[trainings[0].run].iterations
            pace = self.speed.computing(trainings[0]) / iterations
            basis = self.speed.ratio(trainings[0])[1]
        whole = self.speed.whole
        hours = self._hours(jobs, whole)
        return Total(
            method=method,
            model=model,
            runs=len(runs),
            seconds_per_iteration=pace,
            basis=basis,
            train_hours=self._hours(trainings, whole) if trainings else None,
            evaluate_hours=self._hours(others, whole) if others else None,
            hours=hours,
            cost=None if self.price is None else hours * self.price,
            disk=sum(self.disks[run].kept for run in runs),
        )

    def _row(self, total: Total) -> list[str]:
        known = (total.seconds_per_iteration, total.train_hours, total.evaluate_hours)
        pace, train, evaluate = ("" if value is None else amount(value) for value in known)
        return [
            *(total.method, total.model, str(total.runs), pace, total.basis, train, evaluate),
            *self._costs(total.hours),
            size(total.disk),
        ]

    @property
    def hours_left(self) -> float:
        """Device-hours of all jobs that are not done."""
        return self._hours(self.jobs, self.speed.left)

    def stages(self) -> list[str]:
        """The finished and remaining jobs of each stage."""
        total = Counter(job.rule for job in self.every if job.rule != "all")
        left = Counter(one.job.rule for one in self.pending if one.job.rule != "all")

        def row(name: str, rules: Iterable[str], *figures: str) -> list[str]:
            counts = [sum(counter[rule] for rule in rules) for counter in (total, left)]
            return [name, *map(str, (counts[0], counts[0] - counts[1], counts[1])), *figures]

        head = ["stage", "jobs", "done", "to run", f"{self.unit}-h left", *self._cost_head]
        blank = ["" for _ in self._cost_head]
        unknown = ["not modelled", *blank]
        rows = []
        for stage in (stage for stage in STAGES if total[stage]):
            own = [job for job in self.jobs if job.stage == stage]
            known = self._costs(self._hours(own, self.speed.left))
            rows.append(row(stage, [stage], *(known if stage in MODELLED else unknown)))
        rows.append(row("others", [rule for rule in total if rule not in STAGES], "", *blank))
        rows.append(row("total", list(total), *self._costs(self.hours_left)))
        return ["", *table([head, *rows], left=(0,))]

    def reasons(self, verbose: bool) -> list[str]:
        """Why jobs would run."""
        jobs = [one for one in self.pending if one.job.rule != "all"]
        if not jobs:
            return ["", "Nothing to run: all results exist and are up to date."]
        lines = ["", "Jobs to run, and why:"]
        groups: dict[tuple[str, str], list[str]] = {}
        for one in jobs:
            groups.setdefault((one.job.rule, one.reason), []).append(one.job.target)
        for rule, why in sorted(groups, key=lambda key: (ORDER.index(key[0]), key)):
            targets = sorted(groups[rule, why])
            lines.append(f"  {len(targets):4} {rule}: {why}")
            lines += [f"         {target}" for target in targets if target and verbose]
        return lines

    @cached_property
    def downloads(self) -> tuple[list[str], float, str]:
        """(the resources, their bytes, the file that holds their sizes)."""
        names = [job.target for job in self.every if job.rule == "fetch"]
        return names, *(downloads(Path(self.graph.scale.lock), names) if names else (0.0, ""))

    def disk(self) -> list[str]:
        """Disk space and downloads."""
        disks = self.disks.values()
        kept = f"adapters {size(sum(d.adapters for d in disks))}, "
        kept += f"samples {size(sum(d.samples for d in disks))}"
        states, images = [sum(getattr(d, kind) for d in disks) for kind in ("state", "images")]
        largest = max(d.state for d in disks)
        lines = [
            "",
            f"Disk: {size(sum(d.kept for d in disks))} are kept ({kept}).",
            f"  During training: resume states, {size(largest)} per run, {size(states)} for all.",
        ]
        if images:
            lines.append(
                f"  Until the server has scored them: images, {size(images)} for all runs (PNG, "
                f"{100 * PNG_RATIO:.0f} % of raw pixels)."
            )
        names, total, source = self.downloads
        if names:
            lines.append(f"  Downloads: {size(total)} in {len(names)} resources ({source}).")
        return lines

    def makespan(self, nodes: int | None) -> tuple[int, float]:
        """(nodes, seconds until all jobs that are left have ended), by list scheduling."""
        scale = self.graph.scale
        nodes = nodes or default_nodes(scale)
        tasks = [
            Task(
                job.name,
                self.speed.left(job),
                job.devices,
                (f"{AFTER[job.stage]} {job.run}",) if job.stage in AFTER else (),
            )
            for job in self.jobs
            if job.left and job.flops
        ]
        return nodes, makespan(tasks, nodes, scale.processes // scale.nodes)

    def wall_time(self, given: int | None) -> list[str]:
        """The time until all jobs that are left have ended."""
        nodes, seconds = self.makespan(given)
        per_node = self.graph.scale.processes // self.graph.scale.nodes
        where = f"{nodes} node{'s' * (nodes > 1)} of {per_node} {self.unit}{'s' * (per_node > 1)}"
        line = f"Wall time on {where}: {duration(seconds)}"
        train, evaluate = map(self.graph.scale.processes_of, ("train", "evaluate"))
        if train > 1:
            line += f"; a training takes {train} {self.unit}s, an evaluation {evaluate}"
        return ["", f"{line}."]

    def decide(self) -> list[str]:
        """What `snakemake decide` adds to the jobs of `snakemake all` at most."""
        if self.graph.plan.decide is None:
            return []
        own = [job for job in self.graph.decide_jobs() if job not in set(self.every)]
        left = [one.job for one in verdicts.pending(self.graph, jobs=own)]
        jobs = self.work.jobs(left, left)
        trainings = sum(job.stage == "train" for job in jobs)
        hours = self._hours(jobs, self.speed.left)
        cost = "" if self.price is None else f", cost {amount(hours * self.price)}"
        budget = f"`snakemake decide`, with up to {self.graph.plan.decide.seeds[-1]} seeds"
        return [
            "",
            f"{budget}: at most {trainings} more trainings, {amount(hours)} {self.unit}-h{cost}.",
        ]

    def assumptions(self) -> list[str]:
        """Where the figures come from."""
        bases = Counter(self.speed.ratio(job)[1] for job in self.jobs if job.stage == "train")
        rates = [rate / 1e12 for rate in (self.speed.rates.training, self.speed.rates.judging)]
        source = ASSUMPTION[self.graph.device] if self.assumed else "given"
        lines = [
            "",
            "Sources of these figures:",
            f"  modelled  network evaluations x FLOPs of a forward pass / TFLOP/s per {self.unit}:",
            f"            {rates[0]:.3g} in training, {rates[1]:.3g} in evaluations, not compiled,",
            f"            {source};",
            f"            {self.speed.start_up:.0f} s start-up per job, assumed",
            "  measured  median time in journals and in the logs of evaluations",
            "  scaled    modelled x median of measured / modelled of other methods on this model",
            f"  Of {sum(bases.values())} trainings "
            + ", ".join(f"{bases[b]} are {b}" for b in ("measured", "scaled", "modelled"))
            + ".",
            "  Not modelled: rewards besides PickScore and CLIP (unless measured), the scoring",
            "  server, downloads, tables, queues.",
        ]
        if self._on_gpus:
            lines.append("  Memory: weights, optimiser and activations, see docs/paper-scale.md.")
        unknown = sorted({j.backbone for j in self.jobs if j.flops is None and j.stage in MODELLED})
        if unknown:
            lines.append(f"  Unknown architecture, not modelled: {', '.join(unknown)}.")
        return lines
