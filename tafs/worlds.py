"""What a scale's world offers: prompt sets, rewards, and models.

`shapes` is the embedded one, whose files ship with the package. `hub` is the paper's: models of
resources.yaml, pinned by the scale's lock file and fetched beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tafs import models, prompts, resources

if TYPE_CHECKING:  # what only writes descriptions needs no torch
    from tafs.rewards.registry import RewardSet

# Of each world, the prompt sets that its scales can cast.
PROMPTS = {"shapes": ("shapes",), "hub": ("geneval", "pickapic")}
# How many GenEval's generator makes, as many as Flow-GRPO's public set, and from which seed.
GENEVAL_TRAINING, GENEVAL_SEED = 50_000, 0


class World(Protocol):
    """One world at one scale's settings."""

    def metrics(self, prompt_set: str) -> tuple[str, ...]:
        """Those of `rewards.METRICS` that an evaluation on a prompt set computes itself."""
        ...

    def prompts(self, prompt_set: str, split: str) -> list[prompts.Prompt]:
        """The prompts of a set; `split` is train or test."""
        ...

    def rewards(self, names: Sequence[str], *, strict_geneval: bool = False) -> RewardSet:
        """Reward models on the settings' device.

        Args:
            names: of `rewards.METRICS`.
            strict_geneval: GenEval's 0/1 verdict in place of the graded credit.

        Raises:
            ValueError: an unknown reward, or its weights are altered or missing; names it.
        """
        ...

    def model(self, name: str, resolution: int) -> Any:
        """A Backbone, or a Zoo where the model cannot be trained; its weights are verified.

        Raises:
            ValueError: no such model, or its weights are altered or missing; names it.
        """
        ...

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of models and rewards, for provenance."""
        ...

    def random(self, names: Sequence[str]) -> list[str]:
        """Those of the models and rewards that are marked as randomly initialised."""
        ...

    def inputs(self, names: Sequence[str]) -> list[str]:
        """Files whose change reruns what was made with these models, rewards and prompt sets."""
        ...


def of(settings: Mapping[str, Any]) -> World:
    """The world of a run's settings."""
    worlds: dict[str, Callable[[Mapping[str, Any]], World]] = {"shapes": Shapes, "hub": Hub}
    return worlds[settings["world"]](settings)


class Shapes:
    """The embedded world."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def metrics(self, prompt_set: str) -> tuple[str, ...]:
        from tafs.rewards import METRICS

        return METRICS

    def prompts(self, prompt_set: str, split: str) -> list[prompts.Prompt]:
        from tafs.shapes.captions import DATA

        return prompts.read(DATA / f"{split}.jsonl")

    def rewards(self, names: Sequence[str], *, strict_geneval: bool = False) -> RewardSet:
        from tafs.rewards import registry, shapes

        return registry.load(names, partial(shapes.build, strict_geneval=strict_geneval))

    def model(self, name: str, resolution: int) -> Any:
        from tafs import backbones
        from tafs.shapes import weights

        return backbones.load(weights.verify(name), **_settings(self.settings, name, resolution))

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        from tafs.shapes import weights

        return {name: weights.digest(name) for name in names if name != "geneval"}

    def random(self, names: Sequence[str]) -> list[str]:
        return []

    def inputs(self, names: Sequence[str]) -> list[str]:
        return [str(Path(__file__).parent / "shapes" / "weights" / "manifest.json")]


# The resources of each reward; a folder each.
REWARDS = {
    "pickscore": ("pickscore", "clip-vit-h-14"),
    "clip": ("clip-vit-l-14",),
    "hpsv2": ("hpsv2",),
    "imagereward": ("imagereward", "bert-base-uncased"),
    "geneval": ("mask2former", "clip-vit-l-14"),
    "unifiedreward": ("unifiedreward",),
}
SERVED = "unifiedreward"  # the metric whose model is behind a server


class Hub:
    """The paper's models."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.lock = Path(settings["lock"])

    def metrics(self, prompt_set: str) -> tuple[str, ...]:
        from tafs.rewards import METRICS

        # Only GenEval's own prompts say what has to be in the image.
        left_out = {SERVED} | ({"geneval"} if prompt_set != "geneval" else set())
        return tuple(metric for metric in METRICS if metric not in left_out)

    def prompts(self, prompt_set: str, split: str) -> list[prompts.Prompt]:
        from tafs import geneval_prompts

        if prompt_set == "geneval":
            rows = (
                geneval_prompts.evaluation_rows()
                if split == "test"
                else geneval_prompts.training_rows(GENEVAL_TRAINING, GENEVAL_SEED)
            )
        else:
            rows = geneval_prompts.pickapic(self.folder(prompt_set), split)
        return [prompts.Prompt(row["prompt"], row) for row in rows]

    def rewards(self, names: Sequence[str], *, strict_geneval: bool = False) -> RewardSet:
        from tafs.rewards import hub, registry

        build = partial(
            hub.build,
            folder=self.folder,
            device=self.settings["device"],
            strict_geneval=strict_geneval,
        )
        return registry.load(names, build)

    def model(self, name: str, resolution: int) -> Any:
        model = models.read()[name]
        settings = _settings(self.settings, name, resolution)
        folders = {resource: self.folder(resource) for resource in model.resources}
        if not model.trainable:
            from tafs.backbones.zoo import Zoo

            return Zoo.load(
                model, folders, settings["resolution"], settings["device"], settings["dtype"]
            )
        from tafs import backbones

        return backbones.load(folders[model.resource], **settings)

    def folder(self, resource: str) -> Path:
        """A resource's verified files.

        Raises:
            ValueError: see `resources.path`.
        """
        return resources.path(resource, self.lock)

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        return {name: resources.digest(name, self.lock) for name in self._resources(names)}

    def random(self, names: Sequence[str]) -> list[str]:
        return [name for name in self._resources(names) if resources.is_random(name, self.lock)]

    def inputs(self, names: Sequence[str]) -> list[str]:
        return [str(self.lock)]

    def _resources(self, names: Sequence[str]) -> list[str]:
        known = models.read()
        found: set[str] = set()
        for name in names:
            found |= set(known[name].resources if name in known else REWARDS.get(name, (name,)))
        return sorted(found)


def _settings(settings: Mapping[str, Any], name: str, resolution: int) -> dict[str, Any]:
    """How a backbone is loaded."""
    import torch

    model = models.read()[name]
    return {
        "resolution": resolution,
        "guidance": model.guidance,
        "max_sequence_length": model.max_sequence_length,
        "device": settings["device"],
        "dtype": getattr(torch, settings["dtype"]),
        "gradient_checkpointing": settings["gradient_checkpointing"],
    }
