"""A run folder in MLflow's terms: parameters, tags, curves, scores and sample images."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.mirrored_runs import ITERATIONS, PROMPTS, SHOWN, SNAPSHOT, START, trained_run

from tafs.tracking import run_view


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> run_view.RunView:
    view = run_view.read_run(trained_run(tmp_path_factory.mktemp("runs") / "tafs_grpo.text.3"))
    assert view is not None
    return view


def points(view: run_view.RunView, key: str) -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in [*view.curves, *view.scores] if p.key == key]


def test_curves_have_the_steps_times_and_values_of_the_journal(view: run_view.RunView) -> None:
    assert points(view, "reward/toy/step_0") == [(i, i / 10) for i in range(ITERATIONS)]
    assert points(view, "reward/toy/step_1") == points(view, "reward/toy/last")
    assert points(view, "seconds/sample") == [(i, 1.5) for i in range(ITERATIONS)]
    times = [point.timestamp for point in view.curves if point.key == "seconds/sample"]
    assert times == [int((START + i + 1) * 1000) for i in range(ITERATIONS)]
    assert (view.started_ms, view.ended_ms) == (int(START * 1000), int((START + 50) * 1000))


def test_values_that_are_not_finite_are_skipped_and_counted(view: run_view.RunView) -> None:
    assert points(view, "kl") == [(0, 0.5), (2, 0.5)]
    assert not points(view, "score/HPSv2.1/ode/nfe_4")
    assert (view.skipped, view.tags["tafs.skipped_values"]) == (2, "2")


def test_scores_are_the_means_that_the_tables_show_at_their_models_iteration(view) -> None:
    # GenEval averages the means of its tags.
    assert points(view, "score/GenEval/ode/nfe_4") == [(SNAPSHOT, 50.0), (100, 75.0)]
    assert points(view, "score/PickScore/ode/nfe_4") == [(100, 22.0)]
    # A server's table leaves out the images that it could not score.
    assert points(view, "score/UnifiedReward/ode/nfe_4") == [(100, 3.5)]
    # A metric that is not installed keeps its name.
    assert points(view, "score/other/ode/nfe_4") == [(100, 1.0)]


def test_parameters_and_tags_are_flat_and_within_the_limits_of_mlflow(view) -> None:
    expected = {"hyperparameters/learning_rate": "0.0003", "hyperparameters/steps": "[1, 2]"}
    expected |= {"training/lora/rank": "4", "hyperparameters/a_b": "1"}
    assert expected.items() <= view.parameters.items()
    assert max(map(len, view.parameters)) == 250
    note = view.parameters["hyperparameters/note"]
    assert (len(note), note.lstrip("n")) == (6000, "... (7000 characters)")
    assert len(view.tags["provenance/note"]) == 5000
    assert view.tags["provenance/weights/sd3"] == "d" * 64
    assert view.tags["mlflow.source.git.commit"] == "c0ffee"
    assert (view.tags["fingerprint"], view.tags["method"]) == ("f1", "tafs_grpo")


def test_sample_images_are_spread_over_the_prompts_and_named_by_them(view) -> None:
    found = list(run_view.sample_images(view))
    shown = range(0, PROMPTS, PROMPTS // SHOWN)
    assert [key for key, *_ in found] == [f"samples/ode-4/prompt_{10 * row}" for row in shown]
    assert [image[0, 0, 0] for _, image, *_ in found] == list(shown)
    assert {step for *_, step, _ in found} == {100}


def test_an_untrained_model_consists_of_its_scores(tmp_path: Path) -> None:
    folder = trained_run(tmp_path / "base.sd3", method="base", task="")
    (folder / "journal.jsonl").unlink()
    first, again = run_view.read_run(folder), run_view.read_run(folder)
    assert first is not None and again is not None
    assert (first.task, first.curves, first.key) == ("base", [], again.key)
    assert first.ended_ms == first.started_ms


@pytest.mark.parametrize("name", ["run.json", "scores.parquet", "journal.jsonl"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = trained_run(tmp_path / "run")
    (folder / name).write_bytes(b"\0\1\n")
    with pytest.raises(ValueError, match=name):
        run_view.read_run(folder)


def test_the_documented_example_reads_the_curves_without_mlflow(tmp_path: Path) -> None:
    guide = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"
    [example] = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    folder = trained_run(tmp_path / "tafs_grpo.text.3")
    command = [sys.executable, "-I", "-S", "-c", example, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"{i} 2.0 {{'toy': [{i / 10}, {i / 5}]}}" for i in range(ITERATIONS)
    ]
