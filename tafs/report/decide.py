"""Judges the claims at one look of `snakemake decide`: `python -m tafs.report.decide ROOT LOOK`.

ROOT/decide_spec.json lists the looks. Each one judges the claims that are still open with its own
number of seeds, at its share of 5 % (tafs/report/sequential.py). A claim that a look decides stays
decided. The last look writes ROOT/decisions.json and ROOT/decisions.md, the others ROOT/looks/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tafs.common import errors, files
from tafs.experiment import looks, needs
from tafs.experiment.claims import CLAIMS, Claim, read
from tafs.experiment.specs import DecideSpec
from tafs.report import claims, results, sequential
from tafs.report.results import LoadedTable
from tafs.report.sequential import ONCE
from tafs.runtime import receipts

Record = Mapping[str, Any]  # a claim's entry in the result of a look


def decide(root: Path, number: int) -> None:
    """Write the result of a look, counted from 1.

    Raises:
        ValueError, FileNotFoundError: an input is missing or broken; names it.
    """
    spec = DecideSpec.read(root / "decide_spec.json")
    if not 1 <= number <= len(spec.seeds):
        raise ValueError(f"look {number}: {root} has the looks 1 to {len(spec.seeds)}")
    file = looks.result(root, spec, number)
    last = number == len(spec.seeds)
    written = [file, *([file.with_suffix(".md")] if last else [])]
    stated = read(CLAIMS)
    with receipts.replacing(root, f"look_{number}", needs.look(root, spec, number), written):
        report = looks.report_spec(root, spec, number, stated)
        tables = results.load_tables(report.tables, root / "runs")
        random = {name for table in tables for one in table.results for name in one.random_weights}
        before = _before(root, spec, number, stated)
        found = judged(before, stated, tables, spec.seeds, number)
        outcome = {
            "scale": spec.scale,
            "looks": list(spec.seeds),
            "look": number,
            **({"random_weights": sorted(random)} if random else {}),
            "open": [one["id"] for one in found if one["open"]],
            "claims": found,
        }
        files.atomic_text(file, json.dumps(outcome, indent=1) + "\n")
        if last:
            files.atomic_text(written[-1], "\n".join(_text(outcome)) + "\n")


def _before(root: Path, spec: DecideSpec, number: int, stated: Sequence[Claim]) -> list[Record]:
    """What the look before has found; before the first one, all claims that can be tested are open.

    Raises:
        FileNotFoundError, ValueError: the result of the look before is missing or broken.
    """
    if number == 1:
        return [
            {
                **claim.model_dump(include={"id", "claim", "source"}),
                "verdict": claims.UNDECIDED if claim.id in spec.claims else claims.NOT_TESTED,
                "open": claim.id in spec.claims,
                "comparisons": [],
            }
            for claim in stated
        ]
    file = looks.result(root, spec, number - 1)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; `snakemake decide` writes it")
    try:
        return list(json.loads(file.read_bytes())["claims"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: not the result of a look; delete it") from None


def judged(
    before: Sequence[Record],
    stated: Sequence[Claim],
    tables: Sequence[LoadedTable],
    seeds: Sequence[int],
    number: int,
) -> list[Record]:
    """Every claim after a look: the decided ones as before, the open ones judged again.

    Args:
        before: every claim after the look before.
        tables: the rows that the open claims compare, with the seeds of this look.
        seeds: of all looks.
        number: of this look, counted from 1.
    """
    by_id = {claim.id: claim for claim in stated}
    return [
        _judged(one, by_id[one["id"]], tables, seeds, number) if one["open"] else one
        for one in before
    ]


def _judged(
    record: Record,
    claim: Claim,
    tables: Sequence[LoadedTable],
    seeds: Sequence[int],
    number: int,
) -> Record:
    table = next((table for table in tables if claims.is_testable(claim, table)), None)
    if table is None:
        return {**record, "verdict": claims.NOT_TESTED, "open": False}
    # Seeds tell nothing about a base model, so there is one look, at the whole level.
    judge = sequential.judge(seeds, number) if claim.trained else ONCE
    found = claims.assess_claim(claim, table, judge)
    level = 1 - judge.level
    spent = sequential.spent(seeds, number) if claim.trained else level
    undecided = found.verdict == claims.UNDECIDED
    return {
        **record,
        "verdict": found.verdict,
        "open": undecided and claim.trained and number < len(seeds),
        "look": number,
        "seeds": seeds[number - 1] if claim.trained else 1,
        "level": round(level, 6),
        "level_spent": round(spent, 6),
        "comparisons": [claims.recorded(comparison) for comparison in found.comparisons],
    }


def _text(outcome: Record) -> list[str]:
    """The lines of decisions.md."""
    *first, last = map(str, outcome["looks"])
    random = outcome.get("random_weights", [])
    lines = [
        f"The paper's claims at the scale `{outcome['scale']}`, looked at with "
        f"{' and '.join(filter(None, [', '.join(first), last]))} seeds until decided. All looks "
        "together are wrong about a claim in at most 5 % of cases: each has a level of its own, "
        "which its intervals show, and uses up a part of the 5 %. What would decide a claim is for "
        "one test at 5 % and a power of 80 %.",
        *([f"RANDOM WEIGHTS: {', '.join(random)}. These verdicts mean nothing."] if random else []),
        "",
        "| Claim | Source | Verdict | Look | Seeds | Level | Used up | Effects with intervals "
        "| What would decide it |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for one in outcome["claims"]:
        numbers = [str(one.get(key, "–")) for key in ("look", "seeds")]
        shares = [one.get(key) for key in ("level", "level_spent")]
        numbers += ["–" if share is None else f"{100 * share:.2f} %" for share in shares]
        cells = [claims.head(one), *numbers, claims.effects(one), claims.needed(one)]
        lines.append(" | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tafs.report.decide")
    parser.add_argument("root", type=Path, metavar="ROOT", help="results folder of a scale")
    parser.add_argument("look", type=int, metavar="LOOK", help="its number, from 1")
    given = parser.parse_args()
    errors.run_cli("decide", lambda: decide(given.root, given.look))


if __name__ == "__main__":
    main()
