"""What a person sees of a running workflow."""

import io
import json
import logging
from pathlib import Path

import pytest

from tafs.orchestration import live_table
from tafs.orchestration.live_table import Watcher
from tafs.runtime import progress
from tafs.runtime.progress import Reporter

RUN = "tafs_grpo.preference.shapes-sd3.0"


def record(**values) -> dict:
    defaults = {"stage": "train", "run": RUN, "total": 10, "done": 4, "first": 2, "note": "clip 60"}
    return {**defaults, "started": 100.0, "updated": 110.0, **values}


def report(runs: Path, **values) -> Path:
    file = runs / RUN / progress.FOLDER / "train.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(record(**values)))
    return file


def log(event: str, level: int = logging.INFO, msg: str = "", **facts) -> logging.LogRecord:
    """A record as Snakemake logs it."""
    return logging.makeLogRecord({"event": event, "levelno": level, "msg": msg, **facts})


def started(jobid: int = 1, stage: str = "train", run: str = RUN) -> logging.LogRecord:
    return log("job_info", jobid=jobid, rule_name=stage, wildcards={"run": run})


# -- the jobs' own account -------------------------------------------------------------------------


def test_a_job_is_active_until_it_is_finished(tmp_path):
    reporter = Reporter(tmp_path / RUN, "train", total=5)
    [found] = progress.active(tmp_path, reporter.record["started"])
    assert (found["stage"], found["run"], found["done"], found["total"]) == ("train", RUN, 0, 5)
    reporter.finish()
    assert progress.active(tmp_path, reporter.record["started"]) == []


def test_a_step_is_reported_with_its_note(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "MIN_INTERVAL", 0.0)
    reporter = Reporter(tmp_path / RUN, "train", total=5, done=1)
    reporter.advance("clip 61", steps=2)
    [found] = progress.active(tmp_path, reporter.record["started"])
    assert (found["done"], found["first"], found["note"]) == (3, 1, "clip 61")


def test_a_job_that_cannot_report_goes_on(tmp_path):
    (tmp_path / RUN).write_text("a file where the folder belongs")
    reporter = Reporter(tmp_path / RUN, "train", total=5)
    reporter.advance()
    assert reporter.record["done"] == 1


def test_a_job_that_has_long_been_silent_is_not_active(tmp_path):
    report(tmp_path, updated=110.0)
    assert progress.active(tmp_path, 110.0 + progress.STALE) == []


def test_a_report_that_is_cut_short_is_ignored(tmp_path):
    report(tmp_path).write_text('{"stage": "tra')
    assert progress.active(tmp_path, 110.0) == []


# -- time left -------------------------------------------------------------------------------------


def test_time_left_follows_the_pace_since_the_start():
    """Two steps in ten seconds leave thirty for the other six, counted from the last step."""
    assert progress.seconds_left(record(), 110.0) == pytest.approx(30.0)
    assert progress.seconds_left(record(), 115.0) == pytest.approx(25.0)
    assert progress.seconds_left(record(), 999.0) == 0.0


def test_time_left_is_unknown_before_the_first_step():
    assert progress.seconds_left(record(done=2), 110.0) is None
    assert progress.cells(record(done=2), 110.0) == ("2/10", "", "clip 60")


def test_a_job_shows_its_steps_its_time_left_and_its_note():
    assert progress.cells(record(updated=210.0), 210.0) == ("4/10", "5:30 left", "clip 60")


def test_columns_are_as_wide_as_their_widest_cell():
    assert progress.aligned([("a", "bbb", "c"), ("aa", "b", "")]) == ["a   bbb  c", "aa  b"]
    assert progress.aligned([]) == []


# -- Snakemake's account ---------------------------------------------------------------------------


@pytest.fixture
def watcher(tmp_path) -> Watcher:
    return Watcher(tmp_path, io.StringIO(), "scale smoke")


def said(watcher: Watcher) -> str:
    return watcher.stream.getvalue()


