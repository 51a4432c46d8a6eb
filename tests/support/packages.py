"""Installed packages with plug-ins, as importlib.metadata finds them."""

import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tafs.common import plugins
from tafs.models import catalog

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def installed(
    site: Path, files: Mapping[str, str], entry_points: Mapping[str, Mapping[str, str]]
) -> Iterator[None]:
    """Install the package `their_package` 1.0 into `site` inside the block.

    `files` are by name, `entry_points` by group, then by name.
    """
    package, info = site / "their_package", site / "their_package-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    for name, text in {"__init__.py": "", **files}.items():
        (package / name).write_text(text)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    lines = [
        line
        for group, points in entry_points.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    sys.path.insert(0, str(site))
    _forget()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
            del sys.modules[name]
        _forget()


def run_with(site: Path, code: str) -> str:
    """Run code in a process of its own with `site` on sys.path; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{site}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_clean(file: Path) -> None:
    """Check a file with ruff."""
    for command in (["check"], ["format", "--check"]):
        ruff = [Path(sys.executable).parent / "ruff", *command]
        given = [*ruff, "--config", ROOT / "pyproject.toml", file]
        done = subprocess.run(given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def _forget() -> None:
    importlib.invalidate_caches()
    for cached in (plugins.installed, plugins.listed, catalog.read, catalog.backbones):
        cached.cache_clear()
