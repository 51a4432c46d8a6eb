"""torch, imported at its first use: a mistake in config.yaml should not wait a second for it.

What is imported to read the plan (this package's methods, samplers and losses) takes it from here:

    if TYPE_CHECKING:
        import torch
        from torch import Tensor
    else:
        from tafs.lazy import torch
"""

from __future__ import annotations

import importlib
from typing import Any


class _Module:
    """A package by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


torch = _Module("torch")
