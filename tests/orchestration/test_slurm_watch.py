"""Jobs that Slurm does not answer for, has lost or refuses, and orphans of killed workflows."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tafs.common import errors
from tafs.orchestration import slurm
from tafs.orchestration.snakemake_hooks import Verdict


@dataclass
class Executor:
    """Snakemake's executor as far as it is watched; `finds` determines what polling finds."""

    run_uuid: str = "3a8b"
    finds: Callable[[Any], str] = lambda job: "running"
    ended: list[tuple[str, str]] = field(default_factory=list)

    async def check_active_jobs(self, active: Sequence[Any]) -> AsyncIterator[Any]:
        for job in active:
            found = self.finds(job)
            if found == "running":
                yield job
            elif found == "done":
                self.report_job_success(job)
            elif found == "failed":
                self.report_job_error(job, msg="it failed")

    def run_jobs(self, jobs: Sequence[Any]) -> None:
        self.ended += [(job.name, "submitted") for job in jobs]

    def report_job_success(self, job: Any) -> None:
        self.ended.append((job.external_jobid, "done"))

    def report_job_error(self, job: Any, msg: str | None = None, **_: Any) -> None:
        self.ended.append((job.external_jobid, msg or ""))


@dataclass
class Retries:
    """Records its calls."""

    expected: list[tuple[Any, Verdict]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def table(self) -> Any:
        return SimpleNamespace(say=self.said.append)

    def expect(self, job: Any, verdict: Verdict) -> None:
        self.expected.append((job, verdict))


def submitted(id: str) -> Any:
    return SimpleNamespace(external_jobid=id, job=SimpleNamespace(name=f"job of {id}"))


@pytest.fixture
def squeue(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Replaces squeue and scancel by scripts; returns the file that lists their calls."""
    calls = tmp_path / "calls"
    calls.touch()

    def says(script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in (("squeue", script), ("scancel", f"touch {tmp_path}/cancelled")):
            program = folder / name
            program.write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\n{text}\n')
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return calls

    return says


@pytest.fixture
def watched() -> tuple[Executor, Retries]:
    executor, retries = Executor(), Retries()
    slurm.Watch(executor, retries)
    return executor, retries


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Its `now` is the time."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(slurm.time, "monotonic", lambda: clock.now)
    return clock


def check(executor: Executor, active: Sequence[Any]) -> list[Any]:
    """The jobs to poll again."""

    async def kept() -> list[Any]:
        return [job async for job in executor.check_active_jobs(active)]

    return asyncio.run(kept())


def test_a_job_that_the_executor_forgets_is_polled_again(watched, squeue):
    executor, retries = watched
    squeue("echo '1 RUNNING'")
    executor.finds = lambda job: "forgotten"
    job = submitted("1")
    assert check(executor, [job]) == [job]
    executor.finds = lambda job: "done"
    assert check(executor, [job]) == []
    assert (executor.ended, retries.said) == ([("1", "done")], [])


def test_an_executor_that_cannot_poll_keeps_all_its_jobs(watched, squeue):
    executor, _ = watched
    squeue("exit 1")

    def unanswered(job: Any) -> str:
        raise ConnectionError("Unable to contact slurm controller")

    executor.finds = unanswered
    jobs = [submitted("1"), submitted("2")]
    assert check(executor, jobs) == jobs
    assert executor.ended == []


def test_ended_jobs_are_reported_once_and_others_are_polled_again(watched, squeue):
    executor, retries = watched
    squeue("printf '1 COMPLETED\\n2 FAILED\\n3 RUNNING\\n'")
    executor.finds = lambda job: {"1": "done", "2": "failed"}.get(job.external_jobid, "running")
    jobs = [submitted(id) for id in "123"]
    assert check(executor, jobs) == jobs[2:]
    assert executor.ended == [("1", "done"), ("2", "it failed")]
    assert (retries.said, retries.expected) == (["it failed"], [])


def test_a_job_that_slurm_has_lost_is_submitted_again_twice_without_using_up_a_retry(
    watched, squeue, clock
):
    executor, retries = watched
    squeue("echo '1 PREEMPTED'")
    job = submitted("1")
    for loss in range(slurm.FORGIVEN + 1):
        job.external_jobid = "1" if loss == 0 else f"{loss}0"
        assert check(executor, [job]) == [job]
        clock.now += slurm.GRACE
        assert check(executor, [job]) == [job]  # Slurm may yet requeue it
        clock.now += 1.0
        assert check(executor, [job]) == []
    assert [text for _, text in executor.ended] == [
        f"Slurm has lost job {id}" for id in ("1", "10", "20")
    ]
    assert retries.expected == [(job.job, Verdict.CONTINUE)] * slurm.FORGIVEN


@pytest.mark.parametrize(
    "report",
    [
        "failed due to a node failure, SLURM status is: 'NODE_FAIL'. Failed nodes will be "
        "excluded from future job submissions.",
        "failed, SLURM status is: 'BOOT_FAIL'.",
    ],
)
def test_a_job_whose_node_fails_is_submitted_again_twice_without_using_up_a_retry(watched, report):
    executor, retries = watched
    job = submitted("1")
    for _ in range(slurm.FORGIVEN + 1):
        executor.report_job_error(job, msg=f"SLURM-job '1' {report}")
    assert retries.expected == [(job.job, Verdict.CONTINUE)] * slurm.FORGIVEN
    said = "the node of Slurm job 1 has failed"
    assert executor.ended == [("1", said)] * 3 and retries.said == [said] * 3


@pytest.mark.parametrize("answer", ["echo '1 PENDING'", "exit 1"])
def test_a_job_that_is_pending_or_unknown_during_an_outage_is_not_lost(
    watched, squeue, clock, answer
):
    executor, _ = watched
    squeue(answer)
    job = submitted("1")
    for _ in range(3):
        clock.now += 10 * slurm.GRACE
        assert check(executor, [job]) == [job]
    assert executor.ended == []


OUTAGES = [(f"sbatch: error: {sign}", Verdict.CONTINUE) for sign in slurm.UNREACHABLE]


@pytest.mark.parametrize(
    "said, verdict",
    [*OUTAGES, ("sbatch: error: invalid partition specified: gpuu", Verdict.GIVE_UP)],
)
def test_a_refused_submission_is_repeated_only_after_an_outage(watched, said, verdict):
    """Only the message of sbatch is shown."""
    executor, retries = watched
    job = submitted("")
    call = "    sbatch call:\n    sbatch --wrap 'python -m snakemake ...'\n"
    report = f"SLURM sbatch failed. The error message was '{said}'.\n{call}"
    executor.report_job_error(job, msg=report)
    assert (retries.expected, retries.said) == ([(job.job, verdict)], [said])
    assert executor.ended == [("", said if verdict is Verdict.GIVE_UP else report)]


def test_a_job_that_cannot_be_described_to_sbatch_is_not_repeated(watched):
    """The executor has shown its message."""
    executor, retries = watched
    job = submitted("")
    message = f"{slurm.INVALID}Invalid GPU model format: h100 x."
    executor.report_job_error(job, msg=message)
    assert (retries.expected, retries.said) == ([(job.job, Verdict.GIVE_UP)], [])
    assert executor.ended == [("", message)]


def test_a_submitted_job_has_no_log_of_an_earlier_attempt(watched, tmp_path):
    executor, _ = watched
    earlier, kept = tmp_path / "train.log", tmp_path / "other.log"
    earlier.touch()
    kept.touch()
    executor.run_jobs([SimpleNamespace(name="x", log=[str(earlier), str(tmp_path / "none.log")])])
    assert (earlier.exists(), kept.exists()) == (False, True)
    assert executor.ended == [("x", "submitted")]


def test_jobs_of_an_earlier_call_are_cancelled_and_awaited(tmp_path, squeue):
    calls = squeue(f"[ -e {tmp_path}/cancelled ] || printf '1\\n2\\n'")
    file = tmp_path / ".locks" / "slurm.json"
    assert slurm.end_orphans(file) == 0
    slurm.remember(file, Executor().run_uuid)
    assert json.loads(file.read_bytes()) == {"name": "3a8b"}
    assert slurm.end_orphans(file) == 2
    assert "scancel --name=3a8b\n" in calls.read_text()
    assert not file.exists()


def test_the_name_of_the_jobs_is_kept_while_slurm_does_not_answer(tmp_path, squeue):
    squeue("exit 1")
    file = tmp_path / "slurm.json"
    slurm.remember(file, Executor().run_uuid)
    with pytest.raises(errors.RunFailed, match="Slurm does not answer"):
        slurm.end_orphans(file)
    assert file.exists()
