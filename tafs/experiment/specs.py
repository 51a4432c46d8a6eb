"""The typed specs that cross stage boundaries, as immutable objects and as JSON files.

The workflow writes all of them from config.yaml:

| file | spec | read by |
|---|---|---|
| `runs/NAME/run.json` | `RunSpec` | training, evaluation, report, tracking |
| `runs/NAME/evaluation.json` | `EvalSpec` | evaluation, report |
| `report_spec.json` | `ReportSpec` with its `TableSpec`s and `RowSpec`s | report |
| `decide_spec.json` | `DecideSpec` | `snakemake decide` |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tafs.assets.sources import AssetSettings
from tafs.common.yaml_files import first_problem
from tafs.experiment.schema import JUDGE, Kind, Lora
from tafs.runtime.run_dir import BASE

PIPELINE = "pipeline"  # the sampler of a model that is compared as published
BEST = "best"  # the best of the evaluation's samplers, chosen for every model and number of steps


class Spec(BaseModel):
    """A frozen spec with a JSON form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # The fields that do not change an outcome; see `decisive`.
    DESCRIPTIVE: ClassVar[Mapping[str, Any]] = {}

    def decisive(self) -> dict[str, JsonValue]:
        """The fields that decide an outcome, by their dotted names."""
        return dict(flat(self.model_dump(mode="json", exclude=dict(self.DESCRIPTIVE))))

    def to_json(self) -> str:
        """The one JSON form, which is written to files and compared."""
        return self.model_dump_json()

    @classmethod
    def read(cls, file: Path) -> Self:
        """The spec in a JSON file.

        Raises:
            FileNotFoundError, ValueError: the file is missing or does not hold such a spec; one
                line that names it.
        """
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found; snakemake writes it from config.yaml")
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            problem = first_problem(error, cls).removesuffix("; add it")
            raise ValueError(
                f"{file}: was not written by this version ({problem}); delete "
                "the results folder or choose another with --config results=FOLDER"
            ) from None


class TrainingSpec(Spec):
    """The training loop's settings."""

    iterations: int
    prompts_per_iteration: int
    group_size: int
    micro_batch: int
    keep_graphs: bool = False
    compile: bool = False
    tf32: bool = False
    # Left out where it has its default, so that earlier results stay what they are.
    score_ahead: bool = Field(default=False, exclude_if=lambda chosen: not chosen)
    checkpoint_every: int
    lora: Lora


class RunSpec(Spec):
    """One training run, or the evaluation of a model that is not trained."""

    DESCRIPTIVE: ClassVar[Mapping[str, Any]] = {
        # Names, and what follows from the method's source.
        **dict.fromkeys(("name", "variant", "title", "task", "scale", "random_weights"), True),
        "prompt_files": True,  # `prompts` and `weights` say what is in them
        **dict.fromkeys(("nfe_old", "nfe_theta", "forward_equivalents"), True),
        "sampler": True,  # of the evaluation
        # Where and how the work is done; other hardware and batches change the rounding alone.
        "training": {
            *("checkpoint_every", "compile", "keep_graphs", "micro_batch", "score_ahead", "tf32")
        },
        "assets": {"lock", "device", "gradient_checkpointing", "attention", "rewards_dtype"},
    }

    name: str
    variant: str  # key of config.yaml's `methods`, or BASE
    method: str  # name of the method's file, or BASE
    title: str
    task: str  # "" for a model that is not trained
    prompts: str  # the prompt set: trained on its train split, judged on its test split
    prompt_files: tuple[str, ...] = ()  # of a set of files; relative to the project
    backbone: str  # key of models.yaml
    model: dict[str, JsonValue]  # the settings of models.yaml that decide the model's images
    seed: int
    scale: str
    assets: AssetSettings
    resolution: int  # of the training images, in pixels
    training: TrainingSpec | None = None
    rewards: dict[str, float] = {}  # weights on the training scale
    hyperparameters: dict[str, JsonValue] = {}
    sampler: str  # that the model is judged with: BEST or PIPELINE
    nfe_old: float | None = None  # network evaluations per image in the rollout
    nfe_theta: int | None = None  # network evaluations per image with gradients
    forward_equivalents: float = 0.0  # per image and iteration; see `Method.forward_equivalents`
    snapshots: tuple[int, ...] = ()  # iterations after which the adapter is kept besides the last
    weights: dict[str, str] = {}  # SHA-256 of models, rewards and prompts by name
    random_weights: tuple[str, ...] = ()  # those of them that are randomly initialised

    @property
    def trained(self) -> bool:
        return self.method != BASE

    @property
    def batch(self) -> int:
        """The images per micro-batch of the training."""
        return self.training.micro_batch if self.training else 1

    def with_batch(self, batch: int) -> RunSpec:
        """The run with micro-batches of `batch` images; with fewer, graphs are not kept."""
        if self.training is None or batch == self.training.micro_batch:
            return self
        changes = {"micro_batch": batch, "keep_graphs": False}
        return self.model_copy(update={"training": self.training.model_copy(update=changes)})

    @property
    def iterations(self) -> int:
        return self.training.iterations if self.training else 0


