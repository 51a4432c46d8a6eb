"""Quantised weights of a frozen network, so that it takes less memory; adapters stay float32.

torchao (the extra `quantize`) quantises; its formats consist of PyTorch operations and work on all
devices. Adapters cannot be merged into quantised weights.

| format | values | scales | bytes per weight | error |
|---|---|---|---:|---:|
| int8 | symmetric | one float32 per output channel | 1.00 | 0.9 % |
| nf4 | NormalFloat, QLoRA (arXiv 2305.14314) | one int8 for 64 weights | 0.52 | 9.2 % |

The error is that of normally distributed bfloat16 weights, relative to their norm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from torch import Tensor, nn
from torch.nn import functional

Quantization = Literal["none", "int8", "nf4"]
BLOCK, SCALES = 64, 256  # weights that share a scale, and scales that share a factor, in QLoRA
# Bytes of a weight, without the small scales of rows and of scales.
BYTES: Mapping[Quantization, float] = {"int8": 1.0, "nf4": 0.5 + 1 / BLOCK}
# Bytes for each weight of a layer while it is restored to bfloat16, uncompiled.
RESTORING: Mapping[Quantization, float] = {"int8": 6.0, "nf4": 7.0}


def problem(chosen: str) -> str | None:
    """Why weights cannot be quantised on this machine, with the remedy; None: they can."""
    if chosen == "none" or find_spec("torchao") is not None:
        return None
    return f"{chosen!r} needs torchao; run `pip install -c constraints.txt -e '.[quantize]'`"


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a weight of torchao, which is restored for each product."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, [..., out_features], for x [..., in_features]."""
        y: Tensor = _Product.apply(x, self.in_features, *parts(self.weight))
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x W^T. Only the parts of the quantised W are saved for the gradient; torchao saves W.

    They are plain tensors, because a compiled graph cannot save torchao's.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        # Dynamo counts the parameters to tell whether there is a context.
        x, columns, *kept = inputs
        ctx.columns = columns
        ctx.save_for_backward(*kept)
        return x @ restored(kept, columns, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient], kept = gradients, ctx.saved_tensors
        own = gradient @ restored(kept, ctx.columns, gradient.dtype)
        return own, None, *(None for _ in kept)


def parts(weight: Any) -> tuple[Tensor, ...]:
    """The plain tensors that a quantised weight consists of; see `restored`."""
    from torchao.quantization import NF4Tensor

    if isinstance(weight, NF4Tensor):
        scales = (weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean)
        return (weight.quantized_data, *scales, weight.nf4)
    return weight.qdata, weight.scale


def restored(kept: Sequence[Tensor], columns: int, dtype: torch.dtype) -> Tensor:
    """Return the weight, [out_features, columns], whose parts are `kept`.

    With int8, they are the values and the rows' scales; with nf4, pairs of codes, the blocks'
    scales in int8, what scales these, what is added to them, and the values of the 16 codes.
    """
    if len(kept) == 2:
        values, scale = kept
        return values.to(scale.dtype).mul_(scale).to(dtype)
    pairs, quantized, factor, mean, table = kept
    scales = (quantized.view(len(factor), -1) / factor[:, None]).flatten().to(table.dtype) + mean
    codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).view(len(scales), -1)
    values = functional.embedding(codes.int(), table[:, None]).squeeze(-1)
    return (values * scales[:, None]).view(-1, columns).to(dtype)


@torch.no_grad()
def quantize(
    modules: Iterable[nn.Module], chosen: Quantization, device: str | torch.device
) -> None:
    """Quantise the weights of all linear layers in modules, on the device, where they stay.

    With nf4, a layer whose number of weights is not a multiple of 64 keeps them.

    Raises:
        ValueError: torchao is not installed; names the remedy.
    """
    if missing := problem(chosen):
        raise ValueError(f"quantize: {missing}")
    # Of peft, about merging.
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
    layers = [m for module in modules for m in module.modules() if type(m) is nn.Linear]
    for layer in layers if chosen != "none" else ():
        weight = layer.weight.data
        if chosen == "int8" or weight.numel() % BLOCK == 0:
            layer.weight = nn.Parameter(_quantized(weight.to(device), chosen), requires_grad=False)
            layer.__class__ = QuantizedLinear


def _quantized(weight: Tensor, chosen: Quantization) -> Tensor:
    from torchao.quantization import Int8Tensor, PerRow, to_nf4

    if chosen == "int8":
        quantized: Tensor = Int8Tensor.from_hp(weight, granularity=PerRow())
        return quantized
    # In small layers fewer scales share a factor.
    nf4: Tensor = to_nf4(weight, BLOCK, math.gcd(weight.numel() // BLOCK, SCALES))
    return nf4
