"""MLflow holds each run once, however often and wherever a sync is interrupted."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.mirrored_runs import (
    SHOWN,
    START,
    artifacts,
    client,
    contents,
    describe,
    history,
    iterate,
    runs,
    trained_run,
    training_run,
)

from tafs.runtime.journal import Journal
from tafs.tracking import mlflow_mirror, run_view
from tafs.tracking.mlflow_mirror import Summary, SyncError, UnavailableError, sync


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("runs") / "tafs_grpo.text.sd3.3")


@pytest.fixture(scope="module")
def store(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that two processes created together, in a folder with special characters."""
    store = tmp_path_factory.mktemp("a b#%20é") / "mlflow"
    command = [sys.executable, "-m", "tafs.tracking.cli", "sync", "--store", store, finished]
    other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (store / ".lock").exists() and other.poll() is None:
        time.sleep(0.005)
    sync([finished], store)
    assert (other.communicate()[1], other.returncode) == ("", 0)
    return store


def test_a_store_holds_a_run_with_its_files_and_images_once(store: Path, finished: Path) -> None:
    (run,) = runs(store)
    view = run_view.read_run(finished)
    assert view is not None
    assert client(store).get_experiment(run.info.experiment_id).name == "text"
    assert (run.info.run_name, run.info.status) == (finished.name, "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (view.started_ms, view.ended_ms)
    assert run.data.params == view.parameters
    assert view.tags.items() <= run.data.tags.items()
    for point in [*view.curves, *view.scores]:
        assert (point.step, point.timestamp, point.value) in history(store, run, point.key)
    files = artifacts(run, store)
    images = [name for name in files if name.startswith("images/")]
    assert len(images) == 2 * SHOWN  # each with its thumbnail
    assert "+step+100+timestamp+" in images[0]
    copies = {"run.json", "journal.jsonl", "adapter.safetensors"}
    assert files.keys() - set(images) == copies
    assert all(files[name].read_bytes() == (finished / name).read_bytes() for name in copies)
    assert {path.name for path in store.parent.iterdir()} == {"mlflow"}


def test_a_second_sync_changes_nothing(store: Path, finished: Path) -> None:
    before = contents(store)
    assert sync([finished], store) == Summary(1, points=0, skipped=2, waiting=0)
    assert contents(store) == before


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_trains_is_completed_by_later_syncs(
    store: Path, tmp_path: Path, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the first sync fails after it has added points."""
    folder = tmp_path / f"growing-{fails}"
    describe(folder)
    assert sync([folder], store).waiting == 1
    journal = training_run(folder, iterations=5)
    with monkeypatch.context() as patch, pytest.raises(SyncError) if fails else nullcontext():
        if fails:
            patch.setattr(mlflow_mirror.MlflowClient, "log_artifact", None)
        sync([folder], store)
    (run,) = runs(store, folder.name)
    assert (run.info.status, len(history(store, run, "kl"))) == ("RUNNING", 5)
    # Killed, resumed from a state that is two iterations old, and finished.
    for iteration in range(3, 8):
        iterate(journal, iteration, delay=100)
    journal.append("end", time=START + 200)
    os.replace(journal.path, folder / "journal.jsonl")
    sync([folder], store)
    (run,) = runs(store, folder.name)
    assert run.info.status == "FINISHED"
    for key in ("kl", "reward/toy/last", "seconds/total"):
        assert [step for step, *_ in history(store, run, key)] == list(range(8))


@pytest.mark.parametrize("call", ["log_batch", "log_artifact", "log_image", "set_tag"])
def test_a_sync_that_fails_at_any_call_is_completed_by_the_next(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained_run(tmp_path / "cut")
    sync([folder], tmp_path / "whole")
    original, calls = getattr(mlflow_mirror.MlflowClient, call), 0

    def cut(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError("the disk is full")
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(SyncError, match="cut: the disk is full"):
        patch.setattr(mlflow_mirror.MlflowClient, call, cut)
        patch.setattr(mlflow_mirror, "ATTEMPTS", 1)
        sync([folder], tmp_path / "store")
    sync([folder], tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_rewritten_scores_add_only_values_that_changed(store: Path, tmp_path: Path) -> None:
    folder = trained_run(tmp_path / "rescored")
    sync([folder], store)
    table = pd.read_parquet(folder / "scores.parquet")
    table.to_parquet(folder / "scores.parquet", index=False, compression="gzip")
    assert sync([folder], store).points == 0
    table.loc[table["metric"] == "pickscore", "value"] = 24.0
    table.to_parquet(folder / "scores.parquet", index=False)
    assert sync([folder], store).points == 1
    (run,) = runs(store, "rescored")
    assert run.data.metrics["score/PickScore/ode/nfe_4"] == 24.0
    assert len(history(store, run, "score/GenEval/ode/nfe_4")) == 2


def test_a_run_that_is_trained_again_is_a_new_run_and_ends_the_old_one(
    store: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    for attempt, rate in enumerate((0.1, 0.2, 0.2)):
        shutil.rmtree(folder, ignore_errors=True)
        training_run(folder, 1, attempt, hyperparameters={"learning_rate": rate})
        sync([folder], store)
    found = runs(store, "again")
    assert [run.info.status for run in found] == ["KILLED", "KILLED", "RUNNING"]
    rates = [run.data.params["hyperparameters/learning_rate"] for run in found]
    assert rates == ["0.1", "0.2", "0.2"]


def test_unchanged_runs_are_skipped_unless_the_store_is_another(tmp_path: Path) -> None:
    store, seen = tmp_path / "store", {}
    folders = [trained_run(tmp_path / name) for name in ("one", "two")]
    # Twice, because the first sync creates the store.
    assert [sync(folders, store, seen=seen).runs for _ in range(3)] == [2, 2, 0]
    Journal(folders[0] / "journal.jsonl").append("end", time=START + 60)
    assert sync(folders, store, seen=seen).runs == 1
    shutil.rmtree(store)
    assert sync(folders, store, seen=seen).runs == 2
    assert len(runs(store)) == 2


def test_an_experiment_that_was_deleted_in_the_browser_is_restored(
    store: Path, tmp_path: Path
) -> None:
    folder = trained_run(tmp_path / "deleted", task="../a'; drop")
    sync([folder], store)
    (run,) = runs(store, "deleted")
    client(store).delete_experiment(run.info.experiment_id)
    sync([folder], store)
    (run,) = runs(store, "deleted")
    assert run.info.artifact_uri.startswith(f"{(store / 'artifacts/___a___drop').as_uri()}/")


def test_a_moved_store_is_refused_in_one_line(tmp_path: Path, finished: Path) -> None:
    sync([finished], tmp_path / "old")
    os.replace(tmp_path / "old", tmp_path / "new")
    with pytest.raises(
        SyncError, match=f"/old/artifacts/text; it is only a copy: delete {tmp_path}/new"
    ):
        sync([finished], tmp_path / "new")
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("kind", ["not a database", "truncated", "newer"])
def test_a_store_that_mlflow_cannot_open_is_named_with_the_remedy(
    tmp_path: Path, store: Path, finished: Path, kind: str
) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copyfile(store / "mlflow.db", database)
    if kind == "newer":
        with sqlite3.connect(database) as opened:
            opened.execute("UPDATE alembic_version SET version_num = 'feedbeef'")
    else:
        content = database.read_bytes()
        database.write_bytes(content[:9999] if kind == "truncated" else b"no database" * 100)
    before = database.read_bytes()
    reason = "written by a newer MLflow, or damaged" if kind == "newer" else "MLflow cannot use it"
    message = rf"^{database}: {reason} \(.*\); it is only a copy: delete {tmp_path} and sync"
    with pytest.raises(UnavailableError, match=message):
        sync([finished], tmp_path)
    assert database.read_bytes() == before


def test_a_store_that_another_process_uses_is_named_and_not_called_damaged(
    tmp_path: Path, store: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copyfile(store / "mlflow.db", database)
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(mlflow_mirror, "PATIENCE", 0.1)
        message = rf"^{database}: .*\(database is locked\); end the process that uses it and sync"
        with pytest.raises(UnavailableError, match=message):
            sync([finished], tmp_path)


@pytest.mark.parametrize("name", ["mlflow.db", ".lock"])
def test_a_store_that_is_not_writable_is_named_with_the_remedy(
    tmp_path: Path, store: Path, finished: Path, name: str
) -> None:
    shutil.copyfile(store / "mlflow.db", tmp_path / "mlflow.db")
    (tmp_path / ".lock").touch()
    (tmp_path / name).chmod(0o444)
    script = (
        "import sys; from pathlib import Path; from tafs.tracking import mlflow_mirror\n"
        "try: mlflow_mirror.sync([Path(sys.argv[1])], Path(sys.argv[2]))\n"
        "except mlflow_mirror.UnavailableError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(finished), str(tmp_path)]
    if os.geteuid() == 0:  # without root's right to write everything
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(
        rf"{tmp_path}\S*: MLflow cannot use it \(.*\); make it and its folder writable for you\n",
        done.stdout,
    ), done.stdout


def test_any_text_is_kept_literally_and_writes_nothing_outside_the_store(tmp_path: Path) -> None:
    texts = ["../../x", "a\nb", "\x00", "a'b\"c`d", "$(touch x)", "%s{}", "<script>", "汉字"]
    folders = [
        trained_run(tmp_path / "runs" / str(number), title=text, task=text, name=text)
        for number, text in enumerate(texts)
    ]
    sync(folders, tmp_path / "store")
    assert {run.data.tags["title"] for run in runs(tmp_path / "store")} == set(texts)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "store"}
