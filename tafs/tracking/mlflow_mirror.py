"""A copy of the runs for browsing in MLflow: `python -m tafs.tracking.cli sync|ui`.

The journals are the truth and nothing reads from here, so a store that is lost or damaged can be
deleted and synced again. A sync may be repeated at any time, also while runs train: what the store
already holds is left alone. Layout of a store, which may be moved as a whole:

    <store>/mlflow.db    experiments (a task each), runs, parameters, curves
            artifacts/   <task>/<MLflow's run id>/artifacts/...
            .lock        held by the one process that writes

With `--server URL` the copy is a running MLflow server's instead, and of the store only the lock is
used. MLflow's own variables (MLFLOW_TRACKING_USERNAME, _PASSWORD, _TOKEN) hold its credentials.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from tafs.common.files import sha256

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient
from tafs.tracking.run_view import Mirror, _entity, _status, pictures, read_run

DEFAULT_STORE = Path("results/mlflow")


DATABASE, ARTIFACTS = "mlflow.db", "artifacts"


ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


METRICS_PER_BATCH, ENTRIES_PER_BATCH = 1000, 100


HOST = "127.0.0.1"


# A server that is gone would be waited for by MLflow's client for minutes; the next sync does it.
TIMEOUT, REQUEST_SECONDS, PROBE_SECONDS = "MLFLOW_HTTP_REQUEST_TIMEOUT", 30, 10


ATTEMPTS = 3  # at a run: files move while it trains, and hosts without a common lock meet


SHOWN_COLUMNS = 4  # of sampled images in a picture, and as many rows


# Tags by which a sync knows what the store holds.
KEY, RUN, CURVES, SCORES = "tafs.key", "tafs.run", "tafs.next_iteration", "tafs.scores_sha256"


UPLOADED = "tafs.sha256/"  # of an artifact's source, on a server


class SyncError(RuntimeError):
    """Some runs could not be mirrored; one line that names the first and counts the others."""


class ServerError(RuntimeError):
    """The server cannot be used now; one line that names it and what to do."""


@dataclass(frozen=True)
class Summary:
    """What one sync did."""

    runs: int  # mirrored, new or known
    points: int  # new in the store
    skipped: int  # values of these runs that are no finite numbers
    waiting: int  # run folders in which nothing has started


class Copy(Protocol):
    """Where the runs are mirrored to."""

    client: MlflowClient

    def artifact_location(self, task: str) -> str | None:
        """Of a task's experiment; None where the server chooses."""

    def place(self, run: Run, name: str, source: Path, write: Callable[[Path], object]) -> None:
        """Make an artifact by `write`, which fills a path, unless the source is unchanged."""

    def verify(self) -> None:
        """Raise ServerError if nothing can be mirrored now."""


Signature = tuple[object, ...]


def sync(
    run_dirs: list[Path],
    store: Path,
    server: str | None = None,
    seen: dict[Path, Signature] | None = None,
) -> Summary:
    """Bring the store, or the server's copy, up to date with the runs.

    A run that fails does not keep back the others. `seen` holds what the runs' files were like when
    they were mirrored: such runs are passed over, and those mirrored now are added.

    Raises:
        SyncError: a run could not be mirrored.
        ServerError: the server cannot be used; what it lacks is sent by the next sync.
        OSError, ValueError: the store cannot be opened.
    """
    seen = {} if seen is None else seen
    # Before the files are read, so that what changes meanwhile is mirrored by the next sync.
    signatures = {folder: _signature(folder, store, server) for folder in run_dirs}
    changed = [folder for folder in run_dirs if seen.get(folder) != signatures[folder]]
    runs = points = skipped = waiting = 0
    if not changed:
        return Summary(runs, points, skipped, waiting)
    store.mkdir(parents=True, exist_ok=True)
    failures = []
    with _locked(store):
        copy = Server(server) if server else Local(store)
        for folder in changed:
            try:
                mirror, new = _mirror(copy, folder)
            except ServerError as error:
                seen.clear()  # it may come back as another one, with less in it
                raise ServerError(f"{error} ({runs} of {len(changed)} runs mirrored)") from None
            # MLflow lets errors of several packages through; all mean "not mirrored".
            except Exception as error:
                failures.append(f"{folder}: {_one_line(error)}")
                continue
            seen[folder] = signatures[folder]
            if mirror is None:
                waiting += 1
                continue
            runs += 1
            points += new
            skipped += mirror.skipped
    if failures:
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise SyncError(f"{len(failures)} of {len(changed)} runs failed: {failures[0]}{others}")
    return Summary(runs, points, skipped, waiting)


