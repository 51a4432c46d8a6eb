"""`tafs status`: the state of every run of a scale, from its files alone.

Read are the journals, RUN_DIR/.progress/STAGE.json, RUN_DIR/.locks/STAGE (held by the process that
works on the stage) and RUN_DIR/.failed/STAGE.json (the stage's last failure).
"""

from __future__ import annotations

import fcntl
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tafs.common import errors
from tafs.experiment import RunSpec
from tafs.orchestration import slurm, verdicts
from tafs.orchestration.graph import Graph, Job
from tafs.runtime import journal, progress
from tafs.runtime.run_dir import RunDir

RECENT = 5  # iterations that determine a run's pace
STARTING = 120.0  # s that a process may take to acquire a lock that was released for it
SILENT, PACES = 900.0, 10  # a heartbeat is overdue after this many seconds and this many paces
ROUNDING = 1.0  # s; failures may be recorded in whole seconds
WORKING = {
    "train": "training",
    "evaluate": "evaluating",
    "trajectory_rewards": "scoring trajectories",
    "score_served": "scoring (server)",
}
ORDER = (
    *("failed", "lost", "stalled", *WORKING.values()),
    *("to be continued", "waiting", "trained", "done"),
)
LOST = "the Slurm job is gone: end snakemake (Ctrl-C), then run the same command again"


@dataclass(frozen=True)
class Lock:
    """The process that works, or last worked, on a stage of a run."""

    held: bool
    host: str
    pid: int
    job: str  # Slurm's id, or ""
    since: float  # Unix seconds

    @property
    def where(self) -> str:
        return f"{self.host}:{self.pid}" + (f" Slurm {self.job}" if self.job else "")


@dataclass(frozen=True)
class State:
    """A run at one moment."""

    run: str
    state: str  # one of ORDER
    iterations: tuple[int, int] | None  # (done, total); None: not a training run
    reward: str  # rewards of the last scored step
    pace: float | None  # s per iteration
    left: float | None  # s of the current stage, or of a training that waits
    heartbeat: float | None  # Unix seconds of the last sign of life
    where: str
    note: str  # the last failure, or what to do
    stages: tuple[int, int]  # (done, total)


def _read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None if it is missing or being written."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_lock(file: Path) -> Lock | None:
    """A stage's lock; None if there is none or it is being written."""
    record = _read_json(file)
    if record is None:
        return None
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed
        held = False
    except BlockingIOError:
        held = True
    except OSError:
        return None
    return Lock(held, record["host"], record["pid"], record["job"], record["since"])


def gone(job: str) -> bool:
    """Whether Slurm states that a job does not exist; False if it does not answer."""
    try:
        return bool(job) and not slurm.squeue(f"--jobs={job}", "--format=%T").strip()
    except subprocess.CalledProcessError as error:
        return "invalid job id" in error.stderr.lower()
    except (OSError, subprocess.SubprocessError):
        return False


def of_run(spec: RunSpec, folder: Path, stages: Mapping[str, bool], now: float) -> State:
    """The state of a run, whose folder need not exist, at a Unix time.

    Args:
        stages: whether each stage of the run is done.

    Raises:
        ValueError: its journal is damaged; names it.
    """
    run = RunDir(folder)
    locks = {stage: read_lock(run.lock(stage)) for stage in stages}
    held = next((stage for stage, lock in locks.items() if lock and lock.held), None)
    # A stage in progress is not done, even if files of an earlier attempt exist.
    done = [stage for stage in stages if stage != held and stages[stage]]
    current = held or next((stage for stage in stages if stage not in done), None)
    journals = [run.state / "journal.jsonl", run.journal]
    file = next((f for f in journals if f.is_file()), None) if spec.trained else None
    records = journal.iterations(file) if file else []
    count = records[-1]["iteration"] + 1 if records else 0
    recent = [record["seconds"]["total"] for record in records[-RECENT:]]
    pace = statistics.median(recent) if recent else None
    report = _read_json(folder / progress.FOLDER / f"{current}.json") if current else None
    lock = locks[current] if current else None
    failure = _read_json(run.failure(current)) if current else None
    beats = [records[-1]["time"]] if records else []
    beats += [report["updated"]] if report else []
    started = [*beats, *([lock.since] if lock else [])]
    if failure and any(beat > failure["time"] + ROUNDING for beat in started):
        failure = None  # the stage has continued since
    beats += [lock.since] if lock and lock.held else []
    heartbeat = max(beats, default=None)
    overdue = max(SILENT, PACES * (_pace(current, pace, report) or 0.0))
    silent = now - heartbeat if heartbeat is not None and now - heartbeat > overdue else None
    state, note = _state(current, lock, failure, silent, now)
    left = None
    if current == "train" and pace is not None:
        left = pace * (spec.iterations - count)
    elif held and report:
        left = progress.seconds_left(report, now)
    return State(
        run=spec.name,
        state="trained" if state == "waiting" and "train" in done else state,
        iterations=(count, spec.iterations) if spec.trained else None,
        reward=_reward(records),
        pace=pace,
        left=left,
        heartbeat=heartbeat,
        where=lock.where if lock and (held or state == "lost") else "",
        note=note,
        stages=(len(done), len(stages)),
    )


