"""`tafs claims`, `compare`, `leaderboard`, `report` and `votes`: what the workflow found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tafs.cli import output
from tafs.cli.app import app, command
from tafs.cli.options import JsonOption, ResultsOption, ScaleOption, overrides
from tafs.common.errors import RunFailed

if TYPE_CHECKING:
    from tafs.report.leaderboard import Board

TableOption = Annotated[
    str | None,
    typer.Option("--table", metavar="NAME", help="table2, gains, ...; default: the headline."),
]
FolderArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[FOLDER]", help="With tables/; default: that of the scale."),
]


@command(app, ["tafs claims", "tafs claims --power", "tafs claims --json"])
def claims(
    scale: ScaleOption = None,
    results: ResultsOption = None,
    power: Annotated[
        bool,
        typer.Option(
            "--power",
            help="Also what each comparison shows with a power of 80 %, and the seeds it needs.",
        ),
    ] = False,
    json_wanted: JsonOption = False,
) -> int:
    """Show the verdicts on the paper's claims."""
    from tafs import experiment

    file = experiment.load(overrides(scale=scale, results=results)).root / "claims.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; the workflow's rule compare writes it")
    signs = {1: "supports", -1: "contradicts", 0: "open"}
    try:
        lines = []
        judged = json.loads(file.read_bytes())
        for claim in judged:
            lines.append(f"{claim['id']}: {claim['verdict']}")
            for found in claim["comparisons"] if power else ():
                half = "?" if found["half_width"] is None else f"{found['half_width']:.3g}"
                said = "; ".join(filter(None, [signs[found["supports"]], found["needed"]]))
                lines.append(f"  {found['value']:+.3g} +- {half}  {found['what']} ({said})")
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file}: not the claims of this version; build the report again"
        ) from None
    if json_wanted:
        output.as_json(judged)
    else:
        print("\n".join(lines))
    return 0


def _tables(
    folder: Path | None, scale: str | None, results: str | None
) -> tuple[Path, dict[str, Any]]:
    """(the folder that holds tables/, the kind of each experiment of config.yaml)."""
    from tafs import experiment

    plan = experiment.load(overrides(scale=scale, results=results))
    ordered = {name: plan.config.experiments[name].kind for name in plan.config.active.experiments}
    return plan.root if folder is None else folder, ordered


@command(
    app,
    ["tafs compare --scale shapes", "tafs compare results/reference --table table2"],
)
def compare(
    folder: FolderArgument = None,
    scale: ScaleOption = None,
    results: ResultsOption = None,
    table: TableOption = None,
    json_wanted: JsonOption = False,
) -> int:
    """Print a finished table with 95 % intervals.

    `*` marks a value that is surely the best of its column.
    """
    from tafs.report import leaderboard

    root, kinds = _tables(folder, scale, results)
    board = leaderboard.headline(root, kinds, table)
    if json_wanted:
        output.as_json({"folder": str(root), "table": board.name, "rows": board.rows})
        return 0
    cells = [
        [
            *(row["row"], str(row["nfe"])),
            *(" ".join(leaderboard.shown(c, row["metrics"][c])).strip() for c in board.columns),
        ]
        for row in board.rows
    ]
    print(f"{board.name} of {root}")
    output.table(["system", "steps", *board.columns], cells, right=("steps",))
    return 0


@command(
    app,
    [
        "tafs leaderboard --scale shapes",
        "tafs leaderboard results/reference --metric clip",
        "tafs leaderboard results/evaluations --metric clip",
    ],
)
def leaderboard(
    folder: FolderArgument = None,
    scale: ScaleOption = None,
    results: ResultsOption = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="NAME", help="Default: the gains on all metrics."),
    ] = None,
    table: TableOption = None,
    json_wanted: JsonOption = False,
) -> int:
    """Print the systems sorted by a metric.

    FOLDER may also hold evaluations of `tafs evaluate`: each protocol has a list of its own, and
    --table names a protocol.
    """
    from tafs.report import evaluations
    from tafs.report import leaderboard as boards

    if folder is not None and evaluations.holds(folder):
        return _evaluations(folder, table, metric, json_wanted)
    root, kinds = _tables(folder, scale, results)
    board, column = boards.ranking(root, kinds, table, metric)
    if json_wanted:
        content = {"folder": str(root), "table": board.name, "metric": column, "rows": board.rows}
        output.as_json(content)
        return 0
    print(f"{board.name} of {root}, by {column}")
    _print_ranks(board, column)
    return 0


def _evaluations(folder: Path, protocol: str | None, metric: str | None, json_wanted: bool) -> int:
    """Print the evaluations of a folder, or of one protocol."""
    from tafs.report import evaluations

    content = []
    for judged in evaluations.read(folder, protocol, metric):
        column, board = judged.by(metric)
        own = {"protocol": judged.protocol, "sha256": judged.sha256, "metric": column}
        content.append({**own, "rows": board.rows})
        if not json_wanted:
            print(f"protocol {judged.protocol}, SHA-256 {judged.sha256}, by {column}")
            _print_ranks(board, column, model=True)
    if json_wanted:
        output.as_json({"folder": str(folder), "protocols": content})
    return 0


def _print_ranks(board: Board, column: str, model: bool = False) -> None:
    """Print a sorted board; `model`: with the models that its systems are made of."""
    from tafs.report import leaderboard as boards

    cells = []
    for place, row in enumerate(board.rows, 1):
        numbers = row["metrics"][column]
        seeds = "" if numbers["n_seeds"] is None else str(numbers["n_seeds"])
        shown = boards.shown(column, numbers)
        own = [row["backbone"]] if model else [seeds]
        cells.append([str(place), row["row"], str(row["nfe"]), *own, *shown])
    head = ["rank", "system", "steps", "model" if model else "seeds", column, "95 % interval"]
    output.table(head, cells, right=("rank", "steps", "seeds", column))


@command(app, ["tafs report --scale shapes", "tafs report --open"])
def report(
    scale: ScaleOption = None,
    results: ResultsOption = None,
    opened: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> int:
    """Print the path of the page that shows all results."""
    import webbrowser

    from tafs import experiment

    root = experiment.load(overrides(scale=scale, results=results)).root
    page = root / "report" / "index.html"
    if not page.is_file():
        raise FileNotFoundError(f"{page}: not built yet; `tafs run --scale {root.name}` builds it")
    print(page)
    if opened and not webbrowser.open(page.resolve().as_uri()):
        raise RunFailed("no browser can be started; open the page by hand or set BROWSER")
    return 0


@command(app, ["tafs votes votes.json", "tafs votes mine.json yours.json --json"])
def votes(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="That the report's gallery saved.")
    ],
    json_wanted: JsonOption = False,
) -> int:
    """Show win rates from the gallery's blind votes."""
    from tafs.report import votes as cast

    found = cast.record(files)
    if json_wanted:
        output.as_json(found)
    else:
        print(cast.summary(found))
    return 0
