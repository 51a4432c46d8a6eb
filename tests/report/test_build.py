"""The report as a whole: every run is read once, and a system has one name everywhere."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from support import synthetic
from support.synthetic import change_scores

from tafs.experiment.schema import FIGURES
from tafs.experiment.specs import ReportSpec, TableSpec
from tafs.report import build, results
from tafs.rewards.metrics import METRICS

CLAIM = """
- id: gain
  claim: TAFS-GRPO is better than the base model.
  source: Table 2
  experiment: scores
  better:
    {row: {method: tafs_grpo}, than: [{method: base, nfe: few}], metrics: [clip]}
- id: other
  claim: Early images predict the final one.
  source: Table 7
  experiment: absent
  correlated: {step: 2, above: 0, metrics: [clip]}
"""


@pytest.fixture
def root(own_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results with every kind of table and figure."""
    tables = [
        synthetic.table_spec(
            own_runs,
            kind=kind,
            name=kind,
            curve_nfe=(1, 4),
            figures={k: f"figure_{k}" for k in FIGURES} if kind == "scores" else {},
        )
        for kind in ("scores", "compute", "gains", "correlation")
    ]
    write_spec(tmp_path, *tables)
    (tmp_path / "claims.yaml").write_text(CLAIM, encoding="utf-8")
    monkeypatch.setattr(build, "CLAIMS", tmp_path / "claims.yaml")
    return tmp_path


def write_spec(root: Path, *tables: TableSpec, scale: str = "shapes") -> None:
    spec = ReportSpec(scale=scale, tables=tables)
    (root / "report_spec.json").write_text(spec.to_json(), encoding="utf-8")


