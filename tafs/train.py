"""The one training loop: `python -m tafs.train RUN_DIR` trains what RUN_DIR/run.json describes.

Writes adapter.safetensors, journal.jsonl and, after the iterations that run.json names, snapshots/.
Until then all of it and the resume state live in RUN_DIR/.state, which outlives a kill and is
refused when the run's fingerprint has changed. It is deleted when the run is evaluated and not
before: a workflow that was killed before it heard of a training's end calls for that training
again, which then has nothing left to do. All randomness comes from streams of (seed, name,
iteration), so a resumed run draws what an undisturbed one draws.

`torchrun --standalone --nproc-per-node=8 -m tafs.train RUN_DIR` trains the same run on eight GPUs,
and either command continues what the other began. Each process takes an equal part of the groups of
every optimiser step. Prompts and start noise are drawn for the whole iteration, the steps' noise
for each micro-batch by the place of its first image in the iteration; so where `micro_batch`
divides a process's images of a step, the draws do not depend on the number of processes, and what
is trained depends on it by the rounding of sums alone. The first process writes all files, and all
processes read the resume state: RUN_DIR must be on a file system that they share.
"""

from __future__ import annotations

import shutil
import sys
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

from tafs import (
    checkpoint,
    config,
    distributed,
    failures,
    grpo,
    prompts,
    provenance,
    rundir,
    seeding,
    worlds,
)
from tafs import method as methods
from tafs.backbones.base import Backbone, fast_dtype
from tafs.budget import Budget
from tafs.digest import sha256
from tafs.distributed import Processes
from tafs.journal import Journal
from tafs.method import Feedback, Trajectory
from tafs.progress import Reporter
from tafs.rewards.registry import MISSING_SHARE, RewardSet

AHEAD = 16  # iterations whose prompts are encoded at once, while the text encoders are on the GPU


class NonFinite(failures.RunFailed):
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
        self.method = methods.create(description["method"], dict(description["hyperparameters"]))
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
        problem = config.sharing_problem(self.groups, self.method.updates, processes.size)
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
        chunks = self._rollout([drawn[group].text for group in self.own], iteration)
        sampled = clock()
        owners = [drawn[group] for group in self.own for _ in range(self.group_size)]
        rewards = self._score(chunks, owners, iteration)
        advantages = self.method.credit(rewards.by_name, rewards.weights)
        # Whatever a method makes of missing rewards.
        advantages = advantages.masked_fill(rewards.invalid, 0)[:, self.own].flatten(1)
        scored = clock()
        learned = self._update(chunks, owners, advantages, iteration)
        end = clock()
        group = chunks[0].images(slice(0, self.group_size))
        with torch.no_grad():
            divergence = self.method.divergence(self.backbone, group, iteration)
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
        chunks = []
        for part in self.micro_batches():
            generator = seeding.generator(self.seed, "step", iteration, self._place(part.start))
            chunks.append(
                self.method.rollout(self.backbone, cond[part], noise[part], generator, iteration)
            )
        return chunks

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
        self, chunks: Sequence[Trajectory], owners: Sequence[prompts.Prompt], iteration: int
    ) -> Rewards:
        """Decode and score this process's images; the rewards of all processes' images."""
        columns: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        low = 0
        for chunk in chunks:
            scored, size = chunk.scored.shape[:2]
            steps = []
            for number, latents in enumerate(chunk.scored, start=1):
                where = f"iteration {iteration}, scored step {number} of {scored}"
                with torch.no_grad():
                    images = self._decode(latents, range(low, low + size), where)
                steps.append(self.rewards.score(images, owners[low : low + size]))
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
        chunks: Sequence[Trajectory],
        owners: Sequence[prompts.Prompt],
        advantages: Tensor,
        iteration: int,
    ) -> dict[str, Any]:
        """The optimiser steps; advantages: [T, B] of this process's images."""
        method = self.method
        facts: dict[str, list[Tensor]] = {}
        norms = []
        pending = iter(chunks)
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
                feedback = Feedback(
                    advantages[:, of],
                    partial(self._differentiable_rewards, owners, range(low, low + size), where),
                    self.weights,
                    self.averaged,
                )
                share = size / ((update.stop - update.start) * self.processes.size)
                for part in method.losses(self.backbone, chunk, feedback, self.micro_batch):
                    if not part.loss.isfinite():
                        raise NonFinite(f"{where}: the loss is {part.loss.item()}")
                    (part.loss * share).backward()
                    for name, values in part.facts.items():
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
        owners: Sequence[prompts.Prompt],
        chunk: range,
        where: str,
        x_0: Tensor,
        part: slice,
    ) -> dict[str, Tensor]:
        """Training-scale rewards of latents, with gradients; see `method.Feedback`.

        Args:
            owners: of all of this process's images.
            chunk: those of them that `part` selects from.

        Raises:
            NonFinite: an image or a reward is NaN or infinite; a gradient may not show it.
        """
        images = chunk[part]
        pixels = self._decode(x_0, images, where)
        rewards = self.rewards.differentiate(pixels, [owners[image] for image in images])
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
            checkpoint.atomic_write(path, self.backbone.save_adapter)


