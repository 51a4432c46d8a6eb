"""Training at smoke scale on the shipped model: resuming, fingerprints, records."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tafs.common import errors
from tafs.experiment import runs as runs_
from tafs.experiment import validate
from tafs.rewards.registry import RewardSet
from tafs.runtime import journal, run_dir
from tafs.training import train, trainer

ROOT = Path(__file__).resolve().parents[2]


ITERATIONS = 4
SNAPSHOTS = [1, 3, ITERATIONS]


def prepare(
    folder: Path, variant: str = "tafs_grpo", iterations: int = ITERATIONS
) -> run_dir.RunDir:
    runs = runs_.runs(validate.read(ROOT / "config.yaml", {"scale": "smoke"}))
    description = next(r for r in runs.values() if r.variant == variant).describe()
    description["settings"] = {**description["settings"], "iterations": iterations}
    description["snapshots"] = [n for n in SNAPSHOTS if n <= iterations]
    run = run_dir.RunDir(folder / description["name"])
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps(description))
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> run_dir.RunDir:
    run = prepare(tmp_path_factory.mktemp("undisturbed"))
    train.train(run)
    return run


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> run_dir.RunDir:
    """Of a method whose model is an average over its updates."""
    run = prepare(tmp_path_factory.mktemp("averaged"), "flow_grpo")
    train.train(run)
    return run


@pytest.fixture(params=["undisturbed", "averaged"])
def finished(request) -> run_dir.RunDir:
    return request.getfixturevalue(request.param)


def train_until(run: run_dir.RunDir, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and stop before iteration `last` as Ctrl-C does."""
    iterate = trainer.Trainer.iterate

    def stop(self, iteration):
        if iteration == last:
            raise KeyboardInterrupt
        return iterate(self, iteration)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "iterate", stop)
        train.train(run)


def same_adapter(a: run_dir.RunDir, b: run_dir.RunDir) -> bool:
    return a.adapter.read_bytes() == b.adapter.read_bytes()


def snapshots(run: run_dir.RunDir) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(run.snapshots.iterdir())}


def test_training_twice_gives_the_same_adapter_bit_for_bit(undisturbed, tmp_path):
    run = prepare(tmp_path)
    train.train(run)
    assert same_adapter(run, undisturbed)
    assert snapshots(run) == snapshots(undisturbed)


def test_training_changes_the_adapter(undisturbed):
    trained = load_file(undisturbed.adapter)
    assert any(tensor.any() for name, tensor in trained.items() if "lora_B" in name)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_run_that_stopped_continues_to_the_same_adapter(finished, failing, tmp_path, monkeypatch):
    """Also with an averaged adapter and two updates an iteration, as Flow-GRPO has."""
    run = prepare(tmp_path / "stopped", finished.description["variant"])
    train_until(run, failing, monkeypatch)
    assert run.checkpoints.exists() and not run.adapter.exists()
    assert not run.snapshots.exists()
    train.train(run)
    assert same_adapter(run, finished)
    assert snapshots(run) == snapshots(finished)
    kinds = [record["kind"] for record in journal.read(run.journal)]
    assert kinds.count("resume") == 1


def test_a_finished_run_that_is_called_again_has_nothing_left_to_do(undisturbed, tmp_path):
    """As by a workflow that was killed before it heard of the end, and so removed the files."""
    run = run_dir.RunDir(shutil.copytree(undisturbed.folder, tmp_path / undisturbed.name))
    run.adapter.unlink()
    run.journal.unlink()
    shutil.rmtree(run.snapshots)
    train.train(run)
    assert same_adapter(run, undisturbed)
    assert snapshots(run) == snapshots(undisturbed)
    kinds = [record["kind"] for record in journal.read(run.journal)]
    assert kinds == ["start", *["iteration"] * ITERATIONS, "end", "resume", "end"]
    run.forget_training()
    assert not run.state.exists()


def test_the_resume_state_of_a_run_that_is_being_trained_is_not_removed(undisturbed, tmp_path):
    run = run_dir.RunDir(shutil.copytree(undisturbed.folder, tmp_path / undisturbed.name))
    with run.alone("train"):
        run.forget_training()
    assert run.state.exists()


