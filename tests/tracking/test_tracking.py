"""MLflow shows what the journals say, once, and a store that is broken harms nothing else."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tafs.runtime.journal import Journal
from tafs.tracking import cli, mlflow_mirror, run_view

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

START = 1_700_000_000.25
HASH = "d" * 64
ITERATIONS = 3
SNAPSHOT = 50


def describe(folder: Path, **changes: Any) -> None:
    description = {
        "name": folder.name,
        "method": "tafs_grpo",
        "title": "TAFS-GRPO",
        "task": "text",
        "backbone": "sd3",
        "seed": 3,
        "scale": "smoke",
        "rewards": {"toy": 0.5},
        "iterations": 100,
        "hyperparameters": {"learning_rate": 3e-4, "steps": [1, 2], "note": "n" * 7000},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(description))


def begin(journal: Journal, at: float = START) -> None:
    provenance = {"git_commit": "c0ffee", "weights": {"sd3": HASH}, "git_changed": False}
    journal.append("start", run="ignored", fingerprint="f1", provenance=provenance, time=at)


def iterate(journal: Journal, iteration: int, delay: float = 0.0, kl: float = 0.5) -> None:
    journal.append(
        "iteration",
        time=START + iteration + 1 + delay,
        iteration=iteration,
        rewards={"toy": [iteration / 10, iteration / 5]},
        kl=kl,
        seconds={"sample": 1.5, "total": 2.0},
    )


def trained_run(folder: Path, **changes: Any) -> Path:
    """A finished run with every kind of file."""
    describe(folder, **changes)
    journal = Journal(folder / "journal.jsonl")
    begin(journal)
    for iteration in range(ITERATIONS):
        iterate(journal, iteration, kl=float("nan") if iteration == 1 else 0.5)
    journal.append("end", time=START + 50)
    (folder / "adapter.safetensors").write_bytes(b"adapter")
    (folder / "plots").mkdir()
    Image.new("RGB", (2, 2), "red").save(folder / "plots" / "grid.png")
    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[5, :, :, 0] = 255
    save_file({"prompts": np.arange(len(images)), "ode-4": images}, folder / "samples.safetensors")
    rows = [
        # (tag, metric, value): GenEval's tags count alike, however many images they have.
        ("one", "geneval", 1.0),
        ("one", "geneval", 0.0),
        ("one", "geneval", 0.0),
        ("one", "geneval", 1.0),
        ("two", "geneval", 1.0),
        ("one", "pickscore", 20.0),
        ("two", "pickscore", 23.0),
        ("two", "pickscore", 23.0),
        ("two", "hps", float("nan")),
    ]
    columns = ["tag", "metric", "value", "iteration"]
    last = changes.get("iterations", 100)
    finals = [(*row, last) for row in rows]
    # A snapshot's scores stand in the same table.
    snapshot = [("one", "geneval", 0.0, SNAPSHOT), ("two", "geneval", 1.0, SNAPSHOT)]
    table = pd.DataFrame(finals + (snapshot if last else []), columns=columns)
    table = table.assign(run=folder.name, method="m", seed=3, prompt=0, image=0)
    table = table.assign(sampler="ode", nfe=4).astype({"tag": "category", "metric": "category"})
    table.to_parquet(folder / "scores.parquet", index=False)
    return folder


def client(store: Path) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")


def runs(store: Path, name: str) -> list[Run]:
    """The MLflow runs of a name, the first first."""
    reader = client(store)
    experiments = [e.experiment_id for e in reader.search_experiments()]
    found = reader.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return [run for run in found if run.info.run_name == name]


def history(store: Path, run: Run, key: str) -> list[tuple[int, int, float]]:
    points = client(store).get_metric_history(run.info.run_id, key)
    return sorted((p.step, p.timestamp, p.value) for p in points)


def contents(store: Path) -> list[str]:
    """Everything in the database."""
    with sqlite3.connect(store / "mlflow.db") as database:
        return list(database.iterdump())


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "tafs.tracking.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("runs") / "tafs_grpo.text.sd3.3")


@pytest.fixture(scope="module")
def store(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that two processes wanted to create at once, in a folder with an awkward name."""
    store = tmp_path_factory.mktemp("a b#%20é") / "mlflow"
    with ThreadPoolExecutor(1) as pool:
        arguments = command("sync", "--store", store, finished)
        other = pool.submit(subprocess.run, arguments, capture_output=True, text=True)
        while not (store / ".lock").exists() and not other.done():  # until it is at it
            time.sleep(0.005)
        mlflow_mirror.sync([finished], store)
    assert (other.result().returncode, other.result().stderr) == (0, "")
    return store


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, tafs.tracking.cli; print({'mlflow', 'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_two_processes_that_create_a_store_together_mirror_a_run_once(
    store: Path, finished: Path
) -> None:
    assert len(runs(store, finished.name)) == 1


def test_curves_have_the_journals_steps_times_and_values(store: Path, finished: Path) -> None:
    (run,) = runs(store, finished.name)
    expected = [(i, int((START + i + 1) * 1000), i / 5) for i in range(ITERATIONS)]
    assert history(store, run, "reward/toy/step_1") == expected
    assert history(store, run, "reward/toy/last") == expected
    assert [v for _, _, v in history(store, run, "reward/toy/step_0")] == [0.0, 0.1, 0.2]
    assert [v for _, _, v in history(store, run, "seconds/sample")] == [1.5] * ITERATIONS


def test_values_that_are_not_finite_are_left_out_and_counted(store: Path, finished: Path) -> None:
    (run,) = runs(store, finished.name)
    assert [step for step, _, _ in history(store, run, "kl")] == [0, 2]
    assert "score/hps/ode/nfe_4" not in run.data.metrics
    assert run.data.tags["tafs.skipped_values"] == "2"


def test_geneval_is_the_mean_of_its_tags_and_others_the_mean_of_the_images(
    store: Path, finished: Path
) -> None:
    (run,) = runs(store, finished.name)
    assert run.data.metrics["score/geneval/ode/nfe_4"] == 75.0
    assert run.data.metrics["score/pickscore/ode/nfe_4"] == 22.0


def test_scores_stand_at_their_models_iteration_the_final_model_last(
    store: Path, finished: Path
) -> None:
    (run,) = runs(store, finished.name)
    scores = [(step, v) for step, _, v in history(store, run, "score/geneval/ode/nfe_4")]
    assert scores == [(SNAPSHOT, 50.0), (100, 75.0)]
    assert [step for step, _, _ in history(store, run, "score/pickscore/ode/nfe_4")] == [100]


def test_a_run_has_its_experiment_parameters_tags_and_times(store: Path, finished: Path) -> None:
    (run,) = runs(store, finished.name)
    assert client(store).get_experiment(run.info.experiment_id).name == "text"
    parameters = run.data.params
    assert parameters["hyperparameters/learning_rate"] == "0.0003"
    assert parameters["hyperparameters/steps"] == "[1, 2]"
    assert parameters["rewards/toy"] == "0.5"
    note = parameters["hyperparameters/note"]
    assert len(note) == 6000
    assert note.endswith("nnn... (7000 characters)")
    tags = run.data.tags
    assert tags["fingerprint"] == "f1"
    assert tags["provenance/weights/sd3"] == HASH
    assert tags["mlflow.source.git.commit"] == tags["provenance/git_commit"] == "c0ffee"
    info = run.info
    assert (info.status, info.start_time, info.end_time) == (
        "FINISHED",
        int(START * 1000),
        int((START + 50) * 1000),
    )


def test_the_store_holds_its_artifacts_and_no_absolute_path(store: Path, finished: Path) -> None:
    (run,) = runs(store, finished.name)
    folder = store / "artifacts" / "text" / run.info.run_id / "artifacts"
    assert run.info.artifact_uri == f"mlflow-artifacts:/text/{run.info.run_id}/artifacts"
    names = ["run.json", "journal.jsonl", "adapter.safetensors", "plots/grid.png"]
    for name in names:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    with Image.open(folder / "samples" / "ode-4.png") as picture:
        assert picture.size == (4 * 8, 2 * 8)
        assert picture.getpixel((12, 12)) == (255, 0, 0)
    assert len([path for path in folder.rglob("*") if path.is_file()]) == len(names) + 1
    assert not any(str(store) in line for line in contents(store))


def test_pictures_are_looked_for_where_others_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plots/a.png", "plots/sub/b.png", ".state/checkpoints/c.png", "gone/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    def racing(path: str) -> Any:
        if isinstance(path, str) and Path(path).name == "gone":
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", racing)
    found = run_view.pictures(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in found] == ["plots/a.png", "plots/sub/b.png"]


def test_a_second_sync_changes_nothing(store: Path, finished: Path) -> None:
    before = contents(store)
    files = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.suffix != ".db"}
    assert mlflow_mirror.sync([finished], store) == mlflow_mirror.Summary(
        1, points=0, skipped=2, waiting=0
    )
    assert contents(store) == before
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.suffix != ".db"} == files