def _mirror(copy: Copy, folder: Path) -> tuple[Mirror | None, int]:
    """A run, mirrored, and how many points were new; None where nothing has started yet."""
    for _ in range(ATTEMPTS - 1):
        try:
            return _mirror_once(copy, folder)
        except Exception:
            copy.verify()
    return _mirror_once(copy, folder)


def _mirror_once(copy: Copy, folder: Path) -> tuple[Mirror | None, int]:
    mirror = read_run(folder)
    return mirror, 0 if mirror is None else _push(copy, mirror)


def _signature(folder: Path, store: Path, server: str | None) -> Signature:
    """Changes with every file that is mirrored, and with the database that it is mirrored to."""
    database = None if server else _status(store / DATABASE)
    names = ["run.json", "journal.jsonl", ".state/journal.jsonl", "adapter.safetensors"]
    names += ["scores.parquet", "served_scores.parquet", "samples.safetensors"]
    files = [folder / name for name in names] + pictures(folder)
    found = [(str(file), _status(file)) for file in files]
    described = [
        (name, status.st_size, status.st_mtime_ns) for name, status in found if status is not None
    ]
    return (server or (database and database.st_ino), *described)


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """One writer at a time: processes that create a store together would break it."""
    with (store / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _uri(database: Path) -> str:
    path = str(database.resolve())
    if "?" in path:
        raise ValueError(f"{database}: MLflow cannot open a path with a question mark")
    return f"sqlite:///{path}"


def _open(store: Path) -> MlflowClient:
    """A client of the store, which is created or brought to this MLflow's schema."""
    database = store / DATABASE
    new = not database.exists()
    if not new:
        _check_database(database)
    os.environ.update(ENVIRONMENT)
    from mlflow.db import commands
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking import MlflowClient

    # The environment's level counts only where nothing imported mlflow before.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # A new one gets its name when it is complete: a half-made one could not be opened again.
    target = store / f"incoming-{DATABASE}" if new else database
    for left_over in store.glob("incoming-*"):
        left_over.unlink()
    commands.main(["upgrade", _uri(target)], standalone_mode=False)
    # mlflow-artifacts:/ is resolved by the server, so that no absolute path enters the store.
    created = SqlAlchemyStore(_uri(target), "mlflow-artifacts:/")
    # Also of a known one: this process may hold connections to a deleted file of this name.
    created.engine.dispose()
    if new:
        os.replace(target, database)
        SqlAlchemyStore(_uri(database), "mlflow-artifacts:/").engine.dispose()
    return MlflowClient(tracking_uri=_uri(database))


def _check_database(database: Path) -> None:
    """Raise ValueError for a damaged file, which MLflow would try to open for minutes."""
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=rw", uri=True)) as found:
            (verdict,) = found.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        raise ValueError(
            f"{database}: {_one_line(verdict)}; it is only a copy: delete {database.parent} and "
            "sync again"
        )


class Local:
    """The store's own database and files, written without a server."""

    def __init__(self, store: Path) -> None:
        self.client = _open(store)
        self._artifacts = store / ARTIFACTS

    def artifact_location(self, task: str) -> str:
        return f"mlflow-artifacts:/{re.sub(r'[^a-zA-Z0-9_-]', '_', task)}"

    def place(self, run: Run, name: str, source: Path, write: Callable[[Path], object]) -> None:
        # Directly and not by the client, which would need a running server to resolve the address.
        folder = self._artifacts / urlsplit(run.info.artifact_uri).path.lstrip("/")
        _place(folder / name, source, write)

    def verify(self) -> None:
        """It was opened, and its errors are a run's."""


class Server:
    """A running MLflow server.

    Raises:
        ServerError: it does not answer, or refuses.
    """

    def __init__(self, url: str) -> None:
        os.environ.update(ENVIRONMENT)
        # A request that MLflow's client repeats could make a run twice; a sync repeats it instead.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        os.environ.setdefault(TIMEOUT, str(REQUEST_SECONDS))
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.url = url
        self.client = MlflowClient(tracking_uri=url)
        self.verify()

    def artifact_location(self, task: str) -> None:
        return None

    def place(self, run: Run, name: str, source: Path, write: Callable[[Path], object]) -> None:
        uri = run.info.artifact_uri
        if urlsplit(uri).scheme in ("", "file"):
            raise ValueError(
                f"{self.url} keeps artifacts in {uri}, a folder of its own machine: start it with "
                "--serve-artifacts and --artifacts-destination, and no --default-artifact-root"
            )
        # Before the file is sent: one that changes meanwhile is sent again by the next sync.
        digest = sha256(source)
        tag = _entity(f"{UPLOADED}{name}")
        if run.data.tags.get(tag) == digest:
            return
        parent, _, last = name.rpartition("/")
        # From a copy, because a journal may grow while it is sent.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / last
            write(path)
            self.client.log_artifact(run.info.run_id, str(path), parent or None)
        self.client.set_tag(run.info.run_id, tag, digest)

    def verify(self) -> None:
        patience = os.environ[TIMEOUT]
        os.environ[TIMEOUT] = str(PROBE_SECONDS)
        try:
            self.client.search_experiments(max_results=1)
        except Exception as error:
            reason, remedy = _reason(error), "start it or correct --server"
            if getattr(error, "error_code", "") in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
                remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"
            raise ServerError(
                f"{self.url}: no MLflow server that can be used ({reason}): {remedy}, and sync "
                "again; nothing is lost"
            ) from None
        finally:
            os.environ[TIMEOUT] = patience


def _reason(error: BaseException) -> str:
    """The system's word for what went wrong with a connection, or the error's own text."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return _one_line(error, 100)


def _push(copy: Copy, mirror: Mirror) -> int:
    """Add what the copy lacks of one run; how many points that were."""
    from mlflow.entities import Metric, Param, RunTag

    client = copy.client
    run = _find_or_create(copy, mirror)
    run_id, known = run.info.run_id, run.data.tags

    first = int(known.get(CURVES, 0))
    # Curves are sent in order, so a key's last step says what of it had arrived before a cut.
    last = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    points = [p for p in mirror.curves if p.step >= first and p.step > last.get(p.key, -1)]
    if mirror.scores_sha256 != known.get(SCORES, ""):
        held = _last_values(client, run_id, {p.key for p in mirror.scores} & last.keys())
        points += [p for p in mirror.scores if held.get((p.key, p.step)) != p.value]
    metrics = [Metric(*point) for point in points]
    for low in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[low : low + METRICS_PER_BATCH])

    missing = [Param(k, v) for k, v in mirror.parameters.items() if k not in run.data.params]
    for low in range(0, len(missing), ENTRIES_PER_BATCH):
        client.log_batch(run_id, params=missing[low : low + ENTRIES_PER_BATCH])
    _copy_artifacts(copy, run, mirror)

    # Last, so that what was cut short is done again.
    tags = {
        **mirror.tags,
        CURVES: str(max(first, mirror.next_iteration)),
        SCORES: mirror.scores_sha256,
    }
    changed = [RunTag(key, value) for key, value in tags.items() if known.get(key) != value]
    for low in range(0, len(changed), ENTRIES_PER_BATCH):
        client.log_batch(run_id, tags=changed[low : low + ENTRIES_PER_BATCH])
    if mirror.ended_ms is not None and run.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED", end_time=mirror.ended_ms)
    return len(points)


def _last_values(client: MlflowClient, run_id: str, keys: set[str]) -> dict[tuple[str, int], float]:
    """The newest value of every step of these curves."""
    values = {}
    for key in sorted(keys):
        history = client.get_metric_history(run_id, key)
        for metric in sorted(history, key=lambda metric: metric.timestamp):
            values[key, metric.step] = metric.value
    return values


def _find_or_create(copy: Copy, mirror: Mirror) -> Run:
    """The MLflow run of this training; a new one closes the unfinished ones of the same run."""
    client = copy.client
    experiment_id = _experiment(copy, mirror.task)
    found = _runs_of(client, experiment_id, mirror.key)
    if not found:
        for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
            tags = run.data.tags
            same = (tags.get(RUN), tags.get("scale")) == (mirror.name, mirror.tags.get("scale"))
            if same and tags.get(KEY) != mirror.key:
                client.set_terminated(run.info.run_id, "KILLED", end_time=mirror.started_ms)
        tagged = {**mirror.tags, KEY: mirror.key}
        client.create_run(experiment_id, mirror.started_ms, tagged, mirror.name)
        found = _runs_of(client, experiment_id, mirror.key)
    # Hosts without a common lock may each have made one; all of them keep the same one.
    for twin in found[1:]:
        client.delete_run(twin.info.run_id)
    return found[0]


def _experiment(copy: Copy, task: str) -> str:
    """The id of a task's experiment, which may be new or come back from the deleted ones."""
    from mlflow.exceptions import MlflowException

    experiment = copy.client.get_experiment_by_name(task)
    if experiment is None:
        try:
            return copy.client.create_experiment(task, copy.artifact_location(task))
        except MlflowException as error:
            # Another host was faster.
            experiment = copy.client.get_experiment_by_name(task)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        copy.client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def _runs_of(client: MlflowClient, experiment_id: str, key: str) -> list[Run]:
    found = client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'")
    return sorted(found, key=lambda run: run.info.run_id)


def _copy_artifacts(copy: Copy, run: Run, mirror: Mirror) -> None:
    """Place the run's files that are new or have changed, and pictures of its sampled images."""
    sources = [mirror.folder / "run.json", mirror.folder / "adapter.safetensors"]
    copies = {source.name: source for source in sources if source.exists()}
    if mirror.journal:
        copies["journal.jsonl"] = mirror.journal
    for image in pictures(mirror.folder):
        copies[str(image.relative_to(mirror.folder))] = image
    for name, source in copies.items():
        copy.place(run, name, source, partial(shutil.copyfile, source))
    samples = mirror.folder / "samples.safetensors"
    if samples.exists():
        from safetensors import safe_open

        with safe_open(samples, "numpy") as images:
            # `prompts` says which prompts the images are of.
            for name in sorted(set(images.keys()) - {"prompts"}):
                draw = partial(_draw, images, name)
                copy.place(run, f"samples/{_entity(name)}.png", samples, draw)


def _draw(images: Any, name: str, path: Path) -> None:
    """A picture of the first images of a sampler, uint8 [images, height, width, 3]."""
    from PIL import Image

    stored = images.get_slice(name)
    count = min(stored.get_shape()[0], SHOWN_COLUMNS**2)
    shown = stored[:count]
    _, height, width, _ = shown.shape
    rows = math.ceil(count / SHOWN_COLUMNS)
    grid = Image.new("RGB", (SHOWN_COLUMNS * width, rows * height))
    for index, image in enumerate(shown):
        row, column = divmod(index, SHOWN_COLUMNS)
        grid.paste(Image.fromarray(image), (column * width, row * height))
    grid.save(path, format="PNG")


def _place(path: Path, source: Path, write: Callable[[Path], object]) -> None:
    """Fill a file in one step unless it is up to date, which its source's time on it tells."""
    modified = source.stat().st_mtime_ns
    if path.exists() and path.stat().st_mtime_ns == modified:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    write(temporary)
    os.utime(temporary, ns=(modified, modified))
    os.replace(temporary, path)


def _one_line(error: object, length: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."
