"""The part of `tafs plan` about the memory of GPUs: what trainings take, and what fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tafs.experiment import gpu_memory
from tafs.experiment.gpu_memory import TrainingMemory
from tafs.models.memory_model import GB, RESERVED
from tafs.orchestration.graph import Graph
from tafs.orchestration.plan.texts import amount, table

Key = tuple[str, str, str]  # method, task, model


@dataclass(frozen=True)
class MemoryNeed:
    """The memory of a GPU that the trainings of a method take; micro-batches are in images."""

    method: str
    task: str
    model: str
    micro_batch: int
    bytes: int
    when: str  # the phase that takes most
    # What fits in the scale's `gpu_memory`; None: it names none, 0: nothing fits.
    fitting_with_checkpointing: int | None
    fitting_without_checkpointing: int | None


def trainings(graph: Graph) -> list[MemoryNeed]:
    """What each training of a scale takes, if its memory is modelled."""
    found: dict[Key, TrainingMemory] = {}
    for spec in graph.runs.values() if graph.device == "cuda" else ():
        key = (spec.variant, spec.task, spec.backbone)
        if key not in found and (known := gpu_memory.of_run(spec, graph.scale.processes)):
            found[key] = known
    given = graph.scale.gpu_memory
    records = []
    for key, one in sorted(found.items(), key=lambda item: item[0]):
        available = None if given is None else gpu_memory.usable(given)
        phase, most = one.largest(available)
        fits: list[int | None] = [None, None]
        if available is not None:
            fits = [one.fitting(available, checkpointing=on) for on in (True, False)]
        records.append(MemoryNeed(*key, one.setting.micro_batch, round(most), phase, *fits))
    return records


def lines(graph: Graph) -> list[str]:
    """A table of them, and the values of the scale's keys that are `auto`."""
    given, needs = graph.scale.gpu_memory, trainings(graph)
    if not needs:
        return []
    head = ["memory", "task", "model", "batch", "GB", "when"]
    head += [] if given is None else ["with", "without"]
    rows = []
    for need in needs:
        row = [need.method, need.task, need.model, str(need.micro_batch)]
        row += [amount(need.bytes / GB), need.when]
        if given is not None:
            fits = (need.fitting_with_checkpointing, need.fitting_without_checkpointing)
            row += [str(n) if n else "none" for n in fits]
        rows.append(row)
    found = ["", *table([head, *rows], left=(0, 1, 2, 5))]
    if given is None:
        return found
    return [
        *found,
        "  with, without: the largest micro-batch with and without gradient checkpointing in "
        f"{given:g} GB,",
        f"  {100 * RESERVED:.0f} % of which stay free.",
        *_chosen(graph),
    ]


def _chosen(graph: Graph) -> list[str]:
    """The values that follow from the memory."""
    trained = [spec for spec in graph.runs.values() if spec.trained]
    values: dict[str, list[Any]] = {
        "gradient_checkpointing": [spec.assets.gradient_checkpointing for spec in trained],
        "micro_batch": [spec.batch for spec in trained],
    }
    return [
        f"  {key}: auto is here {' or '.join(str(v).lower() for v in sorted({*values[key]}))}."
        for key in graph.scale.automatic
    ]
