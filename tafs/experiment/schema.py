"""The schema of config.yaml, as pydantic models."""

from __future__ import annotations

import re
import string
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    model_validator,
)

from tafs.common.yaml_files import NAME
from tafs.data import prompt_files
from tafs.data.prompt_sets import Assets
from tafs.models.attention import Attention
from tafs.models.quantization import Quantization
from tafs.models.sampling import SAMPLERS

# What a table prints: every metric at its steps, the same at equal training compute, the gains of
# all metrics in one number, or the correlation of earlier images' rewards with the final image's.
Kind = Literal["scores", "compute", "gains", "correlation"]
# Kinds of figures; tafs.report.figures has a function for each.
FIGURES = ("steps", "pareto", "compute", "curves", "images", "hacking", "profiles")
JUDGE = "unifiedreward"  # the served metric of the paper
# Characters that a shell, Snakemake's patterns and MLflow's URLs leave as they are.
PATH = re.compile(r"[\w./+=,@ -]+")
LONGEST_PART = 200  # bytes of one part of a path; file systems allow 255
PLACEHOLDERS = {"folder", "port"}  # in a server's command
AUTO: Final = "auto"  # a value that follows from the GPUs' memory
UNSETTLED = {"gradient_checkpointing": True, "micro_batch": 1}  # in place of `auto` until then
# Keys that were renamed, by their last part, with their present names.
RENAMED_KEYS = {
    "world": "assets",
    "backbones": "model_roles",
    "without": "exclude_methods",
    "reference": "compute_reference",
}


def _printable(text: str) -> str:
    """Check that a title is one line of printable characters."""
    stripped = text.strip()
    bad = next((c for c in stripped if not c.isprintable()), None)
    if bad is not None:
        raise ValueError(f"should not contain {bad!r}, which cannot be printed")
    return stripped


def _path(text: str) -> str:
    """Normalise a path and check its characters; see PATH."""
    path = PurePosixPath(text)
    if not PATH.fullmatch(text) or not (text[0].isalnum() or text[0] in "./_") or text[-1] == " ":
        raise ValueError(
            "should be a path of letters, digits, spaces and ./_+=,@- that does not begin or end "
            "with a space or begin with -"
        )
    if path.name in ("", ".."):
        raise ValueError("should end with the name of a folder")
    if any(len(part.encode()) > LONGEST_PART for part in path.parts) or len(text) > 1000:
        raise ValueError(f"should be shorter: a part may have at most {LONGEST_PART} bytes")
    return str(path)


def _command(part: str) -> str:
    """Check that only PLACEHOLDERS are filled in."""
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(part) if field is not None}
    except ValueError:
        fields = {"{"}
    if fields - PLACEHOLDERS:
        raise ValueError("should have no braces except those of {folder} and {port}")
    return part


def _prompts(value: Any, info: ValidationInfo) -> Any:
    """The name of a prompt set; files are read, relative to the folder of config.yaml."""
    split = isinstance(value, dict) and value.keys() == {"train", "test"}
    files = [value["train"], value["test"]] if split else [value]
    if not split and not (isinstance(value, str) and re.search(r"[./]", value)):
        return value
    for file in files:
        if not isinstance(file, str) or PurePosixPath(file).suffix not in prompt_files.ENDINGS:
            raise ValueError(
                "should be a prompt set, a file .txt or .jsonl, or {train: FILE, test: FILE}"
            )
    folder = (info.context or {}).get("folder", Path())
    return prompt_files.register([folder / _path(file) for file in files])


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Count = Annotated[int, Field(ge=1, le=10**9)]
# Error messages leave out the names in brackets.
CountOrAuto = Annotated[
    Annotated[Count, Tag("[value]")] | Annotated[Literal["auto"], Tag("[auto]")],
    Discriminator(lambda value: "[auto]" if value == AUTO else "[value]"),
]
BoolOrAuto = Annotated[
    Annotated[bool, Tag("[value]")] | Annotated[Literal["auto"], Tag("[auto]")],
    Discriminator(lambda value: "[auto]" if value == AUTO else "[value]"),
]
Seed = Annotated[int, Field(ge=0, le=10**9)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
PathText = Annotated[str, AfterValidator(_path)]
Command = tuple[Annotated[Text, AfterValidator(_command)], ...]  # of a server


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitFiles(_Strict):
    """Two files of prompts."""

    train: str
    test: str


# A prompt set, or files of prompts; see tafs.data.prompt_files.
Prompts = Annotated[Name, BeforeValidator(_prompts, json_schema_input_type=str | SplitFiles)]


class Lora(_Strict):
    rank: Count
    alpha: Count


def _sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"should be one of {', '.join(SAMPLERS)}")
    return name


