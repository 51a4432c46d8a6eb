"""Training at smoke scale on the embedded model: resuming, snapshots, time limits, records."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import killable_training as killable
from support.killable_training import ROOT, before, flip_bit, interrupt

from tafs import experiment
from tafs.common import errors
from tafs.evaluation import generate
from tafs.experiment import needs, run_inputs
from tafs.experiment.specs import RunSpec
from tafs.rewards.registry import RewardSet
from tafs.runtime import journal, receipts
from tafs.runtime.run_dir import RunDir
from tafs.training import train
from tafs.training.rewards import NonFinite
from tafs.training.trainer import Trainer, trainer_of

ITERATIONS = 4
SNAPSHOTS = (1, 3, ITERATIONS)


def prepare(folder: Path, variant: str = "tafs_grpo", iterations: int = ITERATIONS) -> RunDir:
    run = killable.prepare(folder / "run", iterations, variant)
    return change(run, snapshots=tuple(n for n in SNAPSHOTS if n <= iterations))


def change(run: RunDir, **fields: Any) -> RunDir:
    """Replace fields of run.json."""
    spec = run_inputs.run_spec(run).model_copy(update=fields)
    (run.folder / "run.json").write_text(spec.to_json())
    return RunDir(run.folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> RunDir:
    run = prepare(tmp_path_factory.mktemp("uninterrupted"))
    train.train(run)
    return run


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> RunDir:
    """A run whose adapter is an average, with two updates per iteration."""
    run = prepare(tmp_path_factory.mktemp("averaged"), "flow_grpo")
    train.train(run)
    return run


@pytest.fixture(params=["uninterrupted", "averaged"])
def finished(request) -> RunDir:
    return request.getfixturevalue(request.param)


def train_until(run: RunDir, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and stop before iteration `last`, as Ctrl-C does."""
    with before(monkeypatch, "iterate", last, interrupt), pytest.raises(KeyboardInterrupt):
        train.train(run)


def outputs(run: RunDir) -> dict[str, bytes]:
    """The contents of adapter and snapshots."""
    return {file.name: file.read_bytes() for file in [run.adapter, *run.snapshots.iterdir()]}


def kinds(run: RunDir) -> list[str]:
    return [record["kind"] for record in journal.read(run.journal)]


def test_a_run_on_quantised_weights_is_judged_on_the_same_ones(tmp_path):
    run = prepare(tmp_path, iterations=2)
    whole = run_inputs.run_spec(run)
    change(run, assets=whole.assets.model_copy(update={"quantize": "nf4"}))
    train.train(run)
    spec = run_inputs.run_spec(run)
    changed = receipts.differences(needs.training(whole), needs.training(spec))
    assert changed == ['assets.quantize: none -> "nf4"']
    adapter = load_file(run.adapter).values()
    assert all(tensor.isfinite().all() for tensor in adapter)
    assert sum(tensor.norm() for tensor in adapter) > 0
    assert all(record["grad_norm"] > 0 for record in journal.iterations(run.journal))
    run.forget_training()
    evaluation = experiment.load({"scale": "smoke"}, ROOT / "config.yaml").evaluations[spec.name]
    model = generate.load_model(run, spec, evaluation, None)
    assert model.quantized and any(hasattr(m, "lora_A") for m in model.transformer.modules())


def test_training_twice_gives_the_same_files(uninterrupted, tmp_path):
    run = prepare(tmp_path)
    train.train(run)
    assert outputs(run) == outputs(uninterrupted)
    trained = load_file(run.adapter)
    assert any(tensor.any() for name, tensor in trained.items() if "lora_B" in name)


@pytest.mark.parametrize("last", [1, 2])
def test_an_interrupted_run_continues_to_the_same_files(finished, last, tmp_path, monkeypatch):
    run = prepare(tmp_path, run_inputs.run_spec(finished).variant)
    train_until(run, last, monkeypatch)
    assert run.checkpoints.exists() and not run.adapter.exists() and not run.snapshots.exists()
    train.train(run)
    assert outputs(run) == outputs(finished)
    assert kinds(run).count("resume") == 1


def test_settings_that_change_no_outcome_do_not_end_a_run_s_state(
    uninterrupted, tmp_path, monkeypatch
):
    run = prepare(tmp_path)
    train_until(run, 2, monkeypatch)
    spec = run_inputs.run_spec(run)
    training = spec.training.model_copy(update={"checkpoint_every": 7})
    moved = spec.assets.model_copy(update={"lock": "elsewhere.lock"})
    change(run, title="Another title", training=training, assets=moved)
    train.train(run)
    assert outputs(run) == outputs(uninterrupted)
    assert kinds(run).count("resume") == 1


