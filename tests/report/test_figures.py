"""Figures show the files' values, and equal files give equal figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from safetensors.numpy import load_file, save_file
from support import synthetic
from support.paper_metrics import METRICS
from support.synthetic import change_scores

from tafs.experiment.schema import FIGURES
from tafs.report import figures, stats
from tafs.report.figures import style
from tafs.report.results import LoadedTable

GAINS = ("hacking", "profiles", "pareto", "compute")  # measured from the base model


def table(runs: list[Path], **options: Any) -> LoadedTable:
    return synthetic.loaded(runs, **{"curve_nfe": (1, 4), **options})


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figure]:
    """Draws a figure and returns it in place of its files."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))

    def drawn(kind: str, runs: list[Path], **options: Any) -> Figure:
        saved.clear()
        files = figures.draw(table(runs, figures={kind: "name"}, **options), tmp_path / "figures")
        assert [file.name for file in files] == ["name.png", "name.pdf"]
        assert saved[0] is saved[1]
        return saved[0]

    return drawn


def lines(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.get_lines()}


def records(run: Path) -> list[dict[str, Any]]:
    """The iterations in a run's journal."""
    text = (run / "journal.jsonl").read_text(encoding="utf-8")
    return [r for r in map(json.loads, text.splitlines()) if r["kind"] == "iteration"]


def value(runs: list[Path], variant: str, metric: str, nfe: int, iteration: int = 6) -> float:
    """A system's mean over seeds and images."""
    (system,) = (s for s in table(runs).distinct if s.spec.variant == variant)
    at = iteration if system.spec.trained else 0
    return float(system.values(system.spec.sampler, nfe, metric, at).mean())


def effects(runs: list[Path], variant: str, metrics: Sequence[str], nfe: int = 4) -> stats.Array:
    """A system's gains on the base model at four steps, [metrics, seeds]."""
    loaded = table(runs)
    (system,) = (s for s in loaded.distinct if s.spec.variant == variant)
    base = loaded.base_of(system)
    own = [system.values(system.spec.sampler, nfe, metric) for metric in metrics]
    reference = [base.values("ode", 4, metric) for metric in metrics]
    return np.array([stats.effects(*pair) for pair in zip(own, reference, strict=True)])


def test_equal_input_gives_equal_files(runs: list[Path], tmp_path: Path) -> None:
    kinds = {kind: f"figure_{kind}" for kind in FIGURES}
    runs = [runs[0], *runs[-2:]]
    first = figures.draw(table(runs, figures=kinds), tmp_path / "a")
    second = figures.draw(table(runs[::-1], figures=kinds), tmp_path / "b")
    names = [f"{name}.{ending}" for name in kinds.values() for ending in ("png", "pdf")]
    assert [file.name for file in first] == names
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        if a.suffix == ".pdf":
            assert b"/FontFile2" in a.read_bytes()  # TrueType, embedded
            assert b"/Type3" not in a.read_bytes() and b"Date" not in a.read_bytes()


def test_only_figures_of_random_weights_are_marked(
    own_runs: list[Path], draw: Callable[..., Figure]
) -> None:
    def marked() -> bool:
        texts = draw("hacking", own_runs).texts
        return "RANDOM WEIGHTS" in [text.get_text() for text in texts]

    assert not marked()
    file = own_runs[0] / "run.json"
    random = {**json.loads(file.read_bytes()), "random_weights": ["flux-dev"]}
    file.write_text(json.dumps(random), encoding="utf-8")
    assert marked()


def test_systems_differ_in_colour_and_trained_models_in_line_style(tmp_path: Path) -> None:
    runs = []
    for backbone in ("one", "two"):
        for method, variant in (("base", "base"), ("tafs_grpo", "b"), ("tafs_grpo", "tafs_grpo")):
            name = f"{variant}-{backbone}"
            fields = {"name": name, "variant": variant, "title": name, "backbone": backbone}
            small: dict[str, Any] = {"prompts": 6, "images": 1, "nfe": (4,)}
            runs.append(synthetic.write_run(tmp_path, method, **fields, **small))
    systems = table(runs).distinct
    looks = {system.label: look for system, look in style.looks(systems).items()}
    assert len(set(looks.values())) == 6
    for variant in ("base", "tafs_grpo", "b"):
        one, two = looks[f"{variant}-one"], looks[f"{variant}-two"]
        assert one[:2] == two[:2] == style.LOOKS.get(variant, one[:2])
        assert (one.line, two.line) == ("-", "--")


