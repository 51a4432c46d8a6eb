"""Names and texts that look like commands, markup, formulas or paths.

The name of `make new-method` becomes part of commands and paths, and is refused. Titles, captions,
claims and prompts may be any printable line; every output shows them literally.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support import synthetic

from tafs.assets import sources
from tafs.common import yaml_files
from tafs.data import prompts
from tafs.experiment.claims import read
from tafs.report import claims, figures, formats, table_kinds, tables

ROOT = Path(__file__).resolve().parents[2]
LINES = (
    "$(touch PWNED)",
    "`touch PWNED`",
    "'; touch PWNED; '",
    '"; touch PWNED; "',
    "../../PWNED",
    "-rf",
    "{run}",
    "%s%s%n",
    "<script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "</td></table><h1>x",
    "\\input{/etc/passwd}",
    "\\end{tabular}\\immediate\\write18{touch PWNED}",
    "$\\frac{1}{0}$ $ $$ \\$",
    "a & b % c # d _ e ^ f ~ g",
    "| a | b |\\|",
    "[x](javascript:alert(1)) ![x](http://example.org/x.png)",
    "*a* _b_ `c` ~~d~~",
    "=cmd|'/C calc'!A0",
    "@SUM(1:9)",
    "שלום 日本語 🎨",
    "a" * 300,
    "None",
    "NaN",
)
NOT_LINES = ("a\nb", "a\x00b", "\x1b[31mred", "\u202etxt.exe", "a\u2028b", "x" * 100_000)

# A glyph that is missing in silence fails.
pytestmark = pytest.mark.filterwarnings("error:Glyph")


@pytest.fixture(autouse=True)
def no_command_runs(tmp_path, monkeypatch):
    """A command that ran would leave PWNED in the test's folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not list(tmp_path.rglob("PWNED"))


def test_make_new_method_does_not_run_its_argument(tmp_path, trials):
    here = Path.cwd()
    shutil.copy(ROOT / "Makefile", here)
    for name in ("tafs", "baselines"):
        (here / name).symlink_to(ROOT / name)
    before = sorted(f.name for f in (ROOT / "baselines").iterdir())
    # As called from a shell, even if `make test` called us.
    outside = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for number in trials("names: make new-method NAME=", 1, len(LINES)):
        done = subprocess.run(
            ["make", "--silent", "--old-file=.venv/.installed", "new-method"]
            + [f"NAME={LINES[number]}"],
            cwd=here,
            env={**outside, "PATH": path, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        [line] = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
        assert f"{LINES[number]!r} is not a valid name" in line
        assert done.returncode == 2
    assert sorted(f.name for f in (ROOT / "baselines").iterdir()) == before


class Tags(HTMLParser):
    """The elements of a page, the names of their attributes and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    small = {"prompts": 12, "images": 1, "iterations": 2, "nfe": (1, 4)}
    return synthetic.write_runs(tmp_path_factory.mktemp("runs"), seeds=1, **small)


def with_text(table: Any, text: str) -> Any:
    """The loaded table with this text as its caption, header and labels."""
    rows = tuple(row.model_copy(update={"label": text}) for row in table.spec.rows)
    changed = {"caption": text, "header": text, "rows": rows}
    return table.spec.model_copy(update=changed)


def test_tables_show_any_text_literally(runs, tmp_path, trials):
    table = synthetic.loaded(runs)
    for number in trials("names: text in tables", 6, len(LINES)):
        text = LINES[number]
        spec, out = with_text(table, text), tmp_path / str(number)
        built = table_kinds.build(synthetic.load(spec, runs[0].parent))
        files = formats.write(built, tables.fill(built), out)
        assert {f for f in out.rglob("*") if f.is_file()} == set(files)
        read = {f.suffix: f.read_text(encoding="utf-8") for f in files if f.suffix != ".parquet"}

        page = Tags(read[".html"])
        assert not page.found & {"script", "svg", "img", "h1", "a", "input"}
        assert not [name for name in page.attributes if name.startswith(("on", "href", "src"))]
        assert page.text.count(text) >= 3

        body = [line for line in read[".md"].splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in body}) == 1
        labels = "\n".join(line.split(" | ")[0].removeprefix("| ") for line in body)
        assert not re.search(r"(?<!\\)(?:\\\\)*[<`*\[\]]", labels.replace("---", ""))

        latex = read[".tex"]
        assert latex.count(r"\end{tabular}") == latex.count(r"\begin{tabular}") == 1
        assert r"\input{" not in latex and r"\write" not in latex and r"\immediate" not in latex
        plain = re.sub(r"\\.", "", latex)
        assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0

        with files[0].open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert not any(row["row"].startswith(("=", "+", "-", "@")) for row in rows)
        assert all(row["row"].endswith(text) for row in rows)
        [parquet] = [f for f in files if f.suffix == ".parquet"]
        assert len(pd.read_parquet(parquet)) == len(rows)


def test_figures_show_any_text_literally(runs, tmp_path, trials):
    table = synthetic.loaded(runs)
    for number in trials("names: text in figures", 1, len(LINES)):
        text = LINES[number]
        samples = runs[0] / "samples.safetensors"  # the base model's give the captions
        tensors = load_file(samples)
        save_file(tensors, samples, {"captions": json.dumps([text] * len(tensors["prompts"]))})
        figures_of = {"profiles": f"profiles{number}", "images": f"grid{number}"}
        spec = with_text(table, text[:60]).model_copy(update={"figures": figures_of})
        drawn = figures.draw(synthetic.load(spec, runs[0].parent), tmp_path)
        assert all(f.parent == tmp_path and f.stat().st_size > 1000 for f in drawn)


def test_claims_show_any_text_literally(tmp_path):
    for text in LINES:
        raw = yaml_files.load_yaml(ROOT / "claims.yaml", list)[0] | {"claim": text, "source": text}
        (tmp_path / "claims.yaml").write_text(json.dumps([raw], ensure_ascii=False))
        [claim] = read(tmp_path / "claims.yaml")
        verdict = claims.Verdict(claim, claims.NOT_TESTED, ())
        markdown, record = claims.write([verdict], "smoke", tmp_path / "out")
        row = markdown.read_text(encoding="utf-8").splitlines()[-1]
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 7
        assert not re.search(r"(?<!\\)(?:\\\\)*[<`\[\]]", row)
        assert json.loads(record.read_text())[0]["claim"] == text


def test_prompts_are_text_only(tmp_path, trials):
    source = sources.of(synthetic.ASSETS)
    rewards = source.rewards(["clip", "pickscore", "hpsv2", "imagereward"])
    backbones = [source.model(name, 24) for name in ("shapes-sd3", "shapes-flux")]
    texts = [*LINES, *NOT_LINES[:-1], "", " ", "x " * 2000]
    file = tmp_path / "prompts.jsonl"
    for number in trials("names: prompts", 8, len(texts)):
        prompts.write(file, [{"prompt": texts[number]}, {"prompt": "a red circle"}])
        known = prompts.read(file)
        assert [prompt.text for prompt in known] == [texts[number], "a red circle"]
        scores = rewards.score(torch.rand(2, 3, 24, 24), known)
        assert all(values.isfinite().all() for values in scores.values())
        for backbone in backbones:
            assert backbone.encode([prompt.text for prompt in known]).embeds.isfinite().all()
