"""What a scale's world offers: prompt sets, rewards, and models.

`shapes` is the embedded one, whose files ship with the package. `hub` is the paper's: models of
resources.yaml, pinned by the scale's lock file and fetched beforehand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from tafs.assets import cache
from tafs.data import prompts
from tafs.models import catalog

if TYPE_CHECKING:  # what only writes descriptions needs no torch
    from tafs.rewards.registry import RewardSet

# Of each world, the prompt sets that its scales can cast, and the resources that they need.
PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "shapes": {"shapes": ()},
    "hub": {"geneval": (), "pickapic": ("pickapic",)},
}
# How many GenEval's generator makes, as many as Flow-GRPO's public set, and from which seed.
GENEVAL_TRAINING, GENEVAL_SEED = 50_000, 0


class AssetSettings(BaseModel):
    """Where models, rewards and prompts come from, and how models are loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    assets: Literal["shapes", "hub"]
    lock: str  # path of the lock file that pins the hub's files
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    gradient_checkpointing: bool


class AssetSource(Protocol):
    """The models, rewards and prompts of one source, at one scale's settings."""

    @property
    def device(self) -> str:
        """Where models and rewards are put, in torch's words."""
        ...

    def metrics(self, prompt_set: str) -> tuple[str, ...]:
        """Those of `rewards.METRICS` that an evaluation on a prompt set computes itself."""
        ...

    def prompts(self, prompt_set: str, split: str) -> list[prompts.Prompt]:
        """The prompts of a set; `split` is train or test."""
        ...

    def shares(self, prompt_set: str) -> Mapping[str, float] | None:
        """How often training draws each tag of a set's prompts; None: equally often."""
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
        """A Backbone, or a ReferencePipeline where the model cannot be trained; its weights are verified.

        Raises:
            ValueError: no such model, or its weights are altered or missing; names it.
        """
        ...

    @property
    def pinned(self) -> bool:
        """Whether the files are fixed; where they are not, runs can be planned but not made."""
        ...

    def digests(self, names: Sequence[str], prompt_sets: Sequence[str] = ()) -> dict[str, str]:
        """SHA-256 of what models, rewards and prompt sets are made of, by its name.

        Raises:
            ValueError: something is not pinned; names it.
        """
        ...

    def random(self, names: Sequence[str]) -> list[str]:
        """Those of the models and rewards that are marked as randomly initialised."""
        ...

    @property
    def golden_scores(self) -> Path | None:
        """Where the stored scores of `rewards.canary` are; None: the rewards' tests are enough."""
        ...

    def reward_digest(self, name: str) -> str:
        """SHA-256 of all that decides a reward's scores."""
        ...


def of(settings: AssetSettings, gpu: int = 0) -> AssetSource:
    """The asset source of a run's settings.

    Args:
        gpu: index of this process's GPU, where the device is `cuda`.
    """
    source = {"shapes": ShapesAssets, "hub": HubAssets}[settings.assets]
    return source(settings, gpu)


class _Assets:
    def __init__(self, settings: AssetSettings, gpu: int) -> None:
        self.settings = settings
        self.gpu = gpu

    @cached_property
    def device(self) -> str:
        """Device of the models and rewards.

        Raises:
            ValueError: this machine does not have the GPU.
        """
        if self.settings.device != "cuda":
            return self.settings.device
        import torch

        if torch.cuda.device_count() <= self.gpu:
            raise ValueError(
                f"device: the scale's is 'cuda', but this machine shows "
                f"{torch.cuda.device_count()} GPUs; run it where there is one for each process, "
                "or set the scale's device to cpu"
            )
        return f"cuda:{self.gpu}"


class ShapesAssets(_Assets):
    """The embedded models."""

    golden_scores = None
    pinned = True

    def metrics(self, prompt_set: str) -> tuple[str, ...]:
        from tafs.rewards.metrics import METRICS

        return tuple(METRICS)

    def prompts(self, prompt_set: str, split: str) -> list[prompts.Prompt]:
        from tafs.shapes.captions import DATA

        return prompts.read(DATA / f"{split}.jsonl")

    def shares(self, prompt_set: str) -> None:
        return None

    def rewards(self, names: Sequence[str], *, strict_geneval: bool = False) -> RewardSet:
        from tafs.rewards import registry
        from tafs.shapes import rewards as shapes

        return registry.load(names, partial(shapes.build, strict_geneval=strict_geneval))

    def model(self, name: str, resolution: int) -> Any:
        from tafs.models import loading
        from tafs.shapes import weights

        folder = weights.verify(catalog.read()[name].resource)
        return loading.load(folder, **_settings(self.settings, name, resolution, self.device))

    def digests(self, names: Sequence[str], prompt_sets: Sequence[str] = ()) -> dict[str, str]:
        from tafs.shapes import weights

        return {name: weights.digest(name) for name in names if name != "geneval"}

    def random(self, names: Sequence[str]) -> list[str]:
        return []

    def reward_digest(self, name: str) -> str:
        return "".join(self.digests([name]).values())


