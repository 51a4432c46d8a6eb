"""The journal stays valid JSON Lines when its writer is killed or the disk is full."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from support.killable_training import Process, largest_file

from tafs.runtime import journal
from tafs.runtime.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def test_a_record_is_read_as_it_was_written_and_is_one_line(path: Path) -> None:
    fields = {"run": "a\nb\u2028c\r\nd", "time": 1.5, "values": [0.1 + 0.2, 2**70, None, True, {}]}
    Journal(path).append("start", **fields)
    assert path.read_bytes().count(b"\n") == 1
    assert journal.read(path) == [{"kind": "start", **fields}]


def test_numbers_that_json_cannot_hold_are_written_as_null(path: Path) -> None:
    values = {"kl": math.nan, "rewards": {"toy": [math.inf, 1.0]}, "seconds": (-math.inf, 2)}
    Journal(path).append("iteration", time=0, **values)
    before = path.read_text()
    text = '"time": 0, "kl": null, "rewards": {"toy": [null, 1.0]}, "seconds": [null, 2]'
    assert before == f'{{"kind": "iteration", {text}}}\n'
    with pytest.raises(TypeError):
        Journal(path).append("iteration", reward=object())
    assert path.read_text() == before


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
    with largest_file(len(before) + 20), pytest.raises(OSError):
        Journal(path).append("iteration", rewards=[0.0] * 100)
    assert path.read_bytes() == before


def test_records_survive_a_killed_process(path: Path) -> None:
    def work() -> None:
        Journal(path).append("start")
        os.kill(os.getpid(), 9)

    assert Process(work).wait() == -9
    assert [r["kind"] for r in journal.read(path)] == ["start"]