def test_a_run_that_trains_is_completed_by_later_syncs(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "growing"
    describe(folder)
    assert mlflow_mirror.sync([folder], store).waiting == 1
    journal = Journal(folder / ".state" / "journal.jsonl")
    begin(journal)
    for iteration in range(5):
        iterate(journal, iteration)
    mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "growing")
    assert run.info.status == "RUNNING"
    assert len(history(store, run, "kl")) == 5

    # Killed, resumed from a state that is two iterations old, and finished.
    journal.append("resume", iteration=3)
    for iteration in range(3, 8):
        iterate(journal, iteration, delay=100)
    journal.append("end", time=START + 200)
    os.replace(journal.path, folder / "journal.jsonl")
    mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "growing")
    assert run.info.status == "FINISHED"
    assert [step for step, _, _ in history(store, run, "kl")] == list(range(8))
    copy = store / "artifacts" / "text" / run.info.run_id / "artifacts" / "journal.jsonl"
    assert copy.read_bytes() == (folder / "journal.jsonl").read_bytes()


def test_points_that_a_cut_sync_had_written_are_not_written_twice(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained_run(tmp_path / "cut")

    def cut(*arguments: Any) -> None:
        raise OSError("the disk is full")

    with (
        monkeypatch.context() as patch,
        pytest.raises(mlflow_mirror.SyncError, match="disk is full"),
    ):
        patch.setattr(mlflow_mirror, "_copy_artifacts", cut)
        mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "cut")
    assert len(history(store, run, "kl")) == 2
    mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "cut")
    assert len(history(store, run, "kl")) == 2
    assert len(history(store, run, "score/geneval/ode/nfe_4")) == 2
    assert len(history(store, run, "score/pickscore/ode/nfe_4")) == 1
    assert run.info.status == "FINISHED"


