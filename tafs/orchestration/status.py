"""Where every run of a scale stands, by its files alone: `tafs status`, while it runs or after.

Read are run.json, the journals, RUN_DIR/.progress/STAGE.json, RUN_DIR/.locks/STAGE (held by the
process that works on the stage) and RUN_DIR/.failed/STAGE.json (the stage's last failure).
"""

from __future__ import annotations

import fcntl
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafs.common import errors
from tafs.experiment.runs import Run
from tafs.orchestration import graph as workflow
from tafs.runtime import journal, progress, run_dir

RECENT = 5  # iterations that tell a run's pace
STARTING = 120.0  # s in which a process that has a lock waiting for it takes it
SILENT, PACES = 900.0, 10  # a heartbeat is overdue after so many seconds and so many paces
SQUEUE_LIMIT = 20  # s
ROUNDING = 1.0  # s; failures may be noted in whole seconds
STAGES = ("train", "evaluate", "trajectory_rewards", "score_served")
WORKING = {
    "train": "training",
    "evaluate": "evaluating",
    "trajectory_rewards": "scoring trajectories",
    "score_served": "scoring (server)",
}
TROUBLE = ("failed", "lost", "stalled")
ORDER = (*TROUBLE, *WORKING.values(), "to be continued", "waiting", "done")
LOST = "Slurm has no such job any more: end snakemake (Ctrl-C), then run the same command again"


@dataclass(frozen=True)
class Lock:
    """Who works, or worked, on a stage of a run."""

    held: bool
    host: str
    pid: int
    job: str  # Slurm's id, or ""
    since: float

    @property
    def where(self) -> str:
        return f"{self.host}:{self.pid}" + (f" Slurm {self.job}" if self.job else "")


@dataclass(frozen=True)
class Failure:
    """The last failure of a stage."""

    stage: str
    exit: int
    message: str
    time: float


@dataclass(frozen=True)
class State:
    """A run at one moment."""

    run: str
    state: str  # one of ORDER
    iterations: tuple[int, int] | None  # (done, of all); None: nothing is trained
    reward: str  # the last scored step's, by name
    pace: float | None  # s an iteration
    left: float | None  # s of the present stage, or of a training that waits
    heartbeat: float | None  # when anything was last heard of it
    where: str
    note: str  # the last failure, or what to do
    stages: tuple[int, int]  # (done, all)


# -- files -----------------------------------------------------------------------------------------


