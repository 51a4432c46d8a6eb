"""The hyperparameter search: equal budgets, a known objective, pruning, and the same trials after
every interruption.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML
from support.project_copy import copied

from tafs import experiment
from tafs.common import errors
from tafs.common.yaml_files import ConfigError
from tafs.experiment import Plan, RunSpec, needs
from tafs.experiment.schema import Range
from tafs.runtime import receipts
from tafs.runtime.run_dir import RunDir
from tafs.training import train
from tafs.tuning import measure
from tafs.tuning.search import Search, search, search_of

ROOT = Path(__file__).resolve().parents[2]
Measure = Callable[[RunSpec, Path, Any, float], dict[str, float]]


def plan_of(results: Path, **tuning: Any) -> Plan:
    """The scale `smoke` with one sampler, and other values of config.yaml's `tuning`."""
    config = experiment.load({"scale": "smoke", "results": results}, ROOT / "config.yaml").config
    evaluation = config.active.evaluation.model_copy(update={"samplers": ("ode_uniform",)})
    scale = config.active.model_copy(update={"evaluation": evaluation})
    assert config.tuning is not None
    changes = {
        "scales": {**config.scales, "smoke": scale},
        "tuning": config.tuning.model_copy(update=tuning),
    }
    return experiment.expand(config.model_copy(update=changes))


def rows(plan: Plan, method: str) -> list[dict[str, str]]:
    file = plan.root / "tuning" / f"{method}.csv"
    return list(csv.DictReader(file.read_text().splitlines()))


def outcome(plan: Plan, method: str) -> list[dict[str, str]]:
    """The table without times."""
    return [{k: v for k, v in row.items() if k != "iteration_s"} for row in rows(plan, method)]


def curve(trial: RunSpec, folder: Path, evaluation: Any, base: float) -> dict[str, float]:
    """A gain that is known: best at a learning rate of 2e-3, lower with a larger seed."""
    rate = trial.hyperparameters["learning_rate"]
    distance = abs(math.log(rate / 2e-3))
    return {"gain": 0.1 - 0.1 * distance - 0.01 * (trial.seed - 1000), "iteration_s": 0.5}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Measure], list[tuple[int, int]]]:
    """Replaces training and scoring; returns the (trial, seed) pairs that are measured."""
    monkeypatch.setattr(measure, "score", lambda spec, evaluation: 1.0)
    monkeypatch.setattr(Search, "track", lambda self: None)

    def replace(function: Measure) -> list[tuple[int, int]]:
        calls: list[tuple[int, int]] = []

        def watched(trial: RunSpec, *others: Any) -> dict[str, float]:
            number = int(trial.name.rpartition("trial-")[2].partition(".")[0])
            calls.append((number, trial.seed))
            return function(trial, *others)

        monkeypatch.setattr(measure, "measure", watched)
        return calls

    return replace


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([0.3, 0.3, 0.3], 0.3),
        ([0.1, 0.2, 0.3], 0.2 - 0.1 / math.sqrt(3)),
        ([-0.1, 0.0, 0.1], -0.1 / math.sqrt(3)),
    ],
)
def test_the_objective_is_the_mean_minus_its_standard_error(
    gains: list[float], expected: float
) -> None:
    assert measure.objective(gains) == pytest.approx(expected)


def test_a_scale_searches_the_methods_that_it_trains_whose_present_values_are_in_their_spaces():
    smoke, field = (experiment.load({"scale": scale}) for scale in ("smoke", "field"))
    tuning = field.config.tuning
    assert tuning is not None
    assert set(smoke.searched_methods) == set(smoke.config.experiments["table2"].methods)
    assert field.searched_methods == list(tuning.methods)
    for method in tuning.methods:
        search_of(field, tuning, method)
    with pytest.raises(ConfigError, match="'smoke' does not train 'awm' on 'preference' or 'text'"):
        search(smoke, "awm")


def test_a_method_is_searched_on_the_first_of_the_tasks_that_trains_it() -> None:
    words, shapes = (experiment.load({"scale": scale}) for scale in ("words", "shapes"))
    tuning = words.config.tuning
    assert tuning is not None
    assert tuning.tasks == ("preference", "text")
    assert words.searched_methods == ["tafs_grpo", "flow_grpo", "mix_grpo", "dance_grpo"]
    found = [search_of(plan, tuning, "flow_grpo").first.task for plan in (words, shapes)]
    assert found == ["text", "preference"]


def test_a_scale_that_trains_nothing_to_search_refuses_the_target_in_one_line(
    tmp_path: Path,
) -> None:
    place = copied(tmp_path, tmp_path / "results")
    experiments = "experiments: [table2, equal_compute, gains, one_sampler, table7]"
    with place.edited("config.yaml", experiments, "experiments: [table7]"):
        done = place.snakemake("tune", "--dry-run")
    line = "config.yaml: tuning: scale 'smoke' trains none of its methods on its tasks; "
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"{line}choose another scale")


