"""The reports of running jobs, and the time left that follows from them."""

import json

import pytest

from tafs.runtime import progress
from tafs.runtime.progress import Reporter

RUN = "tafs_grpo.preference.shapes-sd3.0"


def record(**values) -> dict:
    defaults = {"stage": "train", "run": RUN, "total": 10, "done": 4, "first": 2, "note": "clip 60"}
    return {**defaults, "started": 100.0, "updated": 110.0, **values}


def test_a_job_is_active_from_its_start_until_it_finishes(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "MIN_INTERVAL", 0.0)
    reporter = Reporter(tmp_path / RUN, "train", total=5, done=1)
    reporter.advance("clip 61", steps=2)
    [found] = progress.active(tmp_path, reporter.record["started"])
    assert (found["stage"], found["run"], found["total"]) == ("train", RUN, 5)
    assert (found["done"], found["first"], found["note"]) == (3, 1, "clip 61")
    reporter.finish()
    assert progress.active(tmp_path, reporter.record["started"]) == []


def test_a_job_that_cannot_report_continues(tmp_path):
    (tmp_path / RUN).write_text("a file instead of the folder")
    reporter = Reporter(tmp_path / RUN, "train", total=5)
    reporter.advance()
    assert reporter.record["done"] == 1


def test_old_and_truncated_reports_are_ignored(tmp_path):
    file = Reporter(tmp_path / RUN, "train", total=5).file
    file.write_text(json.dumps(record(updated=110.0)))
    assert progress.active(tmp_path, 110.0 + progress.STALE) == []
    file.write_text('{"stage": "tra')
    assert progress.active(tmp_path, 110.0) == []


def test_time_left_follows_the_pace_since_the_start():
    """Two steps took ten seconds, so the other six take thirty from the last report on."""
    assert progress.seconds_left(record(), 110.0) == pytest.approx(30.0)
    assert progress.seconds_left(record(), 115.0) == pytest.approx(25.0)
    assert progress.seconds_left(record(), 999.0) == 0.0
    assert progress.seconds_left(record(done=2), 110.0) is None
    assert progress.cells(record(done=2), 110.0) == ("2/10", "", "clip 60")
    assert progress.cells(record(updated=210.0), 210.0) == ("4/10", "5:30 left", "clip 60")


def test_columns_are_as_wide_as_their_widest_cell():
    assert progress.aligned([("a", "bbb", "c"), ("aa", "b", "")]) == ["a   bbb  c", "aa  b"]
