"""Any text comes out in LaTeX, Markdown, CSV, Parquet and figures."""

from __future__ import annotations

import csv
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from support import synthetic

from tafs.report import figures, fonts, formats, latex, table_kinds
from tafs.report.figures import style
from tafs.report.tables import fill

TEXTS = [
    "[ours] TAFS",
    "*best* [4pt]",
    r"\\x {y} _z_ ~u^ |v| <w> # & % $m$",
    "a -- b --- c ''d'' ``e'' ?` !`",
    "η = 0.5 ≤ θ − 1 × ½ ★ α→β x² y₀ ∞",
    "“Grün” – ‘naïve’ — Łódź ß Ångström Dvořák Ő ī…",
]
OTHERS = "舞蹈 Привет שלום ✓ ắ"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[ours] *", "{[}ours] {*}"),
        ("a--b---c", "a-{}-b-{}-{}-c"),
        ("''`", r"'{}'\textasciigrave{}"),
        ("η≤−", r"\ensuremath{\eta}\ensuremath{\leq}\ensuremath{-}"),
        ("e\u0301ïŐçı", r"\'{e}\"{\i}\H{O}\c{c}\i{}"),
        ("x²y₀", r"x\textsuperscript{2}y\textsubscript{0}"),
        ("\u3192", r"\textsuperscript{一}"),
        ("–—“”Α", "-----``''A"),
        ("舞ắ", "舞ắ"),
    ],
)
def test_latex_has_commands_for_what_pdflatex_has_no_characters_for(
    text: str, expected: str
) -> None:
    assert latex.escape(text) == expected


@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp"))))
def test_any_text_has_balanced_braces_and_loses_no_character_that_stays(text: str) -> None:
    escaped = latex.escape(text)
    bare = escaped.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    assert not escaped.startswith(("[", "*")) and "$$" not in escaped
    normal = unicodedata.normalize("NFC", text)
    stays = [level(c) for c in normal if not latex.escape(c).isascii()]
    assert [c for c in escaped if not c.isascii()] == [c for c in "".join(stays) if not c.isascii()]


def level(character: str) -> str:
    """What a character that is raised or lowered shows on the line."""
    raised = unicodedata.decomposition(character).startswith(("<super>", "<sub>"))
    return unicodedata.normalize("NFKC", character) if raised else character


def tables(text: str, folder: Path) -> dict[str, Path]:
    """The files of a table with this text as caption, header and labels."""
    runs = folder / "runs"
    if not runs.exists():
        synthetic.write_runs(runs, seeds=1, prompts=6, images=1, iterations=2, nfe=(4,))
    spec = synthetic.table_spec(sorted(runs.iterdir()))
    rows = tuple(
        row.model_copy(update={"label": text, "rule": i == 2}) for i, row in enumerate(spec.rows)
    )
    spec = spec.model_copy(update={"caption": text, "header": text, "rows": rows})
    table = table_kinds.build(synthetic.load(spec, runs))
    written = formats.write(table, fill(table), folder)
    return {file.suffix: file for file in written}


def test_latex_names_what_needs_lualatex_in_its_first_lines(tmp_path: Path) -> None:
    first, *lines = tables(OTHERS, tmp_path)[".tex"].read_text(encoding="utf-8").splitlines()
    assert (
        first.startswith("% pdflatex does not have ")
        and "舞" in first
        and "a" not in first[-60:-50]
    )
    assert lines[0] == r"% \usepackage{fontspec}" and fonts.BASE in lines[1]
    assert "Right-to-left" in lines[3]
    assert tables(TEXTS[4], tmp_path)[".tex"].read_text(encoding="utf-8").isascii()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_pdflatex_typesets_the_tables(tmp_path: Path) -> None:
    lines = [r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}"]
    for text in TEXTS:
        lines += [tables(text, tmp_path)[".tex"].read_text(encoding="utf-8"), r"\clearpage"]
    (tmp_path / "all.tex").write_text("\n".join([*lines, r"\end{document}"]), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("1. a", r"1\. a"),
        ("---", r"\---"),
        ("~~a~~ $b$ &copy; <c>", r"\~\~a\~\~ \$b\$ \&copy; \<c\>"),
        ("a - 1. b", "a - 1. b"),
    ],
)
def test_a_caption_is_no_list_heading_or_formula_in_markdown(
    text: str, start: str, tmp_path: Path
) -> None:
    assert tables(text, tmp_path)[".md"].read_text(encoding="utf-8").startswith(start + "\n\n|")


@pytest.mark.parametrize("text", ["NaN", "None", "5", "=1+1", *TEXTS, OTHERS])
def test_labels_are_text_in_csv_and_parquet(text: str, tmp_path: Path) -> None:
    files = tables(text, tmp_path)
    label = f"'{text}" if text.startswith("=") else text
    assert set(pd.read_parquet(files[".parquet"])["row"]) == {label}
    with files[".csv"].open(encoding="utf-8", newline="") as file:
        assert {row["row"] for row in csv.DictReader(file)} == {label}


def test_figures_show_what_no_font_has_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fonts._font_of.cache_clear()
    monkeypatch.setattr(fonts, "_others", lambda: ())
    figure = Figure()
    text = figure.text(0, 0, "η 舞\x1b\u200d $x$")
    style.save(figure, tmp_path, "name", [])
    assert text.get_text() == r"η \u821e\x1b\u200d $x$"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("figures: no font of this machine has 舞 (U+821E), which is shown by")
    fonts._font_of.cache_clear()


def test_figures_use_other_fonts_of_the_machine_only_where_they_are_needed(tmp_path: Path) -> None:
    figure = Figure()
    text = figure.text(0, 0, "TAFS ≤ ★")
    style.save(figure, tmp_path, "name", [])
    before = (tmp_path / "name.png").read_bytes()
    assert fonts.covering("TAFS ≤ ★") == ((), frozenset())
    style.save(figure, tmp_path, "name", [])
    assert (tmp_path / "name.png").read_bytes() == before
    families, missing = fonts.covering("舞")
    assert bool(families) != bool(missing)
    text.set_text("舞")
    style.save(figure, tmp_path, "name", [])
    assert text.get_fontfamily() == [fonts.BASE, *families] or missing


def test_wide_characters_count_twice_in_a_line() -> None:
    fonts._font_of.cache_clear()
    assert style.wrap("a b c d e f", 6) == "a b c\nd e f"
    if not fonts.covering("舞蹈").missing:
        assert style.wrap("舞蹈" * 3, 6) == "舞蹈舞\n蹈舞蹈"


def test_every_kind_of_figure_draws_any_label_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    runs = synthetic.write_runs(tmp_path, seeds=1, prompts=6, images=1, iterations=2, nfe=(1, 4))
    label = f"{OTHERS} \U00012000"
    spec = synthetic.table_spec(runs, curve_nfe=(1, 4), figures={k: k for k in ("steps", "images")})
    rows = tuple(row.model_copy(update={"label": label}) for row in spec.rows)
    spec = spec.model_copy(update={"rows": rows})
    assert len(figures.draw(synthetic.load(spec, tmp_path), tmp_path / "figures")) == 4
    assert [str(w.message) for w in recwarn if "lyph" in str(w.message)] == []
