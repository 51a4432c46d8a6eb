"""The ratios of a run's first update, which show whether sampling and training round alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tafs.common import errors
from tafs.methods import Method, PolicyGradient
from tafs.runtime.distributed import Processes


def check(method: Method, deviations: Sequence[Tensor], processes: Processes, where: str) -> None:
    """Check that the ratios of an update on the policy that sampled are 1 up to rounding.

    Args:
        method: whose clip range is the limit; methods without ratios are not checked.
        deviations: |ratio - 1| of this process's images.
        where: the iteration and the update, for the message.

    Raises:
        RunFailed: a ratio of one of the processes differs from 1 by more than the clip range.
    """
    if not deviations or not isinstance(method, PolicyGradient) or method.samples_average:
        return
    own = torch.cat([*deviations]).max().view(1)
    largest = processes.all_gather(own, dim=0).max().item()
    if largest > method.clip_range:
        raise errors.RunFailed(
            f"{where}: a ratio differs from 1 by {largest:.2g} before the adapter has changed, "
            f"which is more than the clip range of {method.clip_range:g}: the network rounds "
            "otherwise in sampling than in training; set compile: false, another attention or "
            "dtype: float32 in the scale, or raise the method's clip_range"
        )