@pytest.mark.parametrize("width", [2.4, 3, 6, 12])
@pytest.mark.parametrize("count", [1, 4, 7, 18])
def test_a_legend_is_as_wide_as_its_figure_at_most(width: float, count: int) -> None:
    figure = Figure(figsize=(width, 8), layout="constrained")
    axes = figure.subplots()
    for number in range(count):
        axes.plot([0, 1], label=f"Method number {number}")
    style.legend(figure, axes)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == count
    extent = legend.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width
    columns = {round(text.get_window_extent().x0) for text in legend.get_texts()}
    if width == 12:
        assert len(columns) == min(count, 4 if count == 7 else 5)


@pytest.mark.parametrize("kind", ["steps", "curves", "compute"])
def test_one_prompt_per_task_and_one_iteration_can_be_drawn(
    kind: str, tmp_path: Path, draw: Callable[..., Figure]
) -> None:
    small: dict[str, Any] = {"prompts": 6, "images": 1, "iterations": 1, "nfe": (1, 4)}
    assert draw(kind, synthetic.write_runs(tmp_path / "runs", seeds=1, **small)).axes


def test_steps_has_a_panel_per_metric_and_a_line_per_system(
    runs: list[Path], draw: Callable[..., Figure]
) -> None:
    axes = draw("steps", runs).axes
    assert [panel.get_title() for panel in axes] == [metric.title for metric in METRICS.values()]
    labels = ["shapes-sd3", "shapes-sd3, 28 steps", "Flow-GRPO", "TAFS-GRPO"]
    assert all(list(lines(panel)) == labels for panel in axes)
    found = lines(axes[2])  # CLIP
    dotted = found["shapes-sd3, 28 steps"].get_ydata()
    assert dotted == pytest.approx([value(runs, "base", "clip", 28)] * 2)
    for method, label in (("flow_grpo", "Flow-GRPO"), ("tafs_grpo", "TAFS-GRPO")):
        assert list(found[label].get_xdata()) == [1, 4]
        expected = [value(runs, method, "clip", n) for n in (1, 4)]
        assert found[label].get_ydata() == pytest.approx(expected)


def test_compute_goes_from_the_base_model_to_the_whole_training(
    runs: list[Path], draw: Callable[..., Figure]
) -> None:
    axes = draw("compute", runs).axes
    # Six iterations of 4 + 3 x 3 evaluations pay for two of 10 + 3 x 6; quarters are rounded down.
    for method, label, cost, iterations in (
        ("flow_grpo", "Flow-GRPO", 28, [1, 2, 6]),
        ("tafs_grpo", "TAFS-GRPO", 13, [1, 3, 4, 6]),
    ):
        line = lines(axes[2])[label]  # CLIP
        assert list(line.get_xdata()) == [0, *(cost * i for i in iterations)]
        base = value(runs, "base", "clip", 4)
        means = [value(runs, method, "clip", 4, iteration=i) for i in iterations]
        assert line.get_ydata() == pytest.approx([base, *means])
        # GenEval is shown in percent; the tasks are equally large.
        accuracy = 100 * value(runs, "base", "geneval", 4)
        assert lines(axes[0])[label].get_ydata()[0] == pytest.approx(accuracy)


def test_the_pareto_front_is_the_best_of_at_most_so_many_steps(
    own_runs: list[Path], draw: Callable[..., Figure]
) -> None:
    # With three metrics the interquartile mean of one seed's gains is their mean.
    metrics = ("pickscore", "clip", "hpsv2")
    runs = [run for run in own_runs if run.name.endswith("-0")]
    for run in runs:
        change_scores(run, lambda found: found[found["metric"].isin(metrics)])

    def worse_with_more_steps(found: pd.DataFrame) -> pd.DataFrame:
        return found.assign(value=found["value"] + np.where(found["nfe"] == 1, 50, -50))

    change_scores(runs[1], worse_with_more_steps)
    found = lines(draw("pareto", runs).axes[0])
    front = found.pop("Pareto front")
    titles = ("shapes-sd3", "Flow-GRPO", "TAFS-GRPO")
    expected = {
        title: [np.mean(effects(runs, variant, metrics, n)) for n in (1, 4)]
        for title, variant in zip(titles, synthetic.METHODS, strict=True)
    }
    assert set(found) == set(expected)
    for title, gains in expected.items():
        assert found[title].get_ydata() == pytest.approx(gains)
    assert expected["shapes-sd3"][1] == pytest.approx(0)
    assert expected["Flow-GRPO"][0] > expected["Flow-GRPO"][1]
    highest = np.max(list(expected.values()), axis=0)
    assert list(front.get_xdata()) == [1, 4]
    assert front.get_ydata() == pytest.approx([highest[0], max(highest)])


