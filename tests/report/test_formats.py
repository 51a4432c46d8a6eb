"""Tables as files: markup, escapes, notes, equal bytes and the provenance of every cell."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support import synthetic
from support.paper_metrics import METRICS
from support.synthetic import change_scores

from tafs.experiment.specs import TableSpec
from tafs.report import formats, table_kinds, tables

SPECIAL = r"""[a] *b* 100% \x {y}_z & ~u^ |v| <i>"w"</i> `c` $d$ #e --"""


def write(spec: TableSpec, runs: Path, out: Path, published: bool = False) -> list[Path]:
    table = table_kinds.build(synthetic.load(spec, runs))
    return formats.write(table, tables.fill(table, published), out, published)


def table2(runs: Sequence[Path], out: Path, published: bool = False, **options: Any) -> list[Path]:
    return write(synthetic.table_spec(runs, **options), runs[0].parent, out, published)


def renamed(spec: TableSpec, text: str) -> TableSpec:
    """The table with `text` as caption, header and every label, and a rule above its third row."""
    rows = [
        row.model_copy(update={"label": text, "rule": i == 2}) for i, row in enumerate(spec.rows)
    ]
    return spec.model_copy(update={"caption": text, "header": text, "rows": tuple(rows)})


def text(folder: Path, ending: str) -> str:
    return (folder / "tables" / f"table2.{ending}").read_text(encoding="utf-8")


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(text(folder, "csv").splitlines()))


def provenance(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance" / "table2.json").read_text(encoding="utf-8"))


def test_equal_input_gives_equal_bytes(runs: list[Path], tmp_path: Path) -> None:
    first, second = table2(runs, tmp_path / "a"), table2(runs[::-1], tmp_path / "b")
    assert [str(file.relative_to(tmp_path / "a")) for file in first] == [
        *(f"tables/table2.{ending}" for ending in ("csv", "md", "tex", "html")),
        "provenance/table2.json",
        "tables/table2.parquet",
    ]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_all_formats_print_the_same_numbers(own_runs: list[Path], tmp_path: Path) -> None:
    for run in own_runs[3:]:
        change_scores(run, lambda found: found.assign(value=found["value"] + 10))
    table2(own_runs, tmp_path)
    stored = pd.read_parquet(tmp_path / "tables" / "table2.parquet")
    pd.testing.assert_frame_equal(stored, pd.read_csv(tmp_path / "tables" / "table2.csv"))
    last = rows(tmp_path)[-1]
    value, low, high = (float(last[f"clip{field}"]) for field in ("", "_low", "_high"))
    interval = f"[{low:.2f}, {high:.2f}]"
    half = f"{(high - low) / 2:.2f}"
    assert last["clip_best"] == "1"
    assert f"| **{value:.2f}** {interval} |" in text(tmp_path, "md")
    assert f"<b>{value:.2f}</b> <small>{interval}</small>" in text(tmp_path, "html")
    assert rf"& \textbf{{{value:.2f}}}{{\tiny\,$\pm$\,{half}}} &" in text(tmp_path, "tex")
    bold = sum(row[f"{metric}_best"] == "1" for row in rows(tmp_path) for metric in METRICS)
    assert text(tmp_path, "md").count("**") == 2 * bold
    assert text(tmp_path, "html").count("<b>") == text(tmp_path, "tex").count(r"\textbf") == bold


def test_latex_is_a_booktabs_table_with_rules(runs: list[Path], tmp_path: Path) -> None:
    write(renamed(synthetic.table_spec(runs), "x"), runs[0].parent, tmp_path)
    latex = text(tmp_path, "tex")
    assert latex.isascii() and latex.endswith("\n")
    lines = latex.splitlines()
    assert lines[:2] == [r"\begin{table*}[t]", r"\centering"]
    assert r"\footnotesize" in lines and r"\setlength{\tabcolsep}{3.5pt}" in lines
    assert r"\label{tab:table2}" in lines
    assert lines[-3:] == [r"\bottomrule", r"\end{tabular}", r"\end{table*}"]
    body = lines[lines.index(r"\toprule") :]
    rules = [i for i, line in enumerate(body) if line == r"\midrule"]
    assert rules == [2, 5]  # below the header, and above the third of four rows
    assert "tbody tr:nth-child(3) td" in text(tmp_path, "html")
    columns = re.search(r"\\begin{tabular}{(\w+)}", latex)
    assert columns
    for line in body:
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns[1]) - 1


