"""The code, commands and messages that documents show."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(
        f"docs/{f.relative_to(ROOT / 'docs').as_posix()}"
        for f in sorted((ROOT / "docs").rglob("*.md"))
    ),
)
PROGRAMS = ("tafs", "snakemake", "make", "python")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `language` is "" for commands and for what programs print."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"


def blocks(language: str) -> list[Block]:
    """The blocks of all pages in a language."""
    return [
        Block(page, language, found[3])
        for page in PAGES
        for found in FENCE.finditer((ROOT / page).read_text("utf-8"))
        if found[2] == language
    ]


def code_of(notebook: Path) -> list[str]:
    """The code of each cell of a notebook."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def commands() -> Iterator[tuple[str, str]]:
    """(the page, a command) of all command blocks, and of commands within sentences.

    What programs print and other lists are left out: they begin with none of PROGRAMS or OTHERS.
    """
    for block in blocks(""):
        lines = block.text.replace("\\\n", " ").splitlines()
        if lines[0].split()[0] in (*PROGRAMS, *OTHERS):
            for line in lines:
                for command in line.partition("  #")[0].split(" && "):
                    yield block.page, command.strip()
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text("utf-8"))
        for found in INLINE.finditer(text):
            words = found[1].split()
            named = 3 if words[:2] == ["python", "-m"] else 2  # the words of a command's name
            if words[0] in PROGRAMS and len(words) > named and "..." not in found[1]:
                yield page, " ".join(words)


# Programs of other projects, which are not checked.
OTHERS = ("cd", "cp", "curl", "export", "git", "sed", "source")


class Parsed(BaseException):
    """A program has accepted its arguments."""


def parse(command: str) -> None:
    """Let a command's own parser accept its arguments, without doing its work.

    Raises:
        SystemExit, AssertionError, Exception: they are refused.
    """
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    match words:
        case ["tafs", *arguments]:
            _run_until_parsed("tafs.cli", arguments)
        case ["python", "-m", "pytest", *arguments]:
            assert all((ROOT / one).exists() for one in arguments if "/" in one), command
        case ["python", "-m", module, *arguments]:
            _run_until_parsed(module, arguments)
        case ["python", file, *arguments]:
            _run_until_parsed(file, arguments)
        case ["snakemake", *arguments]:
            _parse_snakemake(arguments)
        case ["make", *arguments]:
            _parse_make(arguments)
        case [program, *_]:
            assert program in OTHERS, command


def _run_until_parsed(program: str, arguments: Sequence[str]) -> None:
    """Run a module or file until it has parsed its arguments; one that takes none only exists."""
    found = importlib.util.find_spec(program) if not program.endswith(".py") else None
    file = Path(found.origin) if found and found.origin else ROOT / program
    if file.name == "__init__.py":
        file = file.with_name("__main__.py")
    source = file.read_text("utf-8")
    if not re.search(r"\.parse(_intermixed)?_args\(|\brun_stage\(", source):
        return
    with contextlib.ExitStack() as patches:
        for name in ("parse_args", "parse_intermixed_args"):
            patches.enter_context(mock.patch.object(argparse.ArgumentParser, name, _stop(name)))
        patches.enter_context(mock.patch.object(sys, "argv", [program, *arguments]))
        patches.enter_context(mock.patch.object(sys, "path", [str(file.parent), *sys.path]))
        try:
            runpy.run_path(str(file), run_name="__main__")
        except Parsed:
            return
    raise AssertionError(f"{program} parses no arguments")


def _stop(name: str) -> Callable[..., NoReturn]:
    """A parser's method that ends the program after it has parsed."""
    original = getattr(argparse.ArgumentParser, name)

    def stop(parser: argparse.ArgumentParser, *arguments: Any, **others: Any) -> NoReturn:
        original(parser, *arguments, **others)
        raise Parsed

    return stop


def _parse_snakemake(arguments: Sequence[str]) -> None:
    """Check options, targets and what --config sets."""
    from snakemake.cli import get_argument_parser

    from tafs.experiment.plan import as_typed

    given = get_argument_parser().parse_args(list(arguments))
    files = [ROOT / "workflow" / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
    rules = re.findall(
        r"^(?:rule|checkpoint) (\w+):", "\n".join(f.read_text() for f in files), re.MULTILINE
    )
    unknown = [t for t in given.targets if t not in rules and not t.startswith("results/")]
    assert unknown == [], f"snakemake {unknown}"
    # Methods of a guide are in no plan.
    _plan(tuple((k, v) for k, v in as_typed(given.config).items() if k != "method"))


@functools.cache
def _plan(overrides: tuple[tuple[str, str], ...]) -> None:
    from tafs import experiment

    experiment.load(dict(overrides), ROOT / "config.yaml")


def _parse_make(arguments: Sequence[str]) -> None:
    """Check the target, and the commands that it would run with these variables."""
    makefile = (ROOT / "Makefile").read_text()
    settings = [word.partition("=")[0] for word in arguments if "=" in word]
    assert all(f"{name} ?=" in makefile or f"override {name} " in makefile for name in settings)
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():
        for program in ("snakemake ", "python -m tafs", "python tests/"):
            if program in line and ".venv/bin:$PATH" in line:
                parse(program + line.partition(program)[2].split(" > ")[0].split(";")[0])


def messages() -> list[str]:
    """The texts in the code, with "…" for what is filled in, and the Makefile."""
    found = [(ROOT / "Makefile").read_text()]
    for file in [*(ROOT / "tafs").rglob("*.py"), *(ROOT / "baselines").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_bytes())):
            match node:
                case ast.Constant(value=str(text)):
                    found.append(text)
                case ast.JoinedStr(values=parts):
                    found.append(
                        "".join(p.value if isinstance(p, ast.Constant) else "…" for p in parts)
                    )
    return found
