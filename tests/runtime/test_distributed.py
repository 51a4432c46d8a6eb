"""Training by several processes: the same run, whatever their number, also when one of them fails.

Run by torchrun, this file is one of the processes that the tests watch.
"""

import json
import math
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from support.toy import call_of, spoil, toy_run, toy_trainer

from tafs.experiment import runs as runs_
from tafs.experiment import validate
from tafs.rewards.registry import RewardSet
from tafs.runtime import distributed, journal, main, run_dir
from tafs.runtime.distributed import Processes
from tafs.training import train
from tafs.training import trainer as trainer_

ROOT = Path(__file__).resolve().parents[2]
# Advantages within groups; one standard deviation for all groups; the rewards' own gradients.
VARIANTS = ("tafs_grpo", "flow_grpo", "reward_instruct", "rg_lcd")
ITERATIONS = 3
GROUP = 2
SETTINGS = {
    "iterations": ITERATIONS,
    "prompts_per_iteration": 8,
    "group_size": GROUP,
    "micro_batch": GROUP,  # divides what one of four processes has of an update
}


def prepare(folder: Path, variant: str) -> run_dir.RunDir:
    runs = runs_.runs(validate.read(ROOT / "config.yaml", {"scale": "smoke"}))
    description = next(r for r in runs.values() if r.variant == variant).describe()
    description["settings"] = {**description["settings"], **SETTINGS}
    # The paper's learning rate.
    own = {"updates": 2, "learning_rate": 3e-4}
    description["hyperparameters"] = {**description["hyperparameters"], **own}
    description["snapshots"] = [1, ITERATIONS]
    run = run_dir.RunDir(folder)
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps(description))
    return run


def stop_before(iteration: int, run: run_dir.RunDir) -> None:
    """Train alone, and stop before an iteration as Ctrl-C does."""
    iterate = trainer_.Trainer.iterate

    def stopping(self, number):
        if number == iteration:
            raise KeyboardInterrupt
        return iterate(self, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_.Trainer, "iterate", stopping)
        train.train(run)


def assert_same_training(run: run_dir.RunDir, other: run_dir.RunDir) -> None:
    """Up to the rounding of sums that are taken in another order."""
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


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Far under the time that the processes would wait for each other."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, run_dir.RunDir]:
    """Every variant, trained by one process; the first one also as it was after an iteration."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {variant: prepare(folder / variant, variant) for variant in VARIANTS}
    stop_before(1, runs[VARIANTS[0]])
    stopped = shutil.copytree(runs[VARIANTS[0]].folder, folder / "stopped")
    for run in runs.values():
        train.train(run)
    return {**runs, "stopped": run_dir.RunDir(stopped)}


@pytest.fixture(scope="module")
def by_four(alone, tmp_path_factory) -> dict[str, run_dir.RunDir]:
    """Every variant anew, and the stopped run continued, by four processes."""
    folder = tmp_path_factory.mktemp("four")
    runs = {variant: prepare(folder / variant, variant) for variant in VARIANTS}
    stopped = run_dir.RunDir(shutil.copytree(alone["stopped"].folder, folder / "stopped"))
    done = torchrun(4, __file__, "each", str(folder))
    assert done.returncode == 0, done.stderr
    return {**runs, "stopped": stopped}


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_processes_train_what_one_trains(by_four, alone, variant):
    assert_same_training(by_four[variant], alone[variant])


def test_four_processes_continue_what_one_began(by_four, alone):
    run = by_four["stopped"]
    assert_same_training(run, alone[VARIANTS[0]])
    kinds = [record["kind"] for record in journal.read(run.journal)]
    assert kinds == ["start", "iteration", "resume", "iteration", "iteration", "end"]


def test_one_process_of_several_writes_the_files(by_four):
    for run in (by_four[variant] for variant in VARIANTS):
        kinds = [record["kind"] for record in journal.read(run.journal)]
        assert kinds == ["start", *["iteration"] * ITERATIONS, "end"]
        assert {file.name for file in run.folder.iterdir()} == {
            "run.json",
            "adapter.safetensors",
            "journal.jsonl",
            "snapshots",
            ".progress",
            ".state",
        }
        assert not any((run.folder / ".progress").iterdir())


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[run_dir.RunDir, subprocess.CompletedProcess[str]]:
    """Two processes, of which the second one's rewards are broken in iteration 1: half of all."""
    run = prepare(tmp_path_factory.mktemp("broken") / VARIANTS[0], VARIANTS[0])
    return run, torchrun(2, __file__, "broken", str(run.folder))


