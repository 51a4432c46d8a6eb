"""The page of a results folder: report/index.html, which opens from a file and loads nothing.

Statistics are computed here with tafs.report.stats; the page's scripts only sort, filter and draw.
Its Content-Security-Policy admits its own scripts by their digests and blocks the network. The
images lie beside the page, in report/images/.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tafs.report.claims import Verdict
from tafs.report.page import cards, charts, content, diversity, sprites
from tafs.report.page.systems import Systems
from tafs.report.results import Report
from tafs.report.tables import Line, Table

HERE = Path(__file__).parent
SCRIPTS = ("vendor/d3.min.js", "vendor/plot.min.js")
OWN = (
    "core",
    "leaderboard",
    "budget",
    "charts",
    "gallery",
    "votes",
    "runs",
    "main",
)  # in this order
VIEWS = ("overview", "leaderboard", "gallery", "damage", "runs", "cards")


def write(
    report: Report,
    tables: Sequence[tuple[Table, Sequence[Line]]],
    verdicts: Sequence[Verdict],
    root: Path,
) -> list[Path]:
    """Write ROOT/report/; return its files.

    Args:
        report: the runs of all tables.
        tables: the tables of the report with their filled lines, in its order.
        verdicts: on the claims.
        root: the results folder of a scale; it holds the tables' files.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    systems = Systems(report)
    folder = root / "report"
    images, files = sprites.write(report, systems, folder)
    shown = [content.table(report, *filled, systems, root) for filled in tables]
    everything = content.everything(tables, systems)
    data = {
        "scale": report.scale,
        "random": report.random_weights,
        "metrics": content.metrics(report),
        "systems": systems.record(),
        "tables": {table.name: table.record for table in [everything, *shown]},
        "matrices": charts.matrices(report, tables),
        "steps": charts.steps(report, systems),
        "compute": charts.compute(report, systems),
        "gains": charts.gains(report, systems),
        "diversity": diversity.of_tables(systems, charts.with_figure(report, "hacking")),
        "prompts": charts.prompts(report, systems),
        "runs": content.runs(report, systems),
        "images": images,
    }
    page = folder / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    text = _render(
        {
            "scale": report.scale,
            "random": report.random_weights,
            "views": VIEWS,
            "facts": content.facts(report),
            "claims": content.claims(verdicts),
            "headline": content.headline(shown),
            "tables": [everything, *shown],
            "cards": cards.read(report),
        },
        data,
    )
    page.write_text(text, encoding="utf-8", newline="\n")
    return [page, *files]


def _render(context: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The page; `data` is what its scripts read."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = "\n".join((HERE / "scripts" / f"{name}.js").read_text("utf-8") for name in OWN)
    vendored = [(HERE / name).read_text("utf-8") for name in SCRIPTS]
    scripts = [*vendored, f'"use strict";\n(() => {{\n{own}\n}})();\n']
    return environment.get_template("page.html").render(
        **context,
        style=Markup((HERE / "style.css").read_text("utf-8")),  # noqa: S704 (a file of this package)
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        policy=_policy(scripts),
        data=_json(data),
    )


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy for a page whose scripts, styles and data are inside it.

    Plot sets styles of its elements, which only 'unsafe-inline' admits; a style cannot load
    anything else than images beside the page.
    """
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    admitted = " ".join(f"'sha256-{digest}'" for digest in digests)
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {admitted}",
            "style-src 'unsafe-inline'",
            "img-src 'self' file: data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _json(data: Mapping[str, Any]) -> Markup:
    """Compact JSON that cannot end its script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))  # noqa: S704
