"""Whatever dies between the runs and MLflow: trainings do not notice, and nothing is lost or twice."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery, Server, contents, once_a_step
from test_tracking import begin, describe, iterate, trained_run
from test_train import prepare

from tafs import tracking, train
from tafs.journal import Journal
from tafs.rundir import RunDir

JOBS = 16
Trials = Callable[[str, int, int], Iterator[int]]
Copy = dict[tuple[str, str], Any]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def server(nursery: Nursery, tmp_path: Path) -> Iterator[Server]:
    """Not started, and killed in the end."""
    server = Server(nursery, tmp_path / "server")
    yield server
    server.kill()


def mirrored(store: Path) -> Copy:
    return contents(store / "mlflow.db", store / "artifacts")


def undisturbed(runs: list[Path], store: Path) -> Copy:
    tracking.sync(runs, store)
    return mirrored(store)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished ones, and one that trains and has more points than a request may hold."""
    folder = tmp_path_factory.mktemp("runs")
    training = folder / "training"
    describe(training)
    journal = Journal(training / ".state" / "journal.jsonl")
    begin(journal)
    for iteration in range(400):
        iterate(journal, iteration)
    return [trained_run(folder / "a"), training, trained_run(folder / "b")]


@pytest.fixture(scope="module")
def expected(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Copy:
    copy = undisturbed(runs, tmp_path_factory.mktemp("undisturbed") / "store")
    assert len(copy) == len(runs)
    assert all(len(run["artifacts"]) >= 2 for run in copy.values())
    return copy


def after(sign: Callable[[], bool], seconds: float, action: Callable[[], None]) -> threading.Thread:
    """Act so long after the sign."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not sign() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(seconds)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def written(*files: Path) -> Callable[[], bool]:
    """A sign: one of the files is not as it was."""

    def state() -> list[int]:
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]

    before = state()
    return lambda: state() != before


def one_line(capsys: pytest.CaptureFixture[str], url: str) -> bool:
    out, err = capsys.readouterr()
    return out == "" and err.count("\n") == 1 and err.startswith(f"tracking: {url}: ")


def test_a_server_killed_in_the_middle_of_a_sync_lacks_nothing_after_the_next(
    trials: Trials,
    server: Server,
    runs: list[Path],
    expected: Copy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = 0
    for number in trials("tracking: server killed in the middle of a sync", 2, 20):
        # An experiment that is new on this server, as the runs are.
        server.kill()
        for file in server.folder.glob("mlflow.db*"):
            file.unlink()
        server.start()
        arguments = ["sync", "--store", str(server.folder), "--server", server.url]
        arguments += map(str, runs)
        # The first trial is cut at its start, the others anywhere.
        delay = random.Random(number).uniform(0, 1) if number else 0.02
        killer = after(written(server.database), delay, server.kill)
        code = tracking.main(arguments)
        killer.join()
        if code:
            cut += 1
            assert one_line(capsys, server.url)
        else:
            capsys.readouterr()
        server.start()
        assert tracking.main(arguments) == 0
        assert contents(server.database, server.artifacts) == expected
        capsys.readouterr()
        assert tracking.main(arguments) == 0
        assert f"{len(runs)} runs in {server.url} (0 new points" in capsys.readouterr().out
        assert contents(server.database, server.artifacts) == expected
    assert cut


def test_a_sync_killed_in_the_middle_is_completed_by_the_next(
    trials: Trials,
    nursery: Nursery,
    server: Server,
    runs: list[Path],
    expected: Copy,
    tmp_path: Path,
) -> None:
    """Into an own store and to a server, in turn; of the store also while it is created."""
    cut = 0
    for number in trials("tracking: sync killed in the middle", 2, 20):
        store = tmp_path / f"store-{number}"
        arguments = ["sync", "--store", str(store)]
        sign = written(store / ".lock")
        if number % 2:
            server.kill()
            for file in server.folder.glob("mlflow.db*"):
                file.unlink()
            server.start()
            arguments += ["--server", server.url]
            sign = written(server.database)
        arguments += map(str, runs)
        delay = random.Random(number).uniform(0, 1 if number % 2 else 4)
        pid = nursery.start("tracking", arguments, tmp_path / "log")
        after(sign, delay, lambda pid=pid: os.kill(pid, signal.SIGKILL)).join()
        cut += nursery.wait(pid) == -signal.SIGKILL
        for _ in range(2):
            assert tracking.main(arguments) == 0
            copy = contents(server.database, server.artifacts) if number % 2 else mirrored(store)
            assert copy == expected
    assert cut


@pytest.mark.parametrize("place", ["store", "server", "server of several hosts"])
def test_jobs_that_start_at_once_make_one_experiment_with_a_run_each(
    trials: Trials, nursery: Nursery, server: Server, tmp_path: Path, place: str
) -> None:
    for number in trials(f"tracking: {JOBS} jobs start at once ({place})", 1, 3):
        folder = tmp_path / str(number)
        jobs = [trained_run(folder / "runs" / f"job-{job}") for job in range(JOBS)]
        common = folder / "common"
        if place != "store":
            server.kill()
            for file in server.folder.glob("mlflow.db*"):
                file.unlink()
            server.start()
        pids = []
        for job in jobs:
            # A host that does not share the others' store does not share their lock either.
            store = folder / job.name if place == "server of several hosts" else common
            arguments = ["sync", "--store", str(store), str(job)]
            arguments += ["--server", server.url] if place != "store" else []
            pids.append(nursery.start("tracking", arguments, folder / "log"))
        ended = [nursery.wait(pid) for pid in pids]
        assert ended == [0] * JOBS, (folder / "log").read_text()
        at_once = (
            mirrored(common) if place == "store" else contents(server.database, server.artifacts)
        )
        assert at_once == undisturbed(jobs, folder / "one-by-one")
        assert {experiment for experiment, _ in at_once} == {"text"}
        assert len(at_once) == JOBS


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of a training that nothing tracks."""
    run = prepare(tmp_path_factory.mktemp("untracked"))
    train.train(run)
    return run.adapter.read_bytes()


class Beside:
    """`sync --every` to a server, beside a training."""

    def __init__(self, nursery: Nursery, server: Server, folder: Path) -> None:
        self.nursery, self.server, self.log = nursery, server, folder / "log"
        self.run: RunDir = prepare(folder / "runs")
        arguments = ["sync", "--every", "0.1", "--server", server.url, "--store", str(folder)]
        arguments += ["--runs", str(folder / "runs")]
        self.pid = nursery.start("tracking", arguments, self.log)

    def complains(self) -> bool:
        return self.log.exists() and self.server.url in self.log.read_text()

    def end(self) -> int:
        os.kill(self.pid, signal.SIGTERM)
        return self.nursery.wait(self.pid)

    def copy(self) -> Copy:
        return contents(self.server.database, self.server.artifacts)

    def complete(self, expected: Copy) -> bool:
        """Whether the loop brings the server's copy to this within a minute."""
        deadline = time.monotonic() + 60
        while self.copy() != expected and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.copy() == expected


def wait_for(sign: Callable[[], bool]) -> None:
    after(sign, 0, lambda: None).join()
    assert sign()


def test_a_training_does_not_notice_a_server_that_is_gone_at_the_start(
    trials: Trials, nursery: Nursery, server: Server, adapter: bytes, tmp_path: Path
) -> None:
    for number in trials("tracking: server gone at the start", 1, 5):
        server.kill()
        beside = Beside(nursery, server, tmp_path / str(number))
        wait_for(beside.complains)
        train.train(beside.run)
        assert beside.run.adapter.read_bytes() == adapter
        server.start()
        expected = undisturbed([beside.run.folder], tmp_path / str(number) / "undisturbed")
        assert all(once_a_step(run) for run in expected.values())
        wait_for(lambda beside=beside: len(beside.log.read_text().splitlines()) > 1)
        key = next(iter(expected))
        deadline = time.monotonic() + 60
        while beside.copy().get(key) != expected[key] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert beside.copy()[key] == expected[key]
        assert beside.end() == 0
