"""Names, titles and prompts that are commands, markup, formulas or paths: they stay what they are.

Keys of config.yaml, `--config` and `make new-method` refuse them in one line; titles, captions and
prompts, which may be any line of text, are written literally into every file.
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
from support import synthetic

from tafs.assets import sources
from tafs.common import yaml_files
from tafs.data import prompts
from tafs.experiment import validate
from tafs.methods import template
from tafs.orchestration import graph
from tafs.report import claims, table_kinds
from tafs.report.figures import image_grid, plots, style
from tafs.tracking import mlflow_mirror

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config.yaml"
SMALL: dict[str, Any] = {"prompts": 12, "images": 1, "iterations": 2, "nfe": (1, 4)}

LINES = (
    "$(touch PWNED)",
    "`touch PWNED`",
    "; touch PWNED",
    "| touch PWNED",
    "&& touch PWNED &",
    "'; touch PWNED; '",
    '"; touch PWNED; "',
    "> PWNED",
    "$(shell touch PWNED)",
    "${IFS}touch${IFS}PWNED",
    "../../PWNED",
    "/etc/passwd",
    "~root/PWNED",
    "-rf",
    "--help",
    "--config",
    "{run}",
    "{input.run!r}",
    "{0.__class__.__mro__}",
    "%s%s%n",
    "{{7*7}}",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "</td></table><h1>x",
    "\\input{/etc/passwd}",
    "\\write18{touch PWNED}",
    "\\end{tabular}\\immediate",
    "$\\frac{1}{0}$ $ $$ \\$",
    "a & b % c # d _ e ^ f ~ g",
    "| a | b |\\|",
    "[x](javascript:alert(1))",
    "![x](http://example.org/x.png)",
    "*a* _b_ `c` ~~d~~",
    "=cmd|'/C calc'!A0",
    "+1+1",
    "@SUM(1:9)",
    "-2+3",
    "שלום עולם",
    "مرحبا",
    "日本語 🎨",
    "a" * 300,
    "'; DROP TABLE runs; --",
    "!!python/object/apply:os.system [touch PWNED]",
    "None",
    "NaN",
)
NOT_LINES = (
    "a\nb",
    "a\r\nb",
    "\x00",
    "a\x00b",
    "\x1b[31mred",
    "\x07",
    "\u202etxt.exe",
    "a\u2028b",
    "\u200b",
    "\ufeff",
    "x" * 100_000,
)


# matplotlib's font has no CJK, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Glyph")


def no_command_ran(*folders: Path) -> bool:
    return not any(list(folder.rglob("PWNED")) for folder in (*folders, Path.cwd()))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A command that runs leaves its file in a folder of the test's own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def assert_one_line(error: pytest.ExceptionInfo[Any], longest: int = 400) -> None:
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < longest


# -- keys and arguments ----------------------------------------------------------------------------


def use_as_key(raw: dict[str, Any], where: int, name: str) -> None:
    """As a variant, a task, a table, a figure, a scale or a part that a scale casts."""
    smoke = raw["scales"]["smoke"]
    holders: list[dict[str, Any]] = [
        raw["methods"],
        raw["tasks"],
        raw["experiments"],
        raw["scales"],
        smoke["backbones"],
        smoke["prompts"],
        raw["tasks"]["preference"]["rewards"],
        raw["experiments"]["table4"]["labels"],
    ]
    if where < len(holders):
        first = next(iter(holders[where].values()))
        holders[where][name] = first
    elif where == len(holders):
        raw["experiments"]["table2"]["figures"]["steps"] = name
    else:
        raw["experiments"]["table2"]["methods"] = [name]


def test_no_key_of_the_configuration_is_more_than_a_name(tmp_path, trials):
    texts = [*LINES, *NOT_LINES]
    for number in trials("names: as a key of config.yaml", 20, 10 * len(texts)):
        text, where = texts[number % len(texts)], number % 10
        raw = yaml_files.load_yaml(SHIPPED, dict)
        use_as_key(raw, where, text)
        with pytest.raises(yaml_files.ConfigError) as caught:
            validate.check(raw)
        assert_one_line(caught)
    assert no_command_ran(tmp_path)


def test_no_argument_is_more_than_a_name(tmp_path, trials):
    texts = [*LINES, *NOT_LINES]
    for number in trials("names: --config method=, scale=, seeds=", 9, 3 * len(texts)):
        key = ("method", "scale", "seeds")[number % 3]
        with pytest.raises(yaml_files.ConfigError) as caught:
            graph.read({key: texts[number // 3]}, SHIPPED)
        assert_one_line(caught, 700)
    assert no_command_ran(tmp_path)


@pytest.mark.parametrize("name", ["none", "true", "false", "class", "import", "base", "flow_grpo"])
def test_a_method_cannot_be_called_like_a_word_of_python_or_another_method(tmp_path, name):
    with pytest.raises(ValueError, match="choose another name"):
        template.write(name, tmp_path)
    assert list(tmp_path.rglob("*.py")) == []


def test_make_new_method_runs_nothing_that_is_in_its_name(tmp_path, trials):
    here = Path.cwd()
    shutil.copy(ROOT / "Makefile", here)
    for name in ("tafs", "baselines", "requirements.txt", "requirements-nodeps.txt"):
        (here / name).symlink_to(ROOT / name)
    # A NUL cannot be in an argument, nor can more than 128 KiB.
    texts = [text for text in (*LINES, *NOT_LINES[:2], *NOT_LINES[4:]) if text != "\x00"]
    before = sorted(f.name for f in (ROOT / "baselines").iterdir())
    # As called from a shell, also where `make test` called us.
    outside = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
    for number in trials("names: make new-method NAME=", 2, len(texts)):
        done = subprocess.run(
            ["make", "--silent", "--old-file=.venv/.installed", "new-method"]
            + [f"NAME={texts[number]}"],
            cwd=here,
            env={
                **outside,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        said = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
        assert len(said) == 1, done.stderr
        assert said[0].startswith("new-method: ")
        assert "is no name" in said[0]
        assert done.returncode == 2
        assert no_command_ran(tmp_path)
    assert sorted(f.name for f in (ROOT / "baselines").iterdir()) == before


# -- titles, captions and labels -------------------------------------------------------------------


def test_a_title_is_one_line_that_can_be_printed(trials):
    places = ("title of a task", "caption", "header", "label", "title of a method")
    for number in trials("names: unprintable titles", 5, 5 * len(NOT_LINES)):
        raw = yaml_files.load_yaml(SHIPPED, dict)
        text, place = NOT_LINES[number // 5], places[number % 5]
        if place == "title of a task":
            raw["tasks"]["preference"]["title"] = text
        elif place == "label":
            raw["experiments"]["table4"]["labels"]["tafs_grpo"] = text
        elif place == "title of a method":
            raw["methods"]["tafs_grpo"] = {"title": text}
        else:
            raw["experiments"]["table2"][place] = text
        with pytest.raises(yaml_files.ConfigError) as caught:
            validate.check(raw)
        assert_one_line(caught)


class Tags(HTMLParser):
    """The elements of a page, their attributes' names and its text."""

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
    return synthetic.write_runs(tmp_path_factory.mktemp("runs"), seeds=1, **SMALL)


