"""The hyperparameter search: equal numbers of trials, their own seed, resuming."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from tafs import experiment, tuning
from tafs.common.yaml_files import ConfigError
from tafs.evaluation import generate
from tafs.experiment import Plan, RunSpec, needs
from tafs.runtime import receipts
from tafs.runtime.run_dir import RunDir
from tafs.training import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def plan() -> Plan:
    return experiment.load(path=ROOT / "config.yaml")


def test_every_method_gets_the_same_number_of_trials_on_the_tuning_seed(plan):
    trials = tuning.trials(plan)
    counts = Counter(trial.variant for trial in trials)
    assert set(counts) == set(plan.config.tuning.grids)
    assert len(set(counts.values())) == 1
    assert {trial.seed for trial in trials} == {plan.config.tuning.seed}
    assert plan.config.tuning.seed not in plan.config.active.seeds
    assert len({trial.name for trial in trials}) == len(trials)
    assert {trial.snapshots for trial in trials} == {()}
    for trial in trials:
        assert RunSpec.model_validate_json(trial.to_json()) == trial


def test_a_trial_is_scored_at_the_tables_few_steps_and_not_trained_again(tmp_path, monkeypatch):
    overrides = {"scale": "smoke", "results": tmp_path}
    plan = experiment.load(overrides, ROOT / "config.yaml")
    tuning_ = plan.config.tuning.model_copy(update={"grids": {"tafs_grpo": {"eta": (0.7, 0.9)}}})
    plan = experiment.expand(plan.config.model_copy(update={"tuning": tuning_}))
    monkeypatch.setattr(tuning, "VALIDATION_PROMPTS", 3)
    scored = []
    original = generate.generate

    def watched(backbone, texts, setting, batch, seed):
        scored.append((len(texts), setting.sampler, setting.nfe, setting.images_per_prompt, seed))
        return original(backbone, texts, setting, batch, seed)

    monkeypatch.setattr(generate, "generate", watched)
    tuning.search(plan)
    file = tmp_path / "smoke" / "tuning" / "tafs_grpo.csv"
    first = file.read_text()
    common = (plan.config.active.evaluation.few_nfe, 2, tuning_.seed)
    samplers = plan.config.active.evaluation.samplers
    assert scored == [(3, sampler, *common) for _ in range(3) for sampler in samplers]
    rows = list(csv.DictReader(first.splitlines()))
    assert [json.loads(row["hyperparameters"])["eta"] for row in rows] == [0.7, 0.9]
    assert tuple(rows[0]) == tuning.COLUMNS
    assert len({row["base_score"] for row in rows}) == 1
    monkeypatch.setattr(train, "train", lambda run: pytest.fail("trained again"))
    tuning.search(plan, "tafs_grpo")
    assert file.read_text() == first
    with pytest.raises(ConfigError, match=r"--only: 'ppo' has no grid \(available: tafs_grpo\)"):
        tuning.search(plan, "ppo")


def test_an_adapter_of_other_settings_or_without_an_end_is_trained_again(plan, tmp_path):
    trial = tuning.trials(plan)[0]
    run = RunDir(tmp_path / trial.name)
    run.folder.mkdir()
    with receipts.replacing(run.folder, "train", needs.training(trial), [run.adapter]):
        run.adapter.write_bytes(b"")
    assert tuning.is_trained(run, trial)
    assert not tuning.is_trained(run, trial.model_copy(update={"rewards": {"clip": 5.0}}))
    run.adapter.unlink()
    assert not tuning.is_trained(run, trial)
