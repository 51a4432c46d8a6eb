"""Load a pipeline folder with the backbone that trains its pipeline class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tafs.models.base import Backbone
from tafs.models.catalog import backbones


def pipeline_class(folder: Path) -> str:
    """Return the name of the pipeline class in a folder's model_index.json.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the file does not name a class.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{index}: not found; {folder} is not a diffusers pipeline folder, download it again"
        )
    try:
        return str(json.loads(index.read_bytes())["_class_name"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index}: names no pipeline class; download the folder again") from None


def quiet() -> None:
    """Let diffusers and transformers print errors only: they report every part that they load."""
    import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.set_verbosity_error()
    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()


def load(path: Path, **settings: Any) -> Backbone:
    """Load the backbone of a diffusers pipeline folder.

    Args:
        path: the folder.
        settings: as for `Backbone.load`.

    Raises:
        FileNotFoundError: the folder does not hold a pipeline.
        ValueError: no backbone trains its pipeline class; names the class.
    """
    kind = pipeline_class(path)
    if kind not in backbones():
        raise ValueError(
            f"{path / 'model_index.json'}: no backbone trains a {kind!r} "
            f"(available: {', '.join(sorted(backbones()))})"
        )
    return backbones()[kind].load(path, **settings)
