"""Statistics of images without a model: the damage panel, the JPEG rewards and the Vendi score.

Luma is Rec. 601's 0.299 R + 0.587 G + 0.114 B; borders are replicated. All statistics are of the
image at its own size, so compare only images of one size.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from scipy.special import entr
from torch import Tensor
from torch.nn import functional

from tafs.rewards.metrics import Metric, Reward

EDGE = 0.1  # change of luma per pixel, of a range of 1, from which a pixel is on an edge
LEVELS = 8  # per channel, of the colours whose entropy is computed
QUALITY = 95  # of JPEG files


def edge_density(images: Tensor) -> Tensor:
    """The share of pixels where Sobel's gradient of the luma is at least EDGE, [B]."""
    ramp, smooth = torch.tensor([-0.5, 0.0, 0.5]), torch.tensor([0.25, 0.5, 0.25])
    across = torch.outer(smooth, ramp)
    x, y = filtered(images, across), filtered(images, across.T)
    return (torch.hypot(x, y) >= EDGE).float().mean((1, 2, 3))


def colour_entropy(images: Tensor) -> Tensor:
    """Shannon's entropy of the colours, LEVELS per channel, in bits: from 0 to 9, [B]."""
    levels = (images.detach() * LEVELS).long().clamp(0, LEVELS - 1)
    codes = ((levels[:, 0] * LEVELS + levels[:, 1]) * LEVELS + levels[:, 2]).flatten(1)
    counts = codes.new_zeros(len(codes), LEVELS**3).scatter_add(1, codes, torch.ones_like(codes))
    shares = counts.double() / codes.shape[1]
    return (torch.special.entr(shares).sum(1) / math.log(2)).float()


def saturation(images: Tensor) -> Tensor:
    """The mean saturation of HSV, 1 - min / max over the channels, 0 for black, [B]."""
    low, high = images.amin(1), images.amax(1)
    return ((high - low) / high.clamp(min=1e-6)).mean((1, 2))


def sharpness(images: Tensor) -> Tensor:
    """The variance of the luma's Laplacian in 8-bit levels (Pech-Pacheco et al., 2000), [B]."""
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return (255 * filtered(images, laplacian)).flatten(1).var(1, correction=0)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """The size of each image as a JPEG file of Pillow, in units of 1000 bytes, [B]."""
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    sizes = []
    for image in pixels.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


# The damage panel, by the name of the metric: images [B, 3, H, W] in [0, 1] -> [B].
PANEL: Mapping[str, Callable[[Tensor], Tensor]] = {
    "edge_density": edge_density,
    "colour_entropy": colour_entropy,
    "saturation": saturation,
    "sharpness": sharpness,
}


def reward(metric: Metric, published: Callable[[Tensor], Tensor]) -> Reward:
    """A reward whose published score is a statistic of the image alone."""
    return Reward(metric, lambda images, _: published(images) / metric.scale)


def vendi_score(features: np.ndarray) -> float:
    """The effective number of different rows, between 1 and n, of features [n, d]; none is zero.

    exp of the entropy of the eigenvalues of K / n, where K holds the cosines of all pairs of rows
    (Friedman and Dieng, 2023, arXiv 2210.02410): 1 if all are alike, n if no two are. It is a score
    of a set of images and not of each, so it is not in METRICS and cannot be trained on.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    # K is unit unit^T, so the eigenvalues of K / n are these squares.
    shares = np.linalg.svd(unit, compute_uv=False) ** 2 / len(unit)
    return float(np.exp(entr(shares).sum()))


def filtered(images: Tensor, kernel: Tensor) -> Tensor:
    """The luma of images [B, 3, H, W], correlated with a 3 x 3 kernel, [B, 1, H, W]."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)
    luma = (images * weights).sum(1, keepdim=True)
    padded = functional.pad(luma, (1, 1, 1, 1), mode="replicate")
    with _full_precision():
        return functional.conv2d(padded, kernel.to(images.device)[None, None])


@contextmanager
def _full_precision() -> Iterator[None]:
    """Convolve in float32 on GPUs: TF32's 11 bits would count as edges and as sharpness."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
