"""Online DPO (Diffusion-DPO, Wallace et al., 2023, arXiv 2311.12908, on a flow model's own images).

    d(x_0) = mean (v_theta - (e - x_0))^2 - mean (v_base - (e - x_0))^2  at x_t = (1 - t) x_0 + t e
    loss   = -E log sigmoid(-b / 2 (d(x_win) - d(x_lose)))

The images of the largest and the smallest reward of each group are the pair, with the same t and e.
The means are over an image's elements, as in the public code of Flow-GRPO's online DPO.

As published, except:
- The times are distinct ones of the rollout's grid; the public code draws them from a logit-normal
  distribution.
- The trained model samples, and the reference is the base model throughout; in the public code the
  reference samples and can be replaced by the trained model.
- A group without a preference is not trained; the public code trains an arbitrary pair of it.
- The mean is over all images of an update, of which those outside the pairs add nothing.

A micro-batch holds whole pairs, so at least two images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tafs.methods import ForwardProcess, LossPart, Trajectory, UpdateInputs, forward_process
from tafs.models import Backbone, sampling


@dataclass(frozen=True, kw_only=True)
class OnlineDpo(ForwardProcess):
    """Prefer the best to the worst image of each group, on noised copies of both."""

    sharpness: float = 2000.0  # b
    updates: int = 2

    TITLE: ClassVar[str] = "Online DPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sharpness > 0:
            raise ValueError(f"sharpness: {self.sharpness} is not above 0")
        if self.beta:
            raise ValueError(
                f"beta: {self.beta} has no effect, because the loss compares with the base model; "
                "set sharpness"
            )

    @property
    def records_velocity(self) -> bool:
        return False

    @property
    def compares_images(self) -> bool:
        return True

    def cost(self, group_size: int) -> float:
        """Two images of each group are evaluated with and without the adapter, if any differ."""
        return self.steps + (3 + 1) * self.copies * 2 / group_size

    @property
    def forward_equivalents(self) -> float:
        """With two images of each prompt."""
        return self.cost(2)

    def assign_credit(self, advantages: Tensor, steps: int) -> Tensor:
        """Mark the best image of each group with 1 and the worst with -1."""
        last = advantages[-1]
        best, worst = last.amax(-1, keepdim=True), last.amin(-1, keepdim=True)
        places = torch.arange(last.shape[-1], device=last.device)
        won = (places == last.argmax(-1, keepdim=True)) & (best > worst)
        lost = (places == last.argmin(-1, keepdim=True)) & (best > worst)
        return (won.to(last.dtype) - lost.to(last.dtype)).expand(steps, -1, -1)

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, inputs: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        copies, batch = inputs.advantages.shape
        marks = inputs.advantages[0]
        # Groups are adjacent, so that both are in the order of the groups.
        winners, losers = (marks > 0).nonzero()[:, 0], (marks < 0).nonzero()[:, 0]
        size = max(1, micro_batch // 2)
        for n in range(copies):
            for pairs in zip(winners.split(size), losers.split(size), strict=True):
                loss = self.pair_loss(backbone, trajectory, n, *pairs)
                yield LossPart(loss.sum() * 2 / (copies * batch), {})

    def pair_loss(
        self, backbone: Backbone, trajectory: Trajectory, n: int, won: Tensor, lost: Tensor
    ) -> Tensor:
        """Return the loss of the pairs (`won`, `lost`) of images at copy n of the winners, [b]."""
        x_0, t = trajectory.x_s[n, won], trajectory.t[n, won]
        e = x_0 + (trajectory.x_t[n, won] - x_0) / t.view(-1, *[1] * (x_0.dim() - 1))
        both, times = torch.cat([won, lost]), torch.cat([t, t])
        images, noise = trajectory.x_s[n, both], torch.cat([e, e])
        x_t, cond = sampling.interpolate(images, noise, times), trajectory.cond[both]
        target = noise - images
        with torch.no_grad(), backbone.reference():
            base = forward_process.mean_square(backbone.velocity(x_t, times, cond) - target)
        error = forward_process.mean_square(backbone.velocity(x_t, times, cond) - target)
        better, worse = (error - base).chunk(2)
        return -functional.logsigmoid(-self.sharpness / 2 * (better - worse))


METHOD = OnlineDpo
