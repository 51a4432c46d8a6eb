"""The cells of every kind of table are the files' values, and errors name the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr
from support import synthetic
from support.paper_metrics import METRICS
from support.synthetic import change_scores

from tafs.report import stats, table_kinds, tables
from tafs.report.tables import Cell, Line

SMALL: dict[str, Any] = {"prompts": 18, "images": 2, "iterations": 6, "nfe": (4, 8)}


def filled(runs: list[Path], *, published: bool = False, **options: Any) -> list[dict[str, Any]]:
    """The filled table as one mapping of columns to cells per row."""
    table = table_kinds.build(synthetic.loaded(runs, **options))
    return [named(table, line) for line in tables.fill(table, published)]


def named(table: tables.Table, line: Line) -> dict[str, Cell]:
    return {column.name: cell for column, cell in zip(table.columns, line.cells, strict=True)}


def scores(run: Path, nfe: int = 4) -> pd.DataFrame:
    """The scores of a run's final model."""
    found = pd.read_parquet(run / "scores.parquet")
    return found[(found["nfe"] == nfe) & (found["iteration"] == found["iteration"].max())]


def values(runs: list[Path], method: str, metric: str) -> np.ndarray:
    """[seeds, prompts, images] of the final models at four steps, read from the files."""
    found = [scores(run) for run in runs if run.name.startswith(method)]
    wide = [s[s["metric"] == metric].pivot(index="prompt", columns="image") for s in found]
    return np.stack([table["value"].to_numpy() for table in wide])


def test_rows_are_those_of_the_spec_in_order(runs: list[Path]) -> None:
    loaded = synthetic.loaded(runs[::-1], few=(4, 8))
    table = table_kinds.build(loaded)
    assert [row.spec for row in table.rows] == list(loaded.spec.rows)
    assert [row.first for row in table.rows] == [True, False, False, True, False, True, False]
    assert [result.spec.seed for result in table.rows[-1].system.results] == [0, 1]


def test_values_are_those_of_the_files(runs: list[Path]) -> None:
    tafs = filled(runs)[-1]
    assert list(tafs) == ["nfe_old", "nfe_theta", "iteration_time_s", *METRICS]
    found = pd.concat(scores(run) for run in runs if "tafs" in run.name)
    clip = found[found["metric"] == "clip"]["value"]
    cell = tafs["clip"]
    assert cell.value == pytest.approx(clip.mean())
    assert cell.estimate.low < clip.mean() < cell.estimate.high
    assert (cell.estimate.n_seeds, cell.estimate.n_images) == (2, 2 * 18 * 2)
    assert cell.estimate.resampled == "seeds and prompts"
    geneval = found[found["metric"] == "geneval"]
    by_task = geneval.groupby(["seed", "tag"], observed=True)["value"].mean()
    assert tafs["geneval"].value == pytest.approx(100 * by_task.mean())


def test_an_interval_ends_at_the_metrics_limits(own_runs: list[Path]) -> None:
    def differ(found: pd.DataFrame) -> pd.DataFrame:
        geneval = found["metric"] == "geneval"
        return found.assign(value=found["value"].mask(geneval, float(found["seed"].iloc[0])))

    for run in own_runs:
        change_scores(run, differ)  # all images of seed 0 are wrong, all of seed 1 right
    cell = filled(own_runs)[-1]["geneval"]
    assert (cell.value, cell.estimate.low, cell.estimate.high) == (50, 0, 100)


def test_the_gains_tables_provenance_has_variance_components(runs: list[Path]) -> None:
    table = table_kinds.build(synthetic.loaded(runs, kind="gains"))
    variance = table.details["variance"]
    assert list(variance) == ["Flow-GRPO", "TAFS-GRPO"]
    expected = stats.variance_components(values(runs, "tafs_grpo", "clip"))
    assert variance["TAFS-GRPO"]["clip"] == expected._asdict()
    single = [run for run in runs if run.name.endswith("-0")]
    assert table_kinds.build(synthetic.loaded(single, kind="gains")).details == {"variance": {}}