class EvalSetting(Spec):
    """One way of sampling a model, and the number of images per prompt that are judged."""

    sampler: str
    nfe: int
    images_per_prompt: int
    iteration: int | None = None  # of a snapshot; None: the final model

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.nfe}"

    @property
    def images(self) -> str:
        """The key of its images in samples.safetensors."""
        return self.name if self.iteration is None else f"{self.name}@{self.iteration}"


class TrajectorySpec(Spec):
    """The annealed trajectories of training prompts whose images are scored at every step."""

    nfe: int
    prompts: int


class EvalSpec(Spec):
    """How a run is judged."""

    weights: dict[str, str]  # SHA-256 of what the metrics are made of
    random_weights: tuple[str, ...]
    prompts_per_tag: int | None  # the first so many prompts of each tag; None: all
    batch: int
    full_steps: int  # the untrained model's own number of steps
    resolution: int  # of the images, in pixels
    served: bool  # whether a server scores the images too
    # Left out where they have their defaults, so that earlier results stay what they are.
    judge: str = Field(default=JUDGE, exclude_if=lambda name: name == JUDGE)  # what it computes
    optional_metrics: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    trajectories: TrajectorySpec
    samplers: tuple[str, ...]  # keys of `sampling.SAMPLERS` that BEST is chosen from
    validation_prompts: int  # training prompts, one image each, that it is chosen on
    settings: tuple[EvalSetting, ...]


class RowSpec(Spec):
    """A row of a table: the runs of one system (all seeds) at one number of steps."""

    label: str
    runs: tuple[str, ...]
    variant: str
    task: str
    role: str  # the role that the backbone plays in the experiment; "" for compared models
    backbone: str
    nfe: int
    full_steps: int
    iteration: int | None = None  # of a snapshot; None: the final model
    sampler: str
    rule: bool = False  # a line above the row


class TableSpec(Spec):
    """A table and the figures drawn from its runs."""

    name: str
    kind: Kind
    caption: str
    header: str  # of the column of labels
    figures: dict[str, str]  # kind -> file name
    compute_reference: str  # the variant whose training compute is the budget
    excluded_methods: tuple[str, ...]  # of the experiment, not trained at this scale
    few_nfe: int
    curve_nfe: tuple[int, ...]
    rows: tuple[RowSpec, ...]

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of all runs, each once, in the order of the rows."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.runs))


class ReportSpec(Spec):
    """Everything that the report shows."""

    scale: str
    tables: tuple[TableSpec, ...]


class BaseCheckSpec(Spec):
    """The base models whose scores are compared with the published ones."""

    within: float  # share of the published value
    accepted: tuple[str, ...]  # models whose scores may be others
    tables: tuple[TableSpec, ...]  # their rows at full steps

    @property
    def runs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for table in self.tables for name in table.runs))


class DecideSpec(Spec):
    """The looks of `snakemake decide`."""

    scale: str
    seeds: tuple[int, ...]  # at each look
    claims: tuple[str, ...]  # that the scale can test
    tables: tuple[TableSpec, ...]  # the rows that they name, with the seeds of the last look


def flat(values: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    """The values that are not mappings, by their dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
