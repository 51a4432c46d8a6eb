"""Files of prompts: what is read, how it is split, and the one line that every mistake gets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafs.data import prompt_files
from tafs.data.geneval import evaluation_rows
from tafs.data.prompt_sets import prompt_set


def texts(name: str, split: str) -> list[str]:
    return [prompt.text for prompt in prompt_set(name).prompts(split, Path)]


def write(folder: Path, content: str | bytes, name: str = "own.txt") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_a_text_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    plain = write(tmp_path, "a cat\n\n  a dog \n舞蹈 😀\n")
    other = write(
        tmp_path,
        b"\xef\xbb\xbfa cat\r\n\r\na dog\r\n\xe8\x88\x9e\xe8\xb9\x88 \xf0\x9f\x98\x80",
        "b.txt",
    )
    assert [prompt.text for prompt in prompt_files.read(plain)] == ["a cat", "a dog", "舞蹈 😀"]
    # Its name depends on the prompts alone.
    assert prompt_files.register([plain]) == prompt_files.register([other])


def test_genevals_published_metadata_is_read(tmp_path: Path) -> None:
    rows = evaluation_rows()
    file = write(tmp_path, "\n".join(map(json.dumps, rows)), "own.jsonl")
    assert [prompt.row for prompt in prompt_files.read(file)] == rows
    found = prompt_set(prompt_files.register([file]))
    assert found.metadata
    train, test = (found.prompts(split, Path) for split in ("train", "test"))
    assert len(train) + len(test) == 553
    for tag in {row["tag"] for row in rows}:
        members = sum(row["tag"] == tag for row in rows)
        assert sum(prompt.tag == tag for prompt in test) == members // 5


@settings(max_examples=30)
@given(st.permutations([f"prompt {i}" for i in range(12)]))
def test_the_split_does_not_depend_on_the_order_of_the_lines(order: list[str]) -> None:
    found = prompt_files.Read(Path("own.txt"))
    found += [prompt_files.Prompt(text, {"prompt": text}) for text in order]
    train, test = prompt_files.split(found)
    texts = sorted(order, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert {prompt.text for prompt in test} == {*texts[:2]}
    assert sorted([p.text for p in [*train, *test]]) == sorted(order)
    assert [p.text for p in train] == [t for t in order if t not in {p.text for p in test}]


def test_two_files_are_the_split_that_they_say(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a\nb", "a.txt"), write(tmp_path, "c", "b.txt")
    name = prompt_files.register([a, b])
    assert (texts(name, "train"), texts(name, "test")) == (["a", "b"], ["c"])
    write(tmp_path, "a", "a.txt")
    write(tmp_path, "b\nc", "b.txt")
    assert prompt_files.register([a, b]) != name


def item(**fields: Any) -> str:
    return json.dumps(
        {"prompt": "a", "tag": "t", "include": [{"class": "cat", "count": 1}], **fields}
    )


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", "", "the file {} has no prompt; write one per line"),
        ("a.txt", " \n\n", "the file {} has no prompt; write one per line"),
        ("a.txt", "a\nb\n\na", "line 4 of {} repeats the prompt of line 1; remove one of them"),
        ("a.txt", b"a\xff", "the file {} is not UTF-8 text; save it as UTF-8"),
        ("a.txt", "a\nb\x1b[1m", "line 2 of {} has the control character '\\x1b'; remove it"),
        ("a.txt", "a\u2028b", "line 1 of {} has the control character '\\u2028'; remove it"),
        ("a.txt", "a", "the file {} has no two prompts of one tag, of which one could be held out"),
        ("a.jsonl", "{", "line 1 of {} is not a JSON object; write one per line"),
        ("a.jsonl", "[1]", "line 1 of {}"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2 of {}: unknown key 'text'"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "line 1 of {}"),
        ("a.jsonl", '{"prompt": " "}', "line 1 of {} has an empty prompt; remove the line"),
        (
            "a.jsonl",
            item(included=[]),
            "line 1 of {}: unknown key 'included'; did you mean",
        ),
        ("a.jsonl", item(include=[]), "line 1 of {}: include: list should have at least 1 item"),
        (
            "a.jsonl",
            item(include=[{"class": "cat"}]),
            "line 1 of {}: missing key 'include.0.c",
        ),
        (
            "a.jsonl",
            item(include=[{"class": "cat", "count": 1, "position": ["left of", 0]}]),
            "line 1 of {}: include.0.position does not name an earlier item",
        ),
        (
            "a.jsonl",
            item() + '\n{"prompt": "b"}',
            "line 2 of {} differs from line 1: only one has 'include'; give it to all prompts",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_line(
    tmp_path: Path, name: str, content: str | bytes, problem: str
) -> None:
    file = write(tmp_path, content, name)
    with pytest.raises(ValueError) as caught:
        prompt_files.register([file])
    assert str(caught.value).startswith(problem.replace("{}", str(file)))
    assert "\n" not in str(caught.value)


def test_a_prompt_in_both_files_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a\nb", "a.txt"), write(tmp_path, "c\nb", "b.txt")
    with pytest.raises(ValueError, match=f"^line 2 of {b} is also line 2 of {a}; remove one of th"):
        prompt_files.register([a, b])
    a.unlink()
    with pytest.raises(ValueError, match=f"^the file {a} cannot be read .No such file"):
        prompt_files.register([a, b])
