"""Prompts of one's own from files that config.yaml names, without a plug-in.

A file .txt has a prompt per line; a file .jsonl has an object per line with the fields of GenEval's
evaluation_metadata.jsonl: `prompt`, and `tag`, `include` and `exclude` where GenEval judges it.
Blank lines are skipped.

One file is split: of the prompts of each tag a fifth, but at least one of two or more, is held out
for evaluation, namely those whose texts have the smallest SHA-256, in whatever order the file has
them. Two files are the split that they say. Train and test never share a prompt.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tafs.common.yaml_files import first_problem
from tafs.data import prompt_sets
from tafs.data.prompt_sets import PromptSet
from tafs.data.prompts import Prompt, digest, quoted

HELD_OUT = 5  # one of so many prompts is held out
ENDINGS = (".txt", ".jsonl")
CONTROLS = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories

Word = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Limit(_Strict):
    cls: Annotated[Word, Field(alias="class")]
    count: Annotated[int, Field(ge=1)]


class _Item(_Limit):
    color: Word | None = None
    # The relation, and the place of an earlier item in `include`.
    position: tuple[Literal["left of", "right of", "above", "below"], int] | None = None


class _Row(_Strict):
    """A line of a .jsonl file."""

    prompt: str
    tag: str = ""
    include: Annotated[list[_Item], Field(min_length=1)] | None = None
    exclude: list[_Limit] = []

    @model_validator(mode="after")
    def _earlier(self) -> _Row:
        for place, item in enumerate(self.include or ()):
            if item.position and not 0 <= item.position[1] < place:
                raise ValueError(f"include.{place}.position does not name an earlier item")
        return self


class Read(list[Prompt]):
    """The prompts of a file, with their lines' numbers by text."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: dict[str, int] = {}

    def place(self, prompt: Prompt) -> str:
        return f"line {self.lines[prompt.text]} of {self.file}"


def read(file: Path) -> Read:
    """The prompts of a file.

    Raises:
        ValueError: the file cannot be read, or a line is wrong or repeats another; one line that
            names the file and the line.
    """
    found = Read(file)
    parse = {".txt": _text, ".jsonl": _json}[file.suffix]
    for number, line in _lines(file):
        where = f"line {number} of {file}"
        prompt = parse(line, where)
        bad = next((c for c in prompt.text if unicodedata.category(c) in CONTROLS), None)
        if bad is not None:
            raise ValueError(f"{where} has the control character {bad!r}; remove it")
        if not prompt.text.strip():
            raise ValueError(f"{where} has an empty prompt; remove the line")
        if prompt.text in found.lines:
            first = found.lines[prompt.text]
            raise ValueError(f"{where} repeats the prompt of line {first}; remove one of them")
        found.lines[prompt.text] = number
        found.append(prompt)
    if not found:
        raise ValueError(f"the file {file} has no prompt; write one per line")
    odd = next((p for p in found if ("include" in p.row) != ("include" in found[0].row)), None)
    if odd is not None:
        raise ValueError(
            f"{found.place(odd)} differs from line {found.lines[found[0].text]}: only one has "
            "'include'; give it to all prompts or to none"
        )
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not blank."""
    try:
        # Without a byte-order mark and with any line ending.
        content = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"the file {file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"the file {file} is not UTF-8 text; save it as UTF-8") from None
    # str.splitlines would also split at characters that a JSON string may have.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield number, line


def _text(line: str, where: str) -> Prompt:
    return Prompt(line.strip(), {"prompt": line.strip()})


def _json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
        _Row.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_problem(error, _Row).removeprefix(': ')}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is not a JSON object; write one per line") from None
    return Prompt(row["prompt"], row)


def split(found: Read) -> tuple[list[Prompt], list[Prompt]]:
    """(train, test) of one file; see the module's docstring.

    Raises:
        ValueError: no tag has two prompts; names the file.
    """
    by_tag: dict[str, list[Prompt]] = {}
    for prompt in found:
        by_tag.setdefault(prompt.tag, []).append(prompt)
    held: set[str] = set()
    for members in by_tag.values():
        texts = sorted((p.text for p in members), key=lambda t: hashlib.sha256(t.encode()).digest())
        held |= set(texts[: max(len(texts) // HELD_OUT, len(texts) > 1)])
    if not held:
        raise ValueError(
            f"the file {found.file} has no two prompts of one tag, of which one could be held "
            "out; add some, or give {train: FILE, test: FILE}"
        )
    return [p for p in found if p.text not in held], [p for p in found if p.text in held]


def register(files: Sequence[Path]) -> str:
    """Make a prompt set of one file, or of one to train on and one to evaluate on.

    Returns:
        Its name, which depends on the prompts alone: a file may be moved.

    Raises:
        ValueError: a file is wrong; one line that names it and the line.
    """
    parts = [read(file) for file in files]
    if len(parts) == 1:
        train, test = split(parts[0])
    else:
        train, test = parts
        for prompt in test:
            if prompt.text in parts[0].lines:
                raise ValueError(
                    f"{parts[1].place(prompt)} is also {parts[0].place(prompt)}; remove one of them"
                )
        if ("include" in train[0].row) != ("include" in test[0].row):
            raise ValueError(f"the files {files[0]} and {files[1]} should both have 'include'")
    content = f"{digest(train)} {digest(test)}"
    name = f"file-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    places = {prompt.text: part.place(prompt) for part in parts for prompt in part}
    prompt_sets.FROM_FILES[name] = PromptSet(
        train=lambda _: list(train),
        test=lambda _: list(test),
        assets=("shapes", "words", "hub"),
        metadata=("include",) if "include" in train[0].row else (),
        quotes=all(quoted(prompt.text) for prompt in (*train, *test)),
        files=tuple(map(str, files)),
        places=places,
    )
    return name
