"""Shared set-up: one thread, so that sums do not depend on the machine; how often faults are tried.

`--torture` tries every fault as often as results/reference/reliability.md says, which takes longer
than tests should; without it a few trials of each stand for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

import tafs.common.torchvision_patch  # noqa: F401 - before any test imports diffusers

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None)  # none depends on the machine's pace
hypothesis.settings.load_profile("tests")

TRIALS = "trials"
Trials = Callable[[str, int, int], Iterator[int]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("reliability")
    group.addoption("--torture", action="store_true", help="try every fault as often as is kept")
    group.addoption("--reliability", type=Path, metavar="FILE", help="write the table of trials")


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    """Numbers the trials of a fault, and counts those whose body ended well.

    `for number in trials("kill -9 of training", few, many): ...` runs `few` times, and `many` with
    --torture. What is asserted in the body is what "survived" means. Where `few` is 0 the
    test is skipped without --torture.
    """
    counts: list[list[str | int]] = []

    def numbered(fault: str, few: int, many: int) -> Iterator[int]:
        times = many if request.config.getoption("--torture") else few
        if not times:
            pytest.skip("only with --torture")
        row: list[str | int] = [fault, 0, 0]
        counts.append(row)
        for number in range(times):
            row[1] = number + 1
            yield number
            row[2] = number + 1

    yield numbered
    # Reports carry it from the processes that run tests to the one that prints.
    request.node.user_properties.append((TRIALS, counts))


class Reliability:
    """The table of all trials: attempted, survived, lost."""

    def __init__(self, config: pytest.Config) -> None:
        self.file: Path | None = config.getoption("--reliability")
        self.rows: dict[str, list[int]] = {}
        self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.skipped += report.skipped
        if report.when != "teardown":
            return
        for name, counts in report.user_properties:
            for fault, attempted, survived in counts if name == TRIALS else ():
                row = self.rows.setdefault(fault, [0, 0])
                row[0] += attempted
                row[1] += survived

    def lines(self) -> list[str]:
        """A Markdown table."""
        head = ["| fault | attempted | survived | lost |", "|---|---:|---:|---:|"]
        return head + [
            f"| {fault} | {attempted} | {survived} | {attempted - survived} |"
            for fault, (attempted, survived) in sorted(self.rows.items())
        ]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.rows:
            return
        terminalreporter.section("trials")
        for line in self.lines():
            terminalreporter.write_line(line)
        if self.file:
            skipped = f"\n{self.skipped} tests were skipped.\n" if self.skipped else ""
            text = "# Faults\n\n`make torture ARGS='--reliability FILE'` writes this table.\n\n"
            self.file.write_text(text + "\n".join(self.lines()) + "\n" + skipped)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not in one of several processes that run tests
        config.pluginmanager.register(Reliability(config))