def test_a_failure_of_one_process_ends_the_job_with_its_own_line(broken):
    run, done = broken
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"train {run.folder}")]
    # The second process has the images 4 to 7 of the first update's 0 to 7. Both processes know all
    # rewards and stop, and either may be the first.
    assert len(lines) == 1
    assert re.fullmatch(
        rf"train {re.escape(str(run.folder))} \(process [01]\): iteration 1: reward 'pickscore' is "
        r"nan for image 4, scored step 1 of 3; 8 of 16 images \(50.0%\) lack a finite reward, "
        r"at most 1 may \(10%, or one\)",
        lines[0],
    )
    assert "another process" not in done.stderr
    command_lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    assert not any(str(run.folder) in line for line in command_lines)


def test_a_failed_job_is_continued_by_one_process_and_by_two(broken, alone, tmp_path):
    """By the command that a user calls."""
    run, _ = broken
    assert run.checkpoints.exists()
    assert not (run.adapter.exists() or run.journal.exists() or run.snapshots.exists())
    copy = run_dir.RunDir(shutil.copytree(run.folder, tmp_path / "copy"))
    done = torchrun(2, "-m", "tafs.training.train", str(run.folder))
    assert done.returncode == 0, done.stderr
    train.train(copy)
    for continued in (run, copy):
        assert_same_training(continued, alone[VARIANTS[0]])
        resumed = [r["iteration"] for r in journal.read(continued.journal) if r["kind"] == "resume"]
        assert resumed == [1]


# -- sharing out -----------------------------------------------------------------------------------


def trainer(processes: Processes, variant: str = "tafs_grpo") -> trainer_.Trainer:
    sizes = {"prompts_per_iteration": 8, "micro_batch": 8}
    return toy_trainer(toy_run(variant, training=sizes, updates=2), processes)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_each_updates_groups_equally(size):
    own = [trainer(Processes(rank, size)).local_groups for rank in range(size)]
    assert sorted(sum(own, [])) == list(range(8))
    for groups in own:
        assert len(groups) == 8 // size
        assert sum(group < 4 for group in groups) == 4 // size


@pytest.mark.parametrize("size", [2, 4])
def test_processes_begin_micro_batches_where_one_process_does(size):
    """The steps' noise is drawn from a stream that this place names."""

    def places(processes: Processes) -> list[int]:
        run = trainer(processes)
        return [run._place(part.start) for part in run.micro_batches()]

    shared = [places(Processes(rank, size)) for rank in range(size)]
    assert sorted(sum(shared, [])) == places(Processes())


def test_prompts_that_processes_cannot_share_are_refused():
    with pytest.raises(ValueError) as raised:
        trainer(Processes(0, 3))
    assert str(raised.value) == (
        "prompts_per_iteration: 8 prompts in 2 updates cannot be shared by 3 processes; "
        "choose a divisor of 4"
    )


# -- the connection --------------------------------------------------------------------------------