def test_training_columns_are_those_of_the_runs(runs: list[Path]) -> None:
    base, *_, tafs = filled(runs)
    columns = ("nfe_old", "nfe_theta", "iteration_time_s")
    assert [base[name].value for name in columns] == [None] * 3
    journals = [run / "journal.jsonl" for run in runs if "tafs" in run.name]
    records = [json.loads(line) for file in journals for line in file.read_text().splitlines()]
    times = [r["seconds"]["total"] for r in records if r["kind"] == "iteration"]
    assert [tafs[name].value for name in columns] == [4, 3, pytest.approx(np.median(times))]


def test_missing_values_are_left_out_and_counted(own_runs: list[Path]) -> None:
    def lose(found: pd.DataFrame) -> pd.DataFrame:
        first = (found["metric"] == "clip") & (found["prompt"] == 0) & (found["nfe"] == 4)
        return found.assign(value=found["value"].mask(first))

    change_scores(own_runs[0], lose)
    cell = filled(own_runs)[1]["clip"]
    assert cell.value == pytest.approx(np.nanmean(values(own_runs, "base", "clip")))
    assert (cell.estimate.n_images, cell.estimate.n_missing) == (34, 2)


def test_a_servers_scores_stand_beside_the_others(tmp_path: Path) -> None:
    plain = [synthetic.write_run(tmp_path / "plain", "base", **SMALL)]
    served = [synthetic.write_run(tmp_path / "served", "base", served=True, **SMALL)]
    metrics = set(pd.read_parquet(served[0] / "scores.parquet")["metric"])
    assert metrics == {*METRICS} - {"unifiedreward"}
    assert filled(served) == filled(plain)


def test_only_a_supported_winner_is_marked(own_runs: list[Path]) -> None:
    flow, tafs = own_runs[1:3], own_runs[3:]
    other = scores(flow[0])
    other = other.set_index(["metric", "prompt", "image"])["value"]

    def better(found: pd.DataFrame) -> pd.DataFrame:
        """Flow-GRPO's values, but higher in one metric."""
        index = pd.MultiIndex.from_frame(found[["metric", "prompt", "image"]])
        plus = np.where(found["metric"] == "hpsv2", 1.0, 0.0)
        return found.assign(value=other.reindex(index).to_numpy() + plus)

    for run in tafs:
        change_scores(run, better)
    shutil.copy(flow[0] / "scores.parquet", flow[1])
    base, *_ = rows = filled(own_runs)
    marked = [(i, m) for i, row in enumerate(rows) for m in METRICS if row[m].best]
    assert (3, "hpsv2") in marked
    # In the other columns the two methods are equal, so neither of them is marked.
    assert [place for place in marked if place[0] >= 2] == [(3, "hpsv2")]


def test_models_trained_with_one_seed_win_nothing(own_runs: list[Path]) -> None:
    single = [run for run in own_runs if run.name.endswith("-0")]
    change_scores(single[-1], lambda found: found.assign(value=found["value"] + 100))
    assert not any(row[m].best for row in filled(single) for m in METRICS)
    change_scores(own_runs[-1], lambda found: found.assign(value=found["value"] + 100))
    assert filled(own_runs)[-1]["clip"].best


def test_one_prompt_per_task_gives_values_without_intervals(tmp_path: Path) -> None:
    small = {**SMALL, "prompts": 6, "images": 1}
    for row in filled(synthetic.write_runs(tmp_path, seeds=1, **small)):
        assert row["clip"].value is not None
        assert np.isnan(row["clip"].estimate.low) and not row["clip"].best


def test_at_equal_compute_a_snapshot_is_shown(runs: list[Path]) -> None:
    # An iteration costs Flow-GRPO 10 + 3 x 6 evaluations and TAFS-GRPO 4 + 3 x 3. TAFS-GRPO's six
    # take 78, which pays for two of Flow-GRPO's.
    rows = filled(runs, kind="compute")
    numbers = [(row["iterations"].value, row["compute"].value) for row in rows]
    assert numbers == [(None, None), (2, 56), (6, 78)]
    found = pd.concat(pd.read_parquet(run / "scores.parquet") for run in runs)
    found = found[(found["metric"] == "clip") & (found["nfe"] == 4)]
    means = found.groupby(["method", "iteration"], observed=True)["value"].mean()
    expected = [means["base", 0], means["flow_grpo", 2], means["tafs_grpo", 6]]
    assert [row["clip"].value for row in rows] == pytest.approx(expected)
    assert means["flow_grpo", 2] != means["flow_grpo", 6]


