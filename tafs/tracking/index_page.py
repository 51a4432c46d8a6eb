"""tracked.html of a results folder: leads from the report's runs to their copies in MLflow.

MLflow draws the ids of its runs when it copies them, so the job that copies writes this page and
the report links to it by the runs' names: neither job waits for the other, and a repeated copy
leaves no dead link in the report.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from mlflow.entities import RunInfo

from tafs.common.files import atomic_text

HERE = Path(__file__).parent
ADDRESS = "http://127.0.0.1:5000"  # of `tafs.tracking.cli ui`


def write(
    file: Path,
    names: Iterable[str],
    copies: Mapping[str, RunInfo],
    store: Path,
    server: str | None = None,
    problem: str = "",
) -> None:
    """Write the page.

    Args:
        names: of the runs; those that have no copy are shown without a link.
        copies: the MLflow run of each name.
        server: the address of the server that has the copies; None: they are in the store.
        problem: why the last copy is incomplete.

    Raises:
        OSError: the file cannot be written; names it.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((HERE / f"index.{kind}").read_text("utf-8") for kind in ("css", "js"))
    text = environment.get_template("index.html").render(
        runs={
            name: f"#/experiments/{copy.experiment_id}/runs/{copy.run_id}"
            if (copy := copies.get(name))
            else ""
            for name in sorted(names)
        },
        store=store,
        command=f"python -m tafs.tracking.cli ui --store {store}",
        server=server,
        address=ADDRESS,
        problem=problem,
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),  # noqa: S704 (files of this package)
        script=Markup(script),  # noqa: S704
    )
    atomic_text(file, text)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
