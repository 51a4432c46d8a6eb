"""Compares base models with published values: `python -m tafs.report.base_check ROOT SPEC`.

Trainings wait for this check. A base model that scores otherwise than published has another
sampler, size, prompt set or reward, and so would everything that is trained from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tafs.common import errors, files
from tafs.experiment import needs
from tafs.experiment.specs import BaseCheckSpec
from tafs.report import results, table_kinds, tables
from tafs.runtime import receipts


def check(root: Path, spec: BaseCheckSpec) -> None:
    """Write ROOT/base_check.json: every published value of a base model beside its own.

    Values agree if they differ by at most `spec.within` of the published one, or if the published
    one is in the 95 % interval. Randomly initialised models are not compared.

    Raises:
        RunFailed: values of a model that is not accepted do not agree; names them.
        ValueError, FileNotFoundError: an input is missing or broken; names it.
    """
    out = root / "base_check.json"
    with receipts.replacing(root, "check_base", needs.base_check(root, spec), [out]):
        loaded = results.load_tables(spec.tables, root / "runs")
        random = results.Report("", tuple(loaded)).random_weights
        found = [] if random else [one for table in loaded for one in compared(table, spec.within)]
        wrong = [one for one in found if not (one["agrees"] or one["model"] in spec.accepted)]
        if wrong:
            said = "; ".join(
                f"{one['model']}: {one['metric']} {one['value']:.4g}, published "
                f"{one['published']:.4g} ({one['table']})"
                for one in wrong
            )
            names = ", ".join(dict.fromkeys(one["model"] for one in wrong))
            raise errors.RunFailed(
                f"{said}; find out why before anything is trained, or set accept_base: [{names}] "
                "in the scale"
            )
        record = {
            **spec.model_dump(include={"within", "accepted"}),
            "random_weights": random,
            "values": found,
        }
        files.atomic_text(out, json.dumps(record, indent=1) + "\n")


def compared(loaded: results.LoadedTable, within: float) -> list[dict[str, Any]]:
    """Every cell for which the paper prints a value, with whether the two agree."""
    table = table_kinds.build(loaded)
    found = []
    for line in tables.fill(table, published=True):
        for column, cell in zip(table.columns, line.cells, strict=True):
            if cell.published is None or cell.estimate is None or cell.value is None:
                continue
            printed, own = float(cell.published), cell.estimate
            near = abs(cell.value - printed) <= within * abs(printed)
            found.append(
                {
                    "table": table.name,
                    "model": line.row.spec.backbone,
                    "metric": column.title,
                    "published": printed,
                    "value": cell.value,
                    "low": own.low,
                    "high": own.high,
                    "agrees": near or own.low <= printed <= own.high,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tafs.report.base_check")
    parser.add_argument("root", type=Path, metavar="ROOT", help="results folder of a scale")
    parser.add_argument("spec", metavar="SPEC", help="JSON of BaseCheckSpec")
    given = parser.parse_args()
    errors.run_cli(
        "check_base",
        lambda: check(given.root, BaseCheckSpec.model_validate_json(given.spec)),
    )


if __name__ == "__main__":
    main()
