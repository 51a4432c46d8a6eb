"""One training iteration: sample, score, update. `tafs.training.train` runs the loop.

It is one file, because it is one class, whose methods share the state of a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tafs.common import files, seeding
from tafs.data import prompts
from tafs.experiment import run_inputs, validate
from tafs.experiment.specs import RunSpec
from tafs.methods import grpo, registry
from tafs.methods.base import Trajectory, UpdateInputs
from tafs.models.base import Backbone, fast_dtype
from tafs.rewards.registry import RewardSet
from tafs.runtime import checkpoint, distributed
from tafs.runtime.distributed import Processes
from tafs.runtime.receipts import Needs
from tafs.training import ratios
from tafs.training.rewards import IterationRewards, NonFinite, invalid_images
from tafs.training.side_stream import SideStream

# Iterations whose prompts are encoded together, so that the text encoders move to the GPU rarely.
AHEAD = 16
# Iterations from one estimate of the KL divergence to the next; it takes about 2 % of an iteration.
KL_EVERY = 5


class Trainer:
    """The state of a run between iterations, in one of its processes.

    Args:
        spec: the run.
        backbone: the model, to which a LoRA adapter is added.
        rewards: the reward models of `spec.rewards`.
        known: the prompts that iterations draw from.
        processes: this process and its peers.
        shares: the probability of each prompt tag; None: equal probabilities.
    """

    def __init__(
        self,
        spec: RunSpec,
        backbone: Backbone,
        rewards: RewardSet,
        known: Sequence[prompts.Prompt],
        processes: Processes = distributed.ALONE,
        *,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        settings = spec.training
        if settings is None:
            raise ValueError(f"{spec.name}: run.json has no training settings; evaluate it instead")
        self.spec = spec
        self.backbone = backbone
        self.rewards = rewards
        backbone.waiting = rewards.networks
        self.processes = processes
        self.seed = spec.seed
        self.method = registry.create(spec.method, spec.hyperparameters)
        self.weights = spec.rewards
        # Rewards need about 8 bits of a pixel; evaluation decodes in full precision.
        fast = spec.assets.dtype == "bfloat16"
        self.decode_dtype = fast_dtype(backbone.device) if fast else None
        self.iterations = settings.iterations
        self.checkpoint_every = settings.checkpoint_every
        self.groups = settings.prompts_per_iteration
        self.group_size = settings.group_size
        self.micro_batch = settings.micro_batch
        self.keep_graphs = settings.keep_graphs and self.method.keeps_graphs
        self.side = SideStream(backbone.device, ahead=settings.score_ahead)
        self.prompts = known
        self.shares = shares
        self.encoded = range(0)  # the iterations whose prompts the backbone has prepared
        problem = validate.sharing_problem(self.groups, self.method.updates, processes.size)
        if problem:
            raise ValueError(problem)
        # An iteration has `groups` groups; each process has an equal share of every update's.
        parts = torch.arange(self.groups).view(self.method.updates, processes.size, -1)
        self.local_groups: list[int] = parts[:, processes.rank].flatten().tolist()
        lora = settings.lora
        backbone.add_lora(lora.rank, lora.alpha, seeding.generator(self.seed, "lora"))
        self.parameters = backbone.lora_parameters()
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.updates = 0  # optimiser steps so far
        self.ratios_checked = False
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.method.learning_rate,
            weight_decay=self.method.weight_decay,
        )

    def iterate(self, iteration: int) -> dict[str, Any]:
        """Sample, score and update; return the journal's record.

        The record covers the images of all processes, except for the times, which are those of this
        process, and the KL divergence, which is estimated on this process's first group in every
        KL_EVERY-th iteration and in the last one. Images without a finite reward are counted as
        `invalid` and left out of the recorded rewards; they contribute only to terms of the loss
        that do not depend on rewards.

        Raises:
            NonFinite: more images are invalid than `tolerated`, or any where the method
                differentiates the rewards; or an image, a loss or a gradient is NaN or infinite.
                Raised before the update that would use it; names the iteration and the source.
            RunFailed: in this process's first iteration, rounding alone moves a ratio by more than
                the clip range.
        """
        clock = self._clock
        start = clock()
        drawn = self._draw(iteration)
        if iteration not in self.encoded:
            self.encoded = range(iteration, min(iteration + AHEAD, self.iterations))
            ahead = map(self._draw, self.encoded)
            self.backbone.prepare(
                [later[group].text for later in ahead for group in self.local_groups]
            )
        image_prompts = [
            drawn[group] for group in self.local_groups for _ in range(self.group_size)
        ]
        trajectories: list[Trajectory] = []
        scores, low = [], 0
        for trajectory in self._rollout([drawn[g].text for g in self.local_groups], iteration):
            images = range(low, low + trajectory.scored.shape[1])
            score = partial(self._score, trajectory.scored, image_prompts, images, iteration)
            scores.append(self.side.submit(score))
            trajectories.append(trajectory)
            low = images.stop
        sampled = clock()
        rewards = self._gather([found() for found in scores], iteration)
        advantages = self.method.compute_advantages(rewards.by_name, rewards.weights)
        # A method may return any advantage for an image without a reward.
        advantages = advantages.masked_fill(rewards.invalid, 0)[:, self.local_groups].flatten(1)
        scored = clock()
        learned = self._update(trajectories, image_prompts, advantages, iteration)
        end = clock()
        divergence = self._divergence(trajectories[0], iteration)
        batch = self.groups * self.group_size
        return {
            "iteration": iteration,
            "rewards": {
                name: grpo.mean_of_known(values, (1, 2)).tolist()
                for name, values in rewards.reported.items()
            },
            "reward_std": rewards.spread,
            "invalid": int(rewards.invalid.sum()),
            **learned,
            **({} if divergence is None else {"kl": divergence}),
            "images_per_s": batch / (end - start),
            "seconds": {
                "sample": sampled - start,
                "reward": scored - sampled,
                "update": end - scored,
                "total": end - start,
            },
        }

    def _divergence(self, trajectory: Trajectory, iteration: int) -> float | None:
        """Estimate the KL divergence to the base model; None if it is not due.

        It is due in all processes at once: if one alone estimated it, the others would wait for
        that one in the next iteration.
        """
        if iteration % KL_EVERY and iteration != self.iterations - 1:
            return None
        group = trajectory.images(slice(0, self.group_size))
        with torch.no_grad():
            return self.method.kl_to_base(self.backbone, group, -(-iteration // KL_EVERY))

    def _clock(self) -> float:
        """Seconds, after the device has finished its work."""
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)
        return time.perf_counter()

    def _draw(self, iteration: int) -> list[prompts.Prompt]:
        """The prompts of an iteration's groups, of all processes."""
        rng = np.random.default_rng([self.seed, iteration])
        return prompts.draw_balanced(self.prompts, self.groups, rng, self.shares)

    def _rollout(self, texts: Sequence[str], iteration: int) -> Iterator[Trajectory]:
        """Sample this process's images by micro-batches; their groups have the prompts `texts`.

        The ratio before the first update is 1 only if both use the same micro-batches.
        """
        with torch.no_grad():
            cond = self.backbone.encode(texts).repeat_interleave(self.group_size)
        shape = self.backbone.latent_shape
        per_group = 1 if self.method.shares_start_noise else self.group_size
        noise = torch.randn(
            self.groups,
            per_group,
            *shape,
            generator=seeding.generator(self.seed, "start", iteration),
        )[self.local_groups]
        noise = noise.expand(-1, self.group_size, *shape).flatten(0, 1).to(self.backbone.device)
        for part in self.micro_batches():
            generators = seeding.generators(
                self.seed,
                "step",
                iteration,
                images=[(self._place(image),) for image in range(part.start, part.stop)],
                shared=part.start * self.method.updates // len(noise),  # the number of its update
            )
            first = part.stop <= self._updates()[0].stop
            sampled = self.averaged() if self.method.samples_average else nullcontext()
            with torch.set_grad_enabled(first and self.keep_graphs), sampled:
                trajectory = self.method.rollout(
                    self.backbone, cond[part], noise[part], generators, iteration
                )
            yield trajectory

    def micro_batches(self) -> list[slice]:
        """Slices of this process's images that go through the network together."""
        return [
            slice(low, min(low + self.micro_batch, update.stop))
            for update in self._updates()
            for low in range(update.start, update.stop, self.micro_batch)
        ]

    def _updates(self) -> list[slice]:
        """Slices of this process's images by optimiser step: equal numbers of whole groups."""
        images = len(self.local_groups) * self.group_size
        share = images // self.method.updates
        return [slice(low, low + share) for low in range(0, images, share)]

    def _place(self, image: int) -> int:
        """The index among all images of the iteration of this process's `image`."""
        group, member = divmod(image, self.group_size)
        return self.local_groups[group] * self.group_size + member

    def _score(
        self,
        states: Tensor,
        image_prompts: Sequence[prompts.Prompt],
        images: range,
        iteration: int,
    ) -> dict[str, Tensor]:
        """Training-scale rewards by name, [T, b], of decoded latents [T, b, ...].

        Args:
            images: the micro-batch, among this process's images.
        """
        own = image_prompts[images.start : images.stop]
        steps = []
        for number, latents in enumerate(states, start=1):
            where = f"iteration {iteration}, scored step {number} of {len(states)}"
            with torch.no_grad():
                pixels = self._decode(latents, images, where)
            steps.append(self.rewards.score(pixels, own))
        return {name: torch.stack([step[name] for step in steps]) for name in self.weights}

    def _gather(self, scores: Sequence[dict[str, Tensor]], iteration: int) -> IterationRewards:
        """The rewards of all processes, from those of this one's micro-batches."""
        columns = {name: [one[name] for one in scores] for name in self.weights}
        by_name = {}
        for name, parts in columns.items():
            local = torch.cat(parts, dim=1)
            local = local.view(len(local), self.method.updates, -1, self.group_size)
            by_name[name] = self.processes.all_gather(local, dim=2).flatten(1, 2)
        needs_gradients = self.method.needs_reward_gradients
        invalid = invalid_images(by_name, iteration, needs_gradients=needs_gradients)
        reported = self.rewards.report(by_name)
        return IterationRewards(
            {name: values.masked_fill(invalid, torch.nan) for name, values in by_name.items()},
            {name: values.masked_fill(invalid, torch.nan) for name, values in reported.items()},
            self.weights,
            invalid,
        )

    def _decode(self, latents: Tensor, images: Sequence[int], where: str) -> Tensor:
        """Decode latents [b, ...] of this process's `images` to pixels, which must be finite."""
        pixels = self.backbone.decode(latents, self.decode_dtype)
        broken = ~pixels.detach().flatten(1).isfinite().all(1)
        if broken.any():
            image = self._place(images[int(broken.nonzero()[0, 0])])
            raise NonFinite(f"{where}: image {image} holds NaN or infinity")
        return pixels

    def _update(
        self,
        trajectories: Sequence[Trajectory],
        image_prompts: Sequence[prompts.Prompt],
        advantages: Tensor,
        iteration: int,
    ) -> dict[str, Any]:
        """Take the optimiser steps; return the means of the losses' metrics.

        Args:
            advantages: [T, B]; B are this process's images, as in `image_prompts`.
        """
        metrics: dict[str, list[Tensor]] = {}
        norms = []
        pending = iter(trajectories)
        for number, update in enumerate(self._updates()):
            # The sum is in float64, so that its rounding does not depend on the number of
            # processes: AdamW turns the remainder of gradients that cancel into full-size steps.
            total = {
                name: torch.zeros_like(parameter, dtype=torch.float64, requires_grad=False)
                for name, parameter in self.parameters.items()
            }
            where = f"iteration {iteration}, update {number}"
            low = update.start
            while low < update.stop:
                trajectory = next(pending)
                if self.method.compares_images:
                    parts = [trajectory]
                    while sum(part.t.shape[1] for part in parts) < update.stop - low:
                        parts.append(next(pending))
                    trajectory = Trajectory.cat(parts)
                size = trajectory.t.shape[1]
                idx = range(low, low + size)
                inputs = UpdateInputs(
                    advantages[:, low : low + size],
                    partial(self._differentiable_rewards, image_prompts, idx, where),
                    self.weights,
                    self.averaged,
                )
                share = size / ((update.stop - update.start) * self.processes.size)
                for part in self.method.losses(self.backbone, trajectory, inputs, self.micro_batch):
                    if not part.loss.isfinite():
                        raise NonFinite(f"{where}: the loss is {part.loss.item()}")
                    (part.loss * share).backward()
                    for name, values in part.metrics.items():
                        metrics.setdefault(name, []).append(values)
                for name, parameter in self.parameters.items():
                    if parameter.grad is not None:
                        total[name] += parameter.grad
                        parameter.grad = None
                low += size
            if not self.ratios_checked:
                deviations = metrics.get("ratio_deviation", [])
                ratios.check(self.method, deviations, self.processes, where)
                self.ratios_checked = True
            norms.append(self._step(total, where))
        means = {name: self._mean(torch.cat(parts)) for name, parts in metrics.items()}
        return {**means, "grad_norm": sum(norms) / len(norms)}

    def _step(self, gradients: dict[str, Tensor], where: str) -> float:
        """Sum the processes' gradients and take one optimiser step; return the gradient's norm.

        DistributedDataParallel would sum them in the passes of a wrapped network, but methods call
        the backbone itself, and the adapter is small enough to be summed at once. Every process
        gets the same sum bit for bit, and therefore the same adapter.
        """
        self.processes.sum_(list(gradients.values()))
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].to(parameter.dtype)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.method.max_grad_norm)
        if not norm.isfinite():
            raise NonFinite(f"{where}: the gradient's norm is {norm.item()}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.method.rate(self.updates)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = self.method.decay(self.updates)
        self.updates += 1
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(parameter.detach(), 1 - decay)
        return norm.item()

    def _mean(self, values: Tensor) -> float:
        """The mean over the values of all processes."""
        total = torch.stack([values.sum(), values.new_tensor(len(values))])
        self.processes.sum_([total])
        return (total[0] / total[1]).item()

    def _differentiable_rewards(
        self,
        image_prompts: Sequence[prompts.Prompt],
        idx: range,
        where: str,
        x_0: Tensor,
        part: slice,
    ) -> dict[str, Tensor]:
        """Training-scale rewards of latents, with gradients; see `UpdateInputs.rewards`.

        All must be finite: a gradient may not show that one is not.

        Args:
            idx: the images of the micro-batch, among this process's.
            part: selects the images of x_0 from `idx`.
        """
        images = idx[part]
        pixels = self._decode(x_0, images, where)
        rewards = self.rewards.differentiate(pixels, [image_prompts[image] for image in images])
        for name, values in rewards.items():
            broken = ~values.detach().isfinite()
            if broken.any():
                row = int(broken.nonzero()[0, 0])
                raise NonFinite(
                    f"{where}: reward {name!r} is {values[row].item()} for image "
                    f"{self._place(images[row])}"
                )
        return rewards

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged adapter inside the block."""

        def swap() -> None:
            for name, parameter in self.parameters.items():
                parameter.data, self.averages[name] = self.averages[name], parameter.data

        swap()
        try:
            yield
        finally:
            swap()

    def save(self, folder: Path, needs: Needs, iteration: int, values: Mapping[str, Any]) -> None:
        """Write the resume state after `iteration` iterations, with JSON values."""
        tensors, optimizer = checkpoint.pack_optimizer(self.optimizer)
        tensors |= {f"lora/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema/{name}": average for name, average in self.averages.items()}
        own = {**optimizer, "updates": self.updates}
        checkpoint.save(folder, needs, iteration, tensors, {**own, **values})

    def restore(self, state: checkpoint.State) -> None:
        """Continue from a state that `save` wrote."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.tensors[f"lora/{name}"])
                self.averages[name].copy_(state.tensors[f"ema/{name}"])
        self.updates = state.values["updates"]
        checkpoint.unpack_optimizer(self.optimizer, state.tensors, state.values)

    def export(self, path: Path) -> None:
        """Write the adapter, or its average if the method saves that."""
        exported = self.averaged() if self.method.saves_average else nullcontext()
        with exported:
            files.atomic_write(path, self.backbone.save_adapter)


def trainer_of(spec: RunSpec, processes: Processes = distributed.ALONE) -> Trainer:
    """The trainer of a run, with the models, rewards and training prompts of its asset source."""
    source = run_inputs.asset_source(spec, processes.local_rank)
    model = source.model(spec.backbone, spec.resolution)
    if spec.training is not None:
        torch.backends.cuda.matmul.allow_tf32 = spec.training.tf32
        torch.backends.cudnn.allow_tf32 = spec.training.tf32  # PyTorch's default is True
        if spec.training.compile and model.device.type == "cuda":
            model.compile()
    return Trainer(
        spec,
        model,
        source.training_rewards(list(spec.rewards)),
        source.prompts(spec.prompts, "train"),
        processes,
        shares=source.shares(spec.prompts),
    )