def test_a_snapshot_that_was_damaged_before_the_end_is_taken_again(
    undisturbed, tmp_path, monkeypatch
):
    run = prepare(tmp_path)
    train_until(run, 3, monkeypatch)
    content = bytearray(run.kept_snapshot(1).read_bytes())
    content[len(content) // 2] ^= 1
    run.kept_snapshot(1).write_bytes(content)
    train.train(run)
    assert snapshots(run) == snapshots(undisturbed)
    assert same_adapter(run, undisturbed)


@pytest.mark.parametrize("name", ["adapter.safetensors", "snapshots/1.safetensors"])
def test_an_adapter_that_is_not_what_training_wrote_is_refused(undisturbed, tmp_path, name):
    run = run_dir.RunDir(shutil.copytree(undisturbed.folder, tmp_path / undisturbed.name))
    iteration = None if name.startswith("adapter") else 1
    assert run.verified(iteration) == run.folder / name
    content = bytearray((run.folder / name).read_bytes())
    content[-1] ^= 1
    (run.folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: is not what training wrote"):
        run.verified(iteration)
    (run.folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: not found"):
        run.verified(iteration)


# -- time limits and signals -----------------------------------------------------------------------


def in_steps(run: run_dir.RunDir, environment: dict[str, str]) -> list[str]:
    """The lines of the jobs that train the run, one after the other until it is trained."""
    command = [sys.executable, "-m", "tafs.runtime.launch", str(run.folder)]
    said = []
    for _ in range(ITERATIONS):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return said
        assert (done.returncode, run.adapter.exists()) == (errors.CONTINUE, False)
        said.append(done.stderr.splitlines()[-1])
        noted = json.loads(run.failure("train").read_text())
        assert (noted["exit"], noted["seen"]) == (errors.CONTINUE, False)
    raise AssertionError(said)


def test_a_job_near_its_time_limit_saves_its_state_and_asks_to_be_continued(undisturbed, tmp_path):
    """Each job has time for one iteration alone."""
    run = prepare(tmp_path)
    spent = {"TAFS_MINUTES": "1", "TAFS_STARTED": str(int(time.time()) - 60)}
    said = in_steps(run, spent)
    assert said == [
        f"train {run.folder}: saved after {n} of {ITERATIONS} iterations, to be continued: the "
        "time limit of 1 minutes is near"
        for n in range(1, ITERATIONS)
    ]
    assert same_adapter(run, undisturbed)
    assert snapshots(run) == snapshots(undisturbed)
    pauses = [r["iteration"] for r in journal.read(run.journal) if r["kind"] == "pause"]
    assert pauses == [1, 2, 3]
    assert not run.failure("train").exists()


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_for_the_same(undisturbed, tmp_path, asked, monkeypatch):
    run = prepare(tmp_path)
    iterate = trainer.Trainer.iterate

    def signalled(self, iteration):
        if iteration == 1:
            os.kill(os.getpid(), asked)
        return iterate(self, iteration)

    before = signal.getsignal(asked)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "iterate", signalled)
        with pytest.raises(errors.ToBeContinued, match=f"2 of {ITERATIONS}.*: {asked.name}$"):
            train.train(run)
    assert signal.getsignal(asked) == before
    train.train(run)
    assert same_adapter(run, undisturbed)


def test_a_second_job_waits_for_the_first_and_then_has_nothing_to_do(undisturbed, tmp_path):
    """As when a killed workflow left the first one behind, and is called again."""
    run = prepare(tmp_path)
    command = [sys.executable, "-m", "tafs.runtime.launch", str(run.folder)]

    def job() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    with job() as first:
        while not (run.state / "journal.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)
        with job() as second:
            said = next(line for line in second.stderr if "waits for" in line)
            first.send_signal(signal.SIGCONT)
            assert (first.wait(), second.wait()) == (0, 0)
        assert "waits for" not in first.stderr.read()
    assert said.startswith(f"train {run.folder}: waits for process {first.pid} on ")
    kinds = [record["kind"] for record in journal.read(run.journal)]
    assert kinds == ["start", *["iteration"] * ITERATIONS, "end", "resume", "end"]
    assert same_adapter(run, undisturbed)


def test_a_run_stopped_between_snapshot_and_checkpoint_writes_the_snapshot_again(
    undisturbed, tmp_path, monkeypatch
):
    run = prepare(tmp_path)
    save = trainer.Trainer.save

    def stop(self, folder, fingerprint, iteration, facts):
        if iteration == 3:
            raise KeyboardInterrupt
        save(self, folder, fingerprint, iteration, facts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "save", stop)
        train.train(run)
    early = run.state / "snapshots" / "3.safetensors"
    assert early.read_bytes() == snapshots(undisturbed)["3.safetensors"]
    early.write_bytes(b"what a kill may have left")
    train.train(run)
    resumed = [r["iteration"] for r in journal.read(run.journal) if r["kind"] == "resume"]
    assert resumed == [2]
    assert snapshots(run) == snapshots(undisturbed)
    assert same_adapter(run, undisturbed)


def test_snapshots_are_the_described_ones_and_differ(finished):
    kept = snapshots(finished)
    assert set(kept) == {f"{n}.safetensors" for n in SNAPSHOTS}
    assert len(set(kept.values())) == len(SNAPSHOTS)


def test_a_snapshot_of_the_last_iteration_is_the_adapter(finished):
    assert finished.snapshot(ITERATIONS).read_bytes() == finished.adapter.read_bytes()


def test_a_snapshot_is_the_adapter_of_a_run_that_ends_there(finished, tmp_path):
    short = prepare(tmp_path, finished.description["variant"], iterations=1)
    train.train(short)
    assert short.adapter.read_bytes() == finished.snapshot(1).read_bytes()


def test_a_killed_process_continues_to_the_same_adapter(undisturbed, tmp_path):
    """kill -9 in the middle, then the same command."""
    run = prepare(tmp_path)
    command = [sys.executable, "-m", "tafs.training.train", str(run.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not any(path.name.isdecimal() for path in run.checkpoints.glob("*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not run.adapter.exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert [r["kind"] for r in journal.read(run.journal)].count("resume") == 1
    assert same_adapter(run, undisturbed)
    assert snapshots(run) == snapshots(undisturbed)


def test_a_state_of_other_settings_is_not_continued(undisturbed, tmp_path, monkeypatch):
    run = prepare(tmp_path)
    train_until(run, 2, monkeypatch)
    description = {**run.description, "hyperparameters": {"learning_rate": 0.01}}
    (run.folder / "run.json").write_text(json.dumps(description))
    changed = run_dir.RunDir(run.folder)
    train.train(changed)
    records = journal.read(changed.journal)
    assert [r["kind"] for r in records].count("start") == 1
    assert "resume" not in [r["kind"] for r in records]
    assert not same_adapter(changed, undisturbed)


def test_the_journal_holds_what_an_iteration_measured(undisturbed):
    records = journal.iterations(undisturbed.journal)
    assert [r["iteration"] for r in records] == [0, 1, 2, 3]
    for record in records:
        assert set(record["rewards"]) == {"pickscore", "clip"}
        assert {len(values) for values in record["rewards"].values()} == {3}
        parts = record["seconds"]
        assert parts["sample"] + parts["reward"] + parts["update"] == pytest.approx(
            parts["total"], abs=1e-6
        )
        for name in ("reward_std", "grad_norm", "kl", "images_per_s", "clip_fraction"):
            assert record[name] is not None and record[name] >= 0
    assert records[0]["kl"] > 0  # measured after the update


def spoil(monkeypatch: pytest.MonkeyPatch, iteration: int, images: list[int], name: str) -> None:
    """Let a reward lack at the second scored step, for these of an iteration's first images."""
    iterate, score = trainer.Trainer.iterate, RewardSet.score
    calls: list[int] = []

    def counting(self, number):
        calls[:] = [number, 0]
        return iterate(self, number)

    def spoiled(*given):
        scores = score(*given)
        calls[1] += 1
        if calls == [iteration, 2]:
            scores[name][images] = float("nan")
        return scores

    monkeypatch.setattr(trainer.Trainer, "iterate", counting)
    monkeypatch.setattr(RewardSet, "score", spoiled)


def test_an_image_without_a_reward_is_counted_in_the_journal(undisturbed, tmp_path, monkeypatch):
    run = prepare(tmp_path)
    spoil(monkeypatch, 1, [3], "pickscore")
    train.train(run)
    records = journal.iterations(run.journal)
    assert [r["invalid"] for r in records] == [0, 1, 0, 0]
    assert [r["invalid"] for r in journal.iterations(undisturbed.journal)] == [0] * ITERATIONS
    for record in records:
        assert all(None not in values for values in record["rewards"].values())
    assert run.snapshot(1).read_bytes() == undisturbed.snapshot(1).read_bytes()
    assert not same_adapter(run, undisturbed)


def test_a_run_stopped_by_bad_rewards_continues_to_the_same_adapter(
    undisturbed, tmp_path, monkeypatch
):
    run = prepare(tmp_path)
    with monkeypatch.context() as patch:
        spoil(patch, 2, [1, 3], "clip")
        problem = (
            "iteration 2: reward 'clip' is nan for image 1, scored step 2 of 3; 2 of 8 images "
            r"\(25.0%\) lack a finite reward, at most 1 may \(10%, or one\)"
        )
        with pytest.raises(trainer.NonFinite, match=f"^{problem}$"):
            train.train(run)
    assert not run.adapter.exists()
    train.train(run)
    kinds = [record["kind"] for record in journal.read(run.journal)]
    assert kinds == ["start", *["iteration"] * 2, "resume", *["iteration"] * 2, "end"]
    assert same_adapter(run, undisturbed)
    assert snapshots(run) == snapshots(undisturbed)


def test_the_journal_starts_with_the_provenance(undisturbed):
    first = journal.read(undisturbed.journal)[0]
    assert first["kind"] == "start"
    assert set(first["provenance"]["weights"]) == {"shapes-flux", "pickscore", "clip"}
    assert first["fingerprint"] == undisturbed.fingerprint()


def test_a_missing_description_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tafs.training.train", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "run.json: not found" in done.stderr
