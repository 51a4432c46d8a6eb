"""Mirror a hyperparameter search to MLflow: a run for the search, and inside it one per trial.

They are in the experiment `tafs-tuning` of the store that holds the trainings. A sync adds what is
new, so that it can be repeated after every trial.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Metric as Point
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from tafs.tracking.mlflow_mirror import Mirror, locked
from tafs.tracking.run_view import PARAMETER_LENGTH, TAG_LENGTH, RunView, texts, valid_key

EXPERIMENT = "tafs-tuning"


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    number: int
    state: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]  # finite ones only
    started_ms: int
    ended_ms: int
    failure: str = ""


@dataclass(frozen=True)
class Search:
    """A method's search, as far as it is."""

    name: str
    key: str  # changes when the search starts from the beginning
    scale: str
    settings: Mapping[str, Any]
    trials: Sequence[Trial]  # finished, by number
    complete: bool


def sync(store: Path, search: Search) -> None:
    """Bring the store up to date with a search that has at least one finished trial.

    Raises:
        UnavailableError: the store cannot be used; names it and the remedy.
        Exception: of MLflow.
    """
    with locked(store):
        mirror = Mirror(store, None)
        parent, _ = mirror.put(_search_view(search))
        for trial in search.trials:
            mirror.put(_trial_view(search, trial, parent.run_id))


def _search_view(search: Search) -> RunView:
    curve = [
        Point(key, float(trial.metrics[key]), trial.ended_ms, trial.number)
        for key in ("objective", "mean")
        for trial in search.trials
        if key in trial.metrics
    ]
    return _view(
        search,
        name=search.name,
        parameters=search.settings,
        tags={},
        curves=curve,
        started_ms=search.trials[0].started_ms,
        ended_ms=search.trials[-1].ended_ms if search.complete else None,
    )


def _trial_view(search: Search, trial: Trial, parent: str) -> RunView:
    return _view(
        search,
        name=f"{search.name}.{trial.number}",
        parameters=trial.parameters,
        tags={MLFLOW_PARENT_RUN_ID: parent, "state": trial.state, "failure": trial.failure},
        curves=[
            Point(valid_key(key), float(value), trial.ended_ms, 0)
            for key, value in trial.metrics.items()
        ],
        started_ms=trial.started_ms,
        ended_ms=trial.ended_ms,
    )


def _view(
    search: Search, name: str, parameters: Mapping[str, Any], tags: Mapping[str, Any], **fields: Any
) -> RunView:
    identity = f"{search.key} {name} {fields['started_ms']}"
    shared = {"tafs.run": name, "scale": search.scale, "tafs.search": search.key}
    return RunView(
        name=name,
        task=EXPERIMENT,
        key=hashlib.sha256(identity.encode()).hexdigest(),
        parameters=texts(parameters.items(), PARAMETER_LENGTH),
        tags=texts({**shared, **tags}.items(), TAG_LENGTH),
        scores=[],
        scores_sha256="",
        skipped=0,
        files={},
        samples=None,
        **fields,
    )