def test_a_started_job_is_shown_before_it_reports(watcher):
    watcher.jobs.handle(started())
    assert watcher.lines()[1:] == [f"train  {RUN}"]


def test_a_reporting_job_is_shown_with_its_progress(watcher):
    watcher.jobs.handle(started())
    reporter = Reporter(watcher.runs / RUN, "train", total=5, done=1)
    assert watcher.lines()[1] == f"train  {RUN}  1/5"
    reporter.finish()
    assert watcher.lines()[1] == f"train  {RUN}"


def test_a_killed_jobs_report_is_not_shown_as_its_successors(watcher):
    Reporter(watcher.runs / RUN, "train", total=5, done=1)
    watcher.jobs.handle(started())
    assert watcher.lines()[1] == f"train  {RUN}"


def test_finished_jobs_leave_the_table_and_are_counted(watcher):
    watcher.jobs.handle(started())
    watcher.jobs.handle(log("job_finished", job_id=1))
    watcher.jobs.handle(log("progress", done=3, total=11))
    [head] = watcher.lines()
    assert head.startswith("scale smoke") and head.endswith("3 of 11 jobs done")


def test_a_failed_job_leaves_the_table(watcher):
    watcher.jobs.handle(started())
    watcher.jobs.handle(log("error", logging.ERROR, "exit status 1", exception="RuleException"))
    watcher.jobs.handle(log("job_error", logging.ERROR, jobid=1, rule_name="train", log=[]))
    assert len(watcher.lines()) == 1
    assert said(watcher) == ""


def test_a_failure_is_told_by_its_reason_or_by_the_last_line_of_its_log(tmp_path):
    output = tmp_path / "train.log"
    output.write_text("Traceback ...\nValueError: no prompts\n\n")
    told = live_table.failure("FAILED", "train", RUN, [str(output)], "no prompts at all")
    assert told == f"FAILED train {RUN} ({output})\n    no prompts at all"
    told = live_table.failure("FAILED", "train", RUN, [str(output)], "")
    assert told == f"FAILED train {RUN} ({output})\n    ValueError: no prompts"


@pytest.mark.parametrize("logs", [[], ["gone.log"]])
def test_a_failed_job_without_output_is_named_too(logs):
    told = live_table.failure("FAILED", "compare", "", logs, "")
    assert told == f"FAILED compare ({logs[0] if logs else 'no log'})\n    no output"


def test_warnings_are_passed_on_and_other_lines_are_not(watcher):
    watcher.jobs.handle(log("", logging.INFO, "Select jobs to execute..."))
    watcher.jobs.handle(log("", logging.WARNING, "the disk is nearly full"))
    assert said(watcher) == "the disk is nearly full\n"


def test_the_screen_is_taken_over_and_given_back_and_the_log_file_keeps_everything(
    watcher, tmp_path
):
    logger = logging.Logger("snakemake", logging.INFO)
    screen = logging.StreamHandler(io.StringIO())
    file = logging.FileHandler(tmp_path / "snakemake.log")
    logger.addHandler(screen)
    logger.addHandler(file)
    watcher.start(logger)
    logger.info("Select jobs to execute...")
    logger.error("no space left")
    watcher.stop()
    logger.info("Elapsed time: 1 s")
    logger.error("At least one job did not complete successfully.")
    assert said(watcher) == "no space left\n"
    assert screen.stream.getvalue() == "At least one job did not complete successfully.\n"
    assert len((tmp_path / "snakemake.log").read_text().splitlines()) == 4


def test_a_stream_that_is_no_terminal_gets_the_table_as_plain_lines(watcher):
    printed = watcher.say
    shown = []
    watcher.interval = 0.0
    watcher.say = lambda text: (shown.append(text), printed(text), watcher._stop.set())
    watcher.jobs.handle(started())
    logger = logging.Logger("snakemake")
    watcher.start(logger)
    watcher._thread.join()
    assert shown[0].splitlines()[1] == f"train  {RUN}"
    assert "\x1b" not in said(watcher)