class HubAssets(_Assets):
    """The paper's models."""

    @property
    def lock(self) -> Path:
        return Path(self.settings.lock)

    def metrics(self, prompt_set: str) -> tuple[str, ...]:
        from tafs.rewards.metrics import METRICS, SERVED

        # Only GenEval's own prompts say what has to be in the image.
        left_out = {SERVED} | ({"geneval"} if prompt_set != "geneval" else set())
        return tuple(metric for metric in METRICS if metric not in left_out)

    def prompts(self, prompt_set: str, split: str) -> list[prompts.Prompt]:
        from tafs.data import geneval

        if prompt_set == "geneval":
            rows = (
                geneval.evaluation_rows()
                if split == "test"
                else geneval.training_rows(GENEVAL_TRAINING, GENEVAL_SEED)
            )
        else:
            folder = self.folder(prompt_set) / "dataset" / "pickscore"
            rows = geneval.pickapic(folder, split)
        return [prompts.Prompt(row["prompt"], row) for row in rows]

    def shares(self, prompt_set: str) -> Mapping[str, float] | None:
        from tafs.data import geneval

        if prompt_set != "geneval":
            return None
        total = sum(geneval.SHARES.values())
        return {tag: share / total for tag, share in geneval.SHARES.items()}

    def rewards(self, names: Sequence[str], *, strict_geneval: bool = False) -> RewardSet:
        from tafs.rewards import hub, registry

        build = partial(
            hub.build,
            folder=self.folder,
            device=self.device,
            strict_geneval=strict_geneval,
        )
        return registry.load(names, build)

    def model(self, name: str, resolution: int) -> Any:
        model = catalog.read()[name]
        resolution = model.resolution or resolution
        settings = _settings(self.settings, name, resolution, self.device)
        folders = {resource: self.folder(resource) for resource in model.resources}
        if not model.trainable:
            from tafs.models.pipelines import ReferencePipeline

            kept = ("resolution", "device", "dtype")
            return ReferencePipeline.load(model, folders, **{key: settings[key] for key in kept})
        from tafs.models import loading

        return loading.load(folders[model.resource], **settings)

    def folder(self, resource: str) -> Path:
        """A resource's verified files.

        Raises:
            ValueError: see `resources.path`.
        """
        return cache.path(resource, self.lock)

    @property
    def pinned(self) -> bool:
        return self.lock.is_file()

    def digests(self, names: Sequence[str], prompt_sets: Sequence[str] = ()) -> dict[str, str]:
        needed = resources_of(names, prompt_sets)
        return {name: cache.digest(name, self.lock) for name in needed}

    def random(self, names: Sequence[str]) -> list[str]:
        return [name for name in resources_of(names) if cache.is_random(name, self.lock)]

    @property
    def golden_scores(self) -> Path:
        return self.lock.with_suffix(".golden.json")

    def reward_digest(self, name: str) -> str:
        content = json.dumps(self.digests([name]), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def resources_of(names: Sequence[str], prompt_sets: Sequence[str] = ()) -> list[str]:
    """The entries of resources.yaml that models, rewards and prompt sets of the hub are made of."""
    from tafs.rewards.metrics import RESOURCES

    known = catalog.read()
    found = {r for name in prompt_sets for r in PROMPTS["hub"][name]}
    for name in names:
        found |= set(known[name].resources if name in known else RESOURCES[name])
    return sorted(found)


def _settings(settings: AssetSettings, name: str, resolution: int, device: str) -> dict[str, Any]:
    """How a backbone is loaded."""
    import torch

    model = catalog.read()[name]
    return {
        "resolution": resolution,
        "guidance": model.guidance,
        "max_sequence_length": model.max_sequence_length,
        "device": device,
        "dtype": getattr(torch, settings.dtype),
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