PLAIN = {"html", "meta", "title", "style", "table", "caption", "thead", "tbody", "tr", "th", "td"}
PLAIN |= {"ul", "li", "b", "small"}


def test_tables_hold_any_text_literally(runs, tmp_path, trials):
    for number in trials("names: text in tables", 6, len(LINES)):
        text = LINES[number]
        spec = synthetic.table2(runs)
        spec |= {"caption": text, "header": text}
        for row in spec["rows"]:
            row["label"] = text
        out = tmp_path / str(number)
        table_kinds.write_table(spec, runs, out)
        assert {f.parent.name for f in out.rglob("*") if f.is_file()} == {"tables", "provenance"}
        table = out / "tables" / "table2"

        page = Tags(table.with_suffix(".html").read_text(encoding="utf-8"))
        assert page.found <= PLAIN
        assert page.attributes <= {"lang", "charset", "class"}
        assert page.text.count(text) >= 3

        lines = table.with_suffix(".md").read_text(encoding="utf-8").splitlines()
        body = [line for line in lines if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in body}) == 1
        markup = "\n".join([*(line.split(" | ")[0].removeprefix("| ") for line in body), lines[0]])
        assert not re.search(r"(?<!\\)(?:\\\\)*[<`*\[\]]", markup.replace("---", ""))

        latex = table.with_suffix(".tex").read_text(encoding="utf-8")
        assert latex.count(r"\end{tabular}") == latex.count(r"\begin{tabular}") == 1
        assert r"\input{" not in latex and r"\write" not in latex and r"\immediate" not in latex
        assert balanced(latex)

        with table.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert not any(row["row"].startswith(("=", "+", "-", "@")) for row in rows)
        assert all(row["row"].endswith(text) for row in rows)
        assert len(pd.read_parquet(table.with_suffix(".parquet"))) == len(rows)
    assert no_command_ran(tmp_path)


