"""Which failed jobs run again, in a real workflow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tafs.common import errors
from tafs.orchestration.retries import Failure

ROOT = Path(__file__).resolve().parents[2]
RETRIES = 2
RUNS = ("limited", "refused", "killed", "stuck", "broken", "half")

SNAKEFILE = """
import sys
from pathlib import Path
from tafs.orchestration.live_table import LiveTable
from tafs.orchestration.retries import Retries
from tafs.orchestration.snakemake_hooks import on_failure

table = LiveTable(Path("runs"), sys.stderr, "test")

onstart:
    on_failure(workflow, Retries(table).decide)

onerror:
    print("given up:", table.failed, file=sys.stderr)

rule all:
    input:
        expand("runs/{run}/adapter", run=config["runs"].split()),

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

# Each attempt appends its memory to a file; `limited` succeeds in the fifth.
JOB = """
import os, signal, sys
from functools import partial
from pathlib import Path
from tafs.common import errors
from tafs.runtime.run_dir import RunDir

name, memory = sys.argv[1:]
run = RunDir(Path("runs") / name)
attempts = Path(name)
with attempts.open("a") as file:
    print(memory, file=file)
number = len(attempts.read_text().splitlines())

def work():
    if name == "limited":
        if number < 5:
            raise errors.ToBeContinued(f"saved after {number} of 5")
        (run.folder / "adapter").touch()
    elif name == "refused":
        raise ValueError("run.json: is not JSON")
    elif name == "broken":
        raise errors.RunFailed("the server is gone")
    elif name == "stuck" and number == 1:
        raise errors.ToBeContinued("saved once, and never again")
    else:
        if name == "half":
            (run.folder / "adapter").touch()
        print("the last line", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

errors.run_cli("train", work, partial(run.note_failure, "train"))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, str]:
    """(folder, standard error) of the workflow, which has ended."""
    folder = tmp_path_factory.mktemp("retries")
    (folder / "Snakefile").write_text(SNAKEFILE)
    (folder / "job.py").write_text(JOB)
    for name in RUNS:
        (folder / "runs" / name).mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    ended = subprocess.run(
        [
            *("snakemake", "--cores=2", "--keep-going", f"--retries={RETRIES}", "--quiet=all"),
            *("--config", f"runs={' '.join(RUNS)}"),
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    return folder, ended.stderr


def memory(done: tuple[Path, str], run: str) -> list[int]:
    """The memory of each attempt."""
    return [int(line) for line in (done[0] / run).read_text().split()]


def test_a_job_that_saved_its_state_runs_again_without_using_up_a_retry(done):
    assert memory(done, "limited") == [100] * 5
    assert (done[0] / "runs/limited/adapter").exists()
    for number in range(1, 5):
        assert f"train limited: saved after {number} of 5\n" in done[1]
    assert "FAILED train limited" not in done[1]


def test_bad_input_is_not_retried(done):
    assert memory(done, "refused") == [100]
    assert "FAILED train refused (logs/refused.log)\n    run.json: is not JSON\n" in done[1]
    assert "given up: 5\n" in done[1]  # with the four below


@pytest.mark.parametrize("run", ["killed", "half"])
def test_a_killed_job_is_retried_with_more_memory_even_if_its_output_exists(done, run):
    assert memory(done, run) == [100, 200, 300]
    again = f"failed and is tried again: train {run} (logs/{run}.log)\n    the last line\n"
    assert done[1].count(again) == RETRIES
    assert done[1].count(f"FAILED train {run} (logs/{run}.log)\n    the last line\n") == 1


def test_other_failures_are_retried(done):
    assert memory(done, "broken") == [100, 200, 300]
    assert "FAILED train broken (logs/broken.log)\n    the server is gone\n" in done[1]


def test_the_reason_of_an_earlier_failure_does_not_apply_to_a_later_one(done):
    """Otherwise a job that dies before it can write a reason would be continued forever."""
    assert memory(done, "stuck") == [100, 100, 200, 300]
    noted = json.loads((done[0] / "runs/stuck/.failed/train.json").read_text())
    assert (noted["exit"], noted["seen"]) == (errors.CONTINUE, True)


def test_a_failure_is_described_by_its_reason_or_the_last_line_of_its_log(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("Traceback ...\nValueError: no prompts\n\n")
    known = Failure("train", "x.0", (str(log),), 1, "no prompts at all")
    assert known.describe("FAILED") == f"FAILED train x.0 ({log})\n    no prompts at all"
    silent = Failure("train", "x.0", (str(log),), None, "")
    assert silent.describe("FAILED") == f"FAILED train x.0 ({log})\n    ValueError: no prompts"
    gone = Failure("compare", "", ("gone.log",), None, "")
    assert gone.describe("FAILED") == "FAILED compare (gone.log)\n    no output"
    unlogged = Failure("compare", "", (), None, "")
    assert unlogged.describe("FAILED") == "FAILED compare (no log)\n    no output"
