"""An installed package with an entry point, as a folder for PYTHONPATH."""

from __future__ import annotations

from pathlib import Path


def package(folder: Path, group: str, name: str, source: str) -> Path:
    """Write the module `extra_NAME` with the entry point NAME of `group`; returns the folder."""
    (folder / f"extra_{name}.py").write_text(source, encoding="utf-8")
    info = folder / f"extra_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: extra-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = extra_{name}\n")
    return folder
