"""Mirror runs to MLflow: into a local SQLite store, or to a running MLflow server.

A sync adds what MLflow does not have yet, so it can be repeated at any time, also while runs train.

    <store>/mlflow.db    experiments (one per task), runs, parameters, curves
            artifacts/   <task>/<MLflow run id>/artifacts/...
            .lock        held by the one process that writes

MLflow records absolute paths of artifacts, and the store is only a copy: a store that was moved or
is damaged is deleted and synced again.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.util import CommandError
from filelock import FileLock
from mlflow.db import commands
from mlflow.entities import Param, Run, RunInfo, RunTag
from mlflow.tracking import MlflowClient

from tafs.common.errors import one_line
from tafs.common.files import sha256
from tafs.runtime.run_dir import RunDir
from tafs.tracking.run_view import RunView, read_run, sample_images, valid_key

DEFAULT_STORE = Path("results/mlflow")
DATABASE, ARTIFACTS = "mlflow.db", "artifacts"
ATTEMPTS = 3  # per run: training moves files, and another host may create the same run
BATCH_SIZES = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's limits per request
PATIENCE = 5.0  # s for another process to finish writing
KEY_TAG, SCORES_TAG, DIGEST_TAG = "tafs.key", "tafs.scores_sha256", "tafs.sha256/"
REBUILD = "it is only a copy: delete {} and sync again"
# What SQLite and the operating system say of a store that is sound -> the remedy.
SOUND = {
    "database is locked": "end the process that uses it and sync again",
    "readonly database": "make it and its folder writable for you",
    "unable to open database file": "make it and its folder writable for you",
    "Permission denied": "make it and its folder writable for you",
    "Read-only file system": "set `results` to a folder elsewhere",
    "disk is full": "free space and sync again",
    "No space left": "free space and sync again",
}
RESTART = (
    "start it with --artifacts-destination, or correct --server or its credentials "
    "(MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN), and sync again"
)
logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # MLflow also raises what it logs


class SyncError(RuntimeError):
    """Some runs could not be mirrored; one line that names the first and counts the others."""


class UnavailableError(RuntimeError):
    """The store or server cannot be used now; one line that names it and the remedy."""


@dataclass(frozen=True)
class Summary:
    """What one sync did."""

    runs: int  # mirrored, new or known
    points: int  # new in MLflow
    skipped: int  # values of these runs that are not finite
    waiting: int  # run folders in which nothing has started

    def describe(self, place: object) -> str:
        """One line for the command's output."""
        skipped = f", {self.skipped} values that are not finite skipped" if self.skipped else ""
        waiting = f", {self.waiting} runs not started" if self.waiting else ""
        return f"{self.runs} runs in {place} ({self.points} new points{skipped}{waiting})"


Signature = tuple[object, ...]
Seen = dict[Path, Signature]  # runs as they were mirrored
Copies = dict[str, RunInfo]  # the MLflow runs, by the names of the run folders


def sync(
    run_dirs: Sequence[Path],
    store: Path,
    server: str | None = None,
    seen: Seen | None = None,
    copies: Copies | None = None,
) -> Summary:
    """Bring the store, or the server, up to date with the runs. A failed run stops no other.

    Args:
        store: with a server, only its lock is used.
        seen: runs to skip while they are unchanged; the runs of this sync are added.
        copies: the MLflow runs of this sync are added, also if others fail.
    """
    seen = {} if seen is None else seen
    # Taken before the files are read: later changes are left to the next sync.
    signatures = {folder: _signature(folder, store, server) for folder in run_dirs}
    changed = [folder for folder in run_dirs if seen.get(folder) != signatures[folder]]
    if not changed:
        return Summary(0, 0, 0, 0)
    views, points, failures = [], 0, []
    with locked(store):
        mirror = Mirror(store, server)
        for folder in changed:
            try:
                view, copy, new = mirror.update(folder)
            except UnavailableError:
                seen.clear()  # it may come back with less in it
                raise
            except Exception as error:  # MLflow passes on the errors of several packages
                failures.append(f"{folder}: {brief(error)}")
                continue
            seen[folder] = signatures[folder]
            if copy and copies is not None:
                copies[folder.name] = copy
            views += [view] if view else []
            points += new
    if failures:
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise SyncError(f"{len(failures)} of {len(changed)} runs failed: {failures[0]}{others}")
    skipped = sum(view.skipped for view in views)
    return Summary(len(views), points, skipped, waiting=len(changed) - len(views))


