"""Several processes train the same run as one process, whatever their number, and report failures.

Started by the launcher, this file is one of the processes that the tests watch.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from support.forked_processes import free_port
from support.killable_training import before, interrupt, prepare
from support.toy import call_of, spoil, toy_run, toy_trainer

from tafs.common import errors
from tafs.rewards.registry import RewardSet
from tafs.runtime import distributed, journal
from tafs.runtime.distributed import Processes
from tafs.runtime.run_dir import RunDir, read_json
from tafs.training import train
from tafs.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
# Advantages within groups; one standard deviation over all groups; gradients of the rewards.
VARIANTS = ("tafs_grpo", "flow_grpo", "reward_instruct", "rg_lcd")
ITERATIONS = 2
GROUP = 2
HYPERPARAMETERS = {"updates": 2, "learning_rate": 3e-4}
SETTINGS = {
    "prompts_per_iteration": 8,
    "group_size": GROUP,
    "micro_batch": GROUP,  # divides one of four processes' share of an update
}


def prepared(folder: Path, variant: str) -> RunDir:
    return prepare(folder, ITERATIONS, variant, HYPERPARAMETERS, **SETTINGS)


def stop_before(iteration: int, run: RunDir) -> None:
    """Train in one process, and stop before an iteration as Ctrl-C does."""
    stops = pytest.raises(KeyboardInterrupt)
    with stops, before(pytest.MonkeyPatch(), "iterate", iteration, interrupt):
        train.train(run)


def assert_same_training(run: RunDir, other: RunDir) -> None:
    """Compare up to the rounding of sums in another order."""
    for name in ("adapter.safetensors", "snapshots/1.safetensors"):
        found, expected = load_file(run.folder / name), load_file(other.folder / name)
        assert any(tensor.any() for key, tensor in expected.items() if "lora_B" in key)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    pairs = zip(journal.iterations(run.journal), journal.iterations(other.journal), strict=True)
    for record, expected in pairs:
        assert set(record) == set(expected)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        for name, values in expected["rewards"].items():
            assert record["rewards"][name] == pytest.approx(values, rel=1e-6, abs=1e-5)
        measured = set(expected) - {"time", "seconds", "images_per_s", "rewards", "kind"}
        for name in measured:
            assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def command(*arguments: str, mode: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python; the timeout is far below the time that processes wait for each other."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "MODE": mode},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def launched(run: RunDir, module: str, mode: str = "") -> subprocess.CompletedProcess[str]:
    """Launch two processes of a module instead of trainings."""
    code = f"from tafs.runtime import launch; launch.MODULE = {module!r}"
    return command("-c", f"{code}; launch.main()", str(run.folder), "--processes=2", mode=mode)


def in_processes(count: int, work: Callable[[Processes], object]) -> list[int | None]:
    """Return the exit codes of connected processes that run `work`."""
    port = free_port()

    def run(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
        server = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in (place | server).items()}
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        with distributed.connected() as processes:
            work(processes)

    context = multiprocessing.get_context("fork")  # avoids importing again
    started = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
    return [process.exitcode for process in started]


def own_lines(run: RunDir, done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith(f"train {run.folder}")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, RunDir]:
    """Every variant trained by one process, and the first one stopped after an iteration."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {variant: prepared(folder / variant, variant) for variant in VARIANTS}
    stop_before(1, runs[VARIANTS[0]])
    stopped = shutil.copytree(runs[VARIANTS[0]].folder, folder / "stopped")
    for run in runs.values():
        train.train(run)
    return {**runs, "stopped": RunDir(stopped)}


@pytest.fixture(scope="module")
def by_four(alone, tmp_path_factory) -> dict[str, RunDir]:
    """Every variant, and the stopped run continued, by four processes."""
    folder = tmp_path_factory.mktemp("four")
    runs = {variant: prepared(folder / variant, variant) for variant in VARIANTS}
    stopped = RunDir(shutil.copytree(alone["stopped"].folder, folder / "stopped"))

    def work(processes: Processes) -> None:
        for run in (*runs.values(), stopped):
            train.train(run, processes)

    assert in_processes(4, work) == [0, 0, 0, 0]
    return {**runs, "stopped": stopped}


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_processes_train_the_same_as_one(by_four, alone, variant):
    assert_same_training(by_four[variant], alone[variant])