def test_pareto_compares_the_images_that_every_setting_has(
    own_runs: list[Path], draw: Callable[..., Figure]
) -> None:
    def tafs(**options: Any) -> list[float]:
        return list(lines(draw("pareto", own_runs, **options).axes[0])["TAFS-GRPO"].get_ydata())

    both = tafs(curve_nfe=(4,))
    for run in own_runs:  # one image per prompt on the curve, two in the table
        change_scores(run, lambda found: found[(found["nfe"] != 1) | (found["image"] == 0)])
    mixed = tafs()
    for run in own_runs:
        change_scores(run, lambda found: found[found["image"] == 0])
    assert mixed == tafs()
    assert both[0] != mixed[1]


def test_hacking_compares_gains_on_trained_rewards_with_those_on_other_metrics(
    runs: list[Path], draw: Callable[..., Figure]
) -> None:
    (axes,) = draw("hacking", runs).axes
    point = lines(axes)["TAFS-GRPO"]
    trained = ("pickscore", "clip")
    others = ("geneval", "hpsv2", "imagereward", "unifiedreward")
    assert point.get_xdata() == pytest.approx([np.mean(effects(runs, "tafs_grpo", trained))])
    assert point.get_ydata() == pytest.approx([np.mean(effects(runs, "tafs_grpo", others))])
    assert axes.get_xlabel() == "Gain on PickScore, CLIP"


def test_profiles_fall_from_one_to_zero_and_name_the_interquartile_mean(
    runs: list[Path], draw: Callable[..., Figure]
) -> None:
    found = lines(draw("profiles", runs).axes[0])
    gains = effects(runs, "tafs_grpo", tuple(METRICS))
    assert f"TAFS-GRPO ({stats.interquartile_mean(gains):+.2f})" in found
    assert len(found) == 2
    for line in found.values():
        shares = np.asarray(line.get_ydata())
        assert (shares[0], shares[-1]) == (1, 0)
        assert (np.diff(shares) <= 0).all()


def test_learning_curves_show_the_rewards_of_the_final_images(
    runs: list[Path], draw: Callable[..., Figure]
) -> None:
    by_iteration, _, by_time, _ = draw("curves", [runs[3]]).axes
    assert by_iteration.get_title() == "PickScore"
    line, timed = lines(by_iteration)["TAFS-GRPO"], lines(by_time)["TAFS-GRPO"]
    assert list(line.get_xdata()) == list(range(6))
    assert list(line.get_ydata()) == [r["rewards"]["pickscore"][-1] for r in records(runs[3])]
    seconds = np.median([r["seconds"]["total"] for r in records(runs[3])]) * np.arange(1, 7)
    assert timed.get_xdata() == pytest.approx(seconds)
    assert by_time.get_xlabel() == "Compute time (s)"
    mean = np.mean([[r["rewards"]["clip"][-1] for r in records(run)] for run in runs[1:3]], axis=0)
    assert lines(draw("curves", runs).axes[1])["Flow-GRPO"].get_ydata() == pytest.approx(mean)


def test_many_iterations_are_shown_as_running_means(
    tmp_path: Path, draw: Callable[..., Figure]
) -> None:
    small: dict[str, Any] = {"prompts": 6, "images": 1, "nfe": (4,)}
    run = synthetic.write_run(tmp_path, "tafs_grpo", iterations=24, **small)
    axes = draw("curves", [run], curve_nfe=(4,)).axes[0]
    assert axes.get_ylabel() == "Reward, mean of 3 iterations"
    rewards = [r["rewards"]["pickscore"][-1] for r in records(run)]
    shown = list(lines(axes)["TAFS-GRPO"].get_ydata())
    middle = [np.mean(rewards[i - 1 : i + 2]) for i in range(1, 23)]
    assert shown == pytest.approx([np.mean(rewards[:2]), *middle, np.mean(rewards[-2:])])


