"""The figures show what the runs' files say, and equal files give equal figures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import synthetic
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from tafs import config, figures, tables

SMALL = {"prompts": 18, "images": 2, "iterations": 6, "nfe": (1, 4)}
FEW = {"nfe": (1, 4)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthetic.write_runs(tmp_path_factory.mktemp("runs"), seeds=2, **SMALL)


@pytest.fixture
def own_runs(runs: list[Path], tmp_path: Path) -> list[Path]:
    """A copy that a test may damage."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in runs]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, in place of their files."""
    found: list[Figure] = []

    def keep(figure: Figure, out_dir: Path | str, name: str) -> list[Path]:
        found.append(figure)
        return []

    monkeypatch.setattr(figures, "_save", keep)
    return found


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_figure4_has_a_panel_a_metric_and_a_line_a_method(
    runs: list[Path], drawn: list[Figure]
) -> None:
    figures.figure4(runs, "", **FEW)
    assert [axes.get_title() for axes in drawn[0].axes] == [
        metric.title for metric in tables.METRICS.values()
    ]
    for axes in drawn[0].axes:
        assert list(lines(axes)) == [
            "shapes-sd3",
            "shapes-sd3, 28 steps",
            "Flow-GRPO",
            "TAFS-GRPO",
            "TAFS-GRPO, Euler",
        ]


def test_figure4_draws_the_files_values(runs: list[Path], drawn: list[Figure]) -> None:
    figures.figure4(runs, "", **FEW)
    found = lines(drawn[0].axes[2])  # CLIP
    results = {r.run.name: r for r in tables.read_results(runs)}
    base = results["base-0"].scores.values["ode", 28, "clip"].mean()
    assert found["shapes-sd3, 28 steps"].get_ydata() == pytest.approx([base, base])
    for label, sampler in (("TAFS-GRPO", "anneal"), ("TAFS-GRPO, Euler", "ode")):
        values = [
            np.mean([results[f"tafs_grpo-{s}"].scores.values[sampler, n, "clip"] for s in (0, 1)])
            for n in (1, 4)
        ]
        assert found[label].get_ydata() == pytest.approx(values)
        assert list(found[label].get_xdata()) == [1, 4]


def test_figure4_without_euler_scores_has_no_dashed_line(
    own_runs: list[Path], drawn: list[Figure]
) -> None:
    import pandas as pd

    for run in own_runs:
        if "tafs" in run.name:
            scores = pd.read_parquet(run / "scores.parquet")
            scores[scores["sampler"] == "anneal"].to_parquet(run / "scores.parquet")
    figures.figure4(own_runs, "", **FEW)
    assert "TAFS-GRPO, Euler" not in lines(drawn[0].axes[0])


def test_a_method_keeps_its_colour(runs: list[Path], drawn: list[Figure]) -> None:
    figures.figure4(runs, "", **FEW)
    figures.learning_curves(runs, "")
    tafs, _ = figures.LOOKS["tafs_grpo"]
    assert {lines(figure.axes[0])["TAFS-GRPO"].get_color() for figure in drawn} == {tafs}


def test_systems_do_not_share_a_colour(tmp_path: Path) -> None:
    for variant in "abcd":
        info = {"name": variant, "variant": variant, "title": variant}
        synthetic.write_run(tmp_path, "tafs_grpo", **info, **SMALL)
    found = tables.systems(tables.read_results(tmp_path.iterdir()))
    assert len(set(figures._looks(found))) == 4