def test_a_killed_process_continues_to_the_same_files(uninterrupted, tmp_path):
    run = prepare(tmp_path)
    [process] = killable.training(run)
    killable.wait_for(run, 2, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killable.trained(run)
    assert outputs(run) == outputs(uninterrupted)
    assert kinds(run).count("resume") == 1


def test_a_finished_run_has_nothing_left_to_do(uninterrupted, tmp_path):
    """A training is repeated where its files are gone before it was evaluated."""
    run = RunDir(shutil.copytree(uninterrupted.folder, tmp_path / "run"))
    run.adapter.unlink()
    run.journal.unlink()
    shutil.rmtree(run.snapshots)
    train.train(run)
    assert outputs(run) == outputs(uninterrupted)
    assert kinds(run) == ["start", *["iteration"] * ITERATIONS, "end", "resume", "end"]
    with run.alone("train"):  # another process trains it
        run.forget_training()
    assert run.state.exists()
    run.forget_training()
    assert not run.state.exists()


def test_a_second_job_waits_for_the_first_and_finds_nothing_to_do(uninterrupted, tmp_path):
    """As when a killed workflow left the first one behind and is started again."""
    run = prepare(tmp_path)
    [first] = killable.training(run)
    killable.wait_for(run, 1, first)
    os.kill(first.pid, signal.SIGSTOP)
    [second] = killable.training(run)
    time.sleep(1)  # until it waits
    os.kill(first.pid, signal.SIGCONT)
    assert (first.wait(), second.wait()) == (0, 0)
    assert f"process {first.pid} on " in second.said
    assert kinds(run) == ["start", *["iteration"] * ITERATIONS, "end", "resume", "end"]
    assert outputs(run) == outputs(uninterrupted)


def test_a_state_of_other_settings_is_not_continued(uninterrupted, tmp_path, monkeypatch):
    run = prepare(tmp_path)
    train_until(run, 2, monkeypatch)
    run = change(run, hyperparameters={"learning_rate": 0.01})
    train.train(run)
    assert kinds(run) == ["start", *["iteration"] * ITERATIONS, "end"]
    assert outputs(run) != outputs(uninterrupted)


def test_snapshots_are_the_adapters_of_shorter_runs(finished, tmp_path):
    found = outputs(finished)
    assert found.pop("adapter.safetensors") == found[f"{ITERATIONS}.safetensors"]
    assert set(found) == {f"{n}.safetensors" for n in SNAPSHOTS}
    assert len(set(found.values())) == len(SNAPSHOTS)
    short = prepare(tmp_path, run_inputs.run_spec(finished).variant, iterations=1)
    train.train(short)
    assert short.adapter.read_bytes() == found["1.safetensors"]


@pytest.mark.parametrize(("iteration", "resumed"), [(1, []), (3, [2])])
def test_a_damaged_or_partial_snapshot_is_written_again(
    uninterrupted, tmp_path, monkeypatch, iteration, resumed
):
    """The snapshot of iteration 3 has no checkpoint yet, that of iteration 1 has."""
    run = prepare(tmp_path)
    with before(monkeypatch, "save", 3, interrupt), pytest.raises(KeyboardInterrupt):
        train.train(run)
    run.kept_snapshot(iteration).write_bytes(b"part of a file")
    train.train(run)
    found = [r["iteration"] for r in journal.read(run.journal) if r["kind"] == "resume"]
    assert found == resumed
    assert outputs(run) == outputs(uninterrupted)


@pytest.mark.parametrize("name", ["adapter.safetensors", "snapshots/1.safetensors"])
def test_an_altered_or_missing_adapter_is_refused(uninterrupted, tmp_path, name):
    run = RunDir(shutil.copytree(uninterrupted.folder, tmp_path / "run"))
    iteration = None if name.startswith("adapter") else 1
    assert run.verified(iteration) == run.folder / name
    flip_bit(run.folder / name)
    with pytest.raises(ValueError, match=f"{name}: "):
        run.verified(iteration)
    (run.folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: not found"):
        run.verified(iteration)


def test_jobs_near_their_time_limit_save_the_state_and_continue(uninterrupted, tmp_path):
    """Each job has time for one iteration only."""
    run = prepare(tmp_path)
    expired = ("--minutes=1", f"--started={time.time() - 60}")
    for done in range(1, ITERATIONS):
        [process] = killable.training(run, options=expired)
        assert (process.wait(), run.adapter.exists()) == (errors.CONTINUE, False)
        line = f"train {run.folder}: saved after {done} of {ITERATIONS} iterations, to be continued"
        assert process.said.splitlines()[-1].startswith(line)
        assert run.failure("train").exists()
    killable.trained(run)
    assert outputs(run) == outputs(uninterrupted)
    pauses = [r["iteration"] for r in journal.read(run.journal) if r["kind"] == "pause"]
    assert pauses == [1, 2, 3]
    assert not run.failure("train").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_iteration(uninterrupted, tmp_path, number, monkeypatch):
    run = prepare(tmp_path)
    handler = signal.getsignal(number)
    stops = pytest.raises(errors.ToBeContinued, match=f"2 of {ITERATIONS}.*: {number.name}$")
    with before(monkeypatch, "iterate", 1, lambda: os.kill(os.getpid(), number)), stops:
        train.train(run)
    assert signal.getsignal(number) == handler
    train.train(run)
    assert outputs(run) == outputs(uninterrupted)


def test_scoring_ahead_changes_no_byte_and_trains_nothing_again(uninterrupted, tmp_path):
    run = prepare(tmp_path)
    spec = run_inputs.run_spec(run)
    training = spec.training.model_copy(update={"score_ahead": True})
    ahead = spec.model_copy(update={"training": training})
    assert needs.training(ahead) == needs.training(spec)
    assert "score_ahead" in ahead.to_json() and "score_ahead" not in spec.to_json()
    train.train(change(run, training=training))
    assert outputs(run) == outputs(uninterrupted)


def test_the_journal_records_measurements_and_provenance(uninterrupted):
    first, *_, last = journal.read(uninterrupted.journal)
    spec = run_inputs.run_spec(uninterrupted)
    assert first["kind"] == "start"
    assert set(first["provenance"]["weights"]) >= {"shapes-flux", "pickscore", "clip"}
    assert first["fingerprint"] == receipts.fingerprint(needs.training(spec))
    assert set(last["sha256"]) == set(outputs(uninterrupted))
    records = journal.iterations(uninterrupted.journal)
    assert [r["iteration"] for r in records] == list(range(ITERATIONS))
    for record in records:
        assert set(record["rewards"]) == {"pickscore", "clip"}
        assert {len(values) for values in record["rewards"].values()} == {3}
        *phases, total = (record["seconds"][k] for k in ("sample", "reward", "update", "total"))
        assert sum(phases) == pytest.approx(total, abs=1e-6)
        for name in ("reward_std", "grad_norm", "images_per_s", "clip_fraction", "invalid"):
            assert record[name] >= 0
    measured = [record["iteration"] for record in records if "kl" in record]
    assert measured == [0, ITERATIONS - 1]  # every fifth, and the last one
    assert records[0]["kl"] > 0  # measured after the update


def spoil(patch: pytest.MonkeyPatch, iteration: int, images: list[int], name: str) -> None:
    """Make a reward NaN for some images at the second scored step of an iteration."""
    score, calls = RewardSet.score, itertools.count()

    def spoiled(*given: Any) -> dict[str, Any]:
        scores = score(*given)
        if next(calls) == 6 * iteration + 1:  # three scored steps of two micro-batches
            scores[name][images] = float("nan")
        return scores

    patch.setattr(RewardSet, "score", spoiled)


def test_the_journal_counts_images_without_a_reward(uninterrupted, tmp_path, monkeypatch):
    run = prepare(tmp_path)
    spoil(monkeypatch, 1, [3], "pickscore")
    train.train(run)
    records = journal.iterations(run.journal)
    assert [r["invalid"] for r in records] == [0, 1, 0, 0]
    assert all(None not in values for r in records for values in r["rewards"].values())
    assert run.snapshot(1).read_bytes() == uninterrupted.snapshot(1).read_bytes()
    assert run.adapter.read_bytes() != uninterrupted.adapter.read_bytes()


def test_a_run_stopped_by_missing_rewards_can_be_continued(uninterrupted, tmp_path, monkeypatch):
    run = prepare(tmp_path)
    problem = (
        "iteration 2: reward 'clip' is nan for image 1, scored step 2 of 3; 2 of 8 images "
        r"\(25.0%\) lack a finite reward, at most 1 may \(10%, or one\)"
    )
    with monkeypatch.context() as patch, pytest.raises(NonFinite, match=f"^{problem}$"):
        spoil(patch, 2, [1, 3], "clip")
        train.train(run)
    assert not run.adapter.exists()
    train.train(run)
    assert kinds(run) == ["start", *["iteration"] * 2, "resume", *["iteration"] * 2, "end"]
    assert outputs(run) == outputs(uninterrupted)


def test_a_base_model_is_not_trained(tmp_path):
    spec = run_inputs.run_spec(prepare(tmp_path))
    base = RunSpec(**{**spec.model_dump(), "method": "base", "training": None, "rewards": {}})
    with pytest.raises(ValueError, match="run.json has no training settings; evaluate it instead"):
        trainer_of(base)


def test_a_run_out_of_memory_continues_with_smaller_micro_batches(
    uninterrupted, tmp_path, monkeypatch
):
    """The adapter is the same up to rounding, and what was saved is not repeated."""
    run = prepare(tmp_path)
    iterate, asked = Trainer.iterate, run_inputs.run_spec(run).training.micro_batch

    def exhausted(trainer: Trainer, iteration: int) -> dict[str, Any]:
        if iteration >= 2 and trainer.micro_batch > asked // 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return iterate(trainer, iteration)

    monkeypatch.setattr(Trainer, "iterate", exhausted)
    for left in (asked // 2, asked // 4):
        with pytest.raises(errors.ToBeContinued, match=rf"to be continued with {left} \("):
            train.train(run)
    train.train(run)
    assert kinds(run) == [
        "start",
        *["iteration"] * 2,
        "resume",
        "resume",
        "iteration",
        "iteration",
        "end",
    ]
    found, expected = (load_file(of.adapter) for of in (run, uninterrupted))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    assert run_inputs.run_spec(run).training.micro_batch == asked
