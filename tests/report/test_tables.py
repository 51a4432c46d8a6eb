"""The tables print what the runs' files say, and nothing that the statistics do not carry."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr
from support import synthetic

from tafs.report import stats, table_kinds, tables
from tafs.report.results import read_results, select
from tafs.rewards import metrics as rewards
from tafs.rewards.metrics import METRICS

SMALL = {"prompts": 18, "images": 2, "iterations": 5, "nfe": (4, 8)}
DATA = Path(tables.__file__).parent / "paper"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthetic.write_runs(tmp_path_factory.mktemp("runs"), seeds=2, **SMALL)


@pytest.fixture
def own_runs(runs: list[Path], tmp_path: Path) -> list[Path]:
    """A copy that a test may damage."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in runs]


def read(folder: Path, name: str = "table2") -> list[dict[str, str]]:
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def text(folder: Path, ending: str, name: str = "table2") -> str:
    return (folder / "tables" / f"{name}.{ending}").read_text(encoding="utf-8")


def provenance(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance" / "table2.json").read_text(encoding="utf-8"))


def table2(
    runs: Sequence[Path], out: Path, *, scale: str | None = None, **steps: Any
) -> list[Path]:
    return table_kinds.write_table(synthetic.table2(runs, **steps), runs, out, scale=scale)


def test_metrics_are_those_of_the_rewards_in_their_order() -> None:
    assert tuple(METRICS) == rewards.METRICS


def test_rows_are_the_base_then_each_method(runs: list[Path], tmp_path: Path) -> None:
    table2(runs[::-1], tmp_path, few=(4, 8))
    assert [(r["row"], r["sampler"], r["nfe"]) for r in read(tmp_path)] == [
        ("shapes-sd3", "ode", "28"),
        ("shapes-sd3", "ode", "4"),
        ("shapes-sd3", "ode", "8"),
        ("Flow-GRPO", "ode", "4"),
        ("TAFS-GRPO", "anneal", "4"),
        ("Flow-GRPO", "ode", "8"),
        ("TAFS-GRPO", "anneal", "8"),
    ]


def test_values_are_the_files_values(runs: list[Path], tmp_path: Path) -> None:
    table2(runs, tmp_path)
    row = read(tmp_path)[3]
    scores = pd.concat(pd.read_parquet(r / "scores.parquet") for r in runs if "tafs" in r.name)
    scores = scores[(scores["sampler"] == "anneal") & (scores["nfe"] == 4)]
    scores = scores[scores["iteration"] == SMALL["iterations"]]
    clip = scores[scores["metric"] == "clip"]["value"]
    assert float(row["clip"]) == pytest.approx(clip.mean())
    assert float(row["clip_low"]) < clip.mean() < float(row["clip_high"])
    assert (row["clip_n_seeds"], row["clip_n_images"]) == ("2", str(2 * 18 * 2))
    assert row["clip_resampled"] == "seeds and prompts"
    geneval = scores[scores["metric"] == "geneval"]
    by_task = geneval.groupby(["seed", "tag"], observed=True)["value"].mean()
    assert float(row["geneval"]) == pytest.approx(100 * by_task.mean())


def test_training_columns_are_the_runs_own(runs: list[Path], tmp_path: Path) -> None:
    table2(runs, tmp_path)
    base, *_, tafs = read(tmp_path)
    assert (base["nfe_old"], base["nfe_theta"], base["iteration_time_s"]) == ("", "", "")
    assert (tafs["nfe_old"], tafs["nfe_theta"]) == ("4", "3")
    journals = [run / "journal.jsonl" for run in runs if "tafs" in run.name]
    records = [json.loads(line) for file in journals for line in file.read_text().splitlines()]
    times = [r["seconds"]["total"] for r in records if r["kind"] == "iteration"]
    assert float(tafs["iteration_time_s"]) == pytest.approx(np.median(times))


def test_the_last_record_of_an_iteration_counts(own_runs: list[Path], tmp_path: Path) -> None:
    for run in own_runs:
        if "flow" in run.name:
            with (run / "journal.jsonl").open("a") as file:
                for i in range(5):
                    record = {"kind": "iteration", "iteration": i, "seconds": {"total": 77.0}}
                    file.write(json.dumps(record) + "\n")
    table2(own_runs, tmp_path)
    assert read(tmp_path)[2]["iteration_time_s"] == "77"


def change_scores(run: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    file = run / "scores.parquet"
    change(pd.read_parquet(file)).to_parquet(file, index=False)


def test_missing_values_are_counted_and_told(own_runs: list[Path], tmp_path: Path) -> None:
    def lose(scores: pd.DataFrame) -> pd.DataFrame:
        first = (scores["metric"] == "clip") & (scores["prompt"] == 0) & (scores["nfe"] == 4)
        return scores.assign(value=scores["value"].mask(first))

    change_scores(own_runs[0], lose)
    table2(own_runs, tmp_path)
    base = read(tmp_path)[1]
    assert (base["clip_n_images"], base["clip_n_missing"]) == ("34", "2")
    assert "Missing and left out: 2 of 216 values of CLIP." in text(tmp_path, "md")


def test_only_a_sure_winner_is_bold(own_runs: list[Path], tmp_path: Path) -> None:
    tafs = [run for run in own_runs if "tafs" in run.name]
    other = pd.read_parquet(tafs[0].parent / "flow_grpo-0" / "scores.parquet")
    other = other[other["iteration"] == SMALL["iterations"]].set_index(
        ["metric", "nfe", "prompt", "image"]
    )
    for run in tafs:

        def change(scores: pd.DataFrame) -> pd.DataFrame:
            index = pd.MultiIndex.from_frame(scores[["metric", "nfe", "prompt", "image"]])
            same = other["value"].reindex(index).to_numpy()
            plus = np.where(scores["metric"] == "hpsv2", 1.0, 0.0)
            return scores.assign(value=same + plus)

        change_scores(run, change)
    shutil.copy(tafs[0].parent / "flow_grpo-0" / "scores.parquet", tafs[0].parent / "flow_grpo-1")
    change_scores(tafs[0].parent / "flow_grpo-1", lambda s: s.assign(seed=1))
    table2(own_runs, tmp_path)
    rows = read(tmp_path)
    assert [row["hpsv2_best"] for row in rows] == ["0", "0", "0", "1"]
    # In the other columns the two methods are equal, so neither is best.
    best = [row[f"{metric}_best"] for row in rows[2:] for metric in METRICS]
    assert best.count("1") == 1
    bold = sum(row[f"{metric}_best"] == "1" for row in rows for metric in METRICS)
    assert text(tmp_path, "md").count("**") == 2 * bold
    assert text(tmp_path, "tex").count(r"\textbf") == bold


def test_equal_input_gives_equal_bytes(runs: list[Path], tmp_path: Path) -> None:
    first = table2(runs, tmp_path / "a")
    second = table2(runs[::-1], tmp_path / "b")
    assert [str(file.relative_to(tmp_path / "a")) for file in first] == [
        "tables/table2.csv",
        "tables/table2.md",
        "tables/table2.tex",
        "tables/table2.html",
        "tables/table2.parquet",
        "provenance/table2.json",
    ]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_the_papers_values_stand_at_the_papers_scale_alone(
    runs: list[Path], tmp_path: Path
) -> None:
    table2(runs, tmp_path / "shapes")
    files = [file for file in (tmp_path / "shapes").rglob("*") if file.is_file()]
    assert len(files) == 6
    contents = [file.read_bytes() for file in files]
    assert not any(b"paper" in content or b"published" in content for content in contents)
    table2(runs, tmp_path / "paper", scale="paper")
    base, _, flow, tafs = read(tmp_path / "paper")
    assert (tafs["pickscore_published"], tafs["iteration_time_s_published"]) == ("22.46", "116")
    assert flow["hpsv2_published"] == "0.304"
    assert base["clip_published"] == tafs["geneval_published"] == ""
    assert "(paper: 22.46)" in text(tmp_path / "paper", "md")


def test_the_base_is_compared_with_its_namesake_in_the_paper(tmp_path: Path) -> None:
    base = synthetic.write_run(tmp_path, "base", title="FLUX.1-dev", scale="paper", **SMALL)
    table2([base], tmp_path)
    full, few = read(tmp_path)
    assert (full["clip_published"], few["clip_published"]) == ("25.95", "")


def test_published_tables_are_all_there() -> None:
    assert sorted(file.name for file in DATA.glob("*.csv")) == [
        f"table{i}.csv" for i in range(1, 8)
    ]


def test_provenance_names_the_runs_of_each_row(runs: list[Path], tmp_path: Path) -> None:
    table2(runs, tmp_path)
    record = provenance(tmp_path)
    rows = [(row["row"], row["nfe"], row["iteration"], row["runs"]) for row in record["rows"]]
    assert rows == [
        ("shapes-sd3", 28, None, ["base-0"]),
        ("shapes-sd3", 4, None, ["base-0"]),
        ("Flow-GRPO", 4, None, ["flow_grpo-0", "flow_grpo-1"]),
        ("TAFS-GRPO", 4, None, ["tafs_grpo-0", "tafs_grpo-1"]),
    ]
    assert set(record["runs"]) == {run.name for run in runs}
    assert len({run["sha256"]["scores.parquet"] for run in record["runs"].values()}) == 5


def test_provenance_counts_what_is_behind_each_cell(runs: list[Path], tmp_path: Path) -> None:
    table2(runs, tmp_path)
    for row, printed in zip(provenance(tmp_path)["rows"], read(tmp_path), strict=True):
        for metric in METRICS:
            cell = row["cells"][metric]
            assert cell["value"] == pytest.approx(float(printed[metric]))
            for count in ("n_seeds", "n_images", "n_missing", "resampled"):
                assert str(cell[count]) == printed[f"{metric}_{count}"]
    tafs = row["cells"]
    assert (tafs["clip"]["n_seeds"], tafs["clip"]["n_images"]) == (2, 2 * 18 * 2)
    assert tafs["nfe_old"] == {"value": 4}


def test_provenance_has_the_digests_of_every_runs_files(runs: list[Path], tmp_path: Path) -> None:
    table2(runs, tmp_path)
    record = provenance(tmp_path)["runs"]
    for run in runs:
        second = "trajectory_rewards.parquet" if run.name == "base-0" else "adapter.safetensors"
        assert record[run.name]["sha256"] == {
            name: hashlib.sha256((run / name).read_bytes()).hexdigest()
            for name in ("scores.parquet", second)
        }
        seed = int(run.name[-1])
        assert (record[run.name]["seed"], record[run.name]["scale"]) == (seed, "shapes")
    assert record["tafs_grpo-1"]["fingerprint"] == "of tafs_grpo-1"
    assert record["tafs_grpo-1"]["provenance"] == {"code": "abc"}
    assert "fingerprint" not in record["base-0"]


def test_latex_is_balanced_and_escaped(tmp_path: Path) -> None:
    base = synthetic.write_run(tmp_path, "base", title="100% \\ {x}_y & ~z^", **SMALL)
    table2([base], tmp_path)
    latex = text(tmp_path, "tex")
    label = r"100\% \textbackslash{} \{x\}\_y \& \textasciitilde{}z\textasciicircum{} & 28 & --"
    assert label in latex
    bare = re.sub(r"\\[{}]", "", latex)
    assert bare.count("{") == bare.count("}")
    columns = re.search(r"\\begin{tabular}{(\w+)}", latex)
    assert columns
    for line in latex.splitlines():
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns[1]) - 1
    assert latex.isascii()


def test_markdown_is_a_table_whatever_the_title(tmp_path: Path) -> None:
    base = synthetic.write_run(tmp_path, "base", title="a|b_*c*", **SMALL)
    table2([base], tmp_path)
    rows = [line for line in text(tmp_path, "md").splitlines() if line.startswith("|")]
    assert rows[2].startswith(r"| a\|b\_\*c\* | 28 |")
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_one_seed_is_told(tmp_path: Path) -> None:
    runs = synthetic.write_runs(tmp_path / "runs", seeds=1, **SMALL)
    table2(runs, tmp_path)
    assert {row["clip_resampled"] for row in read(tmp_path)} == {"prompts"}
    assert "not of seeds" in text(tmp_path, "md")


def test_one_seed_wins_nothing(runs: list[Path], tmp_path: Path) -> None:
    """Not even where it is better in every image."""
    single = [run for run in runs if run.name.endswith("-0")]
    copies = [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in single]
    best = next(run for run in copies if "tafs" in run.name)
    change_scores(best, lambda s: s.assign(value=s["value"] + 100))
    table2(copies, tmp_path)
    assert {row["clip_best"] for row in read(tmp_path)} == {"0"}
    assert "some models were trained with one seed" in text(tmp_path, "md")


def test_one_prompt_a_task_has_values_and_no_intervals(tmp_path: Path) -> None:
    small = {**SMALL, "prompts": 6, "images": 1}
    table2(synthetic.write_runs(tmp_path / "runs", seeds=1, **small), tmp_path)
    for row in read(tmp_path):
        assert row["clip"] and not row["clip_low"] and row["clip_best"] == "0"
    assert not re.search(r"\d \[", text(tmp_path, "md"))  # an interval
    assert "tiny" not in text(tmp_path, "tex")


def test_rows_select_by_nested_fields(tmp_path: Path) -> None:
    runs = [
        synthetic.write_run(
            tmp_path, "tafs_grpo", name=f"n{n}", hyperparameters={"steps": n}, **SMALL
        )
        for n in (2, 4)
    ]
    where = {"method": "tafs_grpo", "hyperparameters.steps": 4}
    table = tables.Table(
        "table4",
        "Steps",
        [tables.Row(where, 4, label="3 steps", published="3")],
        [tables.TIME, tables.Score("clip")],
    )
    results = read_results(runs)
    (line,) = tables.fill(table, results, published=True)
    assert line.system.label == "3 steps"
    assert [r.info["name"] for r in line.system.results] == ["n4"]
    assert [cell.published for cell in line.cells] == ["116", "27.68"]


def damaged(name: str) -> Callable[[list[Path]], None]:
    return lambda runs: (runs[1] / name).unlink()


def overwritten(name: str, text: str) -> Callable[[list[Path]], None]:
    def do(runs: list[Path]) -> None:
        (runs[1] / name).write_text(text)

    return do


def rescored(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[list[Path]], None]:
    return lambda runs: change_scores(runs[1], change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged("run.json"), r"flow_grpo-0/run.json: not found"),
        (damaged("scores.parquet"), r"flow_grpo-0/scores.parquet: not found"),
        (damaged("journal.jsonl"), r"flow_grpo-0/journal.jsonl: not found"),
        (overwritten("run.json", "{"), r"flow_grpo-0/run.json: is not JSON"),
        (overwritten("run.json", "{}"), r"flow_grpo-0/run.json: has no 'name'"),
        (overwritten("scores.parquet", "x"), r"flow_grpo-0/scores.parquet: not a table of scores"),
        (overwritten("journal.jsonl", "{\n"), r"flow_grpo-0/journal.jsonl, line 1: not JSON"),
        (overwritten("journal.jsonl", ""), r"flow_grpo-0/journal.jsonl: holds no iteration"),
        (
            overwritten("journal.jsonl", '{"kind": "iteration", "iteration": 0}\n'),
            r"flow_grpo-0/journal.jsonl: an iteration has no seconds.total",
        ),
        (rescored(lambda s: s.iloc[:0]), r"flow_grpo-0/scores.parquet: holds no scores"),
        (rescored(lambda s: s.drop(columns="tag")), r"scores.parquet: not a table of scores"),
        (
            rescored(lambda s: s[s["nfe"] != 4]),
            r"flow_grpo-0/scores.parquet: no \w+ for sampler ode at nfe 4 \(has: ode 8\)",
        ),
        (
            rescored(lambda s: s[s["metric"] != "clip"]),
            r"flow_grpo-0/scores.parquet: no clip for sampler ode at nfe 4",
        ),
        (
            rescored(lambda s: s[s["prompt"] != 3]),
            r"its prompts are not those of .*scores.parquet",
        ),
        (
            rescored(lambda s: pd.concat([s, s[(s["nfe"] == 8)].iloc[-1:]])),
            r"scores.parquet: holds two values of sampler ode nfe 8 metric unifiedreward "
            r"iteration 5 prompt 17",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_file(
    damage: Callable[[list[Path]], None], message: str, own_runs: list[Path], tmp_path: Path
) -> None:
    damage(own_runs)
    with pytest.raises(ValueError, match=message) as caught:
        table2(own_runs, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_one_table_are_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs were given"):
        table2([], tmp_path)
    with pytest.raises(ValueError, match="no run with variant base.* among the given ones"):
        table_kinds.write_table(synthetic.table2(runs), runs[1:], tmp_path)
    twin = synthetic.write_run(tmp_path, "base", name="twin", **SMALL)
    with pytest.raises(ValueError, match="twin: the same system and seed as .*base-0"):
        table2([*runs, twin], tmp_path)
    other = synthetic.write_run(tmp_path, "tafs_grpo", 5, scale="paper", **SMALL)
    with pytest.raises(ValueError, match="scale 'paper', but .*base-0 has 'shapes'"):
        table2([*runs, other], tmp_path)


def test_html_escapes_what_users_write_and_runs_nothing(tmp_path: Path) -> None:
    base = synthetic.write_run(tmp_path, "base", title="<script>alert(1)</script>&", **SMALL)
    table2([base], tmp_path)
    page = text(tmp_path, "html")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page
    assert page.count("<tr>") + page.count('<tr class="rule">') == 3


def test_parquet_holds_what_the_csv_holds(runs: list[Path], tmp_path: Path) -> None:
    table2(runs, tmp_path)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "tables" / "table2.parquet"),
        pd.read_csv(tmp_path / "tables" / "table2.csv"),
    )


# -- equal compute ---------------------------------------------------------------------------------


def test_at_equal_compute_a_model_is_judged_by_its_snapshot(
    runs: list[Path], tmp_path: Path
) -> None:
    # An iteration costs Flow-GRPO 10 + 3 x 6 evaluations and TAFS-GRPO 4 + 3 x 3. TAFS-GRPO's five
    # take 65: two of Flow-GRPO's.
    table_kinds.write_table(synthetic.table2(runs, kind="compute"), runs, tmp_path)
    base, flow, tafs = read(tmp_path)
    printed = [(row["iterations"], row["compute"]) for row in (base, flow, tafs)]
    assert printed == [("", ""), ("2", "56"), ("5", "65")]
    scores = pd.concat(pd.read_parquet(run / "scores.parquet") for run in runs)
    scores = scores[(scores["metric"] == "clip") & (scores["nfe"] == 4)]
    means = scores.groupby(["method", "iteration"], observed=True)["value"].mean()
    for row, method, iteration in (
        (base, "base", 0),
        (flow, "flow_grpo", 2),
        (tafs, "tafs_grpo", 5),
    ):
        assert float(row["clip"]) == pytest.approx(means[method, iteration])
    assert means["flow_grpo", 2] != means["flow_grpo", 5]
    assert [row["iteration"] for row in provenance(tmp_path)["rows"]] == [None, 2, 5]


def test_a_snapshot_that_was_not_scored_is_one_line_that_names_it(
    own_runs: list[Path], tmp_path: Path
) -> None:
    change_scores(own_runs[1], lambda scores: scores[scores["iteration"] != 2])
    message = r"flow_grpo-0/scores.parquet: no \w+ for sampler ode at nfe 4 after iteration 2 \(has"
    with pytest.raises(ValueError, match=message) as caught:
        table_kinds.write_table(
            synthetic.table2(own_runs, kind="compute"), own_runs, tmp_path / "out"
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# -- gains -----------------------------------------------------------------------------------------


def gains(runs: list[Path], out: Path) -> list[Path]:
    return table_kinds.write_table(synthetic.table2(runs, kind="gains"), runs, out)


def values(runs: list[Path], method: str, metric: str) -> np.ndarray:
    """[seeds, prompts, images] of the final models at four steps, from the files."""
    arrays = []
    for run in runs:
        if run.name.startswith(method):
            scores = pd.read_parquet(run / "scores.parquet")
            final = scores["iteration"] == scores["iteration"].max()
            chosen = scores[final & (scores["nfe"] == 4) & (scores["metric"] == metric)]
            arrays.append(chosen.pivot(index="prompt", columns="image", values="value").to_numpy())
    return np.stack(arrays)


@pytest.mark.parametrize(
    ("column", "metrics"),
    [
        ("iqm_trained", ["pickscore", "clip"]),
        ("iqm_other", ["geneval", "hpsv2", "imagereward", "unifiedreward"]),
        ("iqm_all", list(METRICS)),
    ],
)
def test_a_gain_is_the_interquartile_mean_of_the_effects(
    column: str, metrics: list[str], runs: list[Path], tmp_path: Path
) -> None:
    gains(runs, tmp_path)
    for row, method in zip(read(tmp_path), ("flow_grpo", "tafs_grpo"), strict=True):
        effects = [stats.effects(values(runs, method, m), values(runs, "base", m)) for m in metrics]
        middle = stats.interquartile_mean(np.concatenate(effects))
        assert float(row[column]) == pytest.approx(middle)
        assert float(row[f"{column}_low"]) < middle < float(row[f"{column}_high"])
        assert row[f"{column}_n_seeds"] == "2"


def test_better_than_the_base_is_the_share_of_won_prompts(
    own_runs: list[Path], tmp_path: Path
) -> None:
    for run in own_runs:
        change_scores(run, lambda scores: scores[scores["metric"].isin(["pickscore", "hpsv2"])])

    def third(scores: pd.DataFrame) -> pd.DataFrame:
        """Every third prompt ten better, the others ten worse than the base model."""
        plus = np.where(scores["prompt"] % 3 == 0, 10.0, -10.0)
        return scores.assign(value=scores["value"] + plus)

    for run in own_runs[1:3]:
        change_scores(run, third)
    spec = synthetic.table2(own_runs, kind="gains")
    table = table_kinds.BUILD["gains"](spec, read_results(own_runs))
    wins = next(column for column in table.columns if column.name == "better_than_base")
    assert isinstance(wins, tables.Statistic)
    system = select(read_results(own_runs), table.rows[0].where)
    assert wins.estimate(system, table.rows[0]).value == pytest.approx(1 / 3)


def test_a_method_is_not_compared_with_itself(runs: list[Path], tmp_path: Path) -> None:
    gains(runs, tmp_path)
    flow, tafs = read(tmp_path)
    assert 0 < float(flow["better_than_reference"]) < 0.5 < float(tafs["better_than_base"])
    assert tafs["better_than_reference"] == tafs["better_than_reference_low"] == ""
    header, _, *rows = (line for line in text(tmp_path, "md").splitlines() if line.startswith("|"))
    assert "P(better than TAFS-GRPO)" in header
    assert rows[1].endswith("| – | 2 |")


def test_gains_name_the_base_model_among_what_they_come_from(
    runs: list[Path], tmp_path: Path
) -> None:
    gains(runs, tmp_path)
    record = provenance(tmp_path)
    assert [row["row"] for row in record["rows"]] == ["Flow-GRPO", "TAFS-GRPO"]
    assert set(record["runs"]) == {run.name for run in runs}


def test_a_rule_above_the_first_row_is_the_headers_own(runs: list[Path], tmp_path: Path) -> None:
    spec = synthetic.table2(runs, kind="gains")
    for row in spec["rows"]:
        row["rule"] = row["variant"] == "flow_grpo"  # which the base model's row stood above
    table_kinds.write_table(spec, runs, tmp_path)
    assert text(tmp_path, "tex").count(r"\midrule") == 1


def test_gains_without_the_base_model_are_refused_in_one_line(
    runs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="table2: no base model 'shapes-sd3'; set base: true") as e:
        gains(runs[1:], tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged("journal.jsonl"), "flow_grpo-0/journal.jsonl: not found"),
        (overwritten("journal.jsonl", ""), "flow_grpo-0/journal.jsonl: holds no iteration"),
    ],
)
def test_gains_need_the_journal_of_their_provenance(
    damage: Callable[[list[Path]], None], message: str, own_runs: list[Path], tmp_path: Path
) -> None:
    damage(own_runs)
    with pytest.raises(ValueError, match=message):
        gains(own_runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- correlations ----------------------------------------------------------------------------------


def correlations(runs: list[Path], out: Path, **options: Any) -> list[Path]:
    spec = synthetic.table2(runs, kind="correlation", name="table7")
    return table_kinds.write_table(spec, runs, out, **options)


def test_correlations_are_those_of_the_file(runs: list[Path], tmp_path: Path) -> None:
    correlations(runs[:1], tmp_path)
    rows = read(tmp_path, "table7")
    assert [row["row"] for row in rows] == ["R2 with R4", "R3 with R4"]
    scores = pd.read_parquet(runs[0] / "trajectory_rewards.parquet")
    for row, step in zip(rows, (2, 3), strict=True):
        for metric in METRICS:
            of = scores[scores["metric"] == metric].set_index(["step", "prompt"])["value"]
            r = pearsonr(of[step], of[4]).statistic
            assert float(row[f"{metric}_r"]) == pytest.approx(r)
            assert float(row[f"{metric}_r_low"]) < r < float(row[f"{metric}_r_high"])
            assert row[f"{metric}_r_n_images"] == "18"
    assert "Pearson's r over 18 training prompts" in text(tmp_path, "md", "table7")


def test_correlations_stand_beside_the_papers(runs: list[Path], tmp_path: Path) -> None:
    correlations(runs[:1], tmp_path, scale="paper")
    published = [
        (row["pickscore_r_published"], row["clip_r_published"], row["hpsv2_r_published"])
        for row in read(tmp_path, "table7")
    ]
    assert published == [("0.68", "0.72", ""), ("0.84", "0.88", "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "base-0/trajectory_rewards.parquet: not found; `python -m tafs.evaluation.trajectory_rewards` writes it",
        ),
        ("x", "base-0/trajectory_rewards.parquet: not a table of step scores"),
        ([], "base-0/trajectory_rewards.parquet: holds no scores"),
    ],
)
def test_broken_step_scores_are_one_line_that_names_them(
    content: str | list[Any] | None, message: str, own_runs: list[Path], tmp_path: Path
) -> None:
    file = own_runs[0] / "trajectory_rewards.parquet"
    if content is None:
        file.unlink()
    elif isinstance(content, str):
        file.write_text(content)
    else:
        pd.read_parquet(file).iloc[:0].to_parquet(file)
    with pytest.raises(ValueError, match=message) as caught:
        correlations(own_runs[:1], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# -- the paper's values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "title", "few", "full", "expected"),
    [
        ("base", "SD3.5-Medium", (4,), 40, {40: "67.99", 4: ""}),
        ("base", "SD3.5-Medium", (4,), 28, {28: "", 4: ""}),
        ("tafs_grpo", "TAFS-GRPO + SD3.5M", (4, 8), None, {4: "80.84", 8: "82.37"}),
    ],
)
def test_the_papers_values_are_those_of_the_name_and_the_steps(
    method: str,
    title: str,
    few: tuple[int, ...],
    full: int | None,
    expected: dict[int, str],
    tmp_path: Path,
) -> None:
    small = {**SMALL, "nfe": (4, 8, 40)}
    run = synthetic.write_run(tmp_path, method, title=title, scale="paper", **small)
    spec = synthetic.table2([run], few=few, full=full, name="table1")
    table_kinds.write_table(spec, [run], tmp_path)
    found = {int(row["nfe"]): row["geneval_published"] for row in read(tmp_path, "table1")}
    assert found == expected


def test_a_table_without_steps_has_one_published_row_a_system(
    runs: list[Path], tmp_path: Path
) -> None:
    table2(runs, tmp_path, few=(4, 8), scale="paper")
    found = {(r["row"], r["nfe"]): r["clip_published"] for r in read(tmp_path)}
    assert (found["TAFS-GRPO", "4"], found["TAFS-GRPO", "8"]) == ("27.68", "")