def test_iterations_repeated_after_a_cut_sync_are_not_there_twice(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sync and training die together, and the training resumes from an older state."""
    folder = tmp_path / "both"
    describe(folder)
    journal = Journal(folder / "journal.jsonl")
    begin(journal)
    for iteration in range(5):
        iterate(journal, iteration)

    def cut(*arguments: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(mlflow_mirror.SyncError):
        patch.setattr(mlflow_mirror, "_copy_artifacts", cut)
        mlflow_mirror.sync([folder], store)
    journal.append("resume", iteration=3)
    for iteration in range(3, 7):
        iterate(journal, iteration, delay=100)
    mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "both")
    for key in ("kl", "reward/toy/last", "seconds/total"):
        assert [step for step, _, _ in history(store, run, key)] == list(range(7))


def test_scores_that_were_written_again_with_the_same_values_are_not_there_twice(
    store: Path, tmp_path: Path
) -> None:
    folder = trained_run(tmp_path / "rescored")
    mlflow_mirror.sync([folder], store)
    table = pd.read_parquet(folder / "scores.parquet")
    table.to_parquet(folder / "scores.parquet", index=False, compression="gzip")
    os.utime(folder / "scores.parquet", (START, START))
    mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "rescored")
    assert len(history(store, run, "score/geneval/ode/nfe_4")) == 2
    assert len(history(store, run, "score/pickscore/ode/nfe_4")) == 1


def test_of_runs_made_at_once_on_several_hosts_one_stays(store: Path, tmp_path: Path) -> None:
    folder = trained_run(tmp_path / "twin")
    mirror = run_view.read_run(folder)
    assert mirror is not None
    writer = client(store)
    experiment = writer.get_experiment_by_name("text").experiment_id
    for _ in range(3):
        writer.create_run(experiment, tags={mlflow_mirror.KEY: mirror.key}, run_name="twin")
    mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "twin")
    assert len(history(store, run, "kl")) == 2


def test_runs_seen_unchanged_are_passed_over_unless_the_store_is_another(tmp_path: Path) -> None:
    store, seen = tmp_path / "store", {}
    folders = [trained_run(tmp_path / name) for name in ("one", "two")]
    # Twice, because the first sync makes the store, which is then another one.
    assert [mlflow_mirror.sync(folders, store, seen=seen).runs for _ in range(3)] == [2, 2, 0]
    with (folders[0] / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "end", "time": START + 60}) + "\n")
    assert mlflow_mirror.sync(folders, store, seen=seen).runs == 1
    shutil.rmtree(store)
    assert mlflow_mirror.sync(folders, store, seen=seen).runs == 2
    assert len(runs(store, "one") + runs(store, "two")) == 2


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_repeated_syncs_find_new_runs_and_end_cleanly(
    store: Path, tmp_path: Path, end: signal.Signals
) -> None:
    folder = tmp_path / "later"
    names = [f"first-{end}", f"second-{end}"]
    first, second = (trained_run(tmp_path / "made" / name) for name in names)
    loop = subprocess.Popen(
        command("sync", "--every", "0.1", "--store", store, "--runs", folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert loop.stdout is not None and loop.stderr is not None
        folder.mkdir()
        first.rename(folder / first.name)
        assert loop.stdout.readline().startswith(f"1 runs in {store} (20 new points")
        # A round that fails says so, and the next ones go on.
        describe(folder / "broken")
        (folder / "broken" / "journal.jsonl").write_text("no JSON\n")
        assert loop.stderr.readline().startswith(f"tracking: 1 of 1 runs failed: {folder}/broken")
        second.rename(folder / second.name)
        while not runs(store, second.name):
            time.sleep(0.05)
        loop.send_signal(end)
        _, err = loop.communicate()
    finally:
        loop.kill()
    assert loop.returncode == 0
    assert all(line.startswith("tracking: 1 of ") for line in err.splitlines())


def test_a_run_trained_anew_is_a_new_run_and_closes_the_old_one(
    store: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    for attempt, rate in enumerate((0.1, 0.2, 0.2)):
        shutil.rmtree(folder, ignore_errors=True)
        describe(folder, hyperparameters={"learning_rate": rate})
        journal = Journal(folder / ".state" / "journal.jsonl")
        begin(journal, START + attempt)
        iterate(journal, 0, delay=attempt)
        mlflow_mirror.sync([folder], store)
    found = runs(store, "again")
    assert [r.info.status for r in found] == ["KILLED", "KILLED", "RUNNING"]
    rates = [r.data.params["hyperparameters/learning_rate"] for r in found]
    assert rates == ["0.1", "0.2", "0.2"]
    assert all(len(history(store, r, "kl")) == 1 for r in found)


def test_a_base_model_has_scores_without_a_journal(store: Path, tmp_path: Path) -> None:
    folder = trained_run(tmp_path / "base.sd3", method="base", task="", iterations=0)
    (folder / "journal.jsonl").unlink()
    for _ in range(2):
        mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "base.sd3")
    assert client(store).get_experiment(run.info.experiment_id).name == "base"
    assert [v for _, _, v in history(store, run, "score/geneval/ode/nfe_4")] == [75.0]
    assert run.info.status == "FINISHED"


def test_names_that_mlflow_refuses_are_rewritten(store: Path, tmp_path: Path) -> None:
    folder = trained_run(
        tmp_path / "odd", task="../a'; drop", hyperparameters={"a=b": 1, "x" * 300: None}
    )
    for _ in range(2):
        mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "odd")
    assert run.data.params["hyperparameters/a_b"] == "1"
    assert (store / "artifacts" / "___a___drop" / run.info.run_id).is_dir()


def test_an_experiment_deleted_in_the_browser_comes_back(store: Path, tmp_path: Path) -> None:
    folder = trained_run(tmp_path / "deleted", task="deleted")
    mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "deleted")
    client(store).delete_experiment(run.info.experiment_id)
    mlflow_mirror.sync([folder], store)
    (run,) = runs(store, "deleted")
    assert len(history(store, run, "kl")) == 2


def test_a_broken_run_is_named_and_the_others_are_mirrored(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, broken, whole = tmp_path / "missing", tmp_path / "broken", tmp_path / "whole"
    describe(broken)
    (broken / "journal.jsonl").write_text("no JSON\n")
    trained_run(whole)
    arguments = ["sync", str(broken), str(missing), str(whole), "--store", str(store)]
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tracking: 2 of 3 runs failed: {broken}: {broken}/journal.jsonl, line 1")
    assert err.endswith(" (and 1 more)\n")
    assert err.count("\n") == 1
    assert len(runs(store, "whole")) == 1


@pytest.mark.parametrize("name", ["run.json", "scores.parquet"])
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, name: str) -> None:
    folder = trained_run(tmp_path / "run")
    (folder / name).write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=name):
        run_view.read_run(folder)


@pytest.mark.parametrize(
    "content", [b"no database at all" * 100, b"SQLite format 3\0" + b"x" * 200]
)
def test_a_broken_store_is_one_line_and_exit_code_1(
    tmp_path: Path, finished: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    for arguments in (["sync", str(finished)], ["ui"]):
        assert cli.main([*arguments, "--store", str(tmp_path)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "it is only a copy: delete" in err
    assert (tmp_path / "mlflow.db").read_bytes() == content


def test_a_store_that_cannot_be_written_is_one_line(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["sync", str(finished), "--store", str(tmp_path / "file" / "x")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///mlflow.db",
        "file:///mlruns",
        "databricks",
        "http://",
        "http://host:port",
        "http://me:secret@host:5000",
        "http://host:5000/?token=secret",
    ],
)
def test_a_server_that_is_no_address_is_one_line_and_exit_code_2(
    finished: Path, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sync", str(finished), "--store", str(tmp_path), "--server", url]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("tracking: --server")
    assert "secret" not in err


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "no runs: name their folders"),
        (["--runs", "nowhere"], "--runs nowhere: no such folder"),
        (["run", "--every", "0"], "--every 0.0: a number of seconds above 0"),
        (["run", "--every", "nan"], "--every nan: a number of seconds above 0"),
    ],
)
def test_a_sync_that_could_mirror_nothing_is_one_line_and_exit_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sync", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tracking: {complaint}")
    assert err.count("\n") == 1


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that wants to know who asks."""

    def do_GET(self) -> None:
        self.send_error(401)

    do_POST = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_server_that_refuses_is_one_line_that_names_the_variables(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        arguments = ["sync", str(finished), "--store", str(tmp_path), "--server", url]
        assert cli.main(arguments) == 1
        server.shutdown()
    err = capsys.readouterr().err
    assert err.startswith(f"tracking: {url}: ")
    assert "MLFLOW_TRACKING_USERNAME" in err
    assert err.count("\n") == 1


def test_the_browser_needs_a_store_and_a_free_port(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ui", "--store", str(tmp_path)]) == 1
    assert "nothing is tracked yet" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["ui", "--store", str(store), "--port", str(port)]) == 1
    err = capsys.readouterr().err
    assert err == f"tracking: port {port}: Address already in use; choose another with --port\n"


def test_the_browser_shows_a_store_that_was_moved(
    store: Path, finished: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(store, moved)
    (run,) = runs(moved, finished.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        command("ui", "--store", moved, "--port", port),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{port}"
        assert server.stdout.readline() == f"{url}  (Ctrl-C ends it)\n"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        address = f"{url}/get-artifact?run_id={run.info.run_id}&path=run.json"
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert answer.read() == (finished / "run.json").read_bytes()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved"]
