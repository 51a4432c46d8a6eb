"""The figures show what the runs' files say, and equal files give equal figures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from support import synthetic

from tafs.experiment import schema
from tafs.report.figures import image_grid, learning_curves, plots, style
from tafs.report.results import read_results, systems_of
from tafs.rewards.metrics import METRICS

SMALL = {"prompts": 18, "images": 2, "iterations": 6, "nfe": (1, 4)}
FEW: dict[str, Any] = {"nfe": (1, 4)}
AT_FOUR = {"nfe": 4}
EVERY: dict[str, Callable[..., list[Path]]] = {
    "figure4": partial(plots.figure4, **FEW),
    "learning_curves": learning_curves.learning_curves,
    "compute": partial(plots.compute, **AT_FOUR),
    "pareto": partial(plots.pareto, few=4, **FEW),
    "image_grid": partial(
        image_grid.image_grid, captions=synthetic.captions(18), indices=[0], **AT_FOUR
    ),
    "hacking": partial(plots.hacking, **AT_FOUR),
    "profiles": partial(plots.profiles, **AT_FOUR),
}


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

    def keep(figure: Figure, *_: object) -> list[Path]:
        found.append(figure)
        return []

    monkeypatch.setattr(plots, "_save", keep)
    return found


def change_scores(run: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    file = run / "scores.parquet"
    change(pd.read_parquet(file)).to_parquet(file, index=False)


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_figure4_has_a_panel_a_metric_and_a_line_a_method(
    runs: list[Path], drawn: list[Figure]
) -> None:
    plots.figure4(runs, "", **FEW)
    assert [axes.get_title() for axes in drawn[0].axes] == [
        metric.title for metric in METRICS.values()
    ]
    for axes in drawn[0].axes:
        assert list(lines(axes)) == [
            "shapes-sd3",
            "shapes-sd3, 28 steps",
            "Flow-GRPO",
            "TAFS-GRPO",
        ]


def test_figure4_draws_the_files_values(runs: list[Path], drawn: list[Figure]) -> None:
    plots.figure4(runs, "", **FEW)
    found = lines(drawn[0].axes[2])  # CLIP
    results = {r.run.name: r for r in read_results(runs)}
    base = results["base-0"].scores.values["ode", 28, "clip", 0].mean()
    assert found["shapes-sd3, 28 steps"].get_ydata() == pytest.approx([base, base])
    for method, label, sampler in (
        ("flow_grpo", "Flow-GRPO", "ode"),
        ("tafs_grpo", "TAFS-GRPO", "anneal"),
    ):
        values = [
            np.mean([results[f"{method}-{s}"].scores.values[sampler, n, "clip", 6] for s in (0, 1)])
            for n in (1, 4)
        ]
        assert found[label].get_ydata() == pytest.approx(values)
        assert list(found[label].get_xdata()) == [1, 4]


def test_a_method_keeps_its_colour(runs: list[Path], drawn: list[Figure]) -> None:
    plots.figure4(runs, "", **FEW)
    learning_curves.learning_curves(runs, "")
    tafs, _ = style.LOOKS["tafs_grpo"]
    assert {lines(figure.axes[0])["TAFS-GRPO"].get_color() for figure in drawn} == {tafs}


def test_systems_do_not_share_a_colour(tmp_path: Path) -> None:
    for variant in "abcd":
        info = {"name": variant, "variant": variant, "title": variant}
        synthetic.write_run(tmp_path, "tafs_grpo", **info, **SMALL)
    found = systems_of(read_results(tmp_path.iterdir()))
    assert len(set(style._looks(found))) == 4


def test_a_method_on_two_models_keeps_its_colour_and_changes_its_line(tmp_path: Path) -> None:
    for backbone in ("one", "two"):
        for method in ("base", "tafs_grpo"):
            name = f"{method}-{backbone}"
            info = {"name": name, "variant": method, "title": name, "backbone": backbone}
            synthetic.write_run(tmp_path, method, **info, **SMALL)
    found = systems_of(read_results(tmp_path.iterdir()))
    looks = {
        (s.info["method"], s.info["backbone"]): look
        for s, look in zip(found, style._looks(found), strict=True)
    }
    for method in ("base", "tafs_grpo"):
        one, two = looks[method, "one"], looks[method, "two"]
        assert one[:2] == two[:2] == style.LOOKS[method]
        assert one.line != two.line


def test_learning_curves_show_the_last_scored_step(runs: list[Path], drawn: list[Figure]) -> None:
    learning_curves.learning_curves([run for run in runs if run.name == "tafs_grpo-0"], "")
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
    seconds = np.median([r["seconds"]["total"] for r in records]) * np.arange(1, 7)
    assert timed.get_xdata() == pytest.approx(seconds)
    assert by_time.get_xlabel() == "Compute time (s)"


def test_learning_curves_are_means_over_seeds(runs: list[Path], drawn: list[Figure]) -> None:
    learning_curves.learning_curves(runs, "")
    results = [r for r in read_results(runs) if r.info["method"] == "flow_grpo"]
    mean = np.mean(
        [[record["rewards"]["clip"][-1] for record in r.iterations] for r in results], axis=0
    )
    assert lines(drawn[0].axes[1])["Flow-GRPO"].get_ydata() == pytest.approx(mean)


def test_running_means_are_centred_and_shorter_at_the_ends() -> None:
    values = np.array([0.0, 3.0, 6.0, 3.0])
    assert learning_curves._running_mean(values, 3).tolist() == [1.5, 3.0, 4.0, 4.5]
    assert learning_curves._running_mean(values, 1).tolist() == values.tolist()


def test_long_training_is_shown_in_hours(own_runs: list[Path], drawn: list[Figure]) -> None:
    for run in own_runs:
        file = run / "journal.jsonl"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            file.write_text(re.sub(r'"total": [\d.]+', '"total": 7200', text), encoding="utf-8")
    learning_curves.learning_curves(own_runs, "")
    assert drawn[0].axes[2].get_xlabel() == "Compute time (h)"
    assert lines(drawn[0].axes[2])["TAFS-GRPO"].get_xdata()[-1] == 12


def test_null_rewards_are_gaps(own_runs: list[Path], drawn: list[Figure]) -> None:
    file = own_runs[-1] / "journal.jsonl"
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r'"clip": \[[^]]*\]', '"clip": [null]', text, count=1))
    learning_curves.learning_curves([own_runs[-1]], "")
    values = lines(drawn[0].axes[1])["TAFS-GRPO"].get_ydata()
    assert np.isnan(values).tolist() == [True] + [False] * 5


def test_image_grid_shows_the_first_prompts_of_every_task(
    runs: list[Path], drawn: list[Figure]
) -> None:
    image_grid.image_grid(runs, "", captions=synthetic.captions(18), per_tag=1, **AT_FOUR)
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
    image_grid.image_grid(runs, "", captions=captions, indices=[7, 2], **AT_FOUR)
    texts = [text.get_text() for text in drawn[0].texts]
    assert [text for text in texts if text.startswith("prompt")] == ["prompt 7", "prompt 2"]


def test_equal_input_gives_equal_bytes(runs: list[Path], tmp_path: Path) -> None:
    runs = [runs[0], *runs[-2:]]
    for name, draw in EVERY.items():
        first, second = draw(runs, tmp_path / "a"), draw(runs[::-1], tmp_path / "b")
        assert [file.name for file in first] == [f"{name}.png", f"{name}.pdf"]
        for a, b in zip(first, second, strict=True):
            assert a.read_bytes() == b.read_bytes()
        pdf = first[1].read_bytes()
        assert b"/FontFile2" in pdf  # TrueType, embedded
        assert b"/Type3" not in pdf and b"Date" not in pdf


@pytest.mark.parametrize("name", EVERY)
def test_a_figure_of_random_weights_says_so_and_no_other_does(
    name: str, own_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    EVERY[name](own_runs, tmp_path)
    described = own_runs[0] / "run.json"
    described.write_text(
        json.dumps({**json.loads(described.read_bytes()), "random_weights": ["flux-dev"]})
    )
    EVERY[name](own_runs, tmp_path)
    marked = ["RANDOM WEIGHTS" in [text.get_text() for text in f.texts] for f in saved]
    assert marked == [False, False, True, True]  # PNG and PDF of each


def test_drawing_leaves_matplotlibs_settings_alone(runs: list[Path], tmp_path: Path) -> None:
    def parameters() -> dict[str, Any]:
        # Reading the backend would choose one.
        return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}

    options = {"captions": synthetic.captions(18), "indices": [0], **AT_FOUR}
    with matplotlib.rc_context({"font.size": 17}):
        before = parameters()
        image_grid.image_grid(runs, tmp_path, **options)
        assert parameters() == before


def test_a_single_prompt_a_task_is_drawn_without_bands(tmp_path: Path) -> None:
    small = {**SMALL, "prompts": 6, "images": 1, "iterations": 1}
    runs = synthetic.write_runs(tmp_path / "runs", seeds=1, **small)
    plots.figure4(runs, tmp_path, **FEW)
    learning_curves.learning_curves(runs, tmp_path)
    plots.compute(runs, tmp_path, nfe=4)


def test_bad_input_is_one_line_that_names_the_file(own_runs: list[Path], tmp_path: Path) -> None:
    def fails(message: str, **options: Any) -> None:
        options = {"captions": synthetic.captions(18), **AT_FOUR, **options}
        with pytest.raises(ValueError, match=message) as caught:
            image_grid.image_grid(own_runs, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)

    fails("prompt 16 has no caption: 2 were given", captions=["a", "b"])
    fails("base-0/samples.safetensors: has no prompt 18", indices=[18], captions=["a"] * 19)
    fails(
        r"base-0/samples.safetensors: has no 'ode-3' \(has: ode-1, ode-28, ode-4, prompts\)", nfe=3
    )
    fails("no prompts to show", indices=[])
    (own_runs[0] / "samples.safetensors").write_text("x")
    fails("base-0/samples.safetensors: not a safetensors file")
    (own_runs[0] / "samples.safetensors").unlink()
    fails("base-0/samples.safetensors: not found")
    with pytest.raises(ValueError, match=r"scores.parquet: no geneval for sampler ode at nfe 3"):
        plots.figure4(own_runs, tmp_path / "out", nfe=[3])
    with pytest.raises(ValueError, match="no trained run"):
        learning_curves.learning_curves(own_runs[:1], tmp_path / "out")
    text = '{"kind": "iteration", "iteration": 0, "seconds": {"total": 1}}\n'
    (own_runs[1] / "journal.jsonl").write_text(text)
    with pytest.raises(ValueError, match="flow_grpo-0/journal.jsonl: its iterations have no rewar"):
        learning_curves.learning_curves(own_runs[1:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_kind_of_figure_in_the_configuration_can_be_drawn() -> None:
    assert tuple(plots.DRAW) == schema.FIGURES


def test_hacking_compares_trained_rewards_with_those_that_took_no_part(
    runs: list[Path], drawn: list[Figure]
) -> None:
    plots.hacking(runs, "", nfe=4)
    (point,) = lines(drawn[0].axes[0])["TAFS-GRPO"].get_xdata()
    base, *_, first, second = read_results(runs)
    gains = []
    for metric in ("pickscore", "clip"):
        reference = base.scores.values["ode", 4, metric, 0]
        spread = np.nanstd(reference.mean(1))
        for result in (first, second):
            own = result.scores.values["anneal", 4, metric, 6]
            gains.append((own.mean() - reference.mean()) / spread)
    assert point == pytest.approx(np.mean(gains))


def test_profiles_fall_from_one_to_zero(runs: list[Path], drawn: list[Figure]) -> None:
    plots.profiles(runs, "", nfe=4)
    found = [line for line in drawn[0].axes[0].get_lines() if "(" in str(line.get_label())]
    assert len(found) == 2
    for line in found:
        shares = line.get_ydata()
        assert (shares[0], shares[-1]) == (1, 0)
        assert (np.diff(shares) <= 0).all()


GAINS: list[Callable[[list[Path]], object]] = [
    lambda runs: plots.hacking(runs, "", nfe=4),
    lambda runs: plots.profiles(runs, "", nfe=4),
    lambda runs: plots.pareto(runs, "", nfe=(1, 4), few=4),
    lambda runs: plots.compute(runs, "", nfe=4),
]


@pytest.mark.parametrize("draw", GAINS)
def test_gains_without_their_base_model_are_refused(
    draw: Callable[[list[Path]], object], runs: list[Path]
) -> None:
    with pytest.raises(ValueError, match="no run of the base model 'shapes-sd3'"):
        draw(runs[1:])


@pytest.mark.parametrize("draw", GAINS)
def test_gains_on_a_base_model_with_other_prompts_are_refused(
    draw: Callable[[list[Path]], object], own_runs: list[Path]
) -> None:
    change_scores(own_runs[0], lambda scores: scores.assign(prompt=scores["prompt"] + 1))
    with pytest.raises(ValueError, match=r"its prompts are not those of .*base-0/scores.parquet"):
        draw(own_runs)


def test_compute_goes_from_the_base_model_to_the_whole_training(
    runs: list[Path], drawn: list[Figure]
) -> None:
    plots.compute(runs, "", nfe=4)
    results = {result.run.name: result for result in read_results(runs)}
    found = lines(drawn[0].axes[2])  # CLIP
    # Six iterations of 4 + 3 x 3 evaluations pay for two of 10 + 3 x 6; quarters are rounded down.
    for method, label, sampler, cost, iterations in (
        ("flow_grpo", "Flow-GRPO", "ode", 28, [1, 2, 6]),
        ("tafs_grpo", "TAFS-GRPO", "anneal", 13, [1, 3, 4, 6]),
    ):
        line = found[label]
        assert list(line.get_xdata()) == [0, *(cost * i for i in iterations)]
        both = [results[f"{method}-{seed}"].scores.values for seed in (0, 1)]
        means = [np.mean([v[sampler, 4, "clip", i] for v in both]) for i in iterations]
        base = results["base-0"].scores.values["ode", 4, "clip", 0].mean()
        assert line.get_ydata() == pytest.approx([base, *means])


def test_compute_reads_accuracies_in_percent(runs: list[Path], drawn: list[Figure]) -> None:
    plots.compute(runs, "", nfe=4)
    base = next(result for result in read_results(runs) if not result.run.trained)
    by_task = base.scores.values["ode", 4, "geneval", 0].reshape(6, -1).mean(1)  # equal tasks
    for line in drawn[0].axes[0].get_lines()[:2]:
        assert line.get_ydata()[0] == pytest.approx(100 * by_task.mean())


def test_compute_without_a_scored_snapshot_names_the_file_and_the_iteration(
    own_runs: list[Path],
) -> None:
    change_scores(own_runs[1], lambda scores: scores[scores["iteration"] != 2])
    with pytest.raises(ValueError, match=r"flow_grpo-0/scores.parquet: .* after iteration 2 \(has"):
        plots.compute(own_runs, "", nfe=4)


def test_compute_needs_a_trained_run(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match="no trained run among the given ones"):
        plots.compute(runs[:1], "", nfe=4)


def test_the_pareto_front_is_the_best_of_so_many_steps_or_fewer(
    own_runs: list[Path], drawn: list[Figure]
) -> None:
    # With three metrics the interquartile mean of one seed's gains is their mean.
    runs = [run for run in own_runs if run.name.endswith("-0")]
    for run in runs:
        kept = ["pickscore", "clip", "hpsv2"]
        change_scores(run, lambda scores, kept=kept: scores[scores["metric"].isin(kept)])

    def fall(scores: pd.DataFrame) -> pd.DataFrame:
        """A model that loses by having more than one step."""
        value = scores["value"].where(scores["nfe"] == 1, scores["value"] - 50)
        return scores.assign(value=value.where(scores["nfe"] > 1, scores["value"] + 50))

    change_scores(runs[1], fall)
    plots.pareto(runs, "", nfe=(1, 4), few=4)
    found = lines(drawn[0].axes[0])
    front = found.pop("Pareto front")
    assert list(front.get_xdata()) == [1, 4]
    base, *_ = results = read_results(runs)
    expected = {}
    for result, title in zip(results, ("shapes-sd3", "Flow-GRPO", "TAFS-GRPO"), strict=True):
        sampler, last = result.info["sampler"], result.info["iterations"]
        expected[title] = []
        for n in (1, 4):
            effects = []
            for metric in ("pickscore", "clip", "hpsv2"):
                reference = base.scores.values["ode", 4, metric, 0]
                own = result.scores.values[sampler, n, metric, last]
                effects.append((own.mean() - reference.mean()) / reference.mean(1).std())
            expected[title].append(np.mean(effects))
    assert set(found) == set(expected)
    for title, gains in expected.items():
        assert found[title].get_ydata() == pytest.approx(gains)
    assert expected["shapes-sd3"][1] == pytest.approx(0)
    assert expected["Flow-GRPO"][0] > expected["Flow-GRPO"][1]
    highest = np.max(list(expected.values()), axis=0)
    assert front.get_ydata() == pytest.approx([highest[0], max(highest)])
    assert (np.diff(front.get_ydata()) >= 0).all()


def test_pareto_compares_the_images_that_every_setting_has(
    own_runs: list[Path], drawn: list[Figure]
) -> None:
    plots.pareto(own_runs, "", nfe=(4,), few=4)
    for run in own_runs:  # one image a prompt on the curve, two in the table
        change_scores(run, lambda s: s[(s["nfe"] != 1) | (s["image"] == 0)])
    plots.pareto(own_runs, "", nfe=(1, 4), few=4)
    for run in own_runs:
        change_scores(run, lambda s: s[s["image"] == 0])
    plots.pareto(own_runs, "", nfe=(1, 4), few=4)
    both, mixed, first = (lines(figure.axes[0])["TAFS-GRPO"].get_ydata() for figure in drawn)
    assert list(mixed) == list(first)
    assert both[0] != mixed[1]


@pytest.mark.parametrize("kind", schema.FIGURES)
def test_every_figure_is_drawn_from_an_experiments_entry(
    kind: str, runs: list[Path], drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = [SimpleNamespace(text=caption) for caption in synthetic.captions(18)]
    monkeypatch.setattr(plots.rundir.RunDir, "test_prompts", lambda run: world)
    spec = synthetic.table2(runs)
    spec["evaluation"]["curve"] = [1, 4]
    plots.draw(kind, "name", spec, runs, Path())
    assert len(drawn) == 1


def test_figures_are_named_by_their_experiment(runs: list[Path], tmp_path: Path) -> None:
    spec = synthetic.table2(runs)
    files = plots.draw("compute", "equal", spec, runs, tmp_path)
    assert files == [tmp_path / "equal.png", tmp_path / "equal.pdf"]
    assert all(file.stat().st_size for file in files)
