"""TAFS-GRPO and its baselines: reinforcement learning of flow-matching text-to-image models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _PatchTorchvision(MetaPathFinder):
    """Patches torchvision when something first imports it, and costs nothing until then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from tafs.common import torchvision_patch

            torchvision_patch.patch_torchvision()
        return None


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _PatchTorchvision())
