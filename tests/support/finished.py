"""Results as finished jobs leave them: files of any content, with receipts of the right needs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tafs.orchestration.graph import Graph, Job
from tafs.orchestration.verdicts import job_folder, job_needs
from tafs.runtime import receipts


def finish(graph: Graph, job: Job) -> None:
    """Write a job's receipt, and those of its files that do not exist."""
    outputs = [Path(file) for file in graph.outputs(job)]
    for file in outputs:
        file.parent.mkdir(parents=True, exist_ok=True)
    match job.rule:
        case "describe" | "describe_evaluation" | "report_spec" | "decide_spec":
            outputs[0].write_text(f"{graph.text(job)}\n", encoding="utf-8")
        case "fetch":
            outputs[0].write_text(f"{graph.locked(job.target)}\n", encoding="utf-8")
        case _:
            *outputs, last = outputs
            if last.name == "snapshots":
                last.mkdir(exist_ok=True)
            else:
                outputs.append(last)
            with receipts.replacing(
                job_folder(graph, job), job.rule, job_needs(graph, job), outputs
            ):
                for file in (one for one in outputs if not one.exists()):
                    file.write_text(f"{job} {file.name}", encoding="utf-8")


def finish_all(graph: Graph, rules: Collection[str] = ()) -> None:
    """Write the files of all jobs, or of those of some rules."""
    for job in graph.jobs():
        if job.rule != "all" and (not rules or job.rule in rules):
            finish(graph, job)
