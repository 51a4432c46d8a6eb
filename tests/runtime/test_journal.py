"""The journal stays valid JSON Lines when its writer is killed or the disk is full."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafs.runtime import journal
from tafs.runtime.journal import Journal

finite_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


@settings(max_examples=40)
@given(fields=st.dictionaries(st.text(max_size=5).filter(lambda k: k != "kind"), finite_json))
def test_records_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    Journal(path).append("start", **fields)
    (record,) = journal.read(path)
    assert record.pop("kind") == "start"
    assert isinstance(record["time"], float) or "time" in fields
    if "time" not in fields:
        del record["time"]
    assert record == fields


def test_a_record_is_one_line_although_its_text_has_several(path: Path) -> None:
    Journal(path).append("start", run="a\nb\u2028c\r\nd", time=1.5)
    assert path.read_bytes().count(b"\n") == 1
    assert journal.read(path) == [{"kind": "start", "time": 1.5, "run": "a\nb\u2028c\r\nd"}]


def test_numbers_that_json_cannot_hold_are_written_as_null(path: Path) -> None:
    Journal(path).append(
        "iteration", kl=math.nan, rewards={"toy": [math.inf, 1.0]}, seconds=(-math.inf, 2)
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record["kl"] is None
    assert record["rewards"] == {"toy": [None, 1.0]}
    assert record["seconds"] == [None, 2]


def test_an_object_that_is_not_json_leaves_the_file_unchanged(path: Path) -> None:
    Journal(path).append("start")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        Journal(path).append("iteration", reward=object())
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [1, 10, -1])
@pytest.mark.parametrize("lines", [0, 1])
def test_an_unfinished_last_line_is_skipped_and_replaced_by_the_next(
    path: Path, lines: int, kept: int
) -> None:
    path.parent.mkdir()
    path.touch()
    for _ in range(lines):
        Journal(path).append("iteration", iteration=0)
    whole = path.read_bytes()
    Journal(path).append("iteration", iteration=1)
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:kept])
    assert [r["iteration"] for r in journal.read(path)] == [0] * lines
    Journal(path).append("resume", iteration=1)
    assert [r["kind"] for r in journal.read(path)] == ["iteration"] * lines + ["resume"]


@pytest.mark.parametrize("broken", ['{"kind": "iter', "", "3", "[]", '{"time": 1.0}', "\0\0"])
def test_a_broken_line_before_the_last_is_named(path: Path, broken: str) -> None:
    Journal(path).append("start")
    with path.open("a") as file:
        file.write(broken + "\n")
    Journal(path).append("end")
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2: not "):
        journal.read(path)


def test_the_last_record_of_an_iteration_is_used(path: Path) -> None:
    log = Journal(path)
    log.append("start", run="a")
    for iteration, reward in [(0, 0.1), (1, 0.2), (2, 0.3)]:
        log.append("iteration", iteration=iteration, reward_std=reward)
    log.append("resume", iteration=1)
    log.append("iteration", iteration=1, reward_std=0.9)
    found = journal.iterations(path)
    assert [(r["iteration"], r["reward_std"]) for r in found] == [(0, 0.1), (1, 0.9), (2, 0.3)]


def test_a_full_disk_leaves_the_file_unchanged(path: Path) -> None:
    Journal(path).append("start")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError):
            Journal(path).append("iteration", rewards=[0.0] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_records_survive_a_killed_process(path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tafs.runtime.journal import Journal\n"
        "Journal(Path(sys.argv[1])).append('start'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, os.fspath(path)], check=False)
    assert done.returncode == -9
    assert [r["kind"] for r in journal.read(path)] == ["start"]
