"""The `hpsv2` package, the reference for parity of HPSv2.1; tafs computes it with open_clip."""

from __future__ import annotations

import functools
import gzip
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import open_clip

from tafs.rewards import compat

BPE_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
SHIPPED = Path(open_clip.__file__).with_name(BPE_VOCABULARY)


@functools.cache
def import_hpsv2() -> ModuleType:
    """Import hpsv2 with its tokenizer's vocabulary read from open_clip_torch.

    hpsv2's wheel lacks the vocabulary that it opens on import; open_clip_torch ships the same
    bytes. It also imports an unused name from turtle, which needs tkinter.
    """
    gzip_open = gzip.open

    def redirected(filename: Any, *args: Any, **kwargs: Any) -> Any:
        path = str(filename)
        missing = path.endswith(BPE_VOCABULARY) and not Path(path).exists()
        return gzip_open(SHIPPED if missing else filename, *args, **kwargs)

    turtle: Any = ModuleType("turtle")
    turtle.forward = None
    with (
        compat.restored_logging(),
        compat.stub_modules([turtle]),
        mock.patch.object(gzip, "open", redirected),
    ):
        # `import hpsv2` alone opens the vocabulary later, after gzip is restored.
        importlib.import_module("hpsv2.img_score")
    return sys.modules["hpsv2"]
