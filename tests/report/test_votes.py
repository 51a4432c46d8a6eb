"""Win rates of blind votes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tafs import cli
from tafs.report import votes


def vote(prompt: int, left: str, right: str, winner: str) -> dict[str, Any]:
    own = {"prompt": f"prompt {prompt}", "task": "colors", "nfe": 4, "winner": winner}
    return {**own, "left": left, "right": right, "left_run": f"{left}.0", "right_run": f"{right}.0"}


def saved(file: Path, cast: list[dict[str, Any]], **fields: Any) -> Path:
    content = {"kind": "tafs votes", "scale": "shapes", "votes": cast, **fields}
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def run(*files: Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["votes", *map(str, files)])
    return int(ended.value.code or 0)


def test_votes_of_several_people_become_win_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [vote(i, "a", "b", "left" if i < 6 else "tie") for i in range(8)]
    second = [vote(i, "b", "a", "left") for i in range(2)] + [vote(0, "b", "c", "right")]
    files = saved(tmp_path / "1.json", first), saved(tmp_path / "2.json", second)
    assert run(*files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "11 votes on 8 prompts; ties count half"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "c",
        "a",
        "b",
        "c over b",
        "a over b",
    ]
    assert "c: 100 % of 1 vote" in lines  # no interval of one prompt
    assert lines[2].startswith("a: 70 % [") and lines[2].endswith("] of 10 votes")
    assert run(*files, Path("--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["votes"], found["prompts"]) == (11, 8)
    assert found["systems"][0] == {"system": "c", "votes": 1, "rate": 1, "low": None, "high": None}
    assert [(one["system"], one["over"]) for one in found["pairs"]] == [("c", "b"), ("a", "b")]


def test_the_interval_is_that_of_prompts() -> None:
    """Repeating every vote tells nothing about other prompts."""
    cast = [votes.Vote(**vote(i, "a", "b", "left" if i % 3 else "right")) for i in range(30)]
    once, often = votes.win_rate(cast, "a"), votes.win_rate(cast * 5, "a")
    assert once.value == often.value == pytest.approx(2 / 3)
    assert (once.low, once.high) == pytest.approx((often.low, often.high))
    assert 0 <= once.low < once.value < once.high <= 1
    assert votes.win_rate(cast, "b").value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a file of votes"),
        ('{"kind": "other"}', "is not a file of votes"),
        ('{"kind": "tafs votes", "scale": "s", "votes": []}', "is not a file of votes"),
        (None, "not found; save votes in the report's gallery"),
    ],
)
def test_a_file_without_votes_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    file = tmp_path / "votes.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert run(file) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"tafs votes: {file}: {said}") and message.count("\n") == 1


def test_votes_of_two_scales_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cast = [vote(0, "a", "b", "tie")]
    files = saved(tmp_path / "1", cast), saved(tmp_path / "2", cast, scale="paper")
    assert run(*files) == 2
    assert "of the scales paper, shapes; give files of one scale" in capsys.readouterr().err
