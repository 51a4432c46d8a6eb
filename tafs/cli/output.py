"""What commands print: plain lines in a pipe, tables and progress in a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from tafs.runtime import progress


def as_json(value: object) -> None:
    """Print a value for other programs."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows; `right` names the columns that are aligned to the right in a terminal."""
    if not sys.stdout.isatty():
        print("\n".join(progress.aligned([head, *rows])))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head:
        shown.add_column(Text(name), justify="right" if name in right else "left")
    for row in rows:
        shown.add_row(*map(Text, row))  # a Text is not read as markup
    Console().print(shown)


@contextmanager
def working(json_wanted: bool = False) -> Iterator[None]:
    """Show the progress of the work inside on a terminal, with the time left.

    Args:
        json_wanted: keep stdout for the JSON; what is printed inside goes to stderr.
    """
    with redirect_stdout(sys.stderr if json_wanted else sys.stdout), _bar():
        yield


@contextmanager
def _bar() -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # lines then appear above the bar
    )
    task = bar.add_task("loading", total=None)

    def listener(name: str, done: int, total: int) -> None:
        shown = bar.tasks[0]
        if (name, total) != (shown.description, shown.total) or done < shown.completed:
            bar.reset(task, description=name, total=total)
        bar.update(task, completed=done)

    with bar, progress.heard_by(listener):
        yield