def test_four_processes_continue_the_run_of_one(by_four, alone):
    run = by_four["stopped"]
    assert_same_training(run, alone[VARIANTS[0]])
    kinds = [record["kind"] for record in journal.read(run.journal)]
    assert kinds == ["start", "iteration", "resume", "iteration", "end"]


def test_only_the_first_process_writes_files(by_four):
    for run in (by_four[variant] for variant in VARIANTS):
        kinds = [record["kind"] for record in journal.read(run.journal)]
        assert kinds == ["start", *["iteration"] * ITERATIONS, "end"]
        names = ["run.json", "adapter.safetensors", "journal.jsonl", "snapshots", "receipts"]
        assert {f.name for f in run.folder.iterdir()} == {*names, ".progress", ".state"}
        assert not any((run.folder / ".progress").iterdir())


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[RunDir, subprocess.CompletedProcess[str]]:
    """Two processes; the second one's rewards, half of all, are NaN in iteration 1."""
    run = prepared(tmp_path_factory.mktemp("broken") / VARIANTS[0], VARIANTS[0])
    return run, launched(run, "runtime.test_distributed")


def test_a_failure_of_all_processes_is_reported_once(broken):
    run, done = broken
    # The second process has the images 4 to 7 of the first update's 0 to 7. Both processes know all
    # rewards and stop, and either may be the first.
    [line] = own_lines(run, done)
    assert re.fullmatch(
        rf"train {re.escape(str(run.folder))}: process [01]: iteration 1: reward 'clip' is "
        r"nan for image 4, scored step 1 of 3; 8 of 16 images \(50.0%\) lack a finite reward, "
        r"at most 1 may \(10%, or one\)",
        line,
    )
    assert done.returncode == read_json(run.failure("train"))["exit"] == 1
    assert read_json(run.failure("train"))["message"] in line
    command_lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    assert not any(str(run.folder) in words for words in command_lines)


@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [
        ("wrong", 2, "process 1: the learning rate is wrong"),
        ("mistake", 1, "process 1: KeyError: 'missing'"),
        ("killed", 1, "process 1: ended by SIGKILL"),
    ],
)
def test_the_failing_process_is_named_and_not_those_that_wait_for_it(mode, code, message, tmp_path):
    run = prepared(tmp_path / "run", VARIANTS[0])
    done = launched(run, "support.failing_process", mode)
    assert done.returncode == code
    assert own_lines(run, done) == [f"train {run.folder}: {message}"]
    assert read_json(run.failure("train"))["message"] == message
    assert ("Traceback" in done.stderr) == (mode == "mistake")


def test_a_failed_job_is_continued_by_one_process_and_by_two(broken, alone, tmp_path):
    run, _ = broken
    assert run.checkpoints.exists()
    assert not (run.adapter.exists() or run.journal.exists() or run.snapshots.exists())
    copy = RunDir(shutil.copytree(run.folder, tmp_path / "copy"))
    done = command("-m", "tafs.runtime.launch", str(run.folder), "--processes=2")
    assert done.returncode == 0, done.stderr
    train.train(copy)
    for continued in (run, copy):
        assert_same_training(continued, alone[VARIANTS[0]])
        resumed = [r["iteration"] for r in journal.read(continued.journal) if r["kind"] == "resume"]
        assert resumed == [1]


def trainer(processes: Processes, variant: str = "tafs_grpo") -> Trainer:
    sizes = {"prompts_per_iteration": 8, "micro_batch": 8}
    return toy_trainer(toy_run(variant, training=sizes, updates=2), processes)