def test_learning_curves_show_the_last_scored_step(runs: list[Path], drawn: list[Figure]) -> None:
    figures.learning_curves([run for run in runs if run.name == "tafs_grpo-0"], "")
    records = [
        json.loads(line)
        for line in (runs[-2] / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    records = [record for record in records if record["kind"] == "iteration"]
    by_iteration, _, by_time, _ = drawn[0].axes
    assert by_iteration.get_title() == "PickScore"
    line, timed = lines(by_iteration)["TAFS-GRPO"], lines(by_time)["TAFS-GRPO"]
    assert list(line.get_xdata()) == list(range(6))
    assert list(line.get_ydata()) == [r["rewards"]["pickscore"][-1] for r in records]
    seconds = np.cumsum([r["seconds"]["total"] for r in records])
    assert timed.get_xdata() == pytest.approx(seconds)
    assert by_time.get_xlabel() == "Compute time (s)"


def test_learning_curves_are_means_over_seeds(runs: list[Path], drawn: list[Figure]) -> None:
    figures.learning_curves(runs, "")
    results = [r for r in tables.read_results(runs) if r.info["method"] == "flow_grpo"]
    mean = np.mean(
        [[record["rewards"]["clip"][-1] for record in r.iterations] for r in results], axis=0
    )
    assert lines(drawn[0].axes[1])["Flow-GRPO"].get_ydata() == pytest.approx(mean)


def test_running_means_are_centred_and_shorter_at_the_ends() -> None:
    values = np.array([0.0, 3.0, 6.0, 3.0])
    assert figures._running_mean(values, 3).tolist() == [1.5, 3.0, 4.0, 4.5]
    assert figures._running_mean(values, 1).tolist() == values.tolist()


def test_long_training_is_shown_in_hours(own_runs: list[Path], drawn: list[Figure]) -> None:
    for run in own_runs:
        file = run / "journal.jsonl"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            file.write_text(re.sub(r'"total": [\d.]+', '"total": 7200', text), encoding="utf-8")
    figures.learning_curves(own_runs, "")
    assert drawn[0].axes[2].get_xlabel() == "Compute time (h)"
    assert lines(drawn[0].axes[2])["TAFS-GRPO"].get_xdata()[-1] == 12


def test_null_rewards_are_gaps(own_runs: list[Path], drawn: list[Figure]) -> None:
    file = own_runs[-1] / "journal.jsonl"
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r'"clip": \[[^]]*\]', '"clip": [null]', text, count=1))
    figures.learning_curves([own_runs[-1]], "")
    values = lines(drawn[0].axes[1])["TAFS-GRPO"].get_ydata()
    assert np.isnan(values).tolist() == [True] + [False] * 5


def test_image_grid_shows_the_first_prompts_of_every_task(
    runs: list[Path], drawn: list[Figure]
) -> None:
    figures.image_grid(runs, "", captions=synthetic.captions(18), per_tag=1)
    texts = [text.get_text() for text in drawn[0].texts]
    assert texts[:4] == [
        "shapes-sd3\n28 steps",
        "shapes-sd3\n4 steps",
        "Flow-GRPO\n4 steps",
        "TAFS-GRPO\n4 steps",
    ]
    assert texts[5::2] == [tag.replace("_", " ") for tag in synthetic.TAGS]
    shown = [axes.get_images()[0].get_array() for axes in drawn[0].axes]
    base = load_file(runs[0] / "samples.safetensors")
    tafs = load_file(runs[-2] / "samples.safetensors")
    columns = (base["ode-28"], base["ode-4"], None, tafs["anneal-4"])
    for row, prompt in enumerate(range(0, 18, 3)):
        for i, images in enumerate(columns):
            if images is not None:
                assert (shown[4 * row + i] == images[prompt]).all()


def test_image_grid_shows_the_given_prompts(runs: list[Path], drawn: list[Figure]) -> None:
    captions = [f"prompt {i}" for i in range(18)]
    figures.image_grid(runs, "", captions=captions, indices=[7, 2])
    texts = [text.get_text() for text in drawn[0].texts]
    assert [text for text in texts if text.startswith("prompt")] == ["prompt 7", "prompt 2"]


def test_equal_input_gives_equal_bytes(runs: list[Path], tmp_path: Path) -> None:
    options = {"captions": synthetic.captions(18), "indices": [0]}
    runs = [runs[0], *runs[-2:]]
    for name, draw in (
        ("figure4", lambda order, out: figures.figure4(order, out, **FEW)),
        ("learning_curves", figures.learning_curves),
        ("image_grid", lambda order, out: figures.image_grid(order, out, **options)),
    ):
        first, second = draw(runs, tmp_path / "a"), draw(runs[::-1], tmp_path / "b")
        assert [file.name for file in first] == [f"{name}.png", f"{name}.pdf"]
        for a, b in zip(first, second, strict=True):
            assert a.read_bytes() == b.read_bytes()
        pdf = first[1].read_bytes()
        assert b"/FontFile2" in pdf  # TrueType, embedded
        assert b"/Type3" not in pdf and b"Date" not in pdf