def locked(store: Path) -> AbstractContextManager[object]:
    """Take the lock of a store, whose folder is created.

    Raises:
        UnavailableError: the folder is not writable.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        return FileLock(store / ".lock").acquire()
    except OSError as error:
        raise UnavailableError(f"{store}: {unusable(error, REBUILD.format(store))}") from None


def open_store(store: Path) -> MlflowClient:
    """Open a store whose lock is held; create it, or upgrade it to this MLflow's schema."""
    database = (store / DATABASE).resolve()
    # A new database is renamed when it is complete: a partial one could not be opened again.
    made = database if database.exists() else database.with_name(f"incoming-{DATABASE}")
    try:
        if made == database:
            if not os.access(made, os.W_OK):
                raise PermissionError(os.strerror(errno.EACCES))
            # MLflow would try to open a damaged file for minutes.
            with closing(sqlite3.connect(f"{made.as_uri()}?mode=rw", PATIENCE, uri=True)) as opened:
                (verdict,) = opened.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        else:
            made.unlink(missing_ok=True)
        commands.main(["upgrade", f"sqlite:///{made}"], standalone_mode=False)
    except CommandError as error:
        reason = f"written by a newer MLflow, or damaged ({brief(error)})"
        raise UnavailableError(f"{database}: {reason}; {REBUILD.format(store)}") from None
    except Exception as error:  # of SQLite, SQLAlchemy or the operating system
        raise UnavailableError(f"{database}: {unusable(error, REBUILD.format(store))}") from None
    os.replace(made, database)
    return MlflowClient(f"sqlite:///{database}")