def test_long_training_is_shown_in_hours_and_missing_rewards_as_gaps(
    own_runs: list[Path], draw: Callable[..., Figure]
) -> None:
    file = own_runs[-1] / "journal.jsonl"
    text = re.sub(r'"total": [\d.]+', '"total": 7200', file.read_text(encoding="utf-8"))
    text = re.sub(r'"clip": \[[^]]*\]', '"clip": [null]', text, count=1)
    file.write_text(text, encoding="utf-8")
    axes = draw("curves", own_runs[-1:]).axes
    assert axes[2].get_xlabel() == "Compute time (h)"
    assert lines(axes[2])["TAFS-GRPO"].get_xdata()[-1] == 12
    gaps = np.isnan(np.asarray(lines(axes[1])["TAFS-GRPO"].get_ydata(), dtype=float))
    assert gaps.tolist() == [True] + [False] * 5


def test_the_image_grid_shows_the_same_prompts_of_every_task_for_each_system(
    runs: list[Path], draw: Callable[..., Figure]
) -> None:
    figure = draw("images", runs)
    texts = [text.get_text() for text in figure.texts]
    titles = ("shapes-sd3\n28", "shapes-sd3\n4", "Flow-GRPO\n4", "TAFS-GRPO\n4")
    assert texts[:4] == [f"{title} steps" for title in titles]
    shown = [prompt for prompt in range(18) if prompt % 3 < 2]  # two of each task's three
    assert texts[4::2] == [f"prompt {prompt}" for prompt in shown]
    assert texts[5::4] == [tag.replace("_", " ") for tag in synthetic.TAGS]
    images = [axes.get_images()[0].get_array() for axes in figure.axes]
    base, tafs = (load_file(run / "samples.safetensors") for run in (runs[0], runs[3]))
    for i, column in enumerate((base["ode-28"], base["ode-4"], None, tafs["anneal-4"])):
        if column is not None:
            assert np.array_equal(images[i::4], column[: len(shown)])


def test_broken_samples_are_reported_in_one_line_that_names_the_file(
    own_runs: list[Path], draw: Callable[..., Figure]
) -> None:
    file = own_runs[0] / "samples.safetensors"
    tensors = load_file(file)
    captions = {"captions": json.dumps([f"prompt {i}" for i in tensors["prompts"]])}

    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            draw("images", own_runs)
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)

    save_file({k: v for k, v in tensors.items() if k != "ode-4"}, file, captions)
    fails(r"has no 'ode-4' \(available: ode-1, ode-28, ode-8, prompts\)")
    save_file({**tensors, "prompts": tensors["prompts"] + 1}, file, captions)
    fails("has no prompt 0")
    save_file(tensors, file)
    fails("has no captions; evaluate the run again")
    file.write_text("x")
    fails("not a safetensors file")
    file.unlink()
    fails("not found; the workflow's rule evaluate writes it")


@pytest.mark.parametrize("kind", GAINS)
def test_figures_of_gains_need_a_base_model_with_the_same_prompts(
    kind: str, own_runs: list[Path], draw: Callable[..., Figure]
) -> None:
    with pytest.raises(ValueError, match="table2: no base model 'shapes-sd3'; set `base: true`"):
        draw(kind, own_runs[1:])
    if kind != "pareto":
        with pytest.raises(ValueError, match="table2: no run is trained"):
            draw(kind, own_runs[:1])
    change_scores(own_runs[0], lambda found: found.assign(prompt=found["prompt"] + 1))
    with pytest.raises(ValueError, match=r"its prompts differ from those of .*base-0/scores.parqu"):
        draw(kind, own_runs)


def test_missing_scores_and_rewards_are_reported_with_their_file(
    own_runs: list[Path], draw: Callable[..., Figure]
) -> None:
    with pytest.raises(ValueError, match=r"scores.parquet: no geneval for sampler ode at nfe 3"):
        draw("steps", own_runs, curve_nfe=(3,))
    with pytest.raises(ValueError, match="table2: no run is trained"):
        draw("curves", own_runs[:1])
    change_scores(own_runs[1], lambda found: found[found["iteration"] != 2])
    with pytest.raises(ValueError, match=r"flow_grpo-0/scores.parquet: .* after iteration 2 \("):
        draw("compute", own_runs)
    text = '{"kind": "iteration", "iteration": 0, "seconds": {"total": 1}}\n'
    (own_runs[1] / "journal.jsonl").write_text(text)
    with pytest.raises(ValueError, match="flow_grpo-0/journal.jsonl: its iterations have no rewar"):
        draw("curves", own_runs[1:2])
