"""The origin of a result: code, data, weights, package versions and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tafs.data.prompts import digest
from tafs.experiment import run_inputs
from tafs.experiment.specs import RunSpec

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")
ROOT = Path(__file__).resolve().parents[2]


def collect(spec: RunSpec) -> dict[str, Any]:
    """Collect what the journal, the tables and the tracking server record.

    No environment variable is recorded, since some hold secrets.
    """
    source = run_inputs.asset_source(spec)
    return {
        **code(ROOT),
        "weights": spec.weights,
        "random_weights": spec.random_weights,
        "prompts": {
            split: digest(source.prompts(spec.prompts, split)) for split in ("train", "test")
        },
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        **gpu(source.device),
    }


def gpu(device: str) -> dict[str, str]:
    """The name of the device that trains, if it is a GPU."""
    return {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}


def code(root: Path) -> dict[str, Any]:
    """Return the commit of the code in `root` and whether tracked files differ from it.

    Both are None unless `root` is the top level of a checkout: the commit of a repository that only
    surrounds the code, or that GIT_DIR names, says nothing about it.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    if top is None or commit is None or status is None or Path(top).resolve() != root.resolve():
        return {"git_commit": None, "git_changed": None}
    return {"git_commit": commit, "git_changed": bool(status)}


def _git(root: Path, *arguments: str) -> str | None:
    """Git's answer about the repository around `root`; None if git refuses or is not installed."""
    command = ["git", "-C", str(root), *arguments]
    # Variables such as GIT_DIR and GIT_WORK_TREE would name another repository.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    try:
        answer = subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.decode().strip()
