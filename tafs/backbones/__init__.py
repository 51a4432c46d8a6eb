"""Flow-matching text-to-image models behind one interface: encode, velocity, decode, LoRA."""

from __future__ import annotations

from tafs import compat

# diffusers reaches torchvision through transformers, so the patch has to come first.
compat.patch_torchvision()