def test_negative_numbers_and_gaps_are_typeset(own_runs: list[Path], tmp_path: Path) -> None:
    for run in own_runs:
        change_scores(run, lambda found: found.assign(value=found["value"] - 100))
    table2(own_runs, tmp_path)
    assert re.search(r"& \$-\$\d+\.\d\d\{\\tiny", text(tmp_path, "tex"))
    assert "shapes-sd3 & 28 & -- & -- & -- &" in text(tmp_path, "tex")
    assert "| shapes-sd3 | 28 | – | – | – |" in text(tmp_path, "md")


def test_latex_escapes_special_characters(runs: list[Path], tmp_path: Path) -> None:
    write(renamed(synthetic.table_spec(runs), SPECIAL), runs[0].parent, tmp_path)
    latex = text(tmp_path, "tex")
    escaped = (
        r"{[}a] {*}b{*} 100\% \textbackslash{}x \{y\}\_z \& \textasciitilde{}u"
        r"\textasciicircum{} \textbar{}v\textbar{} \textless{}i\textgreater{}"
    )
    # The caption, the header, the labels, and the note on their samplers.
    assert latex.count(escaped) == 1 + 1 + 4 + 4
    bare = re.sub(r"\\[{}]", "", latex)
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"(?<!\\)\$", latex)) % 2 == 0
    # A bracket or a star after the end of a row would be read as its option.
    assert not re.search(r"(\\\\|\\midrule|\\toprule)\s*[[*]", latex)


def test_columns_may_share_a_title(runs: list[Path], tmp_path: Path) -> None:
    write(renamed(synthetic.table_spec(runs), "Steps"), runs[0].parent, tmp_path)
    assert text(tmp_path, "html").count(">Steps</th>") == 2
    assert r"Steps & Steps & $\mathrm{NFE}" in text(tmp_path, "tex")


def test_notes_state_the_images_the_resampling_and_what_bold_means(
    own_runs: list[Path], tmp_path: Path
) -> None:
    single = [run for run in own_runs if run.name.endswith("-0")]
    table2(single, tmp_path)
    assert "Per seed: 18 prompts, 2 images of each." in text(tmp_path, "md")
    assert "resamples of prompts within their task, not of seeds" in text(tmp_path, "md")
    assert "No value is bold: some models were trained with one seed." in text(tmp_path, "html")
    for run in own_runs[3:]:
        change_scores(run, lambda found: found.assign(value=found["value"] + 10))

    def lose(found: pd.DataFrame) -> pd.DataFrame:
        first = (found["metric"] == "clip") & (found["prompt"] == 0) & (found["nfe"] == 4)
        return found.assign(value=found["value"].mask(first))

    change_scores(own_runs[0], lose)
    table2(own_runs, tmp_path)
    for ending, percent in (("md", "%"), ("html", "%"), ("tex", r"\%")):
        printed = text(tmp_path, ending)
        assert "2,000 resamples of prompts within their task, and a t distribution" in printed
        assert f"start noise, at 5 {percent} each" in printed
        assert "Missing and left out: 2 of 216 values of CLIP." in text(tmp_path, ending)


def test_published_values_stand_beside_ours(runs: list[Path], tmp_path: Path) -> None:
    table2(runs, tmp_path, published=True)
    assert rows(tmp_path)[3]["pickscore_published"] == "22.46"
    assert "(paper: 22.46)" in text(tmp_path, "md")
    assert "<small>(paper: 22.46)</small>" in text(tmp_path, "html")
    assert r"{\tiny(22.46)}" in text(tmp_path, "tex")
    assert "In parentheses: the published value." in text(tmp_path, "tex")


