"""Run folders to mirror to MLflow, and everything that MLflow then holds of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pandas as pd
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from safetensors.numpy import save_file

from tafs.runtime.journal import Journal

START = 1_700_000_000.25  # s
ITERATIONS, SNAPSHOT = 3, 50
PROMPTS, SHOWN = 12, 6  # stored sample images, and those of them that MLflow shows
UPLOADING = ".artifact.uploading."  # in the names that a killed server leaves and never shows
Contents = dict[tuple[str, str], dict[str, Any]]  # by experiment and run


def describe(folder: Path, **changes: Any) -> None:
    description: dict[str, Any] = {"name": folder.name, "method": "tafs_grpo", "task": "text"}
    description |= {"title": "TAFS-GRPO", "seed": 3, "scale": "smoke", "rewards": {"toy": 0.5}}
    description["training"] = {"iterations": 100, "lora": {"rank": 4}}
    parameters = {"learning_rate": 3e-4, "steps": [1, 2], "note": "n" * 7000}
    description["hyperparameters"] = {**parameters, "a=b": 1, "x" * 300: None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**description, **changes}))


def begin(journal: Journal, at: float = START) -> None:
    provenance = {"git_commit": "c0ffee", "weights": {"sd3": "d" * 64}, "note": "n" * 6000}
    journal.append("start", fingerprint="f1", provenance=provenance, time=at)


def iterate(journal: Journal, iteration: int, delay: float = 0.0, kl: float = 0.5) -> None:
    record = {"time": START + iteration + 1 + delay, "iteration": iteration, "kl": kl}
    record["rewards"] = {"toy": [iteration / 10, iteration / 5]}
    journal.append("iteration", **record, seconds={"sample": 1.5, "total": 2.0})


def training_run(folder: Path, iterations: int, delay: float = 0.0, **changes: Any) -> Journal:
    """A run that trains; return its journal."""
    describe(folder, **changes)
    journal = Journal(folder / ".state" / "journal.jsonl")
    begin(journal, START + delay)
    for iteration in range(iterations):
        iterate(journal, iteration, delay)
    return journal


def trained_run(folder: Path, **changes: Any) -> Path:
    """A finished run with every kind of file."""
    describe(folder, **changes)
    journal = Journal(folder / "journal.jsonl")
    begin(journal)
    for iteration in range(ITERATIONS):
        iterate(journal, iteration, kl=float("nan") if iteration == 1 else 0.5)
    journal.append("end", time=START + 50)
    (folder / "adapter.safetensors").write_bytes(b"adapter")
    images = np.arange(PROMPTS, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    save_file({"prompts": np.arange(PROMPTS) * 10, "ode-4": images}, folder / "samples.safetensors")
    rows = [("one", "geneval", value, 100) for value in (1.0, 0.0, 0.0, 1.0)]
    rows += [("two", "geneval", 1.0, 100), ("two", "hpsv2", np.nan, 100)]
    rows += [("one", "pickscore", 20.0, 100), ("two", "pickscore", 23.0, 100)]
    rows += [("two", "pickscore", 23.0, 100), ("one", "other", 1.0, 100)]
    rows += [("one", "geneval", 0.0, SNAPSHOT), ("two", "geneval", 1.0, SNAPSHOT)]
    table = pd.DataFrame(rows, columns=["tag", "metric", "value", "iteration"])
    table = table.assign(run=folder.name, method="m", seed=3, prompt=0, image=0)
    table = table.assign(sampler="ode", nfe=4).astype({"tag": "category", "metric": "category"})
    table.to_parquet(folder / "scores.parquet", index=False)
    served = table[table["metric"] == "pickscore"].assign(metric="unifiedreward")
    served["value"] = [np.nan, 3.0, 4.0]
    served.to_parquet(folder / "served_scores.parquet", index=False)
    return folder


def client(store: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{store}/mlflow.db")


def runs(store: Path, name: str = "") -> list[Run]:
    """The MLflow runs of a name, or all runs, by their start."""
    experiments = [found.experiment_id for found in client(store).search_experiments()]
    found = client(store).search_runs(experiments, order_by=["attributes.start_time ASC"])
    return [run for run in found if name in ("", run.info.run_name)]


def history(store: Path, run: Run, key: str) -> list[tuple[int, int, float]]:
    """Step, time (ms) and value of every point of a curve."""
    points = client(store).get_metric_history(run.info.run_id, key)
    return sorted((p.step, p.timestamp, p.value) for p in points)


def artifacts(run: Run, root: Path) -> dict[str, Path]:
    """The files of a run by name, without the random part of an image's name."""
    address = urlsplit(run.info.artifact_uri)
    path = url2pathname(address.path)
    folder = Path(path) if address.scheme == "file" else root / path.lstrip("/")
    files = [f for f in folder.rglob("*") if f.is_file() and UPLOADING not in f.name]
    names = [re.sub(r"\+[0-9a-f-]{36}", "", str(file.relative_to(folder))) for file in files]
    # A sync that was killed may have left an image without its thumbnail.
    twice = [name for name, count in Counter(names).items() if count > 1]
    assert not [name for name in twice if not name.endswith(".png")]
    return dict(sorted(zip(names, files, strict=True)))


def contents(store: Path) -> Contents:
    """All that a store, or the folder of a server, holds, without MLflow's own ids."""
    found: Contents = {}
    for run in runs(store):
        info, data = run.info, run.data
        experiment = client(store).get_experiment(info.experiment_id).name
        assert (experiment, info.run_name) not in found, f"{info.run_name} twice"
        found[experiment, info.run_name] = {
            "info": (info.status, info.start_time, info.end_time),
            "metrics": {key: history(store, run, key) for key in data.metrics},
            "last": data.metrics,
            "params": data.params,
            "tags": data.tags,
            "files": {k: f.read_bytes() for k, f in artifacts(run, store / "artifacts").items()},
        }
    return found


def once_per_step(run: dict[str, Any]) -> bool:
    """Whether every curve has one value per step."""
    curves = run["metrics"].values()
    return all(len({step for step, *_ in curve}) == len(curve) for curve in curves)
