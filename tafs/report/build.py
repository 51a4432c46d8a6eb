"""`python -m tafs.report.build ROOT`: every table and figure that ROOT/report_spec.json lists."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tafs.common import errors, locks

CLAIMS = Path("claims.yaml")


def main() -> None:
    if len(sys.argv) != 2:
        print("usage: python -m tafs.report.build ROOT", file=sys.stderr)
        sys.exit(2)
    root = Path(sys.argv[1])

    def wait(holder: str) -> None:
        print(f"compare {root}: waits for {holder}", file=sys.stderr, flush=True)

    def alone() -> None:
        with locks.held(root / ".locks" / "compare", wait):
            build(root)

    errors.run_cli("compare", alone)


def build(root: Path) -> None:
    """Write ROOT/tables, ROOT/provenance, ROOT/figures and ROOT/claims.* from ROOT/runs.

    Raises:
        ValueError, FileNotFoundError: an input is missing or broken; names it.
    """
    from tafs.report import claims, table_kinds
    from tafs.report.figures import plots
    from tafs.report.results import read_results
    from tafs.runtime import checkpoint

    stated = claims.read(CLAIMS)
    verdicts: list[claims.Verdict] = []
    random: set[str] = set()
    for spec in contents(root):
        names = dict.fromkeys(name for row in spec["rows"] for name in row["runs"])
        runs = [root / "runs" / name for name in names]
        table_kinds.write_table(spec, runs, root)
        for kind, name in spec["figures"].items():
            plots.draw(kind, name, spec, runs, root / "figures")
        results = read_results(runs)
        random = random.union(*(result.random_weights for result in results))
        own = [
            claim
            for claim in stated
            if claim.experiment == spec["name"] and not claim.methods & set(spec["without"])
        ]
        verdicts += [claims.assess_claim(claim, spec, results) for claim in own]
    judged = {verdict.claim.id for verdict in verdicts}
    untested = [claim for claim in stated if claim.id not in judged]
    verdicts += [claims.Verdict(claim, claims.NOT_TESTED, ()) for claim in untested]
    claims.write(verdicts, root.name, root, sorted(random))
    # The scores are final now: nothing is left to be continued.
    for kept in root.glob("runs/*/.judged"):
        checkpoint.clear(kept)


def contents(root: Path) -> list[dict[str, Any]]:
    """The tables of report_spec.json.

    Raises:
        ValueError, FileNotFoundError: it is missing or broken; names it.
    """
    file = root / "report_spec.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; snakemake writes it from config.yaml")
    try:
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["tables"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is no list of tables ({error})") from None
    return found


if __name__ == "__main__":
    main()
