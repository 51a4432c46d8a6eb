"""torchvision_patch."""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

import torch

# A Library takes its schemas back when it is garbage-collected.
_schemas: list[torch.library.Library] = []


def patch_torchvision() -> None:
    """Declare the operators that torchvision needs in order to be imported beside a CPU torch.

    torchvision's wheel from PyPI is a CUDA build. Beside a CPU torch its extension cannot be
    loaded, so `torchvision::nms`, for which it registers a fake kernel on import, does not exist.
    """
    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    if _load_torchvision_extension():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)


def _load_torchvision_extension() -> bool:
    """Load torchvision's compiled operators without importing torchvision."""
    # importlib.util would ask tafs' own finder too, which patches.
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for extension in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return True
    return False