def test_a_gain_is_the_interquartile_mean_of_the_effects(runs: list[Path]) -> None:
    others = ["geneval", "hpsv2", "imagereward", "unifiedreward"]
    groups = {"iqm_trained": ["pickscore", "clip"], "iqm_other": others, "iqm_all": list(METRICS)}
    for row, method in zip(filled(runs, kind="gains"), ("flow_grpo", "tafs_grpo"), strict=True):
        for column, metrics in groups.items():
            pairs = [(values(runs, method, m), values(runs, "base", m)) for m in metrics]
            effects = np.concatenate([stats.effects(*pair) for pair in pairs])
            middle, estimate = stats.interquartile_mean(effects), row[column].estimate
            assert row[column].value == pytest.approx(middle)
            assert estimate.low < middle < estimate.high and estimate.n_seeds == 2


def test_better_than_the_base_is_the_share_of_won_prompts(own_runs: list[Path]) -> None:
    for run in own_runs:
        change_scores(run, lambda found: found[found["metric"].isin(["pickscore", "hpsv2"])])
    for run in own_runs[1:3]:  # every third prompt is ten better, the others ten worse
        change_scores(
            run,
            lambda found: found.assign(
                value=found["value"] + np.where(found["prompt"] % 3 == 0, 10.0, -10.0)
            ),
        )
    assert filled(own_runs, kind="gains")[0]["better_than_base"].value == pytest.approx(1 / 3)


def test_the_reference_is_not_compared_with_itself(runs: list[Path]) -> None:
    table = table_kinds.build(synthetic.loaded(runs, kind="gains"))
    assert table.columns[-1].title == "P(better than TAFS-GRPO)"
    flow, tafs = (named(table, line)["better_than_reference"] for line in tables.fill(table))
    assert 0 < flow.value < 0.5
    assert tafs.value is None


def test_times_of_jobs_that_shared_a_processor_are_said_not_to_be_comparable(
    runs: list[Path],
) -> None:
    loaded = synthetic.loaded(runs)
    assert table_kinds.SHARED_TIMES in table_kinds.build(loaded).notes
    on_gpu = synthetic.ASSETS.model_copy(update={"device": "cuda"})
    for result in loaded.results:
        result.spec = result.spec.model_copy(update={"assets": on_gpu})
    assert table_kinds.SHARED_TIMES not in table_kinds.build(loaded).notes


def test_correlations_are_those_of_the_file(runs: list[Path]) -> None:
    table = table_kinds.build(synthetic.loaded(runs, kind="correlation"))
    assert [row.spec.label for row in table.rows] == ["R2 with R4", "R3 with R4"]
    assert "Pearson's r over 18 training prompts" in table.notes[0]
    rewards = pd.read_parquet(runs[0] / "trajectory_rewards.parquet")
    for step, line in zip((2, 3), tables.fill(table), strict=True):
        for metric in METRICS:
            own = rewards[rewards["metric"] == metric].set_index(["step", "prompt"])["value"]
            cell = named(table, line)[f"{metric}_r"]
            assert cell.value == pytest.approx(pearsonr(own[step], own[4]).statistic)
            assert cell.estimate.low < cell.value < cell.estimate.high
            assert cell.estimate.n_images == 18


def published(rows: list[dict[str, Any]], column: str) -> list[str | None]:
    return [row[column].published for row in rows]


