"""The search gives every method as many trials, on a seed of its own, and trusts no stale model."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tafs import tuning
from tafs.evaluation import evaluate
from tafs.evaluation import generate as generate_
from tafs.experiment import runs, validate
from tafs.runtime import run_dir
from tafs.runtime.journal import Journal
from tafs.training import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def trials() -> list[runs.Run]:
    return tuning.trials(validate.read(ROOT / "config.yaml"))


def test_every_method_gets_as_many_trials_on_the_tuning_seed(trials):
    settings = validate.read(ROOT / "config.yaml")
    assert settings.tuning is not None
    counts = Counter(trial.variant for trial in trials)
    assert set(counts) == set(settings.tuning.grids)
    assert len(set(counts.values())) == 1
    assert {trial.seed for trial in trials} == {settings.tuning.seed}
    assert settings.tuning.seed not in settings.active.seeds


def test_trials_have_names_of_their_own(trials):
    assert len({trial.name for trial in trials}) == len(trials)


def test_trials_keep_no_snapshots(trials):
    """They are judged once, at the end."""
    assert {trial.describe()["snapshots"] == [] for trial in trials} == {True}
    assert {trial.snapshots for trial in trials} == {()}


def test_a_trial_is_scored_at_the_tables_few_steps_and_not_trained_again(tmp_path, monkeypatch):
    settings = validate.read(ROOT / "config.yaml", {"scale": "smoke"})
    evaluation = settings.active.evaluation
    trial = next(t for t in tuning.trials(settings) if t.variant == "tafs_grpo")
    monkeypatch.setattr(tuning, "VALIDATION_PROMPTS", 3)
    scored = []
    generate = generate_.generate

    def watched(backbone, texts, setting, batch, seed):
        scored.append((len(texts), setting.sampler, setting.nfe, batch, seed))
        return generate(backbone, texts, setting, batch, seed)

    monkeypatch.setattr(evaluate, "generate", watched)
    base_score = tuning.score_base(trial, evaluation)
    first = tuning.run_trial(trial, tmp_path, evaluation, base_score)
    assert first["base_score"] == round(base_score, 4)
    assert tuple(first) == tuning.COLUMNS
    assert (first["method"], first["nfe"]) == ("tafs_grpo", evaluation.few_nfe)
    common = (evaluation.few_nfe, evaluation.batch, trial.seed)
    assert scored == [(3, "ode", *common), (3, "anneal", *common)]
    folder = tmp_path / trial.name
    assert list((folder / "snapshots").iterdir()) == []
    monkeypatch.setattr(train, "train", lambda run: pytest.fail("trained again"))
    assert tuning.run_trial(trial, tmp_path, evaluation, base_score) == first


def trained(folder: Path, trial: runs.Run) -> run_dir.RunDir:
    """A folder as a finished trial leaves it."""
    run = run_dir.RunDir(folder / trial.name)
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps(trial.describe()))
    run.adapter.write_bytes(b"")
    Journal(run.journal).append("start", fingerprint=run.fingerprint())
    return run


def test_a_finished_trial_is_not_trained_again(trials, tmp_path):
    assert tuning.is_trained(trained(tmp_path, trials[0]))


def test_a_trial_of_other_settings_is_trained_again(trials, tmp_path):
    run = trained(tmp_path, trials[0])
    changed = {**trials[0].describe(), "rewards": {"clip": 5.0}}
    (run.folder / "run.json").write_text(json.dumps(changed))
    assert not tuning.is_trained(run_dir.RunDir(run.folder))


def test_an_unfinished_trial_is_trained(trials, tmp_path):
    run = trained(tmp_path, trials[0])
    run.adapter.unlink()
    assert not tuning.is_trained(run)
