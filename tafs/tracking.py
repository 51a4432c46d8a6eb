"""A copy of the runs for browsing in MLflow: `python -m tafs.tracking sync|ui`.

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

import argparse
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol
from urllib.parse import urlsplit

from tafs import journal
from tafs.digest import sha256

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

DEFAULT_STORE = Path("results/mlflow")
DATABASE, ARTIFACTS = "mlflow.db", "artifacts"
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
# Of the server: nothing is called, nothing runs, no other page may show it.
SERVER_ENVIRONMENT = {
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS": "false",
    "MLFLOW_SERVER_JOB_ENABLE_PERIODIC_TASKS": "false",
    "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",
    "MLFLOW_SERVER_X_FRAME_OPTIONS": "DENY",
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "none",
}
FOREIGN = re.compile(r"^_?MLFLOW_|TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY(_ID)?$")
GUNICORN = "--worker-class=gthread --threads=4 --log-level=warning --no-control-socket"
# MLflow's limits; it cuts longer parameters without a word.
PARAMETER_LENGTH, TAG_LENGTH = 6000, 5000
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


class Point(NamedTuple):
    """One value of a curve."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True)
class Summary:
    """What one sync did."""

    runs: int  # mirrored, new or known
    points: int  # new in the store
    skipped: int  # values of these runs that are no finite numbers
    waiting: int  # run folders in which nothing has started


@dataclass(frozen=True)
class Mirror:
    """A run folder in MLflow's terms."""

    folder: Path
    name: str
    task: str
    key: str  # of this one training of this run
    parameters: dict[str, str]
    tags: dict[str, str]
    curves: list[Point]
    next_iteration: int
    scores: list[Point]
    scores_sha256: str
    started_ms: int
    ended_ms: int | None
    skipped: int
    journal: Path | None


# -- reading a run ---------------------------------------------------------------------------------


def read_run(folder: Path) -> Mirror | None:
    """What MLflow shall show of a run folder; None where nothing has started yet.

    Raises:
        OSError: run.json or another file cannot be read.
        ValueError: run.json, the journal or the scores are damaged; names the file.
    """
    description = _read_description(folder / "run.json")
    # While a run trains, its journal lies with its resume state.
    journals = [folder / ".state" / "journal.jsonl", folder / "journal.jsonl"]
    path = next((p for p in journals if p.exists()), None)
    records = journal.read(path) if path else []
    files = [folder / "scores.parquet", folder / "judgements.parquet"]
    score_files = [file for file in files if file.exists()]
    if not records and not score_files:
        return None

    start: dict[str, Any] = next((r for r in reversed(records) if r["kind"] == "start"), {})
    fingerprint = start.get("fingerprint", description.get("fingerprint", ""))
    facts = description.get("provenance", {}) | start.get("provenance", {})
    described = {k: v for k, v in description.items() if k not in ("fingerprint", "provenance")}
    parameters = {
        _entity(key): _shorten(_text(value), PARAMETER_LENGTH) for key, value in _flatten(described)
    }
    name = str(description.get("name", folder.resolve().name))
    tags = {_entity(key): _text(value) for key, value in _flatten({"provenance": facts})}
    tags |= {k: str(description[k]) for k in ("method", "title", "scale") if k in description}
    tags |= {"fingerprint": fingerprint, RUN: name}
    if facts.get("git_commit"):
        tags["mlflow.source.git.commit"] = facts["git_commit"]

    iterations = journal.iterations(path) if path else []
    curves: list[Point] = []
    skipped = 0
    for record in iterations:
        found, bad = _curve_points(record)
        curves += found
        skipped += bad
    next_iteration = iterations[-1]["iteration"] + 1 if iterations else 0
    scores: list[Point] = []
    for file in score_files:
        found, bad = _score_points(file)
        scores += found
        skipped += bad
    content = b"".join(file.read_bytes() for file in score_files)
    scores_sha256 = hashlib.sha256(content).hexdigest() if score_files else ""
    started = int(records[0]["time"] * 1000) if records else _modified_ms(score_files[0])
    ended = next((int(r["time"] * 1000) for r in records if r["kind"] == "end"), None)
    tags["tafs.skipped_values"] = str(skipped)
    # The start's time, because a run that is trained anew draws curves of its own.
    identity = json.dumps([name, fingerprint, started if records else 0, parameters])
    return Mirror(
        folder=folder,
        name=name,
        task=str(description.get("task") or "base"),
        key=hashlib.sha256(identity.encode()).hexdigest(),
        parameters=parameters,
        tags={key: _shorten(value, TAG_LENGTH) for key, value in tags.items()},
        curves=curves,
        next_iteration=next_iteration,
        scores=scores,
        scores_sha256=scores_sha256,
        started_ms=started,
        ended_ms=ended if records else started,
        skipped=skipped,
        journal=path,
    )