def in_two_processes(work: Callable[[Processes], object]) -> list[int]:
    """Exit codes of two connected processes that do the work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
        server = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in (place | server).items()}
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        with distributed.connected() as processes:
            work(processes)

    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_tensors_are_gathered_in_order_of_rank_and_summed():
    def work(processes: Processes) -> None:
        own = torch.tensor([[1.0, 2.0]]) + 10 * processes.rank
        assert processes.all_gather(own, dim=0).tolist() == [[1, 2], [11, 12]]
        assert processes.all_gather(own.T, dim=1).tolist() == [[1, 11], [2, 12]]
        counts, total = torch.tensor([processes.rank, 5]), torch.tensor(0.5)
        processes.sum_([counts, total])
        assert counts.tolist() == [1, 10]
        assert total.item() == 1.0

    assert in_two_processes(work) == [0, 0]


@pytest.mark.parametrize("variant", ["tafs_grpo", "flow_grpo"])
def test_an_image_without_a_reward_is_masked_for_all_processes(variant):
    """The second process scores it; the first one's images are normalised without it too."""
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

    assert in_two_processes(work) == [0, 0]


def test_processes_that_see_different_states_do_not_train(alone, tmp_path, monkeypatch, capfd):
    """As when each of two machines has a disk of its own."""
    folders = [tmp_path / "first" / "run", tmp_path / "second" / "run"]
    shutil.copytree(alone["stopped"].folder, folders[0])
    prepare(folders[1], VARIANTS[0])
    monkeypatch.setattr(distributed, "GRACE", 0.0)

    def work(processes: Processes) -> None:
        train.train(run_dir.RunDir(folders[processes.rank]), processes)

    assert in_two_processes(work) == [1, 1]
    problem = "the processes found states of different iterations ([1, 0], in order of rank)"
    assert problem in capfd.readouterr().err
    assert run_dir.RunDir(folders[0]).checkpoints.exists()


def test_one_process_keeps_its_tensors_as_they_are():
    processes, tensor = Processes(), torch.tensor([1.0, 2.0])
    assert processes.all_gather(tensor, dim=0) is tensor
    processes.sum_([tensor])
    assert tensor.tolist() == [1.0, 2.0]
    with distributed.connected() as found:
        assert found == processes
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is no whole number from 1; torchrun sets it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is no whole number from 1; torchrun sets it"),
        ({"WORLD_SIZE": "2"}, "RANK: '' is no whole number from 0; torchrun sets it"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1"},
            "LOCAL_RANK: '-1' is no whole number from 0; torchrun sets it",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "1",
                "LOCAL_RANK": "1",
                "TAFS_DISTRIBUTED_TIMEOUT": "for ever",
            },
            "TAFS_DISTRIBUTED_TIMEOUT: 'for ever' is no whole number from 1; give seconds",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TAFS_DISTRIBUTED_TIMEOUT": "0"},
            "TAFS_DISTRIBUTED_TIMEOUT: '0' is no whole number from 1; give seconds",
        ),
    ],
)
def test_a_wrong_environment_is_refused_by_name(environment, problem, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as raised, distributed.connected():
        pass
    assert str(raised.value) == problem


def test_the_rank_on_a_machine_is_not_the_rank_in_the_job(monkeypatch):
    """The second process of the second machine."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    processes = distributed.from_environment()
    assert processes == Processes(rank=3, size=4, local_rank=1)
    assert not processes.leads


# -- one process of several ------------------------------------------------------------------------


def train_each(folder: run_dir.RunDir) -> None:
    """Train every run of a folder in turn: starting a process takes longer than its training."""
    with distributed.connected() as processes:
        for run in sorted(folder.folder.glob("[!.]*")):
            train.train(run_dir.RunDir(run), processes)


def train_with_broken_rewards() -> None:
    """`python -m tafs.training.train`, but from iteration 1 on one process's rewards are no numbers."""
    iterate, score = trainer_.Trainer.iterate, RewardSet.score

    def breaking(self, iteration):
        if iteration == 1 and self.processes.rank == 1:
            RewardSet.score = lambda *given: {n: r * math.nan for n, r in score(*given).items()}
        return iterate(self, iteration)

    trainer_.Trainer.iterate = breaking
    train.main()


if __name__ == "__main__":
    if sys.argv.pop(1) == "each":
        main.run_stage("train", train_each)
    else:
        train_with_broken_rewards()