Sampler = Annotated[str, AfterValidator(_sampler)]


class Evaluation(_Strict):
    """How models are judged. The experiments decide which settings a run needs."""

    images_per_prompt: Count | dict[Name, Count]  # one number, or one for each prompt role
    prompts: Count | None = None  # the first so many of each tag; None: all
    few_nfe: Count  # inference steps of tables that do not set their own
    curve_nfe: tuple[Count, ...]  # inference steps of the curves
    curve_images_per_prompt: Count
    base_nfe: Count | None = None  # full steps of base models; None: those of models.yaml
    correlation_nfe: Annotated[Count, Field(ge=2)] = 4  # steps of the trajectories of Table 7
    correlation_prompts: Count  # training prompts whose trajectories are scored
    # BEST is chosen from these for every model and number of steps, on training prompts.
    samplers: Annotated[tuple[Sampler, ...], Field(min_length=1)] = tuple(SAMPLERS)
    common_sampler: Sampler = "ode_uniform"  # of experiments with `sampler: common`
    validation_prompts: Count  # training prompts, one image each, that samplers are chosen on
    batch: Count  # images sampled at once
    # That share an evaluation, one per GPU, all on one node. None: as many as a training has there.
    processes: Count | None = None
    resolution: Count | None = None  # in pixels; None: as in training
    metrics: tuple[Name, ...] = ()  # optional ones that are computed beside all others
    # The command that serves UnifiedReward, where it is served; {folder} and {port} are filled in.
    server: Command = ()
    judges: dict[Name, Command] = {}  # the commands of other served metrics
    judge: Name = JUDGE  # the served metric that evaluations compute, if there is its command

    @property
    def servers(self) -> dict[str, tuple[str, ...]]:
        """The commands of all served metrics, by name."""
        every = {JUDGE: self.server, **self.judges}
        return {name: command for name, command in every.items() if command}

    @property
    def served(self) -> bool:
        """Whether evaluations compute a served metric."""
        return self.judge in self.servers


class Decide(_Strict):
    """`snakemake decide`: seeds are added where claims are open."""

    # Numbers of seeds at which the claims are looked at; the last one is the budget.
    seeds: Annotated[tuple[Annotated[Count, Field(ge=2, le=1000)], ...], Field(min_length=1)]


