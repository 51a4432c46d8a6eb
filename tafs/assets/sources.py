"""The asset sources: the models, rewards and prompts that a scale's settings select.

The sources `shapes` and `words` are embedded: their files are shipped with the package. The source
`hub` consists of the published models: the entries of resources.yaml, pinned by the scale's lock
file and downloaded beforehand.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from tafs.assets import cache
from tafs.common.files import sha256
from tafs.common.yaml_files import suggestion
from tafs.data import geneval_rows
from tafs.data.prompt_sets import Assets, prompt_set, prompt_sets
from tafs.data.prompts import Prompt, digest
from tafs.models import Backbone, catalog, loading
from tafs.models.attention import Attention
from tafs.models.catalog import Model
from tafs.models.quantization import Quantization
from tafs.rewards import golden, metrics
from tafs.rewards.metrics import METRICS, Metric, Reward
from tafs.rewards.registry import RewardSet, load
from tafs.shapes import captions, scenes, weights
from tafs.words import ROOT as WORDS
from tafs.words import captions as words

Dtype = Literal["float32", "bfloat16"]  # of weights


class AssetSettings(BaseModel):
    """Where models, rewards and prompts come from, and how models are loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    assets: Assets
    lock: str  # path of the lock file that pins the hub's files
    device: Literal["cpu", "cuda", "auto"]
    dtype: Dtype
    gradient_checkpointing: bool
    # Left out where they have their defaults, so that earlier results stay what they are.
    quantize: Quantization = Field(default="none", exclude_if=lambda chosen: chosen == "none")
    attention: Attention = Field(default="native", exclude_if=lambda chosen: chosen == "native")
    # Of the reward models in training; evaluations score in float32.
    rewards_dtype: Dtype = Field(default="float32", exclude_if=lambda dtype: dtype == "float32")
    # Of the prompts of models that are trained, in tokens; None: that of models.yaml.
    max_sequence_length: int | None = Field(default=None, exclude_if=lambda length: length is None)

    def length(self, model: Model) -> int | None:
        """The length of a model's prompts in tokens; None where its pipeline chooses it."""
        own = self.max_sequence_length if model.trainable else None
        return own or model.max_sequence_length

    def conditioning(self, model: Model) -> tuple[float, int]:
        """(guidance, length of the prompts in tokens) of a model that a backbone samples.

        Raises:
            ValueError: models.yaml has null for one of them; names the model.
        """
        guidance, length = model.conditioning
        return guidance, self.length(model) or length


