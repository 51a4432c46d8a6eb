"""Let torchvision be imported beside a CPU-only torch.

The wheels of torch and torchvision on PyPI match: both are built for CUDA and also run without a
GPU. Beside a CPU-only torch from elsewhere, the compiled extension of PyPI's torchvision cannot be
loaded, so importing it fails with "operator torchvision::nms does not exist". transformers,
diffusers, peft, open_clip and timm import torchvision. Import this module before them.

diffusers also imports torchao where it is installed, and then warns of its types. The project's
own use of torchao does not need them, so these warnings are left out.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch

WARNS_OF_TORCHAO = (
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
)

# A library removes its schemas when it is garbage-collected.
_schemas: list[torch.library.Library] = []


def patch_torchvision() -> None:
    """Declare the operators that torchvision registers fake kernels for when it is imported.

    Does nothing if torch has CUDA or torchvision's extension can be loaded.
    """
    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    if _load_extension():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)


def _load_extension() -> bool:
    """Load torchvision's compiled operators without importing torchvision."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for extension in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return True
    return False


patch_torchvision()
for _name in WARNS_OF_TORCHAO:
    logging.getLogger(_name).setLevel(logging.ERROR)