def _state(
    stage: str | None,
    lock: Lock | None,
    failure: dict[str, Any] | None,
    silent: float | None,
    now: float,
) -> tuple[str, str]:
    """(state, note) of a run whose first unfinished stage is `stage`.

    Args:
        lock: of the stage.
        failure: the last one of the stage.
        silent: s since an overdue heartbeat; None: it is not overdue.
    """
    if stage is None:
        return "done", ""
    if lock and lock.held:
        if gone(lock.job):
            return "lost", LOST
        if silent is not None:
            return "stalled", f"{stage}: silent for {progress.duration(silent)}"
        return WORKING[stage], ""
    if failure:
        ago = progress.duration(now - failure["time"])
        state = "to be continued" if failure["exit"] == errors.CONTINUE else "failed"
        return state, f"{stage}: {failure['message']} ({ago} ago)"
    if lock and gone(lock.job):
        return "lost", LOST
    # The launcher of a training releases the lock, and the training's process acquires it.
    if lock and now - lock.since > STARTING:
        return "waiting", f"{stage}: its process has ended; start it again to continue"
    return "waiting", ""


def _pace(stage: str | None, pace: float | None, report: dict[str, Any] | None) -> float | None:
    """Seconds between two signs of life of a stage."""
    if stage == "train" or report is None:
        return pace
    steps = report["done"] - report["first"]
    return float(report["updated"] - report["started"]) / steps if steps > 0 else None


def _reward(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return ""
    last = {name: values[-1] for name, values in records[-1]["rewards"].items() if values}
    return "  ".join(f"{n} {v:.3g}" if v is not None else f"{n} -" for n, v in last.items())


def look(graph: Graph, now: float) -> list[State]:
    """The states of the scale's runs, in the order of ORDER."""
    waiting = {one.job for one in verdicts.pending(graph)}
    found = [
        of_run(
            spec,
            Path(graph.folder(name)),
            {stage: Job(stage, name) not in waiting for stage in graph.stages[name]},
            now,
        )
        for name, spec in graph.plan.runs.items()
    ]
    return sorted(found, key=lambda state: ORDER.index(state.state))


def training_left(states: Sequence[State], variants: Sequence[str]) -> float | None:
    """Seconds until all trainings end, if as many as now run at once; None: not known.

    A run without a pace has the median pace of its variant, or of all runs.

    Args:
        variants: of the states' runs.
    """
    paces: dict[str, list[float]] = {}
    for state, variant in zip(states, variants, strict=True):
        if state.pace is not None:
            paces.setdefault(variant, []).append(state.pace)
    known = [pace for group in paces.values() for pace in group]
    running = sum(state.state == WORKING["train"] for state in states)
    if not known or not running:
        return None
    total = 0.0
    for state, variant in zip(states, variants, strict=True):
        done, count = state.iterations or (0, 0)
        pace = state.pace or statistics.median(paces.get(variant, known))
        total += pace * (count - done)
    return total / running


def summary(graph: Graph, states: Sequence[State]) -> str:
    """One line: the number of runs in each state, finished jobs, time left."""
    counts = Counter(state.state for state in states)
    parts = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    done, total = (sum(state.stages[i] for state in states) for i in (0, 1))
    line = f"scale {graph.plan.config.scale}: {parts}; {done} of {total} jobs done"
    left = training_left(states, [graph.plan.runs[state.run].variant for state in states])
    if left is not None:
        running = counts[WORKING["train"]]
        line += f"; trainings: {progress.duration(left)} left at {running} at a time"
    return line


def record(graph: Graph, states: Sequence[State]) -> dict[str, Any]:
    """The states as JSON values; times in seconds, heartbeats in Unix seconds."""
    done, total = (sum(state.stages[i] for state in states) for i in (0, 1))
    return {
        "scale": graph.plan.config.scale,
        "jobs": {"done": done, "total": total},
        "counts": dict(Counter(state.state for state in states)),
        "runs": [asdict(state) for state in states],
    }


def lines(graph: Graph, states: Sequence[State], now: float) -> list[str]:
    """The summary, then a table with a line per run, without empty columns."""
    rows = []
    for state in states:
        done = state.state == "done"
        heard = None if done or state.heartbeat is None else now - state.heartbeat
        rows.append(
            {
                "run": state.run,
                "state": state.state,
                "iteration": "{}/{}".format(*state.iterations) if state.iterations else "",
                "s/it.": "" if state.pace is None else f"{state.pace:.3g}",
                "left": "" if done or state.left is None else progress.duration(state.left),
                "heard": "" if heard is None else f"{progress.duration(heard)} ago",
                "where": state.where,
                "reward": state.reward,
                "note": state.note,
            }
        )
    kept = [name for name in rows[0] if any(row[name] for row in rows)]
    shown = [kept, *([row[name] for name in kept] for row in rows)]
    return [summary(graph, states), "", *progress.aligned(shown)]


def show(
    graph: Graph, every: float | None = None, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Print the states, once or every so many seconds until all runs are done.

    Returns:
        The exit code: 1 if a run has failed, else 0.

    Raises:
        ValueError: a run's journal is damaged; names it.
    """
    while True:
        now = time.time()
        states = look(graph, now)
        if every is not None and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        print("\n".join(lines(graph, states, now)), flush=True)
        code = int(any(state.state == "failed" for state in states))
        if every is None or all(state.state == "done" for state in states):
            return code
        try:
            sleep(every)
        except KeyboardInterrupt:
            return code
