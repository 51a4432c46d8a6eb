"""`tafs plan`: what a scale takes before it runs, as text for a terminal of 100 columns."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tafs.experiment import schema
from tafs.orchestration import graph as workflow
from tafs.orchestration.plan import dry_run as dryrun
from tafs.orchestration.plan.dry_run import Pending
from tafs.orchestration.plan.estimate import (
    ASSUMED,
    HOUR,
    MODELLED,
    PNG,
    SAID,
    START_UP,
    Disk,
    Job,
    Speed,
    Work,
    disk,
    downloads,
    measured,
)
from tafs.orchestration.plan.schedule import Task, makespan
from tafs.runtime import run_dir
from tafs.runtime.progress import duration

STAGES = ("fetch", "check_rewards", "train", "evaluate", "trajectory_rewards", "score_served")
ORDER = ("describe", "describe_evaluation", *STAGES, "contents", "compare", "track")
FIRST = {
    "score_served": "evaluate",
    "evaluate": "train",
    "trajectory_rewards": "train",
}  # what a stage waits for


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


def default_nodes(scale: schema.Scale) -> int:
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
        return [] if self.price is None else ["forward_equivalents"]

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
        trained = sorted((key for key in keys if key[0] != run_dir.BASE), key=lambda key: key)
        for variant, backbone in trained:
            mine = [j for j in self.all_jobs if (j.variant, j.backbone) == (variant, backbone)]
            rows.append(self._row(variant, backbone, mine))
        base = [job for job in self.all_jobs if job.variant == run_dir.BASE]
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
