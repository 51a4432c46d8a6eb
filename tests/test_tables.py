"""The tables print what the runs' files say, and nothing that the statistics do not carry."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic

from tafs import rewards, tables

SMALL = {"prompts": 18, "images": 2, "iterations": 5, "nfe": (4, 8)}
DATA = Path(tables.__file__).parent / "paper"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthetic.write_runs(tmp_path_factory.mktemp("runs"), seeds=2, **SMALL)


@pytest.fixture
def own_runs(runs: list[Path], tmp_path: Path) -> list[Path]:
    """A copy that a test may damage."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in runs]


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "table2.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table2(
    runs: Sequence[Path], out: Path, *, scale: str | None = None, **steps: Any
) -> list[Path]:
    return tables.comparison(synthetic.table2(runs, **steps), runs, out, scale=scale)


def test_metrics_are_those_of_the_rewards_in_their_order() -> None:
    assert tuple(tables.METRICS) == rewards.METRICS


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
    text = (tmp_path / "table2.md").read_text(encoding="utf-8")
    assert "Missing and left out: 2 of 216 values of CLIP." in text


def test_only_a_sure_winner_is_bold(own_runs: list[Path], tmp_path: Path) -> None:
    tafs = [run for run in own_runs if "tafs" in run.name]
    other = pd.read_parquet(tafs[0].parent / "flow_grpo-0" / "scores.parquet")
    other = other[other["sampler"] == "ode"].set_index(["metric", "nfe", "prompt", "image"])
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
    best = [row[f"{metric}_best"] for row in rows[2:] for metric in tables.METRICS]
    assert best.count("1") == 1
    bold = sum(row[f"{metric}_best"] == "1" for row in rows for metric in tables.METRICS)
    assert (tmp_path / "table2.md").read_text(encoding="utf-8").count("**") == 2 * bold
    assert (tmp_path / "table2.tex").read_text(encoding="utf-8").count(r"\textbf") == bold


def test_equal_input_gives_equal_bytes(runs: list[Path], tmp_path: Path) -> None:
    first = table2(runs, tmp_path / "a")
    second = table2(runs[::-1], tmp_path / "b")
    assert [file.suffix for file in first] == [
        ".csv",
        ".md",
        ".tex",
        ".html",
        ".json",
        ".parquet",
    ]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_the_papers_values_stand_at_the_papers_scale_alone(
    runs: list[Path], tmp_path: Path
) -> None:
    table2(runs, tmp_path / "shapes")
    texts = [file.read_bytes() for file in (tmp_path / "shapes").iterdir()]
    assert not any(b"paper" in text or b"published" in text for text in texts)
    table2(runs, tmp_path / "paper", scale="paper")
    base, _, flow, tafs = read(tmp_path / "paper")
    assert (tafs["pickscore_published"], tafs["iteration_time_s_published"]) == ("22.46", "116")
    assert flow["hpsv2_published"] == "0.304"
    assert base["clip_published"] == tafs["geneval_published"] == ""
    assert "(paper: 22.46)" in (tmp_path / "paper" / "table2.md").read_text(encoding="utf-8")


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
    record = json.loads((tmp_path / "table2.json").read_text(encoding="utf-8"))
    last = record["rows"][-1]
    assert [run["name"] for run in last["runs"]] == ["tafs_grpo-0", "tafs_grpo-1"]
    assert len({run["scores_sha256"] for row in record["rows"] for run in row["runs"]}) == 5


def test_latex_is_balanced_and_escaped(tmp_path: Path) -> None:
    base = synthetic.write_run(tmp_path, "base", title="100% \\ {x}_y & ~z^", **SMALL)
    table2([base], tmp_path)
    text = (tmp_path / "table2.tex").read_text(encoding="utf-8")
    label = r"100\% \textbackslash{} \{x\}\_y \& \textasciitilde{}z\textasciicircum{} & 28 & --"
    assert label in text
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    columns = re.search(r"\\begin{tabular}{(\w+)}", text)
    assert columns
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns[1]) - 1
    assert text.isascii()


def test_markdown_is_a_table_whatever_the_title(tmp_path: Path) -> None:
    base = synthetic.write_run(tmp_path, "base", title="a|b_*c*", **SMALL)
    table2([base], tmp_path)
    lines = (tmp_path / "table2.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows[2].startswith(r"| a\|b\_\*c\* | 28 |")
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_one_seed_is_told(tmp_path: Path) -> None:
    runs = synthetic.write_runs(tmp_path / "runs", seeds=1, **SMALL)
    table2(runs, tmp_path)
    assert {row["clip_resampled"] for row in read(tmp_path)} == {"prompts"}
    assert "not of seeds" in (tmp_path / "table2.md").read_text(encoding="utf-8")


def test_one_prompt_a_task_has_values_and_no_intervals(tmp_path: Path) -> None:
    small = {**SMALL, "prompts": 6, "images": 1}
    table2(synthetic.write_runs(tmp_path / "runs", seeds=1, **small), tmp_path)
    for row in read(tmp_path):
        assert row["clip"] and not row["clip_low"] and row["clip_best"] == "0"
    assert "±" not in (tmp_path / "table2.md").read_text(encoding="utf-8")


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
    results = tables.read_results(runs)
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
            rescored(lambda s: pd.concat([s, s.iloc[-1:]])),
            r"scores.parquet: holds two values of sampler ode nfe 8 metric unifiedreward prompt 17",
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
        tables.comparison(synthetic.table2(runs), runs[1:], tmp_path)
    twin = synthetic.write_run(tmp_path, "base", name="twin", **SMALL)
    with pytest.raises(ValueError, match="twin: the same system and seed as .*base-0"):
        table2([*runs, twin], tmp_path)
    other = synthetic.write_run(tmp_path, "tafs_grpo", 5, scale="paper", **SMALL)
    with pytest.raises(ValueError, match="scale 'paper', but .*base-0 has 'shapes'"):
        table2([*runs, other], tmp_path)


def test_html_escapes_what_users_write_and_runs_nothing(tmp_path: Path) -> None:
    base = synthetic.write_run(tmp_path, "base", title="<script>alert(1)</script>&", **SMALL)
    table2([base], tmp_path)
    text = (tmp_path / "table2.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in text
    assert text.count("<tr>") + text.count('<tr class="rule">') == 3


def test_parquet_holds_what_the_csv_holds(runs: list[Path], tmp_path: Path) -> None:
    table2(runs, tmp_path)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "table2.parquet"), pd.read_csv(tmp_path / "table2.csv")
    )