class Scale(_Strict):
    """The models and budgets of an experiment; the algorithms never change."""

    assets: Assets  # the embedded models, or those of resources.yaml
    lock: PathText = "resources.lock.yaml"  # pins the hub's models
    # auto: a job uses a GPU if there is one; it does not claim it, so that several jobs share one.
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the network's weights
    # GB of each GPU. What is `auto` below follows from it; see `gpu_memory.settled`.
    gpu_memory: Annotated[Finite, Field(gt=0)] | None = None
    # Of the linear layers in the network's blocks, when it is trained and when it is judged.
    quantize: Quantization = "none"
    gradient_checkpointing: BoolOrAuto = False
    # What computes the attention of trained networks, by diffusers' names; changes the rounding.
    attention: Attention = "native"
    # Of the prompts of trained models, in training and evaluation; None: that of models.yaml.
    max_sequence_length: Count | None = None
    processes: Count = 1  # of a training job; one per GPU
    nodes: Count = 1  # machines that share the processes
    memory_mb: Count | None = None  # of host memory per process; None: by the sizes of its files
    model_roles: dict[Name, Name]  # role in the experiments -> model of models.yaml
    prompts: dict[Name, Prompts]  # role in the tasks -> prompt set
    models: tuple[Name, ...] = ()  # compared as published, in experiments with `models: true`
    exclude_methods: tuple[Name, ...] = ()  # not trained at this scale
    methods: dict[Name, dict[Name, Any]] = {}  # hyperparameters at this scale
    iterations: Count
    prompts_per_iteration: Count
    group_size: Annotated[Count, Field(ge=2)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    ablation_seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    decide: Decide | None = None
    # How far the base models' scores may be from the published ones, as a share of these: trainings
    # wait for this check, which passes over the models of `accept_base`. None: no check.
    base_within: Annotated[Finite, Field(gt=0)] | None = None
    accept_base: tuple[Name, ...] = ()
    experiments: tuple[Name, ...]  # that `snakemake all` builds
    micro_batch: CountOrAuto
    keep_graphs: bool = False  # until the first update, which then evaluates nothing again
    compile: bool = False  # blocks and decoder in training, on GPUs
    score_ahead: bool = False  # a micro-batch is scored while the next one is sampled
    tf32: bool = False  # float32 products in training, which are mostly the rewards'; on GPUs
    # Of the reward models' weights in training; evaluations score in float32.
    rewards_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: Count
    lora: Lora
    resolution: Count  # of training images, in pixels
    evaluation: Evaluation

    @property
    def automatic(self) -> tuple[str, ...]:
        """The keys that are `auto`."""
        return tuple(key for key in UNSETTLED if getattr(self, key) == AUTO)

    @property
    def unsettled(self) -> Self:
        """The scale with some values in place of `auto`."""
        return self.model_copy(update={key: UNSETTLED[key] for key in self.automatic})

    def processes_of(self, stage: str) -> int:
        """The processes that share a job of a stage of a run, one per GPU."""
        if stage == "evaluate":
            return self.evaluation.processes or self.processes // self.nodes
        return self.processes if stage == "train" else 1


class Task(_Strict):
    """Rewards with their weights, on the training scale of each reward."""

    title: Text = ""  # label of its row in tables that compare tasks
    prompts: Name  # role that a scale fills with a prompt set
    rewards: Annotated[dict[Name, Annotated[Finite, Field(gt=0)]], Field(min_length=1)]
    # Policy-gradient methods then sum each reward's own advantages, whatever its spread is.
    normalize: bool = False


class Experiment(_Strict):
    """A table: every method on every task and backbone, at every number of steps."""

    caption: Text
    kind: Kind = "scores"
    tasks: tuple[Name, ...] = ()
    model_roles: Annotated[tuple[Name, ...], Field(min_length=1)]  # that a scale fills
    methods: tuple[Name, ...] = ()
    header: Text = "Method"  # of the column of labels
    labels: dict[Name, Text] = {}  # of methods; by default their titles
    nfe: tuple[Count, ...] | None = None  # by default the scale's few_nfe
    base: bool = False  # adds the base models, at their full and at few steps
    models: bool = False  # adds the scale's `models`, at their own steps
    prompts: Name | None = None  # role; for kind `correlation`, which has no tasks
    sampler: Literal["best", "common"] = "best"  # of every model; see `Evaluation`
    ablation: bool = False  # trained with the scale's ablation_seeds
    figures: dict[Name, Name] = {}  # kind of FIGURES -> file name


class Range(_Strict):
    """The bounds of a searched hyperparameter, both included."""

    low: int | Finite
    high: int | Finite
    log: bool = False  # whether its logarithm is searched

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low should be less than high, {self.high}")
        if self.log and not self.low > 0:
            raise ValueError("low should be above 0 for a logarithmic search")
        return self


Choices = Annotated[tuple[bool | int | Finite | str, ...], Field(min_length=1)]
# What a hyperparameter is searched in. Error messages leave out the names in brackets.
Searched = Annotated[
    Annotated[Range, Tag("[range]")] | Annotated[Choices, Tag("[choices]")],
    Discriminator(lambda value: "[range]" if isinstance(value, dict | Range) else "[choices]"),
]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("should be different values")
    return values


class Tuning(_Strict):
    """The hyperparameter search: as many trials for every method, on seeds that no table uses."""

    # A method is searched on the first of them that the scale trains it on.
    tasks: Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(_distinct)]
    trials: Count  # of each method; the first has the method's present values
    # Of each trial. Three at least, since the score of a trial includes their spread.
    seeds: Annotated[tuple[Seed, ...], Field(min_length=3), AfterValidator(_distinct)]
    common: dict[Name, Searched] = {}  # hyperparameters that are searched for every method
    methods: dict[Name, dict[Name, Searched]]  # a method's own, which override `common`

    def space(self, variant: str) -> dict[str, Range | tuple[bool | int | float | str, ...]]:
        """What is searched for a method: every hyperparameter with its range or choices."""
        return {**self.common, **self.methods[variant]}


class Variant(BaseModel):
    """A method with hyperparameters, which the method's own file declares and checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    # The variant or method whose hyperparameters it starts from; by default its own name.
    extends: Name | None = None
    title: Text = ""  # by default the method's

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "method" in raw:
            raise ValueError("'method' is now called 'extends'; rename it")
        return raw


class Config(_Strict):
    scale: Name
    results: PathText = "results"
    scales: dict[Name, Scale]
    tasks: dict[Name, Task]
    methods: dict[Name, Variant | None]
    compute_reference: Name  # the method whose training compute is the equal-compute budget
    experiments: dict[Name, Experiment]
    tuning: Tuning | None = None

    @property
    def active(self) -> Scale:
        return self.scales[self.scale]

    def prompt_role(self, experiment: Experiment) -> str:
        """The role that a scale fills with the experiment's prompt set."""
        return experiment.prompts or self.tasks[experiment.tasks[0]].prompts