def test_the_report_writes_every_table_figure_and_claim(root: Path) -> None:
    (root / "runs" / "base-0" / ".eval_state" / "ode-4-0").mkdir(parents=True)
    build.build(root)
    tables = {file.name for file in (root / "tables").iterdir()}
    kinds = ("scores", "compute", "gains", "correlation")
    assert tables == {f"{k}.{e}" for k in kinds for e in ("csv", "md", "tex", "html", "parquet")}
    drawn = {file.name for file in (root / "figures").iterdir()}
    assert drawn == {f"figure_{kind}.{ending}" for kind in FIGURES for ending in ("png", "pdf")}
    verdicts = json.loads((root / "claims.json").read_text(encoding="utf-8"))
    assert [v["verdict"] for v in verdicts] == ["reproduced", "not tested"]
    assert not (root / "runs" / "base-0" / ".eval_state").exists()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are saved, by name."""
    found: dict[str, Figure] = {}
    real = Figure.savefig

    def kept(figure: Figure, file: Path, **options: Any) -> None:
        found[file.stem] = figure
        real(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return found


def test_one_prompt_gives_dashes_in_place_of_gains_and_a_figure_that_says_why(
    root: Path, drawn: dict[str, Figure]
) -> None:
    for run in (root / "runs").iterdir():
        change_scores(run, lambda found: found[found["prompt"] == 0])
    build.build(root)
    gains = pd.read_csv(root / "tables" / "gains.csv")
    assert gains[["iqm_trained", "iqm_other", "iqm_all"]].isna().all(axis=None)
    assert gains["better_than_base"].notna().all()
    scores = pd.read_csv(root / "tables" / "scores.csv")
    assert scores["clip"].notna().all() and scores["clip_low"].isna()[:2].all()  # one seed
    text = (root / "tables" / "gains.md").read_text(encoding="utf-8")
    assert "| Flow-GRPO | 4 | – | – | – |" in text
    assert re.search(r"Missing and left out: (\d+) of \1 values of All metrics", text)
    for kind in ("pareto", "hacking", "profiles"):
        texts = [t.get_text() for t in drawn[f"figure_{kind}"].axes[0].texts]
        assert texts == ["No gains: the base model's scores\ndo not vary over the prompts"]


def test_every_table_of_a_run_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    real = pd.read_parquet

    def counted(file: Path, **options: Any) -> pd.DataFrame:
        read[str(file.relative_to(root / "runs"))] += 1
        return real(file, **options)

    monkeypatch.setattr(pd, "read_parquet", counted)
    build.build(root)
    names = {path.name for path in (root / "runs").iterdir()}
    expected = {"base-0/trajectory_rewards.parquet", *(f"{name}/scores.parquet" for name in names)}
    assert dict(read) == dict.fromkeys(expected, 1)


def test_a_system_has_one_label_in_tables_figures_and_claims(
    root: Path, drawn: dict[str, Figure]
) -> None:
    spec = results.load(root).tables[0].spec
    labels = {"base": "Untrained", "flow_grpo": "First", "tafs_grpo": "Second"}
    rows = [row.model_copy(update={"label": labels[row.variant]}) for row in spec.rows]
    write_spec(root, spec.model_copy(update={"rows": tuple(rows)}))
    build.build(root)
    for figure in drawn.values():
        legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        shown = " ".join([*legends, *(text.get_text() for text in figure.texts)])
        assert "First" in shown and "Second" in shown
        assert not any(title in shown for title in ("TAFS-GRPO", "Flow-GRPO", "shapes-sd3"))
    table = (root / "tables" / "scores.md").read_text(encoding="utf-8")
    printed = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert printed[2:] == ["| Untrained", "| Untrained", "| First", "| Second"]
    assert "CLIP: Second at 4 steps - Untrained at 4 steps" in (root / "claims.md").read_text()


def test_claims_about_excluded_methods_are_not_tested(root: Path) -> None:
    runs = sorted((root / "runs").iterdir())
    spec = synthetic.table_spec(runs[:3], name="scores", excluded_methods=("tafs_grpo",))
    write_spec(root, spec)
    build.build(root)
    verdicts = json.loads((root / "claims.json").read_text(encoding="utf-8"))
    assert {verdict["verdict"] for verdict in verdicts} == {"not tested"}


def test_the_papers_values_are_printed_at_the_papers_scale_only(root: Path) -> None:
    spec = synthetic.table_spec(sorted((root / "runs").iterdir()), name="table2")
    for scale, printed in (("shapes", False), ("paper", True)):
        write_spec(root, spec, scale=scale)
        build.build(root)
        table = (root / "tables" / "table2.md").read_text(encoding="utf-8")
        assert ("(paper: " in table) == printed


def test_random_weights_mark_the_claims_of_all_tables(root: Path) -> None:
    file = root / "runs" / "base-0" / "evaluation.json"
    random = {**json.loads(file.read_bytes()), "random_weights": ["clip"]}
    file.write_text(json.dumps(random), encoding="utf-8")
    build.build(root)
    assert "RANDOM WEIGHTS: clip." in (root / "claims.md").read_text(encoding="utf-8")
    for table in (root / "tables").glob("*.md"):
        assert table.read_text(encoding="utf-8").startswith("RANDOM WEIGHTS: ")


def test_a_broken_run_ends_the_command_with_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "runs" / "flow_grpo-1")
    monkeypatch.setattr("sys.argv", ["tafs.report.build", str(root)])
    with pytest.raises(SystemExit) as caught:
        build.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"report: {root}/runs/flow_grpo-1/run.json: not found")


def test_a_metric_may_be_better_when_it_is_lower(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the opposite sign and direction, every comparison has the same result."""
    scores, _, gains, _ = (table.spec for table in results.load(root).tables)
    write_spec(root, scores.model_copy(update={"figures": {}}), gains)

    def compared() -> tuple[list[float], list[int], str]:
        build.build(root)
        gains = pd.read_csv(root / "tables" / "gains.csv").select_dtypes("number")
        best = pd.read_csv(root / "tables" / "scores.csv")["clip_best"].tolist()
        return gains.to_numpy().ravel().tolist(), best, (root / "claims.json").read_text()

    for run in (root / "runs").glob("tafs_grpo*"):
        change_scores(run, lambda found: found.assign(value=found["value"] + 10))
    before = compared()
    assert before[1] == [0, 0, 0, 1]
    assert "CLIP ↑" in (root / "tables" / "scores.md").read_text(encoding="utf-8")
    plugin = METRICS.plugins["clip"]
    lower = replace(plugin, metric=replace(plugin.metric, higher_is_better=False))
    monkeypatch.setitem(METRICS.plugins, "clip", lower)

    def negated(found: pd.DataFrame) -> pd.DataFrame:
        return found.assign(value=found["value"].where(found["metric"] != "clip", -found["value"]))

    for run in (root / "runs").iterdir():
        change_scores(run, negated)
    after = compared()
    assert after[0] == pytest.approx(before[0], nan_ok=True)
    assert after[1:] == before[1:]
    assert "CLIP ↓" in (root / "tables" / "scores.md").read_text(encoding="utf-8")
    assert r"CLIP $\downarrow$" in (root / "tables" / "scores.tex").read_text(encoding="utf-8")
