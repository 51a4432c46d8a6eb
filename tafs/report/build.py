"""Builds every table, figure and claim, and the page: `python -m tafs.report.build ROOT`.

ROOT/report_spec.json says what is built. Every run is read once, and tables, figures and claims
share the loaded systems.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tafs.common import errors, locks
from tafs.experiment import needs
from tafs.experiment.claims import CLAIMS, read
from tafs.experiment.specs import ReportSpec
from tafs.report import claims, figures, formats, page, results, table_kinds, tables
from tafs.runtime import checkpoint, receipts


def build(root: Path) -> None:
    """Write ROOT/tables, provenance, figures, claims.* and report from ROOT/runs.

    Raises:
        ValueError, FileNotFoundError: an input is missing or broken; names it.
    """
    spec = ReportSpec.read(root / "report_spec.json")
    written: list[Path] = []
    with receipts.replacing(root, "compare", needs.report(root, spec), written):
        written += _write(root)
    # The scores are final: no evaluation has to be continued.
    for state in root.glob("runs/*/.eval_state"):
        checkpoint.clear(state)


def _write(root: Path) -> list[Path]:
    """Write all files of the report; return them."""
    stated = read(CLAIMS)
    report = results.load(root)
    verdicts: list[claims.Verdict] = []
    written: list[Path] = []
    # The paper's values are comparable with the paper's models only.
    published = report.scale == "paper"
    filled = []
    for table in report.tables:
        built = table_kinds.build(table)
        filled.append((built, tables.fill(built, published)))
        written += formats.write(*filled[-1], root, published)
        written += figures.draw(table, root / "figures")
        verdicts += [
            claims.assess_claim(claim, table)
            for claim in stated
            if claims.is_testable(claim, table)
        ]
    assessed = {verdict.claim.id for verdict in verdicts}
    untested = [claim for claim in stated if claim.id not in assessed]
    verdicts += [claims.Verdict(claim, claims.NOT_TESTED, ()) for claim in untested]
    written += claims.write(verdicts, report.scale, root, report.random_weights)
    return written + page.write(report, filled, verdicts, root)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tafs.report.build")
    parser.add_argument("root", type=Path, metavar="ROOT", help="results folder of a scale")
    root: Path = parser.parse_args().root

    def wait(holder: str) -> None:
        print(f"report {root}: waiting for {holder}", file=sys.stderr, flush=True)

    def alone() -> None:
        if not root.is_dir():  # the lock would create it
            raise FileNotFoundError(f"{root}: not found; give the results folder of a scale")
        with locks.held(root / ".locks" / "report", wait):
            build(root)

    errors.run_cli("report", alone)


if __name__ == "__main__":
    main()