def test_published_values_are_found_by_label(runs: list[Path]) -> None:
    rows = filled(runs, published=True, few=(4, 8))
    # Table 2 gives no numbers of steps: its values stand beside a system's first row.
    assert published(rows, "pickscore") == [None, None, None, "22.26", None, "22.46", None]
    assert published(rows, "iteration_time_s")[-2:] == ["116", None]
    assert published(rows, "geneval") == [None] * 7  # not in the paper's Table 2
    assert {cell.published for row in filled(runs) for cell in row.values()} == {None}
    rows = filled(runs, published=True, kind="correlation", name="table7")
    assert published(rows, "pickscore_r") == ["0.68", "0.84"]
    assert published(rows, "hpsv2_r") == [None, None]


@pytest.mark.parametrize(
    ("method", "title", "options", "expected"),
    [
        ("base", "SD3.5-Medium", {"full": 40}, ["67.99", None]),
        ("base", "SD3.5-Medium", {"full": 28}, [None, None]),
        ("tafs_grpo", "TAFS-GRPO + SD3.5M", {"few": (4, 8)}, ["80.84", "82.37"]),
    ],
)
def test_published_values_are_found_by_steps_where_the_paper_gives_them(
    method: str, title: str, options: dict[str, Any], expected: list[str | None], tmp_path: Path
) -> None:
    run = synthetic.write_run(tmp_path, method, title=title, **{**SMALL, "nfe": (4, 8, 40)})
    rows = filled([run], published=True, name="table1", **options)
    assert published(rows, "geneval") == expected


def removed(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def overwritten(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def rescored(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    return lambda run: change_scores(run, change)


def emptied(run: Path) -> None:
    file = run / "trajectory_rewards.parquet"
    pd.read_parquet(file).iloc[:0].to_parquet(file)


def without(column: str, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda found: found[found[column] != value]


def twice(found: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([found, found[found["nfe"] == 8].iloc[-1:]])


ITERATION = '{"kind": "iteration", "iteration": 0}\n'


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("scores", removed("run.json"), "run.json: not found; snakemake writes it"),
        ("scores", removed("evaluation.json"), "evaluation.json: not found; snakemake writes"),
        ("scores", removed("scores.parquet"), "scores.parquet: not found; the workflow's rule ev"),
        ("scores", removed("journal.jsonl"), "journal.jsonl: not found; training writes it"),
        ("scores", overwritten("run.json", "{"), "run.json: .*invalid JSON"),
        ("scores", overwritten("journal.jsonl", "{\n"), "journal.jsonl, line 1: not JSON"),
        ("gains", overwritten("journal.jsonl", ""), "journal.jsonl: contains no iteration"),
        ("scores", overwritten("journal.jsonl", ITERATION), "an iteration has no seconds.total"),
        ("scores", rescored(lambda s: s.iloc[:0]), "scores.parquet: contains no scores"),
        ("scores", rescored(lambda s: s.drop(columns="tag")), "scores.parquet: not a table of sc"),
        (
            "scores",
            rescored(without("nfe", 4)),
            r"no \w+ for sampler ode at nfe 4 \(available: ode",
        ),
        ("scores", rescored(without("prompt", 3)), "its prompts differ from those of"),
        ("scores", rescored(twice), "two values for sampler ode nfe 8 metric unifiedreward iter"),
        ("compute", rescored(without("iteration", 2)), "sampler ode at nfe 4 after iteration 2 "),
        ("correlation", removed("trajectory_rewards.parquet"), "not found; the workflow's rule t"),
        ("correlation", overwritten("trajectory_rewards.parquet", "x"), "not a table of step sco"),
        ("correlation", emptied, "trajectory_rewards.parquet: contains no scores"),
    ],
)
def test_a_broken_input_is_reported_in_one_line_that_names_the_file(
    kind: str, damage: Callable[[Path], None], message: str, own_runs: list[Path]
) -> None:
    spec = synthetic.table_spec(own_runs, kind=kind)
    run = own_runs[0 if kind == "correlation" else 1]
    damage(run)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        table = table_kinds.build(synthetic.load(spec, run.parent))
        lines = tables.fill(table)
        assert [result.origin for line in lines for result in line.row.system.results]
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gains_without_the_base_model_are_refused(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"^table2: no base model 'shapes-sd3'; set `base: true`"):
        filled(runs[1:], kind="gains")
