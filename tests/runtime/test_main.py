"""The entry point of all stages: options, one-line failures and their notes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tafs.common import errors
from tafs.runtime import gpus, main
from tafs.runtime.run_dir import RunDir, read_json


@pytest.fixture
def run(tmp_path) -> RunDir:
    (tmp_path / "run.json").write_text(json.dumps({"method": "x", "assets": {"device": "cpu"}}))
    return RunDir(tmp_path)


def call(run: RunDir, work: main.Work, monkeypatch, *options: str) -> int:
    """Run a stage and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run.folder), *options])
    try:
        main.run_stage("evaluate", work)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_the_options_give_the_time_limit(run, monkeypatch):
    found = []
    call(run, lambda *given: found.append(given[1]), monkeypatch, "--minutes=10", "--started=1000")
    call(run, lambda *given: found.append(given[1]), monkeypatch, "--minutes=0")
    assert (found[0].limit, found[0].started, found[1].limit) == (600.0, 1000.0, None)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a: wrong"), 2, "a: wrong"),
        (FileNotFoundError("b: not found"), 2, "b: not found"),
        (errors.RunFailed("c"), 1, "c"),
        (OSError(28, "No space left"), 1, "[Errno 28] No space left"),
        (errors.ToBeContinued("saved"), 75, "saved"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nmore"),
            1,
            "out of GPU memory; use gradient_checkpointing, a lower resolution or a larger GPU "
            "(CUDA out of memory.)",
        ),
    ],
)
def test_a_failure_is_one_line_an_exit_code_and_a_note(error, code, line, run, monkeypatch, capsys):
    def work(*_):
        raise error

    assert call(run, work, monkeypatch) == code
    assert capsys.readouterr().err == f"evaluate {run.folder}: {line}\n"
    note = read_json(run.failure("evaluate"))
    assert (note["exit"], note["message"], note["seen"]) == (code, line, False)
    assert call(run, lambda *_: None, monkeypatch) == 0
    assert not run.failure("evaluate").exists()


def test_a_programming_error_keeps_its_traceback_and_is_noted(run, monkeypatch):
    def work(*_):
        raise KeyError("x")

    with pytest.raises(KeyError):
        call(run, work, monkeypatch)
    assert read_json(run.failure("evaluate"))["message"] == "KeyError: 'x'"


def test_only_stages_on_a_gpu_claim_one(run, monkeypatch):
    claimed = []
    monkeypatch.setattr(gpus, "claim", claimed.append)
    call(run, lambda *_: None, monkeypatch)
    assert claimed == []
    (run.folder / "run.json").write_text(json.dumps({"assets": {"device": "cuda"}}))
    call(run, lambda *_: None, monkeypatch)
    assert claimed == [1]


def test_a_missing_run_is_named(run, monkeypatch, capsys):
    missing = RunDir(run.folder / "none")
    assert call(missing, lambda *_: None, monkeypatch) == 2
    assert "none: not found; snakemake writes it" in capsys.readouterr().err
