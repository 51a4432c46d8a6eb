"""The results of `tafs evaluate` as lists, one for each protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tafs import cli
from tafs.common.yaml_files import ConfigError
from tafs.report import evaluations


def write(folder: Path, name: str, adapter: str = "", **changes: Any) -> None:
    """An evaluation of an adapter, whose base model scores 10 less, or of the model."""

    def numbers(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 1, "high": value + 1, "n_images": 9, "n_missing": 0}

    values = changes.pop("values", {"clip": 50.0})
    base = {"base": True} if adapter else {}
    record = {
        "judged": name,
        "protocol": {"name": "small", "sha256": "5a" * 32},
        "model": {"name": "shapes-flux", "sha256": "b0" * 32},
        "adapter": {"sha256": adapter} if adapter else None,
        "nfe": 4,
        "sampler": "anneal",
        "base_sampler": "ode",
        "random_weights": [],
        "metrics": {
            metric: numbers(value) | ({"base": numbers(value - 10)} if base else {})
            for metric, value in values.items()
        },
    }
    out = folder / f"{len(list(folder.iterdir()))}"
    out.mkdir()
    (out / "evaluation.json").write_text(json.dumps(record | changes))


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["leaderboard", *map(str, arguments)])
    assert ended.value.code == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_evaluations_are_listed_under_their_protocols_with_their_base_models(tmp_path, capsys):
    other = {"name": "small", "sha256": "c3" * 32}  # the same file, with another seed
    write(tmp_path, "mine", "aa" * 32, values={"clip": 62.0, "saturation": 3.0})
    write(tmp_path, "mine", "dd" * 32, values={"clip": 50.0, "saturation": 4.0})
    write(tmp_path, "theirs", protocol=other, random_weights=["flux-dev"])
    first = f"protocol small, SHA-256 {'5a' * 32}, by clip"
    head = "rank system steps model clip 95 % interval"
    assert printed(capsys, tmp_path) == [
        first,
        head,
        "1 mine aaaaaaaa 4 shapes-flux 62.00 [61.00, 63.00]",
        "2 shapes-flux 4 shapes-flux 52.00 [51.00, 53.00]",
        "3 mine dddddddd 4 shapes-flux 50.00 [49.00, 51.00]",
        f"protocol small, SHA-256 {'c3' * 32}, by clip",
        head,
        "1 theirs (random weights) 4 shapes-flux 50.00 [49.00, 51.00]",
    ]
    assert len(printed(capsys, tmp_path, "--metric", "saturation")) == 5  # of one protocol
    found = json.loads("\n".join(printed(capsys, tmp_path, "--json")))
    assert [len(one["rows"]) for one in found["protocols"]] == [3, 1]
    assert found["protocols"][0]["rows"][1]["sampler"] == "ode"


def test_a_base_model_that_was_judged_alone_has_one_row(tmp_path):
    write(tmp_path, "The model")
    write(tmp_path, "mine", "aa" * 32)
    write(tmp_path, "The model")
    [found] = evaluations.read(tmp_path)
    assert [row["row"] for row in found.board.rows] == ["The model", "mine"]
    assert found.board.rows[0]["metrics"]["clip"]["value"] == 50


def test_unknown_protocols_and_metrics_and_other_files_are_named(tmp_path):
    assert not evaluations.holds(tmp_path)
    write(tmp_path, "mine")
    assert evaluations.holds(tmp_path) and evaluations.read(tmp_path, "small", "clip")
    with pytest.raises(ConfigError, match="--table: .* has no 'smalll'; did you mean 'small'?"):
        evaluations.read(tmp_path, "smalll")
    with pytest.raises(ConfigError, match="unknown metric 'clipp'; did you mean 'clip'?"):
        evaluations.read(tmp_path, metric="clipp")
    (tmp_path / "0" / "evaluation.json").write_text('{"settings": []}')
    with pytest.raises(ValueError, match="0/evaluation.json: is not an evaluation of this version"):
        evaluations.read(tmp_path)
