"""The shipped weights of the embedded models: location, writing and verification.

Weights are stored in float16 in safetensors files. `manifest.json` lists the SHA-256 of all files;
a model is loaded only after its files match.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from tafs.common.files import give_umask_mode, sha256

ROOT = Path(__file__).parent / "weights"
VAE = "shapes-sd3/vae"  # the autoencoder of all base models
MANIFEST = "manifest.json"
FACTS = "facts.json"
NOT_LOADED = (MANIFEST, FACTS, "README.md")


def save_module(module: Any, folder: Path) -> None:
    """Write one diffusers or transformers module in float16."""
    module.half().save_pretrained(folder, safe_serialization=True)
    module.float()
    _give_umask_modes(folder)


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a diffusers pipeline folder in float16, whose modules are loaded in float32."""
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    pipeline.to(torch.float32)
    _give_umask_modes(folder)
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        settings = json.loads(file.read_text(encoding="utf-8"))
        # A path of the machine that trained the model.
        settings.pop("_name_or_path", None)
        # Without a dtype argument, diffusers loads its own modules in float32, but transformers
        # loads the text encoders in the dtype that is noted here.
        if "dtype" in settings:
            settings["dtype"] = "float32"
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_scorer(scorer: Any, folder: Path) -> None:
    """Write a reward model in float16."""
    scorer.half().save(folder)
    scorer.float()
    _give_umask_modes(folder)


def _give_umask_modes(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        give_umask_mode(file)


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write the measurements of training, which the model card contains."""
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def write_manifest(root: Path = ROOT) -> None:
    """List the SHA-256 of every loaded file below `root`."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name not in NOT_LOADED)
    sums = {p.relative_to(root).as_posix(): sha256(p) for p in files}
    (root / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def verify(name: str, root: Path = ROOT) -> Path:
    """Check the files of a model against the manifest and return its folder.

    Raises:
        ValueError: a file is missing, altered or not listed; names it and the remedy.
    """
    listed: dict[str, str] = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    members = {path: sum_ for path, sum_ in listed.items() if path.startswith(f"{name}/")}
    if not members:
        raise ValueError(f"no embedded model {name!r} in {root / MANIFEST}")
    for path, expected in members.items():
        file = root / path
        if not file.is_file() or sha256(file) != expected:
            state = "altered" if file.is_file() else "missing"
            raise ValueError(f"{file}: {state}; restore it with `git checkout -- {file}`")
    for file in (root / name).rglob("*"):
        # Libraries prefer some files over others and could load an unlisted one.
        known = file.name in NOT_LOADED or file.relative_to(root).as_posix() in members
        if file.is_file() and not known and not file.name.startswith("."):
            raise ValueError(f"{file}: not listed in {root / MANIFEST}; delete it")
    return root / name


def digest(name: str, root: Path = ROOT) -> str:
    """SHA-256 of the manifest's lines of a model's files."""
    listed: dict[str, str] = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    members = [f"{p} {s}\n" for p, s in sorted(listed.items()) if p.startswith(f"{name}/")]
    return hashlib.sha256("".join(members).encode()).hexdigest()
