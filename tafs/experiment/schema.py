"""config.yaml -> a list of Runs. Every mistake gives one line that names its key and the remedy."""

from __future__ import annotations

import re
import string
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tafs.common.yaml_files import NAME

# What an experiment can be drawn as; tafs.report.figures.plots has a function for each.
FIGURES = ("steps", "pareto", "compute", "curves", "images", "hacking", "profiles")


# What a table prints: every metric at its steps, the same at equal training compute, all metrics'
# gains in one number, or the correlation of earlier images' rewards with the final image's.
Kind = Literal["scores", "compute", "gains", "correlation"]


MOST_CHARACTERS = 300  # of a title, a caption, a label


# A path that shell, Snakemake's patterns and MLflow's addresses leave as it is.
PATH = re.compile(r"[\w./+=,@ -]+")


LONGEST_PART = 200  # bytes of a part of it; file systems allow 255


PLACEHOLDERS = {"folder", "port"}  # of a server's command


def _printable(text: str) -> str:
    """A title: one line that any file of results can hold."""
    stripped = text.strip()
    bad = next((c for c in stripped if not c.isprintable()), None)
    if bad is not None:
        raise ValueError(f"should have no character {bad!r}, which cannot be printed")
    return stripped


def _path(text: str) -> str:
    """A path without `.` and doubled slashes; see PATH."""
    path = PurePosixPath(text)
    if not PATH.fullmatch(text) or not (text[0].isalnum() or text[0] in "./_") or text[-1] == " ":
        raise ValueError(
            "should be a path of letters, digits, spaces and ./_+=,@- without a space or - in front"
        )
    if path.name in ("", ".."):
        raise ValueError("should end with the name of a folder of its own")
    if any(len(part.encode()) > LONGEST_PART for part in path.parts) or len(text) > 1000:
        raise ValueError(f"should be shorter; a part of it may have {LONGEST_PART} bytes")
    return str(path)


def _command(part: str) -> str:
    """A part of a server's command, in which nothing but PLACEHOLDERS is filled in."""
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(part) if field is not None}
    except ValueError:
        fields = {"{"}
    if fields - PLACEHOLDERS:
        raise ValueError("should have no braces but those of {folder} and {port}")
    return part


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


Count = Annotated[int, Field(ge=1, le=10**9)]


Seed = Annotated[int, Field(ge=0, le=10**9)]


Finite = Annotated[float, Field(allow_inf_nan=False)]


Text = Annotated[str, Field(max_length=MOST_CHARACTERS), AfterValidator(_printable)]


PathText = Annotated[str, AfterValidator(_path)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(_Strict):
    rank: Count
    alpha: Count


class Evaluation(_Strict):
    """How models are judged; which of it a run needs follows from the experiments it is in."""

    images_per_prompt: Count | dict[Name, Count]  # or of each part of the scale's prompts
    prompts: Count | None = None  # the first so many of each task; None takes all
    few_nfe: Count  # steps that tables print unless they say otherwise
    curve_nfe: tuple[Count, ...]  # steps of the curves
    curve_images_per_prompt: Count
    base_nfe: Count | None = None  # the models' full steps; None: those of models.yaml
    correlation_prompts: Count  # training prompts whose images' rewards are correlated
    batch: Count  # images at once; sampling takes less memory than training
    resolution: Count | None = None  # of the images, in pixels; None: as in training
    # The command that serves UnifiedReward, if it is a server; {folder} and {port} are filled in.
    server: tuple[Annotated[Text, AfterValidator(_command)], ...] = ()


class Scale(_Strict):
    """Which models and budgets; never how."""

    world: Literal["shapes", "hub"]  # the embedded models, or those of resources.yaml
    lock: PathText = "resources.lock.yaml"  # what the hub's models are pinned to
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the network's weights
    gradient_checkpointing: bool = False
    processes: Count = 1  # of a training job, one a GPU
    nodes: Count = 1  # machines that share them
    memory_mb: Count = 3000  # of the machine's, for each process
    backbones: dict[Name, Name]  # the models that play the experiments' parts
    prompts: dict[Name, Name]  # the prompt sets that play the tasks' parts
    models: tuple[Name, ...] = ()  # compared as they are, where an experiment has `models`
    without: tuple[Name, ...] = ()  # methods that are not trained at this scale
    methods: dict[Name, dict[Name, Any]] = {}  # hyperparameters at this scale
    iterations: Count
    prompts_per_iteration: Count
    group_size: Annotated[Count, Field(ge=2)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    ablation_seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    experiments: tuple[Name, ...]  # what `snakemake all` builds
    micro_batch: Count
    checkpoint_every: Count
    lora: Lora
    resolution: Count  # of the images, in pixels
    evaluation: Evaluation


class Task(_Strict):
    """Rewards with their weights, on the training scale of each reward."""

    title: Text = ""  # of its row where a table compares tasks
    prompts: Name  # the part that a scale casts with a prompt set
    rewards: dict[Name, Annotated[Finite, Field(gt=0)]]


class Experiment(_Strict):
    """A table: every method on every task and backbone, at every number of steps."""

    caption: Text
    kind: Kind = "scores"
    tasks: tuple[Name, ...] = ()
    backbones: Annotated[tuple[Name, ...], Field(min_length=1)]  # parts that a scale casts
    methods: tuple[Name, ...] = ()
    header: Text = "Method"  # of the rows' labels
    labels: dict[Name, Text] = {}  # of methods; by default their titles
    nfe: tuple[Count, ...] | None = None  # by default the scale's few_nfe
    base: bool = False  # the base models too, at their full and at few steps
    models: bool = False  # the scale's `models` too, at their own steps
    prompts: Name | None = None  # a correlation's part; of other kinds that of the tasks
    ablation: bool = False  # trained with the scale's ablation_seeds
    figures: dict[Name, Name] = {}  # what is drawn, of FIGURES, and the file's name


class Tuning(_Strict):
    """The search: a grid a method, all of the same size, on a seed that no table uses."""

    task: Name
    seed: Seed
    grids: dict[Name, dict[Name, tuple[int | Finite, ...]]]


class Variant(BaseModel):
    """A method with its hyperparameters, which the method's own file declares and checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    # The variant whose hyperparameters it starts from, or a method's file; by default its own name.
    method: Name | None = None
    title: Text = ""  # by default the method's


class Config(_Strict):
    scale: Name
    results: PathText = "results"
    scales: dict[Name, Scale]
    tasks: dict[Name, Task]
    methods: dict[Name, Variant | None]
    reference: Name  # the method whose training compute is the measure of equal compute
    experiments: dict[Name, Experiment]
    tuning: Tuning | None = None

    @property
    def active(self) -> Scale:
        return self.scales[self.scale]


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Names that are allowed where an unknown key stands."""
    sections: dict[str, type[BaseModel]] = {
        "scales": Scale,
        "tasks": Task,
        "experiments": Experiment,
        "lora": Lora,
        "evaluation": Evaluation,
    }
    for part in reversed(location[:-1]):
        if part in sections:
            return list(sections[str(part)].model_fields)
    return list(Config.model_fields)