class Mirror:
    """An open store, or the server if one is given."""

    def __init__(self, store: Path, server: str | None) -> None:
        self._place = server or str(store)
        self._remedy = RESTART if server else REBUILD.format(store)
        self._artifacts = None if server else store.resolve() / ARTIFACTS
        self._client = MlflowClient(server) if server else open_store(store)
        self._check()

    def _check(self) -> None:
        try:
            self._client.search_experiments(max_results=1)
        except Exception as error:
            raise UnavailableError(f"{self._place}: {unusable(error, self._remedy)}") from None

    def update(self, folder: Path) -> tuple[RunView | None, RunInfo | None, int]:
        """Mirror a run; return its view, MLflow run (None if nothing has started), new points."""
        for _ in range(ATTEMPTS - 1):
            try:
                return self._update(folder)
            except Exception:
                self._check()
        return self._update(folder)

    def _update(self, folder: Path) -> tuple[RunView | None, RunInfo | None, int]:
        view = read_run(folder)
        return (view, *self.put(view)) if view else (None, None, 0)

    def put(self, view: RunView) -> tuple[RunInfo, int]:
        """Mirror what a view shows; return its MLflow run and its new points."""
        run = self._find_or_create(view)
        run_id, known = run.info.run_id, run.data.tags
        # A resumed training repeats iterations at other times: new are steps after a curve's last.
        last = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        points = [p for p in view.curves if p.step > last.get(p.key, -1)]
        if view.scores_sha256 != known.get(SCORES_TAG, ""):
            held = {}
            for key in {point.key for point in view.scores} & last.keys():
                history = self._client.get_metric_history(run_id, key)
                for point in sorted(history, key=lambda point: point.timestamp):
                    held[key, point.step] = point.value
            points += [p for p in view.scores if held.get((p.key, p.step)) != p.value]
        params = [Param(k, v) for k, v in view.parameters.items() if k not in run.data.params]
        self._log(run_id, metrics=points, params=params)
        self._copy_files(run, view)
        # Last, so that the next sync completes one that was interrupted.
        tags = {**view.tags, SCORES_TAG: view.scores_sha256}
        self._log(run_id, tags=[RunTag(k, v) for k, v in tags.items() if known.get(k) != v])
        if view.ended_ms is not None and run.info.status != "FINISHED":
            self._client.set_terminated(run_id, "FINISHED", end_time=view.ended_ms)
        return run.info, len(points)

    def _log(self, run_id: str, **entities: list[Any]) -> None:
        for kind, values in entities.items():
            for low in range(0, len(values), size := BATCH_SIZES[kind]):
                batch: dict[str, Any] = {kind: values[low : low + size]}
                self._client.log_batch(run_id, **batch)

    def _find_or_create(self, view: RunView) -> Run:
        """Get the MLflow run of a training. A new one ends unfinished trainings of the same run."""
        experiment = self._experiment(view.task)
        query = f"tags.`{KEY_TAG}` = '{view.key}'"
        if not self._client.search_runs([experiment], query):
            for run in self._client.search_runs([experiment], "attributes.status = 'RUNNING'"):
                if all(run.data.tags.get(t) == view.tags.get(t) for t in ("tafs.run", "scale")):
                    self._client.set_terminated(run.info.run_id, "KILLED", view.started_ms)
            tags = {**view.tags, KEY_TAG: view.key}
            self._client.create_run(experiment, view.started_ms, tags, view.name)
        # Hosts that share no lock may each have created one; all of them keep the same one.
        found = self._client.search_runs([experiment], query)
        kept, *twins = sorted(found, key=lambda run: run.info.run_id)
        for twin in twins:
            self._client.delete_run(twin.info.run_id)
        return kept

    def _experiment(self, task: str) -> str:
        """Get the id of a task's experiment, which is created, or restored if it was deleted."""
        client, location = self._client, None
        if self._artifacts:
            location = (self._artifacts / re.sub(r"[^a-zA-Z0-9_-]", "_", task)).as_uri()
        experiment = client.get_experiment_by_name(task)
        if experiment is None:
            experiment = client.get_experiment(client.create_experiment(task, location))
        # A folder on a server's own machine, or where a store was before it was moved.
        found = experiment.artifact_location
        if found != location and (location or re.match(r"file:|/", found)):
            raise ValueError(f"{self._place}: keeps artifacts in {found}; {self._remedy}")
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _copy_files(self, run: Run, view: RunView) -> None:
        """Log the files and sample images that are new or have changed."""
        run_id = run.info.run_id
        samples = {view.samples.name: view.samples} if view.samples else {}
        for name, source in (view.files | samples).items():
            tag, digest = valid_key(DIGEST_TAG + name), sha256(source)
            if run.data.tags.get(tag) == digest:
                continue
            if source == view.samples:
                self._log_images(run_id, view)
            else:
                # From a copy, because a journal may grow while it is sent.
                with tempfile.TemporaryDirectory() as folder:
                    copy = shutil.copyfile(source, Path(folder) / name)
                    self._client.log_artifact(run_id, str(copy))
            self._client.set_tag(run_id, tag, digest)

    def _log_images(self, run_id: str, view: RunView) -> None:
        """Log the images that an interrupted sync has not logged yet."""
        logged = [file.path for file in self._client.list_artifacts(run_id, "images")]
        complete = [path for path in logged if path.endswith(".webp")]  # the thumbnail comes last
        for key, image, step, time in sample_images(view):
            prefix = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{time}+"
            if not any(path.startswith(prefix) for path in complete):
                self._client.log_image(run_id, image, key=key, step=step, timestamp=time)


def _signature(folder: Path, store: Path, server: str | None) -> Signature:
    """Change with every file that is mirrored, and with the store or server."""

    def state(file: Path) -> tuple[int, ...]:
        with suppress(FileNotFoundError):
            found = file.stat()
            return found.st_ino, found.st_size, found.st_mtime_ns
        return ()

    run = RunDir(folder)
    files = [folder / "run.json", run.journal, run.state / "journal.jsonl", run.adapter]
    files += [run.scores, run.served_scores, run.samples]
    return server or state(store / DATABASE)[:1], *map(state, files)


def unusable(error: BaseException, otherwise: str) -> str:
    """Why MLflow cannot use its store or server, and the remedy.

    Args:
        otherwise: the remedy if the store may be damaged.
    """
    cause = error  # the first one is the operating system's
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    remedies = (remedy for sign, remedy in SOUND.items() if sign in str(cause))
    return f"MLflow cannot use it ({brief(cause, 100)}); {next(remedies, otherwise)}"


def brief(error: object, length: int = 600) -> str:
    """An error's text in one line."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, length)
