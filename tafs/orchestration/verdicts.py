"""What has to run and why, decided by content: receipts against the plan.

The times of files and Snakemake's own records decide nothing, so results may be copied, moved or
computed elsewhere. `snakemake`, `tafs plan` and `tafs status` use the same verdicts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from tafs.assets import cache
from tafs.experiment import needs
from tafs.experiment.specs import flat
from tafs.orchestration.graph import Graph, Job
from tafs.runtime import receipts
from tafs.runtime.receipts import Needs
from tafs.runtime.run_dir import STAGES, RunDir

LISTED = 3  # differences in a reason


@dataclass(frozen=True)
class Pending:
    """A job that has to run."""

    job: Job
    reason: str
    again: bool  # it has run before


def pending(
    graph: Graph, forced: Collection[Job] = (), jobs: Iterable[Job] | None = None
) -> list[Pending]:
    """The jobs that have to run, in their order.

    Args:
        jobs: that may have to; None: those of `snakemake all`.
        forced: jobs that the user runs in any case.
    """
    every = graph.jobs() if jobs is None else jobs
    return _Verdicts(graph, set(forced), list(dict.fromkeys(every))).decide()


class _Verdicts:
    def __init__(self, graph: Graph, forced: set[Job], jobs: list[Job]) -> None:
        self.graph = graph
        self.forced = forced
        self.jobs = jobs
        self.reasons: dict[Job, str] = {}

    def decide(self) -> list[Pending]:
        for job in self.jobs:
            if reason := self._reason(job):
                self.reasons[job] = reason
        # A job needs the files of others, which may have been deleted, and others need its files.
        known = -1
        while known < len(self.reasons):
            known = len(self.reasons)
            for job in list(self.reasons):
                for other, files in self.graph.inputs(job).items():
                    if other not in self.reasons and (lack := self._lack(other, files)):
                        self.reasons[other] = lack
            for job in self.jobs:
                if job not in self.reasons and (reason := self._follows(job)):
                    self.reasons[job] = reason
        return [
            Pending(job, self.reasons[job], self._ran(job))
            for job in self.jobs
            if job in self.reasons
        ]

    def _reason(self, job: Job) -> str:
        """Why a job has to run, whether or not another one needs its files; "": it does not."""
        outputs = self.graph.outputs(job)
        if job in self.forced:
            return "asked for"
        match job.rule:
            case "fetch":
                return ""
            case "describe" | "describe_evaluation" | "report_spec" | "decide_spec":
                return _changed(Path(outputs[0]), self.graph.text(job))
            case "all" | "decide":
                return self._follows(job)
        folder = job_folder(self.graph, job)
        receipt = receipts.read(folder, job.rule)
        if receipt is None:
            written = any(Path(file).exists() for file in outputs)
            return f"{receipts.path(folder, job.rule)} is missing" if written else "has not run"
        different = receipts.differences(receipt.needs, job_needs(self.graph, job))
        more = f" and {len(different) - LISTED} more" if len(different) > LISTED else ""
        if reason := "; ".join(different[:LISTED]) + more or self._follows(job):
            return reason
        # What `all` asks for; other files may be deleted.
        return "" if job.target else self._lack(job, outputs)

    def _follows(self, job: Job) -> str:
        """Name a job that has to run and that this one follows; "" if there is none.

        Jobs over all runs follow everything that they read, a stage only other stages.
        """
        for producer in self.graph.inputs(job):
            if producer in self.reasons and (not job.target or producer.rule in STAGES):
                return f"follows {producer.rule}"
        return ""

    def _lack(self, producer: Job, files: Collection[str]) -> str:
        """Name a file of `producer` that is missing; "" if there is none."""
        for file in map(Path, files):
            if not file.exists():
                return f"{file.name} is missing"
            if producer.rule == "fetch":
                if file.read_bytes().strip().decode(errors="replace") != self.graph.locked(
                    producer.target
                ):
                    return "pinned to other files"
                if not cache.Cached(producer.target, Path(self.graph.scale.lock)).noted:
                    return "not on this machine"
        return ""

    def _ran(self, job: Job) -> bool:
        return any(Path(file).exists() for file in self.graph.outputs(job))


def job_folder(graph: Graph, job: Job) -> Path:
    """The folder that a job's receipt is in."""
    return Path(graph.folder(job.target) if job.target else graph.root)


def job_needs(graph: Graph, job: Job) -> Needs:
    """What the outcome of a job depends on, if it runs now.

    Args:
        job: of a rule that leaves a receipt.
    """
    plan, root = graph.plan, Path(graph.root)
    name = job.target or graph.check_run
    spec, evaluation = graph.runs[name], graph.evaluations[name]
    run = RunDir(Path(graph.folder(name)))
    match job.rule:
        case "train":
            return needs.training(spec)
        case "evaluate":
            return needs.evaluation(run, spec, evaluation)
        case "score_served":
            return needs.served(run, spec, evaluation)
        case "trajectory_rewards":
            return needs.trajectories(run, spec, evaluation)
        case "check_rewards":
            metrics = needs.checked_metrics(graph.source, evaluation, served=True)
            return needs.check_rewards(graph.source, metrics)
        case "check_base" if plan.base_check:
            return needs.base_check(root, plan.base_check)
        case "compare":
            return needs.report(root, plan.report)
        case "track":
            return needs.tracking(root, plan.runs)
        case look if look in graph.looks and plan.decide:
            return needs.look(root, plan.decide, 1 + graph.looks.index(look))
        case _:
            raise ValueError(f"{job.rule}: leaves no receipt")


def _changed(file: Path, text: str) -> str:
    """How the spec in a file differs from its new text; "" if it does not."""
    if not file.is_file():
        return f"{file.name} is missing"
    old = file.read_bytes()
    if old == f"{text}\n".encode():
        return ""
    try:
        different = receipts.differences(dict(flat(json.loads(old))), dict(flat(json.loads(text))))
    except (ValueError, AttributeError):
        different = []
    return "; ".join(different[:LISTED]) or f"{file.name} is damaged"