def test_drawing_leaves_matplotlibs_settings_alone(runs: list[Path], tmp_path: Path) -> None:
    def parameters() -> dict[str, Any]:
        # Reading the backend would choose one.
        return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}

    with matplotlib.rc_context({"font.size": 17}):
        before = parameters()
        figures.image_grid(runs, tmp_path, captions=synthetic.captions(18), indices=[0])
        assert parameters() == before


def test_a_single_prompt_a_task_is_drawn_without_bands(tmp_path: Path) -> None:
    small = {**SMALL, "prompts": 6, "images": 1, "iterations": 1}
    runs = synthetic.write_runs(tmp_path / "runs", seeds=1, **small)
    figures.figure4(runs, tmp_path, **FEW)
    figures.learning_curves(runs, tmp_path)


def test_bad_input_is_one_line_that_names_the_file(own_runs: list[Path], tmp_path: Path) -> None:
    def fails(message: str, **options: Any) -> None:
        options = {"captions": synthetic.captions(18), **options}
        with pytest.raises(ValueError, match=message) as caught:
            figures.image_grid(own_runs, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)

    fails("base-0/samples.safetensors: 18 prompts, but 2 captions were given", captions=["a", "b"])
    fails("base-0/samples.safetensors: has no prompt 18", indices=[18])
    fails(r"base-0/samples.safetensors: has no 'ode-3' \(has: ode-1, ode-28, ode-4\)", nfe=3)
    fails("no prompts to show", indices=[])
    (own_runs[0] / "samples.safetensors").write_text("x")
    fails("base-0/samples.safetensors: not a safetensors file")
    (own_runs[0] / "samples.safetensors").unlink()
    fails("base-0/samples.safetensors: not found")
    with pytest.raises(ValueError, match=r"scores.parquet: no geneval for sampler ode at nfe 3"):
        figures.figure4(own_runs, tmp_path / "out", nfe=[3])
    with pytest.raises(ValueError, match="no trained run"):
        figures.learning_curves(own_runs[:1], tmp_path / "out")
    text = '{"kind": "iteration", "iteration": 0, "seconds": {"total": 1}}\n'
    (own_runs[1] / "journal.jsonl").write_text(text)
    with pytest.raises(ValueError, match="flow_grpo-0/journal.jsonl: its iterations have no rewar"):
        figures.learning_curves(own_runs[1:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_kind_of_figure_in_the_configuration_can_be_drawn() -> None:
    assert tuple(figures.DRAW) == config.FIGURES


def test_hacking_compares_trained_rewards_with_those_that_took_no_part(
    runs: list[Path], drawn: list[Figure]
) -> None:
    figures.hacking(runs, "")
    (point,) = lines(drawn[0].axes[0])["TAFS-GRPO"].get_xdata()
    base, *_, first, second = tables.read_results(runs)
    gains = []
    for metric in ("pickscore", "clip"):
        reference = base.scores.values["ode", 4, metric]
        spread = np.nanstd(reference.mean(1))
        for result in (first, second):
            own = result.scores.values["anneal", 4, metric]
            gains.append((own.mean() - reference.mean()) / spread)
    assert point == pytest.approx(np.mean(gains))


def test_profiles_fall_from_one_to_zero(runs: list[Path], drawn: list[Figure]) -> None:
    figures.profiles(runs, "")
    found = [line for line in drawn[0].axes[0].get_lines() if "(" in str(line.get_label())]
    assert len(found) == 2
    for line in found:
        shares = line.get_ydata()
        assert (shares[0], shares[-1]) == (1, 0)
        assert (np.diff(shares) <= 0).all()


def test_gains_without_their_base_model_are_refused(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match="no run of the base model 'shapes-sd3'"):
        figures.hacking(runs[1:], "")
