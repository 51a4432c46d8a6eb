"""The looks of `snakemake decide`: the claims that each one judges, from which runs.

The result of a look names the claims that are still open, and the next look needs the runs of
these alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tafs.experiment.claims import Claim
from tafs.experiment.specs import DecideSpec, ReportSpec, TableSpec


def result(root: Path, spec: DecideSpec, look: int) -> Path:
    """The file of a look, counted from 1; the last one is the whole outcome."""
    last = look == len(spec.seeds)
    return root / "decisions.json" if last else root / "looks" / f"{look}.json"


def open_claims(root: Path, spec: DecideSpec, look: int) -> tuple[str, ...]:
    """The claims that a look judges; () if there is no result of the look before.

    Args:
        root: the results folder of the scale.
    """
    if look == 1:
        return spec.claims
    try:
        return tuple(json.loads(result(root, spec, look - 1).read_bytes())["open"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def report_spec(root: Path, spec: DecideSpec, look: int, claims: Sequence[Claim]) -> ReportSpec:
    """The rows that the open claims compare, with the seeds of a look."""
    names = open_claims(root, spec, look)
    judged = [claim for claim in claims if claim.id in names]
    return ReportSpec(scale=spec.scale, tables=narrowed(spec.tables, judged, spec.seeds[look - 1]))


def narrowed(
    tables: Sequence[TableSpec], claims: Sequence[Claim], seeds: int
) -> tuple[TableSpec, ...]:
    """The rows that claims name, with their first so many seeds."""
    found = []
    for table in tables:
        own = [claim for claim in claims if claim.experiment == table.name]
        names = [name for claim in own for test in claim.tests.values() for name in test.named]
        named = {row for name in names for row in name.among(table)}
        rows = [
            row.model_copy(update={"runs": row.runs[:seeds]}) for row in table.rows if row in named
        ]
        if rows:
            found.append(table.model_copy(update={"rows": tuple(rows)}))
    return tuple(found)
