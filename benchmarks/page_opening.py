"""How long a report's page takes to open in a headless Chromium, and how large it is.

    python benchmarks/page_opening.py results/shapes/report

A view is open when it is drawn. Seconds of the clock depend on what else the machine does; seconds
of the CPU are all that the page's process has used since its own start. Needs `chromium` or
`google-chrome` on the PATH.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support import browser  # noqa: E402

from tafs.report.page import VIEWS  # noqa: E402

DRAWN = "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(true))))"


def cpu(page: browser.Page) -> float:
    """Seconds of CPU time that the page's process has used."""
    metrics = page.call("Performance.getMetrics")["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "ProcessTime"))


def opening(url: str) -> tuple[float, float, int]:
    """Seconds of the clock and of the CPU from the request until a view is drawn; its images."""
    with tempfile.TemporaryDirectory() as profile, browser.Page(Path(profile)) as page:
        page.call("Performance.enable")
        start = time.perf_counter()
        page.open(url)
        page.run(DRAWN)
        took = time.perf_counter() - start
        images = [one for one in page.requests if one.endswith(".webp")]
        return took, cpu(page), len(set(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path, help="report/ of a scale's results")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is printed")
    given = parser.parse_args()
    page: Path = given.folder / "index.html"
    if browser.PROGRAM is None or not page.is_file():
        missing = "no chromium on the PATH" if page.is_file() else f"{page}: no such page"
        parser.error(missing)
    total = sum(file.stat().st_size for file in given.folder.rglob("*") if file.is_file())
    print(f"{page.stat().st_size / 1e6:.1f} MB page, {total / 1e6:.1f} MB with all images")
    print(f"{'view':12} {'seconds':>8} {'CPU s':>8} {'images':>7}")
    for view in VIEWS:
        rows = [opening(f"{page.resolve().as_uri()}#{view}") for _ in range(given.repeats)]
        seconds, used, images = (median(column) for column in zip(*rows, strict=True))
        print(f"{view:12} {seconds:8.2f} {used:8.2f} {images:7.0f}", flush=True)


if __name__ == "__main__":
    main()
