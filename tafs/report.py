"""`python -m tafs.report ROOT RUN_JSON...`: every table and figure of the given runs."""

from __future__ import annotations

import sys
from pathlib import Path

from tafs import rundir


def main() -> None:
    rundir.fail_in_one_line(
        "compare", lambda: build(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]])
    )


def build(root: Path, descriptions: list[Path]) -> None:
    """Write ROOT/tables and ROOT/figures.

    Raises:
        ValueError, FileNotFoundError: an input is missing or broken; names it.
    """
    from tafs import figures, tables

    runs = [file.parent for file in descriptions]
    settings = rundir.RunDir(runs[0]).description["settings"]
    evaluation = settings["evaluation"]
    captions = [p.text for p in rundir.test_prompts(settings["world"], evaluation["prompts"])]
    # As in the paper: every method at its few steps; Figure 4 shows the others.
    tables.table2(runs, root / "tables", few_steps=evaluation["table_nfe"][:1])
    figures.figure4(runs, root / "figures")
    figures.learning_curves(runs, root / "figures")
    figures.image_grid(runs, root / "figures", captions=captions)


if __name__ == "__main__":
    main()
