"""How long jobs take on equal nodes: list scheduling, longest job first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A job that may start when the tasks named in `after` have ended."""

    name: str
    seconds: float
    devices: int
    after: tuple[str, ...] = ()


def makespan(tasks: Sequence[Task], nodes: int, per_node: int) -> float:
    """Seconds until the last task ends.

    Whenever devices become free, the longest task that is ready and fits starts. A task of at most
    `per_node` devices runs on one node; a larger one takes whole nodes. Names in `after` that are
    not tasks count as done.

    Raises:
        ValueError: a task needs more nodes than there are.
    """
    names = {task.name for task in tasks}
    waiting = sorted(tasks, key=lambda task: (-task.seconds, task.name))
    for task in waiting:
        needed = math.ceil(task.devices / per_node)
        if needed > nodes:
            raise ValueError(f"--nodes {nodes}: {task.name} needs {needed}; give at least as many")
    free = [per_node] * nodes
    ended = set[str]()
    running: list[tuple[float, str, list[tuple[int, int]]]] = []
    now = 0.0
    while waiting or running:
        for task in list(waiting):
            ready = all(name in ended or name not in names for name in task.after)
            places = _places(task.devices, free, per_node) if ready else None
            if places is None:
                continue
            for node, devices in places:
                free[node] -= devices
            waiting.remove(task)
            heapq.heappush(running, (now + task.seconds, task.name, places))
        if not running:
            raise ValueError(f"{waiting[0].name}: waits for itself")
        now, name, places = heapq.heappop(running)
        ended.add(name)
        for node, devices in places:
            free[node] += devices
    return now


def _places(devices: int, free: Sequence[int], per_node: int) -> list[tuple[int, int]] | None:
    """(node, devices) pairs for a task, on the fullest node that fits; None if it fits nowhere."""
    if devices <= per_node:
        fitting = [node for node, left in enumerate(free) if left >= devices]
        return [(min(fitting, key=lambda node: free[node]), devices)] if fitting else None
    whole = [node for node, left in enumerate(free) if left == per_node]
    needed = math.ceil(devices / per_node)
    return [(node, per_node) for node in whole[:needed]] if len(whole) >= needed else None
