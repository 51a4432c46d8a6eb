"""What has to run is decided by contents: settings, digests and files, never by times."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.dry_run import dry_run
from support.finished import finish_all

from tafs.orchestration import graph as graphs
from tafs.orchestration import verdicts
from tafs.orchestration.graph import Graph, Job

ROOT = Path(__file__).resolve().parents[2]
RUN = "tafs_grpo.preference.shapes-flux.0"
AFTER = ["evaluate", "compare", "track", "all"]


@pytest.fixture(scope="module")
def smoke() -> Graph:
    return graphs.read({"scale": "smoke"}, ROOT / "config.yaml")


@pytest.fixture
def graph(smoke, tmp_path, monkeypatch) -> Graph:
    """The scale smoke with finished results."""
    monkeypatch.chdir(ROOT)
    found = placed(smoke, tmp_path / "results")
    finish_all(found)
    return found


def placed(graph: Graph, results: Path) -> Graph:
    config = graph.plan.config.model_copy(update={"results": str(results)})
    return Graph(dataclasses.replace(graph.plan, config=config))


def with_run(graph: Graph, **fields: Any) -> Graph:
    """Another specification of RUN."""
    runs = dict(graph.plan.runs)
    runs[RUN] = runs[RUN].model_copy(update=fields)
    return Graph(dataclasses.replace(graph.plan, runs=runs))


def rules(graph: Graph, **options: Any) -> list[str]:
    return [one.job.rule for one in verdicts.pending(graph, **options)]


def reason(graph: Graph, rule: str, run: str = RUN) -> str:
    [found] = [one for one in verdicts.pending(graph) if one.job == Job(rule, run)]
    assert found.again
    return found.reason


def test_results_without_files_have_not_run(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = verdicts.pending(placed(smoke, tmp_path))
    assert [one.job for one in found] == list(smoke.jobs())
    assert not any(one.again for one in found)
    assert {one.reason for one in found if one.job.rule == "train"} == {"has not run"}


def test_finished_results_need_no_work_wherever_and_whenever_they_were_copied(graph, tmp_path):
    assert rules(graph) == []
    moved = shutil.copytree(graph.plan.config.results, tmp_path / "moved elsewhere")
    for number, file in enumerate(sorted(moved.rglob("*"))):
        os.utime(file, (10**9 - number, 10**9 - number))
    assert rules(placed(graph, moved)) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"title": "Another title"},
        {"nfe_old": 99.0},
        {"scale": "other"},
    ],
)
def test_a_setting_that_changes_no_outcome_only_rewrites_descriptions(graph, fields):
    assert rules(with_run(graph, **fields)) == ["describe", "compare", "track", "all"]


@pytest.mark.parametrize("name, value", [("checkpoint_every", 99)])
def test_how_often_a_run_is_saved_is_no_part_of_its_outcome(graph, name, value):
    training = graph.plan.runs[RUN].training.model_copy(update={name: value})
    changed = with_run(graph, training=training)
    assert rules(changed) == ["describe", "compare", "track", "all"]
    assert reason(changed, "describe") == f"training.{name}: 1 -> {value}"


def test_assets_may_move_to_another_lock_file_or_device(graph):
    assets = graph.plan.runs[RUN].assets
    moved = assets.model_copy(update={"lock": "elsewhere.lock", "device": "cuda"})
    assert "train" not in rules(with_run(graph, assets=moved))
    rounded = assets.model_copy(update={"dtype": "bfloat16"})
    changed = with_run(graph, assets=rounded)
    assert reason(changed, "train") == 'assets.dtype: "float32" -> "bfloat16"'


def test_a_changed_setting_trains_its_run_again_and_names_both_values(graph):
    settings = {**graph.plan.runs[RUN].hyperparameters, "learning_rate": 0.5}
    changed = with_run(graph, hyperparameters=settings)
    assert rules(changed) == ["describe", "train", *AFTER]
    assert reason(changed, "train") == "hyperparameters.learning_rate: 0.002 -> 0.5"
    assert reason(changed, "evaluate") == "follows train"


def test_other_weights_train_again_and_their_digests_are_shown(graph):
    weights = {**graph.plan.runs[RUN].weights, "clip": "f" * 64}
    old = graph.plan.runs[RUN].weights["clip"][:12]
    assert reason(with_run(graph, weights=weights), "train") == f"weights.clip: {old} -> {'f' * 12}"


def test_a_new_evaluation_trains_nothing(graph):
    evaluations = dict(graph.plan.evaluations)
    evaluations[RUN] = evaluations[RUN].model_copy(update={"prompts_per_tag": 7})
    changed = Graph(dataclasses.replace(graph.plan, evaluations=evaluations))
    assert rules(changed) == ["describe_evaluation", *AFTER]
    assert reason(changed, "evaluate") == "prompts_per_tag: 1 -> 7"


def test_an_adapter_that_was_trained_elsewhere_is_judged_again(graph):
    file = Path(graph.folder(RUN)) / "receipts" / "train.json"
    digest = json.loads(file.read_text())["files"]["adapter.safetensors"]["sha256"]
    file.write_text(file.read_text().replace(digest, "f" * 64))
    assert rules(graph) == AFTER
    assert reason(graph, "evaluate") == f"adapter.safetensors: {digest[:12]} -> {'f' * 12}"


def test_a_file_is_made_again_only_where_it_is_needed(graph):
    folder = Path(graph.folder(RUN))
    (folder / "adapter.safetensors").unlink()
    (folder / "scores.parquet").unlink()
    assert rules(graph) == []
    (Path(graph.root) / "receipts" / "compare.json").unlink()
    assert rules(graph) == ["train", *AFTER]
    assert reason(graph, "evaluate") == "scores.parquet is missing"
    assert reason(graph, "train") == "adapter.safetensors is missing"


def test_files_without_a_receipt_are_not_trusted(graph):
    file = Path(graph.folder(RUN)) / "receipts" / "train.json"
    file.write_text("{")
    assert reason(graph, "train") == f"{file} is missing"


def test_what_the_user_forces_runs_with_what_follows(graph):
    assert rules(graph, forced={Job("train", RUN)}) == ["train", *AFTER]


@pytest.mark.parametrize("change", ["nothing", "adapter", "trained", "method", "spec", "report"])
def test_snakemake_runs_what_the_verdicts_say(graph, change):
    folder, root, options = Path(graph.folder(RUN)), Path(graph.root), []
    match change:
        case "adapter":
            (folder / "adapter.safetensors").unlink()
            (folder / "receipts" / "evaluate.json").unlink()
        case "trained":
            options = ["--forcerun", "train"]
        case "method":
            receipt = folder / "receipts" / "train.json"
            receipt.write_text(
                receipt.read_text().replace('"method source": "', '"method source": "0')
            )
        case "spec":
            (folder / "run.json").unlink()
        case "report":
            (root / "claims.md").unlink()
            (root / "receipts" / "compare.json").unlink()
    forced = {job for job in graph.jobs() if options and job.rule == "train"}
    expected = Counter(one.job for one in verdicts.pending(graph, forced))
    assert dry_run("smoke", graph.plan.config.results, *options) == expected
    assert bool(expected) == (change != "nothing")
