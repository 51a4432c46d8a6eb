"""Snakemake tries again what is worth it, as often as it is: seen in a real workflow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tafs.common import errors

ROOT = Path(__file__).resolve().parents[2]
RETRIES = 2

RUNS = ("limited", "refused", "killed", "stuck", "broken", "half")

SNAKEFILE = (
    f"""
RUNS = {RUNS}
"""
    + """
import sys
from pathlib import Path
from tafs import progress, retries


jobs = progress.Jobs(lambda text: print(text, file=sys.stderr))

onstart:
    retries.Retries(workflow.scheduler, Path("runs"), jobs)

onerror:
    print("given up:", jobs.failed, file=sys.stderr)

rule all:
    input:
        expand("runs/{run}/adapter", run=RUNS),

rule train:
    output:
        "runs/{run}/adapter",
    log:
        "logs/{run}.log",
    resources:
        mem_mb=lambda wildcards, attempt: 100 * attempt,
    shell:
        "python job.py {wildcards.run} {resources.mem_mb} > {log} 2>&1"
"""
)

# Each try appends its memory to a file; `limited` succeeds at its fifth.
JOB = """
import os, signal, sys
from pathlib import Path
from tafs import failures, rundir

name, memory = sys.argv[1:]
run = rundir.RunDir(Path("runs") / name)
tries = Path(name)
with tries.open("a") as file:
    print(memory, file=file)
number = len(tries.read_text().splitlines())

def work():
    if name == "limited":
        if number < 5:
            raise failures.ToBeContinued(f"saved after {number} of 5")
        (run.folder / "adapter").touch()
    elif name == "refused":
        raise ValueError("run.json: is not JSON")
    elif name == "broken":
        raise failures.RunFailed("the server is gone")
    elif name == "stuck" and number == 1:
        raise failures.ToBeContinued("saved once, and never again")
    else:
        if name == "half":
            (run.folder / "adapter").touch()
        print("the last line", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

failures.run_cli("train", work, lambda code, line: run.note_failure("train", code, line))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, str]:
    """The folder in which the workflow has ended, and what it said."""
    folder = tmp_path_factory.mktemp("retries")
    (folder / "Snakefile").write_text(SNAKEFILE)
    (folder / "job.py").write_text(JOB)
    for name in RUNS:
        (folder / "runs" / name).mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    ended = subprocess.run(
        ["snakemake", "--cores=2", "--keep-going", f"--retries={RETRIES}", "--quiet=all"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    return folder, ended.stderr


def tries(done: tuple[Path, str], run: str) -> list[int]:
    """The memory of each try."""
    return [int(line) for line in (done[0] / run).read_text().split()]


def test_what_is_to_be_continued_is_continued_and_uses_up_no_retry(done):
    assert tries(done, "limited") == [100] * 5
    assert (done[0] / "runs/limited/adapter").exists()
    for number in range(1, 5):
        assert f"train limited: saved after {number} of 5\n" in done[1]
    assert "FAILED train limited" not in done[1]


def test_bad_input_is_not_tried_again(done):
    assert tries(done, "refused") == [100]
    assert "FAILED train refused (logs/refused.log)\n    run.json: is not JSON\n" in done[1]


def test_a_killed_job_is_tried_again_with_more_memory_as_often_as_is_allowed(done):
    assert tries(done, "killed") == [100, 200, 300]
    again = "failed and is tried again: train killed (logs/killed.log)\n    the last line\n"
    assert done[1].count(again) == RETRIES
    assert done[1].count("FAILED train killed (logs/killed.log)\n    the last line\n") == 1


def test_a_job_that_dies_with_its_files_there_is_told_of_as_well(done):
    assert tries(done, "half") == [100, 200, 300]
    assert done[1].count("FAILED train half (logs/half.log)\n    the last line\n") == 1


def test_a_failure_that_may_pass_is_tried_again(done):
    assert tries(done, "broken") == [100, 200, 300]
    assert "FAILED train broken (logs/broken.log)\n    the server is gone\n" in done[1]


def test_what_a_job_said_of_an_earlier_end_does_not_hold_for_a_later_one(done):
    """Or a job that dies before it can say anything would be continued for ever."""
    assert tries(done, "stuck") == [100, 100, 200, 300]
    noted = json.loads((done[0] / "runs/stuck/.failed/train.json").read_text())
    assert (noted["exit"], noted["seen"]) == (errors.CONTINUE, True)


def test_what_was_given_up_is_counted(done):
    assert "given up: 5\n" in done[1]
