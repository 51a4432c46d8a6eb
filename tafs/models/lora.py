"""The LoRA layer of trained adapters, with fewer passes over the activations than peft's."""

from __future__ import annotations

from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Size, Tensor, nn


def _added_product(y: Size, a: Size, b: Size, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


# For FlopCounterMode, which does not count the product in place.
FLOPS = {torch.ops.aten.addmm_: _added_product}


class LoraLinear(Linear):
    """x W^T + b + (alpha / rank) (x A^T) B^T for an adapter without dropout or other extras.

    The adapter's part is added within the product with B. It is computed in the precision of x, as
    mixed-precision training does; A and B and their gradients keep their own precision.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, [..., out_features], for x [..., in_features]."""
        rows = x.flatten(0, -2)
        y: Tensor = self.base_layer(rows)
        if not self.disable_adapters and not self.merged:
            (name,) = self.active_adapters
            weights: Any = (self.lora_A[name].weight, self.lora_B[name].weight)
            a, b = (weight.to(x.dtype) for weight in weights)
            y.addmm_(rows @ a.T, b.T, alpha=self.scaling[name])
        return y.unflatten(0, x.shape[:-1])


def install(network: nn.Module) -> None:
    """Compute all adapters of a network, which peft has attached, with `LoraLinear`.

    Its layer for torchao's quantised weights differs in merging alone, which they do not allow.
    """
    for module in network.modules():
        if type(module) in (Linear, TorchaoLoraLinear):
            module.__class__ = LoraLinear
