"""Flow-matching text-to-image models behind one interface: encode, velocity, decode, LoRA."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tafs.models.base import Backbone

# The pipeline that a folder's model_index.json names -> the module and class that drive it.
CLASSES = {
    "StableDiffusion3Pipeline": ("tafs.models.sd3", "SD3Backbone"),
    "FluxPipeline": ("tafs.models.flux", "FluxBackbone"),
}


def load(path: Path, **settings: Any) -> Backbone:
    """The backbone of a diffusers pipeline folder; `settings` as for `Backbone.load`.

    Raises:
        FileNotFoundError: the folder holds no pipeline; names the missing file.
        ValueError: a pipeline of another kind; names it and those that can be used.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index}: not found; {path} is no diffusers pipeline folder")
    kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if kind not in CLASSES:
        raise ValueError(f"{index}: cannot drive a {kind!r} (available: {', '.join(CLASSES)})")
    module, name = CLASSES[kind]
    backbone: Backbone = getattr(importlib.import_module(module), name).load(path, **settings)
    return backbone
