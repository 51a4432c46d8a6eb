"""Where a result came from: code, data, weights, versions and machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from tafs import rundir
from tafs.shapes import weights

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")


def collect(description: dict[str, Any]) -> dict[str, Any]:
    """Facts that journal, tables and tracking repeat; nothing from the environment's variables."""
    root = Path(__file__).resolve().parent.parent
    models = sorted({description["backbone"], *description["rewards"]} - {"geneval"})
    return {
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "weights": {model: weights.digest(model) for model in models},
        "prompts": {
            split: weights.sha256(rundir.prompt_file(description["settings"]["world"], split))
            for split in ("train", "test")
        },
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _git(root: Path, *arguments: str) -> str | None:
    """Git's answer, or None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
