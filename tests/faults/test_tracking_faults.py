"""Whatever dies between runs and MLflow: trainings do not notice, and nothing is lost or twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.forked_processes import Contents, Nursery, Server, contents, once_a_step
from test_tracking import begin, describe, iterate, trained_run
from test_train import prepare

from tafs.runtime.journal import Journal
from tafs.runtime.run_dir import RunDir
from tafs.tracking import cli, mlflow_mirror
from tafs.training import train

JOBS = 16
PATIENCE = 120  # seconds, for what comes in a second when nothing else runs
Trials = Callable[[str, int, int], Iterator[int]]
Sign = Callable[[], bool]


def mirrored(store: Path) -> Contents:
    return contents(store / "mlflow.db", store / "artifacts")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs."""
    folder = tmp_path_factory.mktemp("empty")
    mlflow_mirror.Local(folder)
    return folder / "mlflow.db"


@pytest.fixture
def server(nursery: Nursery, empty: Path, tmp_path: Path) -> Iterator[Server]:
    """Not started, and killed in the end."""
    server = Server(nursery, tmp_path / "server", empty)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def undisturbed(
    empty: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[Path]], Contents]:
    """What a copy of runs is like that nothing disturbed."""

    def mirror(runs: list[Path]) -> Contents:
        store = tmp_path_factory.mktemp("undisturbed")
        shutil.copyfile(empty, store / "mlflow.db")
        mlflow_mirror.sync(runs, store)
        return mirrored(store)

    return mirror


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished ones, and one that trains and has more points than a request may hold."""
    folder = tmp_path_factory.mktemp("runs")
    training = folder / "training"
    describe(training)
    journal = Journal(training / ".state" / "journal.jsonl")
    begin(journal)
    for iteration in range(300):
        iterate(journal, iteration)
    return [trained_run(folder / "a"), training, trained_run(folder / "b")]


@pytest.fixture(scope="module")
def expected(runs: list[Path], undisturbed: Callable[[list[Path]], Contents]) -> Contents:
    copy = undisturbed(runs)
    assert len(copy) == len(runs)
    assert all(run["artifacts"] and run["metrics"] for run in copy.values())
    return copy


def wait_for(sign: Sign, pause: float = 0.002) -> None:
    deadline = time.monotonic() + PATIENCE
    while not sign():
        assert time.monotonic() < deadline
        time.sleep(pause)


def after(sign: Sign, seconds: float, action: Callable[[], None]) -> threading.Thread:
    """Act in the background, so long after the sign."""

    def act() -> None:
        wait_for(sign)
        time.sleep(seconds)
        action()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def written(file: Path) -> Sign:
    """The sign that a file is no longer as it was."""

    def state() -> int:
        return file.stat().st_mtime_ns if file.exists() else 0

    before = state()
    return lambda: state() != before


def test_a_server_killed_in_the_middle_of_a_sync_lacks_nothing_after_the_next(
    trials: Trials,
    server: Server,
    runs: list[Path],
    expected: Contents,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = 0
    for number in trials("tracking: server killed in the middle of a sync", 2, 20):
        server.forget()
        server.start()
        arguments = ["sync", "--store", str(server.folder), "--server", server.url]
        arguments += map(str, runs)
        # The first right at the beginning, so that one at least is cut.
        delay = random.Random(number).uniform(0, 1.5) if number else 0
        killer = after(written(server.database), delay, server.kill)
        code = cli.main(arguments)
        killer.join()
        out, err = capsys.readouterr()
        if code:
            cut += 1
            assert (code, out, err.count("\n")) == (1, "", 1)
            assert err.startswith(f"tracking: {server.url}: no MLflow server that can be used (")
        server.start()
        assert cli.main(arguments) == 0
        assert server.contents() == expected
        capsys.readouterr()
        uploaded = {file: file.stat().st_mtime_ns for file in server.artifacts.rglob("*")}
        assert cli.main(arguments) == 0
        assert f"{len(runs)} runs in {server.url} (0 new points" in capsys.readouterr().out
        assert server.contents() == expected
        assert {f: f.stat().st_mtime_ns for f in server.artifacts.rglob("*")} == uploaded
    assert cut


def test_a_sync_killed_in_the_middle_is_completed_by_the_next(
    trials: Trials,
    nursery: Nursery,
    server: Server,
    runs: list[Path],
    expected: Contents,
    tmp_path: Path,
) -> None:
    """To a server and into a store, also while it is created, in turn."""
    cut = 0
    for number in trials("tracking: sync killed in the middle", 2, 20):
        store = tmp_path / f"store-{number}"
        arguments = ["sync", "--store", str(store)]
        sign, latest = written(store / ".lock"), 4.0
        if to_server := number % 2 == 0:
            server.forget()
            server.start()
            arguments += ["--server", server.url]
            sign, latest = written(server.database), 1.5
        arguments += map(str, runs)
        delay = random.Random(number).uniform(0, latest) if number else 0
        pid = nursery.start("tracking", arguments, tmp_path / "log")
        after(sign, delay, lambda pid=pid: os.kill(pid, signal.SIGKILL)).join()
        cut += nursery.wait(pid) == -signal.SIGKILL
        for _ in range(2):
            assert cli.main(arguments) == 0
            assert (server.contents() if to_server else mirrored(store)) == expected
    assert cut


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("jobs")
    return [trained_run(folder / f"job-{number}") for number in range(JOBS)]


@pytest.fixture(scope="module")
def one_by_one(jobs: list[Path], undisturbed: Callable[[list[Path]], Contents]) -> Contents:
    copy = undisturbed(jobs)
    assert {experiment for experiment, _ in copy} == {"text"}
    assert len(copy) == JOBS
    return copy


@pytest.mark.parametrize(
    "place, few", [("one store", 0), ("one server", 1), ("one server from several hosts", 0)]
)
def test_jobs_that_start_at_once_make_one_experiment_with_a_run_each(
    trials: Trials,
    nursery: Nursery,
    server: Server,
    jobs: list[Path],
    one_by_one: Contents,
    tmp_path: Path,
    place: str,
    few: int,
) -> None:
    """Hosts that share no store share no lock."""
    for number in trials(f"tracking: {JOBS} jobs start at once, {place}", few, 3):
        server.forget()
        server.start()
        pids = []
        for job in jobs:
            shared = "host" if place != "one server from several hosts" else job.name
            arguments = ["sync", "--store", str(tmp_path / f"{shared}-{number}"), str(job)]
            arguments += ["--server", server.url] if place != "one store" else []
            pids.append(nursery.start("tracking", arguments, tmp_path / "log"))
        ended = [nursery.wait(pid) for pid in pids]
        assert ended == [0] * JOBS, (tmp_path / "log").read_text()
        store = tmp_path / f"host-{number}"
        at_once = mirrored(store) if place == "one store" else server.contents()
        assert at_once == one_by_one


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of a training that nothing tracks."""
    run = prepare(tmp_path_factory.mktemp("untracked"))
    train.train(run)
    return run.adapter.read_bytes()


