"""The whole tree: style, types, layers, language, and documents that match the code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = (
    "ruff check .",
    "ruff format --check .",
    "mypy",
    "lint-imports",
    "codespell",
    "snakefmt --check workflow",
    "snakemake --lint",
)
SOURCES = ("tafs", "baselines", "workflow", "benchmarks", "docs", "tests")
MACHINE_PATH = re.compile(r"(?<![\w.:$}])/(home|root|Users|work|tmp|mnt|scratch|private)/")
LONGEST = 450  # lines of a module


def tracked(*patterns: str) -> list[Path]:
    command = ["git", "ls-files", "-z", "--", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def text_of(file: Path) -> str:
    """The text of a file; "" for weights and images."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def found(pattern: re.Pattern[str], files: list[Path]) -> set[str]:
    """FILE:LINE: MATCH of every match."""
    return {
        f"{file.relative_to(ROOT)}:{number}: {match.group().strip()}"
        for file in files
        for number, line in enumerate(text_of(file).splitlines(), 1)
        for match in pattern.finditer(line)
    }


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", CHECKS)
def test_the_tree_passes(command: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command.split(),
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_lint_runs_the_same_checks() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    commands = [line.strip().removeprefix("$(RUN) ") for line in recipe.splitlines()[1:]]
    assert commands == list(CHECKS)


# -- what no tool checks ---------------------------------------------------------------------------

# Options with which reading a file or a model runs code from it. The tests attack with some.
UNSAFE = re.compile(
    r"\b(weights_only\s*=\s*False|trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True)\b"
)
# Phrases that the style guide replaces: "X is not a Y", "again", "forever".
UNPLAIN = re.compile(
    r"(?<!\bthere)\b (is|are|was|were) no (?!longer|more|fewer|less)"
    r"|\b(shall|thereof|whereof|anew|for ever|knows? no|nor would|of which each)\b",
    re.IGNORECASE,
)


def test_nothing_that_is_read_can_run_code() -> None:
    files = tracked("tafs/*.py", "baselines/*.py", "benchmarks/*.py", "workflow")
    assert len(files) > 100
    assert found(UNSAFE, files) == set()


def test_no_file_holds_a_path_of_one_machine() -> None:
    assert found(MACHINE_PATH, tracked()) == set()


@pytest.mark.parametrize("path", ["home/me/weights", "work/x", "tmp/out.png", "Users/a/b"])
def test_a_path_of_one_machine_is_recognised(path: str) -> None:
    assert MACHINE_PATH.search(f'open("/{path}")')
    assert not MACHINE_PATH.search(f'open("results/{path}")')
    assert not MACHINE_PATH.search(f"https://example.org/{path}")


def test_the_language_is_plain() -> None:
    files = tracked(*SOURCES, "*.md", "*.yaml", "*.yml", "*.toml", "Makefile", ".ci")
    others = {"results", "vendor"}  # written by programs or by other projects
    files = [f for f in files if f != Path(__file__) and not others & set(f.parts)]
    assert found(UNPLAIN, files) == set()


def test_a_long_module_says_why_it_is_one_file() -> None:
    """Its docstring holds the words "one file"."""
    unexplained = {
        str(file.relative_to(ROOT))
        for file in tracked("tafs/*.py", "baselines/*.py")
        if len(text_of(file).splitlines()) > LONGEST
        and "one file" not in (ast.get_docstring(ast.parse(text_of(file))) or "").lower()
    }
    assert unexplained == set()


# -- documents -------------------------------------------------------------------------------------


def test_every_relative_link_leads_somewhere() -> None:
    broken = {
        f"{file.relative_to(ROOT)}: {target}"
        for file in tracked("*.md")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(file))
        if "://" not in target and not (file.parent / target).exists()
    }
    assert broken == set()


def test_every_source_path_in_documents_and_comments_exists() -> None:
    """Names in capitals are placeholders."""
    folders = "|".join(SOURCES)
    pattern = re.compile(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w\.(?:py|md|yaml|smk|rst)\b")
    files = tracked("*.md", "*.py", "*.smk", "*.yaml", "*.toml", "workflow/Snakefile", "Makefile")
    broken = {
        f"{file.relative_to(ROOT)}: {path}"
        for file in files
        if not {"results", "tests"} & set(file.parts) and file.name != "CHANGELOG.md"
        for path in pattern.findall(text_of(file))
        if path == path.lower()
        and not (ROOT / path).exists()
        # Guides name the files that their `tafs new KIND NAME` commands write.
        and Path(path).stem
        not in re.findall(r"tafs new \w+ (\w+)", text_of(file).replace("-", "_"))
    }
    assert broken == set()


def test_every_documented_module_and_target_exists() -> None:
    """`python -m tafs...` and `make TARGET` in documents, comments and messages."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    broken = set()
    for file in tracked("*.md", "tafs/*.py", "workflow", "*.yaml", "Makefile"):
        if "results" in file.parts or file.name == "CHANGELOG.md":
            continue
        text = text_of(file)
        for module in re.findall(r"python -m (tafs(?:\.[a-z_0-9]+)+)", text):
            path = ROOT / module.replace(".", "/")
            if not path.with_suffix(".py").exists() and not path.is_dir():
                broken.add(f"{file.relative_to(ROOT)}: {module}")
        named = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text, re.MULTILINE)
        broken |= {f"{file.relative_to(ROOT)}: make {t}" for t in map("".join, named)} - {
            f"{file.relative_to(ROOT)}: make {t}" for t in targets
        }
    assert broken == set()


def test_the_contributing_guide_lists_the_layers_of_the_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [set(layer.split(" | ")) for layer in settings["contracts"][0]["layers"]]
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    rows = [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table.splitlines()[2:]]
    assert rows == layers