def _read_description(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(description, dict):
        raise ValueError(f"{file}: holds no JSON object")
    return description


def _curve_points(record: Mapping[str, Any]) -> tuple[list[Point], int]:
    """An iteration's points, and how many of its values are no finite numbers.

    A list is indexed by step: `rewards: {toy: [a, b]}` becomes reward/toy/step_0, reward/toy/step_1
    and reward/toy/last, which methods with different numbers of scored steps share.
    """
    values = {k: v for k, v in record.items() if k not in ("kind", "time", "iteration", "rewards")}
    values["reward"] = record.get("rewards", {})
    timestamp, step = int(record["time"] * 1000), record["iteration"]
    points, skipped = [], 0
    for key, leaf in _flatten(values):
        named = {key: leaf}
        if isinstance(leaf, list):
            named = {f"{key}/step_{i}": value for i, value in enumerate(leaf)}
            if leaf:
                named[f"{key}/last"] = leaf[-1]
        for name, value in named.items():
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                skipped += 1
            elif isinstance(value, int | float):
                points.append(Point(_entity(name), float(value), timestamp, step))
    return points, skipped


def _score_points(file: Path) -> tuple[list[Point], int]:
    """score/METRIC/SAMPLER/nfe_N: means over the images, GenEval's as 100 x the mean of its tags'.

    A snapshot's point stands at its iteration, so that the last point is the final model's.

    Raises:
        ValueError: the file is no table of scores.
    """
    import pandas as pd

    try:
        columns = ["tag", "iteration", "sampler", "nfe", "metric", "value"]
        table = pd.read_parquet(file, columns=columns)
    except Exception as error:  # pyarrow has no common class for what a damaged file raises
        raise ValueError(f"{file}: not a table of scores ({error})") from error
    points, skipped = [], 0
    for keys, rows in table.groupby(["metric", "sampler", "nfe", "iteration"], observed=True):
        metric, sampler, nfe, iteration = keys
        if metric == "geneval":
            tags = rows.groupby("tag", observed=True)["value"]
            value = 100 * tags.mean(skipna=False).mean(skipna=False)
        else:
            # A server's missing grades are counted in the tables.
            value = rows["value"].mean(skipna=file.stem == "judgements")
        if math.isfinite(value):
            key = _entity(f"score/{metric}/{sampler}/nfe_{nfe}")
            points.append(Point(key, float(value), _modified_ms(file), int(iteration)))
        else:
            skipped += 1
    return points, skipped


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings with keys such as `seconds/total`."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", item


def _entity(key: str) -> str:
    """A key without the characters that MLflow refuses."""
    return re.sub(r"[^\w./: -]", "_", key, flags=re.ASCII)[:250]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _shorten(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    note = f"... ({len(text)} characters)"
    return text[: length - len(note)] + note


def _modified_ms(file: Path) -> int:
    return file.stat().st_mtime_ns // 1_000_000


# -- writing the copy ------------------------------------------------------------------------------


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
    names += ["scores.parquet", "judgements.parquet", "samples.safetensors"]
    files = [folder / name for name in names] + pictures(folder)
    found = [(str(file), _status(file)) for file in files]
    described = [
        (name, status.st_size, status.st_mtime_ns) for name, status in found if status is not None
    ]
    return (server or (database and database.st_ino), *described)


def pictures(folder: Path) -> list[Path]:
    """The PNG files in a run's folder, but for its hidden ones, which are works in progress and may
    be gone before they have been looked through."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent) / name for name in files if name.endswith(".png")]
    return sorted(found)


def _status(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:
        return None


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


# -- the command line ------------------------------------------------------------------------------


def serve(store: Path, port: int) -> NoReturn:
    """Become MLflow's server on 127.0.0.1, for the browsers of this machine.

    Raises:
        ValueError: there is no store, or it is damaged.
        OSError: the port is taken.
    """
    database = store / DATABASE
    if not database.exists():
        raise ValueError(f"{store}: nothing is tracked yet; `make all` fills it")
    _check_database(database)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise OSError(f"port {port}: {error.strerror}; choose another with --port") from error
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", _uri(database), "--workers", "1"]
    command += ["--artifacts-destination", str((store / ARTIFACTS).resolve())]
    # Under gunicorn MLflow serves its Flask application alone: no assistant that runs commands, no
    # jobs, no calls of language models, none of which can be switched off under uvicorn.
    command += [f"--gunicorn-opts={GUNICORN}"]
    # What is set for MLflow elsewhere could open this server; no credential is of use to it.
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.search(name)}
    hosts = {"MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{port},localhost:{port}"}
    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    os.execve(command[0], command, {**kept, **ENVIRONMENT, **SERVER_ENVIRONMENT, **hosts})


def _one_line(error: object, length: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."


def server_url(text: str) -> str:
    """A server's address as it can be used.

    Raises:
        ValueError: it is none, or holds what does not belong on a command line.
    """
    # Not repeated in the message: it may hold a password.
    if "@" in text or "?" in text or "#" in text:
        raise ValueError(
            "--server: an address without credentials or a query; they belong in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    parts = urlsplit(text)
    try:
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        valid = None
    if not valid:
        raise ValueError(f"--server {text}: not an address such as http://{HOST}:5000")
    return text.rstrip("/")


def _find(run_dirs: list[Path], parent: Path | None) -> list[Path]:
    inside = sorted(file.parent for file in parent.glob("*/run.json")) if parent else []
    return list(dict.fromkeys([*run_dirs, *inside]))


def _describe(done: Summary, place: object) -> str:
    details = f"{done.points} new points"
    if done.skipped:
        details += f", {done.skipped} values that are no finite numbers left out"
    if done.waiting:
        details += f", {done.waiting} runs not started"
    return f"{done.runs} runs in {place} ({details})"


def _complain(error: object) -> None:
    print(f"tracking: {_one_line(error)}", file=sys.stderr, flush=True)


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event and leave the block, in the middle of whatever it does.

    Where Python lets nothing be raised, as in a weak reference's callback, the event has to do.
    """
    stop = threading.Event()

    def interrupt(*_: object) -> None:
        if not stop.is_set():
            stop.set()
            raise KeyboardInterrupt

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            said(lost)

    said, sys.unraisablehook = sys.unraisablehook, unraisable
    previous = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt:
        pass
    finally:
        sys.unraisablehook = said
        for each, handler in previous.items():
            signal.signal(each, handler)


def keep_syncing(
    find: Callable[[], list[Path]], store: Path, server: str | None, seconds: float
) -> None:
    """Sync the folders that `find` names again and again, until interrupted.

    A line for each round that mirrored or failed; runs whose files are unchanged are passed over.
    """
    seen: dict[Path, Signature] = {}
    with _until_interrupted() as stop:
        while not stop.is_set():
            try:
                done = sync(find(), store, server, seen)
                if done.runs:
                    print(_describe(done, server or store), flush=True)
            # The next round may find the disk, the server or the run in order again.
            except Exception as error:
                _complain(error)
            stop.wait(seconds)


def main(arguments: list[str] | None = None) -> int:
    """The exit code, with one line on stderr: 2 for bad input, 1 if something could not be done."""
    parser = argparse.ArgumentParser(prog="python -m tafs.tracking", description="MLflow's copy")
    commands = parser.add_subparsers(dest="command", required=True)
    syncing = commands.add_parser("sync", help="mirror run folders into the store or to a server")
    syncing.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR")
    syncing.add_argument("--runs", type=Path, metavar="FOLDER", help="all run folders in it")
    syncing.add_argument("--server", metavar="URL", help="a running MLflow server")
    syncing.add_argument(
        "--every", type=float, metavar="SECONDS", help="again and again, until interrupted"
    )
    serving = commands.add_parser("ui", help=f"browse the store on {HOST}")
    serving.add_argument("--port", type=int, default=5000)
    for command in (syncing, serving):
        command.add_argument("--store", type=Path, default=DEFAULT_STORE)
    given = parser.parse_args(arguments)
    try:
        if given.command == "ui":
            serve(given.store, given.port)
    except Exception as error:
        _complain(error)
        return 1
    try:
        server = server_url(given.server) if given.server is not None else None
        _check(given)
    except ValueError as error:
        _complain(error)
        return 2
    find = partial(_find, given.run_dirs, given.runs)
    try:
        if given.every:
            keep_syncing(find, given.store, server, given.every)
        else:
            print(_describe(sync(find(), given.store, server), server or given.store))
    # A copy that fails must not look like a run that fails: one line, whatever it was.
    except Exception as error:
        _complain(error)
        return 1
    return 0


def _check(given: argparse.Namespace) -> None:
    """Raise ValueError for a sync that could mirror nothing."""
    if not given.run_dirs and given.runs is None:
        raise ValueError("no runs: name their folders, or with --runs the folder that holds them")
    if given.every is not None and not 0 < given.every < threading.TIMEOUT_MAX:
        raise ValueError(f"--every {given.every}: a number of seconds above 0")
    # With --every it may appear later.
    if given.runs and given.every is None and not given.runs.is_dir():
        raise ValueError(f"--runs {given.runs}: no such folder")


if __name__ == "__main__":
    sys.exit(main())
