"""The one registry of metrics: what each measures, its scales, and how tables and figures show it.

Every metric is a plug-in with one object, `REWARD = RewardPlugin(METRIC, build)`: a file of
tafs/rewards/plugins/ or an entry point of the group `tafs.rewards`. docs/adding-a-reward.md says
how to add one. Reading METRICS imports these declarations only, not the models behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, Self

from tafs.common.plugins import Group
from tafs.data.prompt_sets import Folder, PromptSet
from tafs.data.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tafs.rewards.chat import ChatJudge

# The paper's order, which tables and figures follow; installed metrics come after, by name.
ORDER = ("geneval", "pickscore", "clip", "hpsv2", "imagereward", "unifiedreward")


@dataclass(frozen=True)
class Metric:
    """A reward model as a metric: names, scales and what it is made of.

    A score has three scales. Training uses the training scale, on which higher is always better.
    scores.parquet holds the published scale, `scale` times the training scale. Tables and figures
    show `factor` times the published scale.
    """

    name: str  # in config.yaml, and the plug-in's name
    title: str  # in tables and figures
    unit: str  # label of a figure's axis
    digits: int  # after the decimal point in tables
    published: str = ""  # its column in the paper's tables; "" where the paper has none
    factor: float = 1.0  # shown value per unit of the published score
    limits: tuple[float, float] = (-math.inf, math.inf)  # of the shown value
    macro: bool = False  # averaged over the means of the tasks, not over all images
    higher_is_better: bool = True  # of the published score
    differentiable: bool = False  # the gradient of a score in this process reaches the images
    served: bool = False  # scored by a server, after the images are generated
    version: str = ""  # of the published model
    resources: tuple[str, ...] = ()  # entries of resources.yaml
    castable: tuple[str, ...] = ()  # those of them whose weights `Reward.cast` converts
    scale: float = 1.0  # published score per unit of the training score; negative: lower is better
    metadata: str = ""  # an entry of a prompt's metadata that it needs, such as GenEval's "include"
    optional: bool = False  # evaluations compute it only where a scale, task or protocol names it
    quotes: bool = False  # needs prompts with a text in double quotes

    def fits(self, prompts: PromptSet) -> bool:
        """Whether a prompt set has what the metric needs."""
        has_metadata = not self.metadata or self.metadata in prompts.metadata
        return has_metadata and (prompts.quotes or not self.quotes)

    def record(self) -> dict[str, str]:
        """What the provenance of a result says about it."""
        return {"name": self.name, "version": self.version, "scale": f"{self.scale:g}"}


class Scorer(Protocol):
    """Scores images against prompts on the training scale; `Reward.score` checks its input.

    It may also have `networks`, its modules, and `cast(dtype)`, which converts their weights; see
    `Reward`.
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W], B > 0, in [0, 1], float32 -> [B] float32; NaN: a missing value."""
        ...


@dataclass(frozen=True)
class Reward:
    """A loaded reward model."""

    metric: Metric  # a variant of a registered metric replaces fields of it
    scorer: Scorer
    details: Callable[[], dict[str, str]] = dict  # further entries of its provenance

    @property
    def name(self) -> str:
        return self.metric.name

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images on the training scale.

        Args:
            images: [B, 3, H, W] in [0, 1], of any floating-point dtype.
            prompts: of the images.

        Returns:
            [B] float32; NaN is a missing value.

        Raises:
            ValueError: wrong images or prompts; names the reward.
        """
        from tafs.rewards import registry

        images = registry.check_images(self.name, images, prompts)
        return self.scorer(images, prompts) if len(images) else images.new_empty(0)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The scorer's modules, which may be elsewhere while it does not score."""
        return tuple(getattr(self.scorer, "networks", ()))

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the weights of a loaded model; a scorer without `cast` keeps its own."""
        if convert := getattr(self.scorer, "cast", None):
            convert(dtype)

    @property
    def differentiable(self) -> bool:
        """Whether the gradient of a score reaches the images."""
        return self.metric.differentiable and not self.metric.served

    def report(self, scores: Tensor) -> Tensor:
        """Training-scale scores on the published scale."""
        return self.metric.scale * scores

    def record(self) -> dict[str, str]:
        """Name, version, scale and details, for the provenance of a result."""
        return self.metric.record() | self.details()


@dataclass(frozen=True)
class RewardPlugin:
    """A metric and the functions that load its model to a device.

    `build_strict` is the variant for evaluations, where it differs from the training reward. A
    served metric has `connect` instead: (the server's URL, where the resources are, the number of
    images that are scored in all) -> the client of its server.
    """

    metric: Metric
    build: Callable[[str, Folder], Reward]
    build_strict: Callable[[str, Folder], Reward] | None = None
    connect: Callable[[str, Folder, int], ChatJudge] | None = None

    @classmethod
    def served(cls, metric: Metric, connect: Callable[[str, Folder, int], ChatJudge]) -> Self:
        """The plug-in of a metric that only a server can compute."""

        def refuse(device: str, folder: Folder) -> Reward:
            raise ValueError(
                f"reward {metric.name!r} is scored by a server and cannot be loaded into this "
                "process; remove it from the task's rewards"
            )

        return cls(metric, refuse, connect=connect)


PLUGINS = Group(kind="reward", attribute="REWARD", package="tafs.rewards.plugins")


class _Metrics(Mapping[str, Metric]):
    """The metrics by name; the plug-ins are imported on first use."""

    @cached_property
    def plugins(self) -> dict[str, RewardPlugin]:
        others = sorted({*PLUGINS.names()} - {*ORDER})
        found = {name: PLUGINS.load(name) for name in (*ORDER, *others)}
        for name, plugin in found.items():
            if not isinstance(plugin, RewardPlugin) or plugin.metric.name != name:
                raise ValueError(
                    f"reward {name!r}: REWARD in {PLUGINS.source(name)} is not a RewardPlugin of "
                    "a Metric with this name; correct it there"
                )
        return found

    def __getitem__(self, name: str) -> Metric:
        return self.plugins[name].metric

    def __iter__(self) -> Iterator[str]:
        return iter(self.plugins)

    def __len__(self) -> int:
        return len(self.plugins)


METRICS = _Metrics()


def plugin(name: str) -> RewardPlugin:
    """The plug-in of a metric.

    Raises:
        ValueError: an unknown reward; lists those available.
    """
    if name not in METRICS:
        raise ValueError(f"unknown reward {name!r} (available: {', '.join(METRICS)})")
    return METRICS.plugins[name]