def read_lock(file: Path) -> Lock | None:
    """A stage's lock; None where there is none, or one that is being written."""
    try:
        with file.open("rb") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                held = True
            else:
                held = False
                fcntl.flock(opened, fcntl.LOCK_UN)
            facts = json.loads(opened.read())
        return Lock(held, facts["host"], facts["pid"], facts["job"], facts["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_failure(file: Path) -> Failure | None:
    """A stage's last failure; None where there is none."""
    try:
        facts = json.loads(file.read_bytes())
        return Failure(facts["stage"], facts["exit"], facts["message"], facts["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _report(file: Path) -> dict[str, Any] | None:
    """A stage's own account of its progress."""
    try:
        record: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return record


# -- Slurm -----------------------------------------------------------------------------------------


def gone(job: str) -> bool:
    """Whether Slurm says that it has no such job (any more); False where it does not say."""
    if not job or shutil.which("squeue") is None:
        return False
    try:
        answer = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"],
            capture_output=True,
            text=True,
            check=False,
            timeout=SQUEUE_LIMIT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    if answer.returncode != 0:
        return "invalid job id" in answer.stderr.lower()
    return not answer.stdout.strip()


# -- a run -----------------------------------------------------------------------------------------


def stages_of(graph: workflow.Plan) -> dict[str, tuple[str, ...]]:
    """The stages that each run has, in their order."""
    judged = set(graph.files("", judged=True))
    correlated = set(graph.correlated)
    served = bool(graph.images)
    found = {}
    for name, run in graph.runs.items():
        folder = f"{graph.root}/runs/{name}"
        has = {
            "train": run.trained,
            "evaluate": folder in judged,
            "trajectory_rewards": f"{folder}/trajectory_rewards.parquet" in correlated,
            "score_served": served and folder in judged,
        }
        found[name] = tuple(stage for stage in STAGES if has[stage])
    return found


def _ended(run: run_dir.RunDir, stage: str) -> bool:
    files = {
        "train": (run.adapter, run.journal),
        "evaluate": (run.scores, run.samples),
        "trajectory_rewards": (run.trajectory_rewards,),
        "score_served": (run.served_scores,),
    }
    return all(file.is_file() for file in files[stage])


def of_run(run: Run, folder: Path, stages: Sequence[str], now: float) -> State:
    """Where a run stands.

    Raises:
        ValueError: its journal is damaged; names it.
    """
    files = run_dir.RunDir(folder)
    locks = {stage: read_lock(files.lock(stage)) for stage in stages}
    held = next((stage for stage, lock in locks.items() if lock and lock.held), None)
    # What is worked on is not done, whatever an earlier attempt has left.
    ended = [stage for stage in stages if stage != held and _ended(files, stage)]
    current = held or next((stage for stage in stages if stage not in ended), None)
    journals = [files.state / "journal.jsonl", files.journal]
    file = next((f for f in journals if f.is_file()), None) if run.trained else None
    records = journal.iterations(file) if file else []
    total = run.settings["iterations"] if run.trained else 0
    count = records[-1]["iteration"] + 1 if records else 0
    recent = [record["seconds"]["total"] for record in records[-RECENT:]]
    pace = statistics.median(recent) if recent else None
    report = _report(folder / progress.FOLDER / f"{current}.json") if current else None
    lock = locks[current] if current else None
    failure = read_failure(files.failure(current)) if current else None
    beats = [records[-1]["time"]] if records else []
    beats += [report["updated"]] if report else []
    started = [*beats, *([lock.since] if lock else [])]
    if failure and any(beat > failure.time + ROUNDING for beat in started):
        failure = None  # it has gone on since
    beats += [lock.since] if lock and lock.held else []
    heartbeat = max(beats, default=None)
    state, note = _state(current, held, lock, failure, heartbeat, _pace(current, pace, report), now)
    left = None
    if current == "train" and pace is not None:
        left = pace * (total - count)
    elif held and report:
        left = progress.seconds_left(report, now)
    return State(
        run=run.name,
        state=state,
        iterations=(count, total) if run.trained else None,
        reward=_reward(records),
        pace=pace,
        left=left,
        heartbeat=heartbeat,
        where=lock.where if lock and (held or state == "lost") else "",
        note=note,
        stages=(len(ended), len(stages)),
    )


def _state(
    current: str | None,
    held: str | None,
    lock: Lock | None,
    failure: Failure | None,
    heartbeat: float | None,
    pace: float | None,
    now: float,
) -> tuple[str, str]:
    """(state, note) of a run whose stage `current` is the first that is not done."""
    if current is None:
        return "done", ""
    if held:
        if lock and gone(lock.job):
            return "lost", LOST
        overdue = max(SILENT, PACES * (pace or 0.0))
        if heartbeat is not None and now - heartbeat > overdue:
            return "stalled", f"{current}: silent for {progress.duration(now - heartbeat)}"
        return WORKING[current], ""
    if failure:
        said = f"{failure.stage}: {failure.message} ({progress.duration(now - failure.time)} ago)"
        return ("to be continued" if failure.exit == errors.CONTINUE else "failed"), said
    if lock and lock.job and gone(lock.job):
        return "lost", LOST
    # A training's launcher gives the lock back for its processes, which take it once they run.
    if lock and now - lock.since > STARTING:
        return "waiting", f"{current}: its process has gone; it continues when it is started again"
    return "waiting", ""


def _pace(current: str | None, pace: float | None, report: dict[str, Any] | None) -> float | None:
    """Seconds between two signs of life of the present stage."""
    if current == "train" or report is None:
        return pace
    steps = report["done"] - report["first"]
    return (report["updated"] - report["started"]) / steps if steps > 0 else None


def _reward(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return ""
    rewards = records[-1]["rewards"]
    last = {name: values[-1] for name, values in rewards.items() if values}
    return "  ".join(f"{n} {v:.3g}" if v is not None else f"{n} -" for n, v in last.items())


# -- all runs --------------------------------------------------------------------------------------


def look(graph: workflow.Plan, now: float) -> list[State]:
    """The scale's runs: first those in trouble, then those at work, in the graph's order."""
    stages = stages_of(graph)
    found = [
        of_run(run, Path(graph.root) / "runs" / name, stages[name], now)
        for name, run in graph.runs.items()
    ]
    return sorted(found, key=lambda state: ORDER.index(state.state))


def training_left(states: Sequence[State], variants: Sequence[str]) -> float | None:
    """Seconds that all trainings still take, if as many run at once as now; None: not known.

    A run without a pace has the median of its method's, or of all.

    Args:
        variants: of each state's run, its method.
    """
    paces: dict[str, list[float]] = {}
    for state, variant in zip(states, variants, strict=True):
        if state.pace is not None:
            paces.setdefault(variant, []).append(state.pace)
    known = [pace for group in paces.values() for pace in group]
    running = sum(state.state == "training" for state in states)
    if not known or not running:
        return None
    total = 0.0
    for state, variant in zip(states, variants, strict=True):
        done, count = state.iterations or (0, 0)
        pace = state.pace or statistics.median(paces.get(variant, known))
        total += pace * (count - done)
    return total / running


def summary(graph: workflow.Plan, states: Sequence[State]) -> str:
    """One line: how many runs are in which state, jobs done, time left."""
    counts = Counter(state.state for state in states)
    parts = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    done, total = (sum(state.stages[i] for state in states) for i in (0, 1))
    line = f"scale {graph.settings.scale}: {parts}; {done} of {total} jobs done"
    left = training_left(states, [graph.runs[state.run].variant for state in states])
    if left is not None:
        running = counts["training"]
        line += f"; trainings: {progress.duration(left)} left at {running} at a time"
    return line


def lines(graph: workflow.Plan, states: Sequence[State], now: float) -> list[str]:
    """The summary, then a line a run; columns in which nothing stands are left out."""
    head = ["run", "state", "iteration", "s/it.", "left", "heard", "where", "reward", "note"]
    rows = [
        [
            *(state.run, state.state),
            "" if state.iterations is None else "{}/{}".format(*state.iterations),
            "" if state.pace is None else f"{state.pace:.3g}",
            "" if state.left is None or state.state == "done" else progress.duration(state.left),
            *(
                [""]
                if state.heartbeat is None or state.state == "done"
                else [f"{progress.duration(now - state.heartbeat)} ago"]
            ),
            *(state.where, state.reward, state.note),
        ]
        for state in states
    ]
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    shown = [[row[place] for place in kept] for row in [head, *rows]]
    return [summary(graph, states), "", *progress.aligned(shown)]


def show(
    graph: workflow.Plan, every: float | None = None, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Print it, and again after `every` seconds until all is done; the exit code.

    Returns:
        1 if a run has failed, else 0.

    Raises:
        ValueError: a run's journal is damaged; names it.
    """
    while True:
        now = time.time()
        states = look(graph, now)
        if every is not None and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        print("\n".join(lines(graph, states, now)), flush=True)
        if every is None or all(state.state == "done" for state in states):
            return int(any(state.state == "failed" for state in states))
        try:
            sleep(every)
        except KeyboardInterrupt:
            return int(any(state.state == "failed" for state in states))