def test_a_table_with_random_weights_says_so_in_every_format(
    runs: list[Path], tmp_path: Path
) -> None:
    """Also where only the model that gains are measured from has random weights."""
    fields: dict[str, Any] = {"prompts": 18, "images": 2, "nfe": (4,), "iterations": 6}
    own = [
        synthetic.write_run(tmp_path / "runs", "tafs_grpo", **fields),
        synthetic.write_run(tmp_path / "runs", "base", random_weights=("flux-dev",), **fields),
    ]
    table2(own, tmp_path)
    for ending in ("md", "html", "tex"):
        assert "RANDOM WEIGHTS: Alignment methods." in text(tmp_path, ending)
        assert "Randomly initialised: flux-dev. These numbers" in text(tmp_path, ending)
    assert {row["random_weights"] for row in rows(tmp_path)} == {"flux-dev"}
    table2(own, tmp_path, kind="gains")
    assert "RANDOM WEIGHTS" in text(tmp_path, "md")
    table2(runs, tmp_path)
    assert "RANDOM" not in text(tmp_path, "md") and "random" not in text(tmp_path, "csv")


def test_provenance_names_the_runs_and_the_numbers_behind_every_cell(
    runs: list[Path], tmp_path: Path
) -> None:
    table2(runs, tmp_path, kind="compute")
    record = provenance(tmp_path)
    found = [(row["row"], row["nfe"], row["iteration"], row["runs"]) for row in record["rows"]]
    assert found == [
        ("shapes-sd3", 4, None, ["base-0"]),
        ("Flow-GRPO", 4, 2, ["flow_grpo-0", "flow_grpo-1"]),
        ("TAFS-GRPO", 4, 6, ["tafs_grpo-0", "tafs_grpo-1"]),
    ]
    for row, printed in zip(record["rows"], rows(tmp_path), strict=True):
        assert row["cells"].keys() == {"iterations", "compute", *METRICS}
        for metric in METRICS:
            cell = row["cells"][metric]
            assert cell["value"] == pytest.approx(float(printed[metric]))
            for count in ("n_seeds", "n_images", "n_missing", "resampled"):
                assert str(cell[count]) == printed[f"{metric}_{count}"]
    assert record["rows"][2]["cells"]["iterations"] == {"value": 6}


def test_provenance_has_the_digests_of_every_runs_files(runs: list[Path], tmp_path: Path) -> None:
    served = synthetic.write_run(
        tmp_path / "runs", "base", name="served", served=True, prompts=6, images=1, nfe=(4,)
    )
    table2([served], tmp_path)
    assert "served_scores.parquet" in provenance(tmp_path)["runs"]["served"]["sha256"]
    # The base model is not printed, but gains are computed from its scores.
    table2(runs, tmp_path, kind="gains")
    record = provenance(tmp_path)
    assert [row["row"] for row in record["rows"]] == ["Flow-GRPO", "TAFS-GRPO"]
    assert set(record["runs"]) == {run.name for run in runs}
    for run in runs:
        second = "trajectory_rewards.parquet" if run.name == "base-0" else "adapter.safetensors"
        own = record["runs"][run.name]
        assert own["sha256"] == {
            name: hashlib.sha256((run / name).read_bytes()).hexdigest()
            for name in ("scores.parquet", second)
        }
        assert (own["seed"], own["scale"]) == (int(run.name[-1]), "shapes")
        assert own["metrics"] == {"clip": "c" * 64}
    tafs = record["runs"]["tafs_grpo-1"]
    assert (tafs["fingerprint"], tafs["provenance"]) == ("of tafs_grpo-1", {"code": "abc"})
    assert "fingerprint" not in record["runs"]["base-0"]