def test_every_method_has_as_many_trials_and_begins_with_its_present_values(
    tmp_path: Path, measured: Callable[[Measure], list[tuple[int, int]]]
) -> None:
    measured(curve)
    plan = plan_of(tmp_path)
    tuning = plan.config.tuning
    assert tuning is not None
    search(plan)
    for method in plan.searched_methods:
        found = rows(plan, method)
        space = search_of(plan, tuning, method).space
        assert [int(row["number"]) for row in found] == list(range(tuning.trials))
        # Also where the present values are a point of the hypercube, from an earlier search.
        assert len({tuple(row[key] for key in space.searched) for row in found}) == tuning.trials
        assert {key: float(found[0][key]) for key in space.present} == {
            key: float(value) for key, value in space.present.items()
        }
        for row, (key, searched) in ((r, s) for r in found for s in space.searched.items()):
            if isinstance(searched, Range):
                assert searched.low <= float(row[key]) <= searched.high
            else:
                assert float(row[key]) in searched
        for row in found:
            gains = [float(row[f"gain_{s}"]) for s in tuning.seeds if row[f"gain_{s}"]]
            assert row["state"] == ("complete" if len(gains) == 3 else "pruned")
            if row["state"] == "complete":
                assert float(row["objective"]) == pytest.approx(measure.objective(gains), abs=1e-4)
    assert {row["ema"] for row in rows(plan, "rg_lcd")} == {"0.95"}


def test_a_trial_below_the_median_of_three_stops_after_a_seed(
    tmp_path: Path, measured: Callable[[Measure], list[tuple[int, int]]]
) -> None:
    gain = [0.3, 0.1, 0.2, 0.05, 0.4, 0.19]  # of trials; the median of the first three is 0.2

    def known(trial: RunSpec, *_: Any) -> dict[str, float]:
        return {"gain": gain[calls[-1][0]] + 0.001 * trial.seed, "iteration_s": 1.0}

    calls = measured(known)
    plan = plan_of(tmp_path, trials=6)
    search(plan, "flow_grpo")
    states = [row["state"] for row in rows(plan, "flow_grpo")]
    assert states == ["complete", "complete", "complete", "pruned", "complete", "pruned"]
    complete = [(n, s) for n in (0, 1, 2, 4) for s in (1000, 1001, 1002)]
    assert calls == sorted([*complete, (3, 1000), (5, 1000)])
    best = (plan.root / "tuning" / "flow_grpo.best.yaml").read_text()
    values = YAML(typ="safe").load(best)["flow_grpo"]
    assert values["learning_rate"] == float(rows(plan, "flow_grpo")[4]["learning_rate"])
    assert "trial 4 of 6" in best
    assert "No trial beats" not in best


def test_a_failed_training_is_a_failed_trial_and_a_search_without_gains_says_so(
    tmp_path: Path, measured: Callable[[Measure], list[tuple[int, int]]]
) -> None:
    def poor(trial: RunSpec, *_: Any) -> dict[str, float]:
        if calls[-1] == (1, 1001):
            raise errors.RunFailed("its loss is NaN")
        return {"gain": -0.1, "iteration_s": 1.0}

    calls = measured(poor)
    plan = plan_of(tmp_path, trials=3)
    search(plan, "rg_lcd")
    found = rows(plan, "rg_lcd")
    assert [row["state"] for row in found] == ["complete", "failed", "complete"]
    assert (found[1]["gain_1000"], found[1]["gain_1001"], found[1]["objective"]) == ("-0.1", "", "")
    assert "No trial beats the base model" in (plan.root / "tuning/rg_lcd.best.yaml").read_text()


class Killed(BaseException):
    """Ends the process's work as a kill does: nothing is cleaned up."""


def test_a_search_that_is_killed_before_every_measurement_has_the_same_trials(
    tmp_path: Path, measured: Callable[[Measure], list[tuple[int, int]]]
) -> None:
    calls = measured(curve)
    whole, parts = plan_of(tmp_path / "whole"), plan_of(tmp_path / "parts")
    search(whole, "mix_grpo")
    needed = list(calls)

    def killing(trial: RunSpec, *others: Any) -> dict[str, float]:
        if calls.count(calls[-1]) == 1:
            raise Killed
        return curve(trial, *others)

    calls = measured(killing)
    study = parts.root / "tuning" / "mix_grpo.optuna.jsonl"
    for _ in needed:
        with pytest.raises(Killed):
            search(parts, "mix_grpo")
        with study.open("a") as file:
            file.write('{"op_code": 4, "unfinished')
        study.with_name(f"{study.name}.lock").symlink_to(study)
    search(parts, "mix_grpo")
    assert calls == [pair for pair in needed for _ in range(2)]
    assert outcome(parts, "mix_grpo") == outcome(whole, "mix_grpo")
    more = plan_of(tmp_path / "parts", trials=10)
    calls.clear()
    measured(curve)
    search(more, "mix_grpo")
    assert outcome(more, "mix_grpo")[:8] == outcome(whole, "mix_grpo")


