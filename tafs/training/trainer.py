"""trainer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tafs.assets import sources
from tafs.common import errors, files, seeding
from tafs.data import prompts
from tafs.experiment import validate
from tafs.methods import grpo, registry
from tafs.methods.base import Trajectory, UpdateInputs
from tafs.models.base import Backbone, fast_dtype
from tafs.rewards.registry import MISSING_SHARE, RewardSet
from tafs.runtime import checkpoint, distributed
from tafs.runtime.distributed import Processes

AHEAD = 16  # iterations whose prompts are encoded at once, while the text encoders are on the GPU


class NonFinite(errors.RunFailed):
    """An image, reward, loss or gradient is NaN or infinite; it has updated nothing."""


def tolerated(images: int) -> int:
    """How many of an iteration's images may lack a reward.

    The share MISSING_SHARE, but always one, which says little about a share where a batch is small;
    and never all.
    """
    return min(max(1, int(MISSING_SHARE * images)), images - 1)


@dataclass
class Rewards:
    """The rewards of an iteration's scored images; an invalid image's are all NaN."""

    by_name: dict[str, Tensor]  # training scale, [K, groups, G]
    reported: dict[str, Tensor]  # reported scale, [K, groups, G]
    weights: dict[str, float]
    invalid: Tensor  # bool [groups, G]: some reward at some step was NaN or infinite

    @property
    def total(self) -> Tensor:
        """Weighted sum, [K, groups, G]."""
        parts = [weight * self.by_name[name] for name, weight in self.weights.items()]
        return torch.stack(parts).sum(0)

    @property
    def spread(self) -> float:
        """The total's standard deviation within a group at the last step, mean over the groups.

        Of valid images, and groups that have two of them; NaN if there are none.
        """
        last = self.total[-1]
        std = last.std(-1)
        for group in self.invalid.any(-1).nonzero().flatten().tolist():
            valid = last[group][~self.invalid[group]]
            std[group] = valid.std() if len(valid) > 1 else torch.nan
        return grpo.mean_of_known(std, 0).item()


class Trainer:
    """Everything that a run carries from iteration to iteration, in one of its processes.

    Args:
        description: run.json.
        known: the prompts that iterations draw from.
        shares: how often each of their tags is drawn; None: equally often.

    Raises:
        ValueError: the prompts of an iteration cannot be shared out to updates and processes.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        backbone: Backbone,
        rewards: RewardSet,
        known: Sequence[prompts.Prompt],
        processes: Processes = distributed.ALONE,
        *,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        settings = description["settings"]
        self.backbone = backbone
        self.rewards = rewards
        self.processes = processes
        self.seed: int = description["seed"]
        self.method = registry.create(description["method"], dict(description["hyperparameters"]))
        self.weights: dict[str, float] = description["rewards"]
        # Rewards see pixels to about 8 bits in any case; evaluation decodes in full precision.
        self.decode_dtype = fast_dtype(backbone.device)
        self.iterations: int = settings["iterations"]
        self.groups: int = settings["prompts_per_iteration"]
        self.group_size: int = settings["group_size"]
        self.micro_batch: int = settings["micro_batch"]
        self.prompts = known
        self.shares = shares
        self.encoded = range(0)  # the iterations whose prompts the backbone has prepared
        problem = validate.sharing_problem(self.groups, self.method.updates, processes.size)
        if problem:
            raise ValueError(problem)
        # The groups of this process, of all that an iteration has.
        parts = torch.arange(self.groups).view(self.method.updates, processes.size, -1)
        self.own: list[int] = parts[:, processes.rank].flatten().tolist()
        lora = settings["lora"]
        backbone.add_lora(lora["rank"], lora["alpha"], seeding.generator(self.seed, "lora"))
        self.parameters = backbone.lora_parameters()
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.method.learning_rate,
            weight_decay=self.method.weight_decay,
        )

    # -- one iteration -------------------------------------------------------------------------

    def iterate(self, iteration: int) -> dict[str, Any]:
        """Sample, score, update; returns the journal's record.

        It describes the images of all processes, but for the time, which is this process's, and
        the divergence, which is that of this process's first group. An image without a finite
        reward is `invalid`: it is counted, the record's rewards are those of the others, and it
        moves nothing but a KL term, which knows no rewards.

        Raises:
            NonFinite: more images are invalid than `tolerated`, or any where the method
                differentiates the rewards; or an image, a loss or a gradient is NaN or infinite.
                Raised before the update that it would have been part of; names the iteration and
                the source.
        """
        clock = self._clock
        start = clock()
        drawn = self._draw(iteration)
        if iteration not in self.encoded:
            self.encoded = range(iteration, min(iteration + AHEAD, self.iterations))
            ahead = map(self._draw, self.encoded)
            self.backbone.prepare([later[group].text for later in ahead for group in self.own])
        trajectories = self._rollout([drawn[group].text for group in self.own], iteration)
        sampled = clock()
        image_prompts = [drawn[group] for group in self.own for _ in range(self.group_size)]
        rewards = self._score(trajectories, image_prompts, iteration)
        advantages = self.method.compute_advantages(rewards.by_name, rewards.weights)
        # Whatever a method makes of missing rewards.
        advantages = advantages.masked_fill(rewards.invalid, 0)[:, self.own].flatten(1)
        scored = clock()
        learned = self._update(trajectories, image_prompts, advantages, iteration)
        end = clock()
        group = trajectories[0].images(slice(0, self.group_size))
        with torch.no_grad():
            divergence = self.method.kl_to_base(self.backbone, group, iteration)
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

    def _clock(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)
        return time.perf_counter()

    def _draw(self, iteration: int) -> list[prompts.Prompt]:
        """The prompts of an iteration's groups, of all processes."""
        rng = np.random.default_rng([self.seed, iteration])
        return prompts.draw(self.prompts, self.groups, rng, self.shares)

    @torch.no_grad()
    def _rollout(self, texts: Sequence[str], iteration: int) -> list[Trajectory]:
        """This process's images in micro-batches, the very ones that the update will take: the
        ratio is exactly 1 before the first update only if both see the same shapes."""
        cond = self.backbone.encode(texts).repeat_interleave(self.group_size)
        shape = self.backbone.latent_shape
        per_group = 1 if self.method.shares_start_noise else self.group_size
        noise = torch.randn(
            self.groups,
            per_group,
            *shape,
            generator=seeding.generator(self.seed, "start", iteration),
        )[self.own]
        noise = noise.expand(-1, self.group_size, *shape).flatten(0, 1).to(self.backbone.device)
        trajectories = []
        for part in self.micro_batches():
            generator = seeding.generator(self.seed, "step", iteration, self._place(part.start))
            trajectories.append(
                self.method.rollout(self.backbone, cond[part], noise[part], generator, iteration)
            )
        return trajectories

    def micro_batches(self) -> list[slice]:
        """This process's images in the parts that go through the network together."""
        return [
            slice(low, min(low + self.micro_batch, update.stop))
            for update in self._updates()
            for low in range(update.start, update.stop, self.micro_batch)
        ]

    def _updates(self) -> list[slice]:
        """This process's images of each optimiser step: equal shares of whole groups."""
        images = len(self.own) * self.group_size
        share = images // self.method.updates
        return [slice(low, low + share) for low in range(0, images, share)]

    def _place(self, image: int) -> int:
        """Where an image of this process stands among all images of the iteration."""
        group, member = divmod(image, self.group_size)
        return self.own[group] * self.group_size + member

    def _score(
        self,
        trajectories: Sequence[Trajectory],
        image_prompts: Sequence[prompts.Prompt],
        iteration: int,
    ) -> Rewards:
        """Decode and score this process's images; the rewards of all processes' images."""
        columns: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        low = 0
        for chunk in trajectories:
            scored, size = chunk.scored.shape[:2]
            steps = []
            for number, latents in enumerate(chunk.scored, start=1):
                where = f"iteration {iteration}, scored step {number} of {scored}"
                with torch.no_grad():
                    images = self._decode(latents, range(low, low + size), where)
                steps.append(self.rewards.score(images, image_prompts[low : low + size]))
            for name in self.weights:
                columns[name].append(torch.stack([step[name] for step in steps]))
            low += size
        by_name = {}
        for name, parts in columns.items():
            own = torch.cat(parts, dim=1)
            own = own.view(len(own), self.method.updates, -1, self.group_size)
            by_name[name] = self.processes.all_gather(own, dim=2).flatten(1, 2)
        invalid = self._invalid(by_name, iteration)
        reported = self.rewards.report(by_name)
        return Rewards(
            {name: values.masked_fill(invalid, torch.nan) for name, values in by_name.items()},
            {name: values.masked_fill(invalid, torch.nan) for name, values in reported.items()},
            self.weights,
            invalid,
        )

    def _decode(self, latents: Tensor, images: Sequence[int], where: str) -> Tensor:
        """Pixels of this process's `images`, [b, ...] as their latents.

        Raises:
            NonFinite: NaN or infinity is among them; names the image.
        """
        pixels = self.backbone.decode(latents, self.decode_dtype)
        broken = ~pixels.detach().flatten(1).isfinite().all(1)
        if broken.any():
            image = self._place(images[int(broken.nonzero()[0, 0])])
            raise NonFinite(f"{where}: image {image} holds NaN or infinity")
        return pixels

    def _invalid(self, rewards: Mapping[str, Tensor], iteration: int) -> Tensor:
        """Which images lack a reward, [groups, G], of those of all processes [K, groups, G].

        Raises:
            NonFinite: too many do; names the first of them, and how many may.
        """
        missing = torch.stack([~values.isfinite() for values in rewards.values()])
        invalid = missing.any(0).any(0)
        count, images = int(invalid.sum()), invalid.numel()
        allowed = 0 if self.method.needs_reward_gradients else tolerated(images)
        if count > allowed:
            image = int(invalid.flatten().nonzero()[0, 0])
            of, step = missing.flatten(2)[:, :, image].nonzero()[0].tolist()
            name, values = list(rewards.items())[of]
            limit = f"at most {allowed} may ({MISSING_SHARE:.0%}, or one)"
            if self.method.needs_reward_gradients:
                limit = "none may where the method differentiates it"
            raise NonFinite(
                f"iteration {iteration}: reward {name!r} is {values[step].flatten()[image].item()} "
                f"for image {image}, scored step {step + 1} of {len(values)}; {count} of {images} "
                f"images ({count / images:.1%}) lack a finite reward, {limit}"
            )
        return invalid

    def _update(
        self,
        trajectories: Sequence[Trajectory],
        image_prompts: Sequence[prompts.Prompt],
        advantages: Tensor,
        iteration: int,
    ) -> dict[str, Any]:
        """The optimiser steps; advantages: [T, B] of this process's images."""
        method = self.method
        facts: dict[str, list[Tensor]] = {}
        norms = []
        pending = iter(trajectories)
        for number, update in enumerate(self._updates()):
            # Rounding then does not depend on how many processes share the sum: AdamW makes whole
            # steps of what is left of gradients that cancel.
            total = {
                name: torch.zeros_like(parameter, dtype=torch.float64, requires_grad=False)
                for name, parameter in self.parameters.items()
            }
            where = f"iteration {iteration}, update {number}"
            low = update.start
            while low < update.stop:
                chunk = next(pending)
                size = chunk.t.shape[1]
                of = slice(low, low + size)
                feedback = UpdateInputs(
                    advantages[:, of],
                    partial(
                        self._differentiable_rewards, image_prompts, range(low, low + size), where
                    ),
                    self.weights,
                    self.averaged,
                )
                share = size / ((update.stop - update.start) * self.processes.size)
                for part in method.losses(self.backbone, chunk, feedback, self.micro_batch):
                    if not part.loss.isfinite():
                        raise NonFinite(f"{where}: the loss is {part.loss.item()}")
                    (part.loss * share).backward()
                    for name, values in part.metrics.items():
                        facts.setdefault(name, []).append(values)
                for name, parameter in self.parameters.items():
                    if parameter.grad is not None:
                        total[name] += parameter.grad
                        parameter.grad = None
                low += size
            # DistributedDataParallel would sum them in a wrapped network's forward and backward
            # passes; methods call the backbone itself, and the adapter is small enough to be
            # summed at once. Every process gets the same sum, bit for bit, and so the same adapter.
            self.processes.sum_(list(total.values()))
            for name, parameter in self.parameters.items():
                parameter.grad = total[name].to(parameter.dtype)
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), method.max_grad_norm)
            if not norm.isfinite():
                raise NonFinite(f"{where}: the gradient's norm is {norm.item()}")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            norms.append(norm.item())
            for name, parameter in self.parameters.items():
                self.averages[name].lerp_(parameter.detach(), 1 - method.ema)
        means = {name: self._mean(torch.cat(parts)) for name, parts in facts.items()}
        return {**means, "grad_norm": sum(norms) / len(norms)}

    def _mean(self, values: Tensor) -> float:
        """Over the values of all processes."""
        total = torch.stack([values.sum(), values.new_tensor(len(values))])
        self.processes.sum_([total])
        return (total[0] / total[1]).item()

    def _differentiable_rewards(
        self,
        image_prompts: Sequence[prompts.Prompt],
        chunk: range,
        where: str,
        x_0: Tensor,
        part: slice,
    ) -> dict[str, Tensor]:
        """Training-scale rewards of latents, with gradients; see `method.UpdateInputs`.

        Args:
            image_prompts: of all of this process's images.
            chunk: those of them that `part` selects from.

        Raises:
            NonFinite: an image or a reward is NaN or infinite; a gradient may not show it.
        """
        images = chunk[part]
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
        """The averaged adapter is in place inside the block."""
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data

    # -- resuming ------------------------------------------------------------------------------

    def save(
        self, folder: Path, fingerprint: str, iteration: int, facts: Mapping[str, Any]
    ) -> None:
        """Write the resume state after `iteration` iterations, with what else is to be kept."""
        tensors, values = checkpoint.pack_optimizer(self.optimizer)
        tensors |= {f"lora/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema/{name}": average for name, average in self.averages.items()}
        checkpoint.save(folder, fingerprint, iteration, tensors, {**values, **facts})

    def restore(self, state: checkpoint.State) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.tensors[f"lora/{name}"])
                self.averages[name].copy_(state.tensors[f"ema/{name}"])
        checkpoint.unpack_optimizer(self.optimizer, state.tensors, state.values)

    def export(self, path: Path) -> None:
        """Write the adapter: the averaged one where the method keeps an average."""
        kept = self.averaged() if self.method.ema > 0 else nullcontext()
        with kept:
            files.atomic_write(path, self.backbone.save_adapter)


def trainer_of(description: dict[str, Any], processes: Processes = distributed.ALONE) -> Trainer:
    """What run.json describes, with its world's models, rewards and training prompts."""
    world = sources.of(description["settings"], processes.local_rank)
    return Trainer(
        description,
        world.model(description["backbone"], description["settings"]["resolution"]),
        world.rewards(list(description["rewards"])),
        world.prompts(description["prompts"], "train"),
        processes,
        shares=world.shares(description["prompts"]),
    )
