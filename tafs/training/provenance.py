"""Where a result came from: code, data, weights, versions and machine."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tafs.assets import sources
from tafs.data.prompts import Prompt

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")


def collect(description: dict[str, Any]) -> dict[str, Any]:
    """Facts that journal, tables and tracking repeat; nothing from the environment's variables."""
    root = Path(__file__).resolve().parents[2]
    world, prompt_set = sources.of(description["settings"]), description["prompts"]
    return {
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "weights": description["weights"],
        "random_weights": description["random_weights"],
        "prompts": {
            split: _digest(world.prompts(prompt_set, split)) for split in ("train", "test")
        },
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _digest(found: Sequence[Prompt]) -> str:
    """SHA-256 of a prompt set's rows."""
    rows = "".join(json.dumps(prompt.row, sort_keys=True) + "\n" for prompt in found)
    return hashlib.sha256(rows.encode()).hexdigest()


def _git(root: Path, *arguments: str) -> str | None:
    """Git's answer, or None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