class AssetSource(ABC):
    """The models, rewards and prompts of one source, at one scale's settings."""

    def __init__(self, settings: AssetSettings, gpu: int) -> None:
        self.settings = settings
        self.gpu = gpu

    @property
    def pinned(self) -> bool:
        """Whether all files are fixed; otherwise runs can be planned, but not trained."""
        return True

    @property
    def golden_scores(self) -> Path | None:
        """The file of the golden scores of downloaded weights; None: there are no downloads."""
        return None

    @functools.cached_property
    def device(self) -> str:
        """Device of the models and rewards; "auto" spreads the jobs over the machine's GPUs.

        Raises:
            ValueError: this machine does not have the GPU.
        """
        if self.settings.device == "auto" and not _unassigned() and torch.cuda.device_count():
            return f"cuda:{os.getpid() % torch.cuda.device_count()}"
        if self.settings.device != "cuda":
            return "cpu"
        if torch.cuda.device_count() <= self.gpu:
            raise ValueError(
                f"device: the scale uses 'cuda', but this machine has {torch.cuda.device_count()} "
                "GPUs; provide one GPU per process, or set the scale's device to cpu"
            )
        return f"cuda:{self.gpu}"

    def metrics(self, prompts: str, optional: Iterable[str] = ()) -> tuple[str, ...]:
        """The metrics that an evaluation on a prompt set computes in its own process.

        Args:
            optional: those of the optional metrics that it computes.
        """
        chosen = {name for name, metric in METRICS.items() if not metric.optional} | {*optional}
        available = [m for m in METRICS.values() if m.name in chosen and self._scores(m)]
        return tuple(m.name for m in available if m.fits(prompt_set(prompts)))

    def prompts(self, name: str, split: str) -> list[Prompt]:
        """The prompts of a set's split, "train" or "test".

        Raises:
            ValueError: an unknown prompt set, or its files are missing or altered; names it.
        """
        return prompt_set(name).prompts(split, self.folder)

    def shares(self, name: str) -> Mapping[str, float] | None:
        """Probability with which training draws each tag of a prompt set; None: uniform."""
        return prompt_set(name).shares

    def rewards(self, names: Sequence[str], *, strict_geneval: bool = False) -> RewardSet:
        """Load reward models in float32; `strict_geneval`: the variants for evaluation.

        Raises:
            ValueError: an unknown reward, or its weights are altered or missing; names it.
            RunFailed: a reward does not reproduce the golden scores that the package ships.
        """
        return load(names, lambda name: self._verified(name, strict_geneval))

    def training_rewards(self, names: Sequence[str]) -> RewardSet:
        """Load reward models to train with, in `rewards_dtype`; the errors are those of `rewards`.

        Golden scores are of float32, so a reward is converted after it has given them, and before
        the next one is loaded.
        """
        dtype = getattr(torch, self.settings.rewards_dtype)

        def converted(name: str) -> Reward:
            reward = self._verified(name, strict=False)
            reward.cast(dtype)
            return reward

        return load(names, converted)

    def _verified(self, name: str, strict: bool) -> Reward:
        reward = self._reward(name, strict)
        golden.verify_shipped(reward, self.device)
        return reward

    def digests(self, names: Sequence[str], prompts: Sequence[str] = ()) -> dict[str, str]:
        """SHA-256 of everything that models, rewards and prompt sets consist of, by name."""
        found = self._file_digests(names, prompts)
        for name in names:
            if name in METRICS and name not in metrics.ORDER:  # code that others may change
                found[f"rewards.{name}"] = sha256(metrics.PLUGINS.source(name))
        for name in prompts:
            if not prompt_set(name).resources:
                found[f"prompts.{name}"] = _prompts_digest(name)
        return found

    def reward_digest(self, name: str) -> str:
        """SHA-256 of everything that determines a reward's scores."""
        content = json.dumps(self.digests([name]), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def random(self, names: Sequence[str]) -> list[str]:
        """The resources of models and rewards that are marked as randomly initialised."""
        return []

    def embeddings(
        self, files: Mapping[str, str], pipeline: str, max_sequence_length: int
    ) -> Path | None:
        """The folder of the prompts' embeddings that a model shares; None: they are not stored.

        Args:
            files: SHA-256 of what the model consists of, by resource or file.
            pipeline: its diffusers pipeline class.
        """
        return None

    @abstractmethod
    def folder(self, resource: str) -> Path:
        """The folder of a resource's verified files; a ValueError names what is wrong."""

    @abstractmethod
    def pipeline_folder(self, model: Model) -> Path:
        """The folder of a model's pipeline, verified."""

    @abstractmethod
    def model(self, name: str, resolution: int) -> Any:
        """Load a model: a `Backbone`, or a `ReferencePipeline` if it cannot be trained."""

    @abstractmethod
    def _scores(self, metric: Metric) -> bool:
        """Whether the metric can be computed in an evaluation's own process."""

    @abstractmethod
    def _reward(self, name: str, strict: bool) -> Reward:
        """Load a reward."""

    @abstractmethod
    def _file_digests(self, names: Sequence[str], prompts: Sequence[str]) -> dict[str, str]:
        """SHA-256 of the files of models, rewards and prompt sets, by name."""

    def _plugin(self, name: str, strict: bool) -> Reward:
        plugin = metrics.plugin(name)
        build = (plugin.build_strict if strict else None) or plugin.build
        return build(self.device, self.folder)

    def backbone(
        self,
        folder: Path,
        resolution: int,
        guidance: float,
        max_sequence_length: int,
        embeddings: Path | None = None,
    ) -> Backbone:
        """Load a pipeline folder with the backbone of its class; see `loading.load`."""
        settings = self._loading(resolution, guidance, max_sequence_length)
        return loading.load(folder, **settings, embeddings=embeddings)

    def _loading(
        self, resolution: int, guidance: float, max_sequence_length: int
    ) -> dict[str, Any]:
        """The arguments with which a backbone is loaded."""
        return {
            "resolution": resolution,
            "guidance": guidance,
            "max_sequence_length": max_sequence_length,
            "device": self.device,
            "dtype": getattr(torch, self.settings.dtype),
            "gradient_checkpointing": self.settings.gradient_checkpointing,
            "quantize": self.settings.quantize,
            "attention_backend": self.settings.attention,
        }


class EmbeddedAssets(AssetSource):
    """Embedded models, and rewards that need no downloads."""

    root: Path  # of the models' weights

    def folder(self, resource: str) -> Path:
        raise ValueError(
            f"{resource}: the assets {self.settings.assets!r} have no downloads; use a scale with "
            "assets: hub"
        )

    def pipeline_folder(self, model: Model) -> Path:
        return weights.verify(model.resource, self.root)

    def model(self, name: str, resolution: int) -> Any:
        model = catalog.read()[name]
        folder = self.pipeline_folder(model)
        return self.backbone(folder, resolution, *self.settings.conditioning(model))

    def _scores(self, metric: Metric) -> bool:
        return not (metric.resources or metric.served)

    def _reward(self, name: str, strict: bool) -> Reward:
        return self._plugin(name, strict)

    def _file_digests(self, names: Sequence[str], prompts: Sequence[str]) -> dict[str, str]:
        models = [name for name in names if name not in METRICS]
        return {name: weights.digest(name, self.root) for name in models}


class ShapesAssets(EmbeddedAssets):
    """The embedded shapes, with small models of the paper's rewards."""

    root = weights.ROOT

    def _scores(self, metric: Metric) -> bool:
        return metric.name in metrics.ORDER or super()._scores(metric)

    def _reward(self, name: str, strict: bool) -> Reward:
        if name in metrics.ORDER:
            from tafs.shapes import rewards

            return rewards.build(name, self.device, strict_geneval=strict)
        return super()._reward(name, strict)

    def _file_digests(self, names: Sequence[str], prompts: Sequence[str]) -> dict[str, str]:
        shipped = [name for name in names if name not in METRICS or name in metrics.ORDER]
        return {name: weights.digest(name) for name in shipped if name != "geneval"}


class WordsAssets(EmbeddedAssets):
    """The embedded words, with the published recogniser."""

    root = WORDS

    def _reward(self, name: str, strict: bool) -> Reward:
        if name == "ocr":
            from tafs.words import rewards

            return rewards.ocr()
        return super()._reward(name, strict)


class HubAssets(AssetSource):
    """The published models and rewards, pinned by a lock file."""

    @property
    def lock(self) -> Path:
        return Path(self.settings.lock)

    @property
    def pinned(self) -> bool:
        return self.lock.is_file()

    @property
    def golden_scores(self) -> Path:
        return self.lock.with_suffix(".golden.json")

    def folder(self, resource: str) -> Path:
        return cache.path(resource, self.lock)

    def pipeline_folder(self, model: Model) -> Path:
        return self.folder(model.resource)

    def model(self, name: str, resolution: int) -> Any:
        model = catalog.read()[name]
        resolution = model.resolution or resolution
        if model.trainable:
            folder, files = self.pipeline_folder(model), self.digests([name])
            guidance, length = self.settings.conditioning(model)
            stored = self.embeddings(files, model.pipeline, length)
            return self.backbone(folder, resolution, guidance, length, stored)
        from tafs.models.pipelines import ReferencePipeline

        folders = {resource: self.folder(resource) for resource in model.resources}
        dtype = getattr(torch, self.settings.dtype)
        return ReferencePipeline.load(
            model, folders, resolution=resolution, device=self.device, dtype=dtype
        )

    def embeddings(self, files: Mapping[str, str], pipeline: str, max_sequence_length: int) -> Path:
        versions = [version(name) for name in ("diffusers", "torch", "transformers")]
        device = torch.device(self.device).type
        own = [pipeline, max_sequence_length, self.settings.dtype, device]
        content = json.dumps([dict(sorted(files.items())), *own, *versions])
        return cache.home() / "embeddings" / hashlib.sha256(content.encode()).hexdigest()[:16]

    def random(self, names: Sequence[str]) -> list[str]:
        return [name for name in resources_of(names) if cache.is_random(name, self.lock)]

    def _scores(self, metric: Metric) -> bool:
        return not metric.served

    def _reward(self, name: str, strict: bool) -> Reward:
        return self._plugin(name, strict)

    def _file_digests(self, names: Sequence[str], prompts: Sequence[str]) -> dict[str, str]:
        needed = resources_of(names, prompts)
        return {name: cache.digest(name, self.lock) for name in needed}


def of(settings: AssetSettings, gpu: int = 0) -> AssetSource:
    """The asset source of a run's settings; `gpu` is the index of this process's GPU."""
    kinds = {"shapes": ShapesAssets, "words": WordsAssets, "hub": HubAssets}
    return kinds[settings.assets](settings, gpu)


def prompt_sets_of(assets: str) -> tuple[str, ...]:
    """The prompt sets that can be used with an asset source."""
    return tuple(name for name, found in prompt_sets().items() if assets in found.assets)


def text_problem(text: str, assets: str) -> str | None:
    """Why the models of an asset source cannot take a prompt; None: they can."""
    if assets == "words":
        return words.problem(text)
    spoken = text.split() if assets == "shapes" else []
    unknown = next((word for word in spoken if word not in captions.words()), None)
    if unknown is not None:
        return f"has {unknown!r}, which is not in tafs/data/shapes/train.jsonl"
    if len(spoken) > captions.MAX_WORDS:
        return f"has more than {captions.MAX_WORDS} words, which the embedded models ignore"
    return None


def prompt_problem(name: str, assets: str) -> str | None:
    """Why models or rewards of an asset source cannot take a prompt of a file; None: they can.

    Names the file and the line.
    """
    places = prompt_set(name).places
    embedded = assets == "shapes"
    classes = scenes.SHAPES if embedded else geneval_rows.CLASSES
    colors = tuple(scenes.COLORS) if embedded else geneval_rows.COLORS

    def problem(prompt: Prompt) -> str | None:
        if found := text_problem(prompt.text, assets):
            return found
        for item in (*prompt.row.get("include", ()), *prompt.row.get("exclude", ())):
            for key, known in (("class", classes), ("color", colors)):
                if item.get(key, known[0]) not in known:
                    hint = suggestion(item[key], known)
                    return f"has the {key} {item[key]!r}, which the detector does not know{hint}"
        return None

    for split in ("train", "test") if places else ():
        for prompt in prompt_set(name).prompts(split, Path):
            if found := problem(prompt):
                return f"{places[prompt.text]} {found}"
    return None


def resources_of(names: Sequence[str], prompts: Sequence[str] = ()) -> list[str]:
    """The entries of resources.yaml that models, rewards and prompt sets consist of, sorted."""
    models = catalog.read()
    found = {resource for name in prompts for resource in prompt_set(name).resources}
    for name in names:
        found |= set((models[name] if name in models else METRICS[name]).resources)
    return sorted(found)


@functools.cache
def _prompts_digest(name: str) -> str:
    """SHA-256 of a prompt set without resources."""

    def folder(resource: str) -> Path:
        raise ValueError(
            f"prompt set {name!r} reads the resource {resource!r}; add it to its `resources`"
        )

    chosen = prompt_set(name)
    parts = [digest(chosen.prompts(split, folder)) for split in ("train", "test")]
    content = json.dumps([*parts, dict(chosen.shares or {})], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _unassigned() -> bool:
    """Whether this is a Slurm job without GPUs; not every cluster hides the others' from it."""
    return "SLURM_JOB_ID" in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ
