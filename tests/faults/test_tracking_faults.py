"""Whatever dies between the runs and MLflow: training continues, and nothing is lost or twice."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.forked_processes import Server, start_sync
from support.killable_training import prepare
from support.mirrored_runs import Contents, contents, once_per_step, trained_run, training_run

from tafs.tracking import cli, mlflow_mirror
from tafs.training import train

JOBS = 16
PATIENCE = 120  # s, for what takes one second on an idle machine
Condition = Callable[[], bool]
Mirrored = Callable[[list[Path]], Contents]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs."""
    folder = tmp_path_factory.mktemp("empty")
    mlflow_mirror.open_store(folder)
    return folder / "mlflow.db"


@pytest.fixture
def server(empty: Path, tmp_path: Path) -> Iterator[Server]:
    """Not started; killed at the end."""
    server = Server(tmp_path / "server", empty)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def undisturbed(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Mirrored:
    """What a store holds of runs if nothing fails."""

    def mirror(runs: list[Path]) -> Contents:
        store = tmp_path_factory.mktemp("undisturbed")
        shutil.copyfile(empty, store / "mlflow.db")
        mlflow_mirror.sync(runs, store)
        return contents(store)

    return mirror


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished runs, and one that trains and has more points than one request may hold."""
    folder = tmp_path_factory.mktemp("runs")
    training_run(folder / "training", iterations=300)
    return [trained_run(folder / "a"), folder / "training", trained_run(folder / "b")]


@pytest.fixture(scope="module")
def expected(runs: list[Path], undisturbed: Mirrored) -> Contents:
    return undisturbed(runs)


def wait_for(condition: Condition, pause: float = 0.002) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)


def after(condition: Condition, seconds: float, action: Callable[[], object]) -> threading.Thread:
    """Act in the background, so many seconds after the condition is met."""

    def act() -> None:
        wait_for(condition)
        time.sleep(seconds)
        action()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def changed(file: Path) -> Condition:
    def state() -> int:
        return file.stat().st_mtime_ns if file.exists() else 0

    before = state()
    return lambda: state() != before


@pytest.mark.parametrize(
    "fault, few", [("server killed in the middle of a sync", 2), ("sync killed in the middle", 4)]
)
def test_the_next_sync_completes_one_that_was_killed(
    trials, server, runs, expected, tmp_path, capsys, fault, few
):
    """Killed syncs are in turn to a server and into a store, also while the store is created."""
    interrupted = 0
    for number in trials(f"tracking: {fault}", few, 20):
        store, log = tmp_path / f"store-{number}", tmp_path / f"log-{number}"
        to_server = fault.startswith("server") or number % 2 == 0
        arguments = ["--store", str(store), *map(str, runs)]
        if to_server:
            server.forget()
            server.start()
            arguments += ["--server", server.url]
        # The first kill is immediate, so that at least one sync is interrupted.
        delay = random.Random(number).uniform(0, 1.5 if to_server else 3) if number else 0
        begun = changed(server.database if to_server else store / ".lock")
        process = start_sync(arguments, log)
        kill = server.kill if fault.startswith("server") else process.kill
        after(begun, delay, kill).join()
        process.join()
        interrupted += process.exitcode != 0
        if fault.startswith("server"):
            if process.exitcode:
                (line,) = log.read_text().splitlines()
                assert line.startswith(f"tracking: {server.url}: MLflow cannot use it (")
            server.start()
        for _ in range(2):
            assert cli.main(["sync", *arguments]) == 0
            assert contents(server.folder if to_server else store) == expected
        assert " (0 new points" in capsys.readouterr().out.splitlines()[-1]
    assert interrupted


@pytest.mark.parametrize(
    "place, few", [("one store", 1), ("one server", 0), ("one server from several hosts", 1)]
)
def test_jobs_that_start_together_create_one_experiment_with_one_run_each(
    trials, server, undisturbed, tmp_path, place, few
):
    """Hosts that share no store share no lock."""
    jobs = [trained_run(tmp_path / f"job-{number}") for number in range(JOBS)]
    for number in trials(f"tracking: {JOBS} jobs start at once, {place}", few, 3):
        store = tmp_path / f"host-{number}"
        server.forget()
        if place != "one store":
            server.start()
        processes = []
        for job in jobs:
            own = store / job.name if "several" in place else store
            arguments = ["--store", str(own), str(job)]
            arguments += ["--server", server.url] if place != "one store" else []
            processes.append(start_sync(arguments, tmp_path / "log"))
        for process in processes:
            process.join()
        ended = [process.exitcode for process in processes]
        assert ended == [0] * JOBS, (tmp_path / "log").read_text()
        assert contents(store if place == "one store" else server.folder) == undisturbed(jobs)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_next_sync_completes_the_store(
    trials, disk, runs, expected, capfd
):
    arguments = ["sync", "--store", str(disk / "store"), *map(str, runs)]
    full = 0
    for number in trials("tracking: disk full during a sync", 6, 20):
        shutil.rmtree(disk / "store", ignore_errors=True)
        # From no room at all to room for most of the store.
        room = int(random.Random(number).uniform(0, 1.8e6)) if number else 0
        with (disk / "ballast").open("wb") as ballast:
            free = shutil.disk_usage(disk).free
            os.posix_fallocate(ballast.fileno(), 0, max(1, free - room))
        code = cli.main(arguments)
        out, err = capfd.readouterr()
        if code:
            full += 1
            assert (code, out, err.count("\n")) == (1, "", 1)
            assert err.startswith("tracking: ")
        (disk / "ballast").unlink()
        assert cli.main(arguments) == 0
        assert contents(disk / "store") == expected
        capfd.readouterr()
    assert full


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of a training that is not tracked."""
    run = prepare(tmp_path_factory.mktemp("untracked") / "run", 8, "tafs_grpo")
    train.train(run)
    return run.adapter.read_bytes()


@pytest.mark.parametrize(
    "fault, few", [("gone at the start", 1), ("killed while a run trains", 1), ("gone for good", 0)]
)
def test_training_does_not_notice_a_server_that_fails(
    trials, server, adapter, undisturbed, tmp_path, fault, few
):
    for number in trials(f"tracking: server {fault}", few, 5):
        folder, log = tmp_path / str(number), tmp_path / f"log-{number}"
        run = prepare(folder / "runs" / "run", 8, "tafs_grpo")
        server.forget()
        arguments = ["--every", "0.1", "--server", server.url, "--store", str(folder)]
        killed = fault == "killed while a run trains"
        if killed:
            server.start()
        loop = start_sync([*arguments, "--runs", str(folder / "runs")], log)

        def failures(log: Path = log) -> int:
            return log.read_text().count("tracking: http") if log.exists() else 0

        if killed:
            delay = random.Random(number).uniform(0, 2)
            killer = after((run.state / "journal.jsonl").exists, delay, server.kill)
            train.train(run)
            killer.join()
        else:
            wait_for(lambda: failures() > 0)
            train.train(run)
        assert run.adapter.read_bytes() == adapter

        if fault == "gone for good":
            known = failures()
            wait_for(lambda known=known: failures() > known)
        else:
            server.start()
            expected = undisturbed([run.folder])
            assert all(once_per_step(found) for found in expected.values())
            wait_for(lambda expected=expected: contents(server.folder) == expected, 0.2)
        loop.terminate()
        loop.join(PATIENCE)
        assert loop.exitcode == 0
        lines = log.read_text().splitlines()
        assert all(line.startswith(("tracking: http", "1 runs in http")) for line in lines)