def balanced(latex: str) -> bool:
    """Whether its braces and its dollar signs come in pairs."""
    plain = re.sub(r"\\.", "", latex)
    depth = 0
    for character in plain:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0 and plain.count("$") % 2 == 0


def test_figures_draw_any_text_literally(runs, tmp_path, trials):
    for number in trials("names: text in figures", 1, len(LINES)):
        text = LINES[number]
        own = []
        for run in runs:
            folder = Path(shutil.copytree(run, tmp_path / str(number) / run.name))
            described = json.loads((folder / "run.json").read_text())
            described["title"] = f"{text[:60]} {described['method']}"
            (folder / "run.json").write_text(json.dumps(described))
            own.append(folder)
        out = tmp_path / "figures"
        drawn = plots.profiles(own, out, nfe=4, name=f"profiles{number}")
        images = [torch.zeros(2, 24, 24, 3, dtype=torch.uint8).numpy()]
        result = plots.read_results(own)[0]
        with style._style():
            figure = image_grid._grid(
                [(text, result, "x")], images, [0, 1], [text, text], {0: text}
            )
            drawn += style._save(figure, out, f"grid{number}", plots.systems_of([result]))
        assert all(f.parent == out and f.stat().st_size > 1000 for f in drawn)
    assert no_command_ran(tmp_path)


def test_claims_hold_any_text_literally(tmp_path, trials):
    for number in trials("names: text in claims.md", 5, len(LINES)):
        text = LINES[number]
        raw = yaml_files.load_yaml(ROOT / "claims.yaml", list)[0] | {"claim": text, "source": text}
        (tmp_path / "claims.yaml").write_text(json.dumps([raw], ensure_ascii=False))
        [claim] = claims.read(tmp_path / "claims.yaml")
        verdict = claims.Verdict(claim, claims.NOT_TESTED, ())
        markdown, record = claims.write([verdict], "smoke", tmp_path / "out")
        row = markdown.read_text(encoding="utf-8").splitlines()[-1]
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 6
        assert not re.search(r"(?<!\\)(?:\\\\)*[<`\[\]]", row)
        assert json.loads(record.read_text())[0]["claim"] == text


def test_mlflow_holds_any_text_and_writes_nothing_outside_its_store(runs, tmp_path, trials):
    texts = [*LINES[:12], *LINES[21:30], "../../PWNED", "a\nb", "\x00", "x" * 5000]
    for number in trials("names: text in MLflow", 0, len(texts)):
        text = texts[number]
        folder = Path(shutil.copytree(runs[-1], tmp_path / "runs" / str(number)))
        described = json.loads((folder / "run.json").read_text())
        described |= {
            "title": text,
            "task": text[:200],
            "name": text[:200],
            "settings": {"text": text},
        }
        (folder / "run.json").write_text(json.dumps(described))
        mlflow_mirror.sync([folder], tmp_path / "store")
        assert {f.name for f in tmp_path.iterdir()} == {"here", "runs", "store"}
    assert no_command_ran(tmp_path)


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts_are_text_and_nothing_else(tmp_path, trials):
    settings = validate.read(SHIPPED, {"scale": "smoke"}).active.model_dump(mode="json")
    world = sources.of(settings)
    rewards = world.rewards(["clip", "pickscore", "hpsv2", "imagereward"])
    backbones = [world.model(name, 24) for name in ("shapes-sd3", "shapes-flux")]
    texts = [*LINES, *(text for text in NOT_LINES if len(text) < 1000), "", " ", "x " * 2000]
    file = tmp_path / "prompts.jsonl"
    for number in trials("names: prompts", 10, len(texts)):
        rows = [{"prompt": text} for text in (texts[number], "a red circle")]
        prompts.write(file, rows)
        known = prompts.read(file)
        assert [prompt.text for prompt in known] == [texts[number], "a red circle"]
        scores = rewards.score(torch.rand(2, 3, 24, 24), known)
        assert all(values.isfinite().all() for values in scores.values())
        for backbone in backbones:
            assert backbone.encode([prompt.text for prompt in known]).embeds.isfinite().all()
    assert no_command_ran(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "\\ud800"}',
        '{"prompt": 5}',
        '{"prompt": null}',
        '{"prompt": ["a"]}',
        "[" * 100_000,
        "5",
        "",
        '{"prompt": "a"} x',
        "9" * 10_000,
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ValueError) as caught:
        prompts.read(file)
    assert str(caught.value) == f"{file}:2: not a JSON object with a 'prompt'"
