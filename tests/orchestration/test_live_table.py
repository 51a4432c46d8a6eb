"""The live table: what it shows of the jobs' own reports and of Snakemake's log."""

import io
import logging

import pytest

from tafs.orchestration.live_table import LiveTable
from tafs.runtime.progress import Reporter

RUN = "tafs_grpo.preference.shapes-sd3.0"


def log(event: str, level: int = logging.INFO, msg: str = "", **facts) -> logging.LogRecord:
    """A record as Snakemake logs it."""
    return logging.makeLogRecord({"event": event, "levelno": level, "msg": msg, **facts})


def started(jobid: int = 1, stage: str = "train", run: str = RUN) -> logging.LogRecord:
    return log("job_info", jobid=jobid, rule_name=stage, wildcards={"run": run}, reason="")


@pytest.fixture
def table(tmp_path) -> LiveTable:
    return LiveTable(tmp_path, io.StringIO(), "scale smoke")


def said(table: LiveTable) -> str:
    return table.stream.getvalue()


def test_a_job_is_shown_with_its_own_progress_only(table):
    Reporter(table.runs / RUN, "train", total=7)  # of a job that was killed
    table.jobs.handle(started())
    assert table.lines()[1:] == [f"train  {RUN}"]
    reporter = Reporter(table.runs / RUN, "train", total=5, done=1)
    assert table.lines()[1:] == [f"train  {RUN}  1/5"]
    reporter.finish()
    assert table.lines()[1:] == [f"train  {RUN}"]


def test_finished_and_failed_jobs_leave_the_table(table):
    table.jobs.handle(started(1))
    table.jobs.handle(started(2))
    table.jobs.handle(log("job_finished", job_id=1))
    table.jobs.handle(log("progress", done=3, total=11))
    table.jobs.handle(log("error", logging.ERROR, "exit status 1", exception="RuleException"))
    table.jobs.handle(log("job_error", logging.ERROR, jobid=2, rule_name="train", log=[]))
    table.failed = 1
    [head] = table.lines()
    assert head.startswith("scale smoke")
    assert head.endswith("3 of 11 jobs done, 1 failed")
    assert said(table) == ""


def test_warnings_are_printed_and_other_lines_are_not(table):
    table.jobs.handle(log("", logging.INFO, "Select jobs to execute..."))
    table.jobs.handle(log("", logging.WARNING, "the disk is nearly full"))
    assert said(table) == "the disk is nearly full\n"


def test_snakemake_is_silent_while_the_table_is_shown_and_its_log_file_is_complete(table, tmp_path):
    logger = logging.Logger("snakemake", logging.INFO)
    screen = logging.StreamHandler(io.StringIO())
    file = logging.FileHandler(tmp_path / "snakemake.log")
    logger.addHandler(screen)
    logger.addHandler(file)
    table.start(logger)
    logger.info("Select jobs to execute...")
    logger.error("no space left")
    table.stop()
    logger.info("Elapsed time: 1 s")
    logger.error("At least one job did not complete successfully.")
    assert said(table) == "no space left\n"
    assert screen.stream.getvalue() == "At least one job did not complete successfully.\n"
    assert len((tmp_path / "snakemake.log").read_text().splitlines()) == 4


def test_without_a_terminal_the_table_is_printed_as_plain_lines(table):
    shown = []
    table.interval = 0.0
    table.say = lambda text: (shown.append(text), table._stop.set())
    table.jobs.handle(started())
    table.start(logging.Logger("snakemake"))
    table._thread.join()
    assert shown[0].splitlines()[1] == f"train  {RUN}"
    assert "\x1b" not in shown[0]