class Loop:
    """`sync --every` to a server, beside a training."""

    def __init__(self, nursery: Nursery, server: Server, folder: Path) -> None:
        self.nursery, self.log = nursery, folder / "log"
        self.run: RunDir = prepare(folder / "runs")
        arguments = ["sync", "--every", "0.1", "--server", server.url, "--store", str(folder)]
        arguments += ["--runs", str(folder / "runs")]
        self.pid = nursery.start("tracking", arguments, self.log)

    def lines(self, start: str) -> int:
        return sum(line.startswith(start) for line in self.log.read_text().splitlines())

    def end(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
        assert self.nursery.wait(self.pid) == 0
        # And nothing but its own lines.
        assert self.lines("tracking: http") + self.lines("1 runs in http") == self.lines("")


@pytest.mark.parametrize(
    "fault, few",
    [
        ("server gone at the start", 1),
        ("server killed while a run trains", 0),
        ("server gone for good", 0),
    ],
)
def test_a_training_does_not_notice_its_tracking(
    trials: Trials,
    nursery: Nursery,
    server: Server,
    adapter: bytes,
    undisturbed: Callable[[list[Path]], Contents],
    tmp_path: Path,
    fault: str,
    few: int,
) -> None:
    for number in trials(f"tracking: {fault}", few, 5):
        server.forget()
        if fault == "server killed while a run trains":
            server.start()
        loop = Loop(nursery, server, tmp_path / str(number))
        if fault == "server killed while a run trains":
            journal = loop.run.state / "journal.jsonl"
            delay = random.Random(number).uniform(0, 2)
            killer = after(journal.exists, delay, server.kill)
            train.train(loop.run)
            killer.join()
        else:
            wait_for(lambda loop=loop: loop.lines("tracking: http"))
            train.train(loop.run)
        assert loop.run.adapter.read_bytes() == adapter

        expected = undisturbed([loop.run.folder])
        assert all(once_a_step(run) for run in expected.values())
        if fault == "server gone for good":
            known = loop.lines("tracking: http")
            wait_for(lambda loop=loop, known=known: loop.lines("tracking: http") > known)
        else:
            server.start()
            wait_for(lambda expected=expected: server.contents() == expected, 0.2)
        loop.end()