class Keeper:
    """The files of a run in training, which one process writes for all."""

    def __init__(
        self, run: rundir.RunDir, trainer: Trainer, fingerprint: str, state: checkpoint.State | None
    ) -> None:
        self.run = run
        self.trainer = trainer
        self.fingerprint = fingerprint
        self.journal = Journal(run.state / "journal.jsonl")
        if state is None:
            # Nothing to continue: a journal that is there belongs to a run with other settings.
            run.clear_state()
            facts = {"run": run.name, "fingerprint": fingerprint}
            self.journal.append("start", **facts, provenance=provenance.collect(run.description))
        else:
            self.journal.append("resume", iteration=state.iteration, notes=state.notes)
        self.seconds: float = 0.0 if state is None else state.values["seconds"]
        self.snapshots: dict[str, str] = {} if state is None else state.values["snapshots"]
        self.saved = done = 0 if state is None else state.iteration
        self.reporter = Reporter(run.folder, "train", trainer.iterations, done)

    def keep(self, record: Mapping[str, Any]) -> None:
        """Write what is due after an iteration."""
        run, trainer = self.run, self.trainer
        self.seconds += record["seconds"]["total"]
        self.journal.append("iteration", **record)
        self.reporter.advance(_headline(record["rewards"]))
        done = record["iteration"] + 1
        if done in run.description["snapshots"]:
            kept = run.kept_snapshot(done)
            trainer.export(kept)
            self.snapshots[kept.name] = sha256(kept)
        every = run.description["settings"]["checkpoint_every"]
        if done % every == 0 or done == trainer.iterations:
            self.save(done)

    def save(self, done: int) -> None:
        facts = {"seconds": self.seconds, "snapshots": self.snapshots}
        self.trainer.save(self.run.checkpoints, self.fingerprint, done, facts)
        self.saved = done

    def pause(self, done: int, reason: str) -> str:
        """Save the state after `done` iterations, for another job to go on; the line to say so."""
        if self.saved != done:
            self.save(done)
        self.journal.append("pause", iteration=done, reason=reason)
        self.reporter.finish()
        total = self.trainer.iterations
        return f"saved after {done} of {total} iterations, to be continued: {reason}"

    def finish(self) -> None:
        """Put the finished run's files in their places."""
        run = self.run
        run.snapshots.mkdir(exist_ok=True)
        for iteration in run.description["snapshots"]:
            copy = partial(shutil.copyfile, run.kept_snapshot(iteration))
            checkpoint.atomic_write(run.snapshot(iteration), copy)
        self.trainer.export(run.adapter)
        digests = {**self.snapshots, run.adapter.name: sha256(run.adapter)}
        facts = {"iterations": self.trainer.iterations, "seconds": self.seconds}
        self.journal.append("end", **facts, sha256=digests)
        checkpoint.atomic_text(run.journal, self.journal.path.read_text(encoding="utf-8"))
        self.reporter.finish()


def trainer_of(description: dict[str, Any], processes: Processes = distributed.ALONE) -> Trainer:
    """What run.json describes, with its world's models, rewards and training prompts."""
    world = worlds.of(description["settings"], processes.local_rank)
    return Trainer(
        description,
        world.model(description["backbone"], description["settings"]["resolution"]),
        world.rewards(list(description["rewards"])),
        world.prompts(description["prompts"], "train"),
        processes,
        shares=world.shares(description["prompts"]),
    )


def train(run: rundir.RunDir, processes: Processes = distributed.ALONE) -> None:
    """Train a run from its newest usable state to its adapter, in each of its processes."""
    trainer = trainer_of(run.description, processes)
    fingerprint = run.fingerprint()
    state = checkpoint.load(run.checkpoints, fingerprint, partial(_missing_snapshot, run))
    done = 0 if state is None else state.iteration
    found = processes.all_gather(torch.tensor([done]), dim=0).tolist()
    if len(set(found)) > 1:
        raise failures.RunFailed(
            f"{run.checkpoints}: the processes found states of different iterations ({found}, in "
            f"order of rank); put the run on a file system that they share"
        )
    if state is not None:
        trainer.restore(state)
    keeper = Keeper(run, trainer, fingerprint, state) if processes.leads else None
    with Budget.from_environment() as budget:
        for iteration in range(done, trainer.iterations):
            record = trainer.iterate(iteration)
            if keeper is not None:
                keeper.keep(record)
            budget.lap()
            done = iteration + 1
            if processes.any(bool(budget.spent)) and done < trainer.iterations:
                reason = budget.spent or "another process was asked to stop"
                line = "" if keeper is None else keeper.pause(done, reason)
                # torchrun ends the others soon after the first: not before the state is saved.
                processes.any(False)
                if keeper is None:
                    sys.exit(failures.CONTINUE)
                raise failures.ToBeContinued(line)
        if keeper is not None:
            keeper.finish()


def _missing_snapshot(run: rundir.RunDir, state: checkpoint.State) -> str:
    """Which snapshot that was taken before a state is not as it was written; "" if all are."""
    for name, digest in state.values["snapshots"].items():
        kept = run.state / "snapshots" / name
        if not kept.is_file() or sha256(kept) != digest:
            return f"snapshot {name} is damaged"
    return ""


def _headline(rewards: dict[str, list[float]]) -> str:
    """The last scored step's rewards, for the person who watches."""
    return "  ".join(f"{name} {values[-1]:.3g}" for name, values in rewards.items())


def train_together(run: rundir.RunDir) -> None:
    """`train` in this process and in those that torchrun started beside it."""
    with distributed.connected(run.description["settings"]["device"]) as processes:
        train(run, processes)


def main() -> None:
    rundir.run_stage("train", train_together)


if __name__ == "__main__":
    main()