def test_a_number_of_processes_that_does_not_divide_the_prompts_is_refused():
    problem = "^prompts_per_iteration: 8 prompts in 2 updates cannot be divided among 3 processes"
    with pytest.raises(ValueError, match=f"{problem}; choose a divisor of 4$"):
        trainer(Processes(0, 3))


def test_tensors_are_gathered_in_order_of_rank_and_summed():
    def work(processes: Processes) -> None:
        own = torch.tensor([[1.0, 2.0]]) + 10 * processes.rank
        assert processes.all_gather(own, dim=0).tolist() == [[1, 2], [11, 12]]
        assert processes.all_gather(own.T, dim=1).tolist() == [[1, 11], [2, 12]]
        counts, total = torch.tensor([processes.rank, 5]), torch.tensor(0.5)
        processes.sum_([counts, total])
        assert (counts.tolist(), total.item()) == ([1, 10], 1.0)

    assert in_processes(2, work) == [0, 0]


@pytest.mark.parametrize("variant", ["tafs_grpo", "flow_grpo"])
def test_an_image_without_a_reward_is_masked_in_all_processes(variant):
    """The second process scores it; normalisation in the first process ignores it too."""
    sound, lacking = (trainer(Processes(), variant) for _ in range(2))
    sound.iterate(0)
    spoil(lacking, {call_of(lacking, 2 * 16 + 3): math.nan})
    expected = lacking.iterate(0)
    assert not torch.equal(lacking.parameters["bias"], sound.parameters["bias"])

    def work(processes: Processes) -> None:
        run = trainer(processes, variant)
        if processes.rank == 1:
            spoil(run, {call_of(run, 3): math.nan})  # of its first group, the third of all
        record = run.iterate(0)
        assert record["invalid"] == 1
        assert record["rewards"]["clip"] == pytest.approx(expected["rewards"]["clip"], rel=1e-5)
        assert record["reward_std"] == pytest.approx(expected["reward_std"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        for name, parameter in run.parameters.items():
            torch.testing.assert_close(parameter, lacking.parameters[name], rtol=0, atol=1e-6)

    assert in_processes(2, work) == [0, 0]


def test_processes_that_see_different_states_do_not_train(alone, tmp_path):
    """This happens when two machines do not share the results folder."""
    folders = [tmp_path / "first" / "run", tmp_path / "second" / "run"]
    shutil.copytree(alone["stopped"].folder, folders[0])
    prepared(folders[1], VARIANTS[0])
    problem = r"the processes found states of different iterations \(\[1, 0\], by rank\)"

    def work(processes: Processes) -> None:
        with pytest.raises(errors.RunFailed, match=problem):
            train.train(RunDir(folders[processes.rank]), processes)

    assert in_processes(2, work) == [0, 0]
    assert RunDir(folders[0]).checkpoints.exists()


def test_with_one_process_the_methods_return_their_arguments():
    processes, tensor = Processes(), torch.tensor([1.0, 2.0])
    assert processes.all_gather(tensor, dim=0) is tensor
    processes.sum_([tensor])
    assert tensor.tolist() == [1.0, 2.0]
    with distributed.connected() as found:
        assert found == processes
    assert not torch.distributed.is_initialized()


def test_a_process_that_has_no_gpu_is_named_by_its_rank_on_the_machine(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.from_environment() == Processes(rank=3, size=4, local_rank=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match="process 1 of this machine has no GPU, only 1 are visible"
    ):
        distributed.from_environment("cuda")


def break_rewards() -> None:
    """All of this process's rewards are NaN from now on."""
    score = RewardSet.score
    RewardSet.score = lambda *given: {n: r * math.nan for n, r in score(*given).items()}


if __name__ == "__main__":
    iterate = Trainer.iterate

    def disturbed(self: Trainer, iteration: int) -> Any:
        if iteration == 1 and self.processes.rank == 1:
            break_rewards()
        return iterate(self, iteration)

    Trainer.iterate = disturbed
    train.main()