def test_other_settings_begin_another_search(
    tmp_path: Path,
    measured: Callable[[Measure], list[tuple[int, int]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = measured(curve)
    search(plan_of(tmp_path, trials=1), "tafs_grpo")
    search(plan_of(tmp_path, trials=1), "tafs_grpo")
    assert calls == [(0, 1000), (0, 1001), (0, 1002)]
    search(plan_of(tmp_path, trials=1, seeds=(2000, 2001, 2002)), "tafs_grpo")
    assert calls[3:] == [(0, 2000), (0, 2001), (0, 2002)]
    assert "a new search, since seed: 1000 -> 2000; seeds: [1000, 1001, 1002]" in (
        capsys.readouterr().out
    )


def test_a_present_value_outside_the_space_is_refused_before_any_training(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, common={"learning_rate": Range(low=1e-5, high=1e-4, log=True)})
    with pytest.raises(ConfigError, match="tuning: tafs_grpo: learning_rate: the present value"):
        search(plan)
    with pytest.raises(ConfigError, match=r"--only: 'ppo' is not searched \(available: tafs_grpo"):
        search(plan, "ppo")
    assert not plan.root.exists()


def test_trials_are_trained_continued_and_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real trainings: a copy of the results, taken in the middle, is continued to the same end."""
    monkeypatch.setattr(measure, "VALIDATION_PROMPTS", 3)
    space = {"learning_rate": Range(low=1e-3, high=8e-3, log=True)}
    plan = plan_of(tmp_path / "whole", trials=2, common=space, methods={"tafs_grpo": {}})
    copied = plan_of(tmp_path / "copy", trials=2, common=space, methods={"tafs_grpo": {}})
    trained: list[str] = []
    original = train.train

    def watched(run: RunDir) -> None:
        trained.append(run.name.partition("trial-")[2])
        if trained[-1] == "1.1002":
            shutil.copytree(plan.root, copied.root)
        original(run)

    monkeypatch.setattr(train, "train", watched)
    search(plan)
    assert trained == [f"{number}.{seed}" for number in (0, 1) for seed in (1000, 1001, 1002)]
    trained.clear()
    monkeypatch.setattr(
        train, "train", lambda run: (trained.append(run.name.partition("trial-")[2]), original(run))
    )
    search(copied)
    assert trained == ["1.1002"]
    assert outcome(copied, "tafs_grpo") == outcome(plan, "tafs_grpo")
    assert {row["state"] for row in outcome(plan, "tafs_grpo")} == {"complete"}
    search(plan)
    assert trained == ["1.1002"]

    for place in (plan, copied):
        client = MlflowClient(f"sqlite:///{Path(place.config.results).resolve()}/mlflow/mlflow.db")
        known = client.get_experiment_by_name("tafs-tuning")
        assert known is not None
        runs = {run.info.run_name: run for run in client.search_runs([known.experiment_id])}
        assert runs.keys() == {"smoke.tafs_grpo", "smoke.tafs_grpo.0", "smoke.tafs_grpo.1"}
        parent = runs["smoke.tafs_grpo"]
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        assert json.loads(parent.data.params["seeds"]) == [1000, 1001, 1002]
        for number, row in enumerate(outcome(place, "tafs_grpo")):
            run = runs[f"smoke.tafs_grpo.{number}"]
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert run.data.tags["state"] == row["state"]
            assert run.data.params == {"learning_rate": row["learning_rate"]}
            for key in ("gain_1000", "gain_1001", "gain_1002", "mean", "objective"):
                assert run.data.metrics[key] == float(row[key])


def test_a_store_that_cannot_be_used_stops_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "score", lambda spec, evaluation: 1.0)
    monkeypatch.setattr(measure, "measure", curve)
    (tmp_path / "mlflow").write_text("not a folder")
    plan = plan_of(tmp_path, trials=1)
    search(plan, "tafs_grpo")
    assert len(rows(plan, "tafs_grpo")) == 1
    assert capsys.readouterr().err.startswith(f"tracking: {tmp_path / 'mlflow'}: ")


def test_an_adapter_of_other_settings_or_without_an_end_is_trained_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    tuning = plan.config.tuning
    assert tuning is not None
    trial = search_of(plan, tuning, "tafs_grpo").spec(0, 1000, {"learning_rate": 1e-3})
    assert RunSpec.model_validate_json(trial.to_json()) == trial
    run = RunDir(tmp_path / trial.name)
    run.folder.mkdir()
    with receipts.replacing(run.folder, "train", needs.training(trial), [run.adapter]):
        run.adapter.write_bytes(b"")
    assert measure.is_trained(run, trial)
    assert not measure.is_trained(run, trial.model_copy(update={"rewards": {"clip": 5.0}}))
    run.adapter.unlink()
    assert not measure.is_trained(run, trial)
