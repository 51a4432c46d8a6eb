"""config.yaml -> a list of Runs. Every mistake gives one line that names its key and the remedy."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tafs import models
from tafs.failures import one_line, shown

NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
BASE = "base"  # the untrained model's place among the methods
# What an experiment can be drawn as; tafs.figures has a function for each.
FIGURES = ("steps", "pareto", "compute", "curves", "images", "hacking", "profiles")
# What a table prints: every metric at its steps, the same at equal training compute, all metrics'
# gains in one number, or the correlation of earlier images' rewards with the final image's.
Kind = Literal["scores", "compute", "gains", "correlation"]
# Shares of the reference method's training compute at which models are kept for the comparison.
MARKS = (0.25, 0.5, 0.75, 1.0)

# What a file may hold: the time that reading takes grows with each, and recursion with the depth.
LONGEST = 1 << 16  # bytes
DEEPEST = 20  # levels
BYTES_A_VALUE = 8  # at least, on the average; the values of an alias count wherever it stands
MOST_CHARACTERS = 300  # of a title, a caption, a label
# A path that shell, Snakemake's patterns and MLflow's addresses leave as it is.
PATH = re.compile(r"[\w./+=,@ -]+")
LONGEST_PART = 200  # bytes of a part of it; file systems allow 255
PLACEHOLDERS = {"folder", "port"}  # of a server's command


class ConfigError(ValueError):
    """A mistake in config.yaml, in one line of printable characters."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text, 600))


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


@dataclass(frozen=True)
class Run:
    """One training run, or the evaluation of a base model."""

    name: str
    variant: str  # key in config.yaml's methods, or BASE
    method: str  # the method's file name, or BASE
    title: str
    task: str
    prompts: str  # the prompt set: it trains on one part of it and is judged on the other
    backbone: str
    model: Mapping[str, Any]  # guidance, max_sequence_length and the full steps of the backbone
    seed: int
    scale: str
    settings: Mapping[str, Any]  # of the scale
    rewards: Mapping[str, float]
    hyperparameters: Mapping[str, Any]
    snapshots: tuple[int, ...] = ()  # iterations after which the model is kept besides the last

    @property
    def trained(self) -> bool:
        return self.method != BASE

    @property
    def sampler(self) -> str:
        """Of the untrained models: Euler's, or the pipeline's own where nothing can be trained."""
        return "ode" if self.model["trainable"] else "pipeline"

    def describe(self) -> dict[str, Any]:
        """What run.json holds."""
        from tafs import method as methods

        used = (self.backbone, *sorted(self.rewards))
        out: dict[str, Any] = {
            "name": self.name,
            "variant": self.variant,
            "method": self.method,
            "title": self.title,
            "task": self.task,
            "prompts": self.prompts,
            "backbone": self.backbone,
            "model": dict(self.model),
            "seed": self.seed,
            "scale": self.scale,
            "settings": dict(self.settings),
            "rewards": dict(self.rewards),
            "hyperparameters": dict(self.hyperparameters),
            "sampler": self.sampler,
            "nfe_old": None,
            "nfe_theta": None,
            "cost": 0,
            "iterations": 0,
            "snapshots": list(self.snapshots),
            **weights_of(self.settings, used, [self.prompts]),
        }
        if self.trained:
            algorithm = methods.create(self.method, dict(self.hyperparameters))
            out |= {
                "sampler": algorithm.evaluation_sampler,
                "nfe_old": algorithm.nfe_old,
                "nfe_theta": algorithm.nfe_theta,
                "cost": algorithm.cost,
                "iterations": self.settings["iterations"],
            }
        return out


def weights_of(
    settings: Mapping[str, Any], names: Sequence[str], prompt_sets: Sequence[str] = ()
) -> dict[str, Any]:
    """What models, rewards and prompts are made of: SHA-256, and what is randomly initialised."""
    from tafs import worlds

    world = worlds.of(settings)
    if not world.pinned:
        return {"weights": {}, "random_weights": []}
    digests = world.digests(names, prompt_sets)
    return {"weights": digests, "random_weights": world.random(names)}


def to_json(value: Mapping[str, Any]) -> str:
    """The one form in which descriptions are written and compared."""
    return json.dumps(value, sort_keys=True)


def fingerprint(description: Mapping[str, Any], *files: Path) -> str:
    """SHA-256 over what decides a run's outcome: its description and its method's source."""
    digest = hashlib.sha256(to_json(description).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


# -- reading -----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys and what unfolds without end, and reads 3e-4 as a number.

    It is PyYAML's own in Python: the one in C overflows the stack where values are nested deeply.
    """

    def __init__(self, text: str, most: int) -> None:
        super().__init__(text)
        self._most = most  # values
        self._count = self._depth = 0
        self._sizes: dict[int, int] = {}  # values of a finished node, by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self._count += 1
        self._depth += 1
        if self._count > self._most:
            raise _at(event, f"is value {self._count} of the file; write fewer")
        if self._depth > DEEPEST:
            raise _at(event, f"is nested more than {DEEPEST} levels deep; write it flatter")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or id(node) in self._sizes:
            return node
        if isinstance(event, yaml.AliasEvent):
            raise _at(event, "stands inside what it names; write its values out")
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inside = itertools.chain(*parts) if isinstance(node, yaml.MappingNode) else parts
        size = 1 + sum(self._sizes[id(part)] for part in inside)
        if size > self._most:
            raise _at(event, f"holds more than {self._most} values; use fewer aliases")
        self._sizes[id(node)] = size
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except ConfigError:
            raise
        # A day that no month has, an empty hexadecimal number, a word after `!!bool`.
        except (ValueError, KeyError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise _at(node, f"{shown(node.value)} is no {kind}; put it in quotes") from None
        if isinstance(value, int) and abs(value) >= 1 << 63:  # its digits may take long to write
            raise _at(node, "the number is too large; give one below 2**63")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise _at(key_node, "'<<' merges no keys here; write them out")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int)):
                raise _at(key_node, f"{shown(key)} is no plain key; use a word")
            if key in seen:
                raise _at(key_node, f"{shown(key)} is given twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _at(place: yaml.Node | yaml.Event, problem: str) -> ConfigError:
    mark: Any = place.start_mark
    return ConfigError(f"line {mark.line + 1}: {problem}")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read and check config.yaml; `overrides` replaces top-level keys, such as the scale.

    Raises:
        ConfigError: one line that names the file, the key and the remedy.
    """
    return check({**load_yaml(path, dict), **(overrides or {})}, str(path))


def load_yaml(path: Path, kind: type, longest: int = LONGEST) -> Any:
    """The file's content, a mapping (`dict`) or a list; it may have `longest` bytes.

    Raises:
        ConfigError: one line that names the file and what is wrong.
    """
    try:
        with path.open("rb") as file:
            content = file.read(longest + 1)
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"{path}: cannot be read ({reason}); put a file there") from None
    if len(content) > longest:
        raise ConfigError(f"{path}: has more than {longest} bytes; shorten it")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    try:
        loader = _Loader(text, longest // BYTES_A_VALUE)
        raw = loader.get_single_data()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        problem = _yaml_problem(error, text)
        raise ConfigError(f"{path}: is not YAML ({problem}); correct it there") from None
    if not isinstance(raw, kind):
        wanted = "mapping of keys to values" if kind is dict else "list"
        raise ConfigError(f"{path}: holds no {wanted}; write one")
    return raw


def check(raw: Mapping[str, Any], source: str = "config.yaml") -> Config:
    """Check a mapping read from config.yaml; see `read`."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_problem(error)}") from None
    problem = _inconsistency(config)
    if problem:
        raise ConfigError(f"{source}: {problem}")
    return config


def with_method(config: Config, name: str) -> Config:
    """The configuration with one more method in every experiment that has the base models.

    A method that config.yaml does not list gets its file's own hyperparameters.

    Raises:
        ConfigError: there is no such method, or it cannot join an experiment; names it.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"--config method: {name[:60]!r} is no method's name")
    methods = {**config.methods, name: config.methods.get(name)}
    found = config.model_copy(update={"methods": methods})
    problem = _inconsistency(found)
    joined = {}
    for key, experiment in config.experiments.items():
        new = experiment.model_copy(update={"methods": (*experiment.methods, name)})
        known = problem or not experiment.base or name in experiment.methods
        # A method that differentiates its rewards cannot join tasks whose rewards have no gradient.
        fits = not known and _experiment_inconsistency(found, key, new) is None
        joined[key] = new if fits else experiment
    found = found.model_copy(update={"experiments": joined})
    if not problem and not any(name in joined[key].methods for key in config.active.experiments):
        problem = f"no table of scale {config.scale!r} can take it"
    if problem:
        raise ConfigError(f"--config method={name}: {problem}")
    return found


def with_seeds(config: Config, count: Any) -> Config:
    """The configuration with the seeds 0 to `count` - 1 in every experiment of the active scale.

    Raises:
        ConfigError: `count` is no number of seeds, or they meet the search's.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1000:
        raise ConfigError(f"--config seeds={count}: give a number from 1 to 1000")
    seeds = tuple(range(count))
    scale = config.active.model_copy(update={"seeds": seeds, "ablation_seeds": seeds})
    found = config.model_copy(update={"scales": {**config.scales, config.scale: scale}})
    problem = _inconsistency(found)
    if problem:
        raise ConfigError(f"--config seeds={count}: {problem}")
    return found


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: the character {chr(error.character)!r} is not allowed"
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or type(error).__name__
    return f"line {mark.line + 1}: {problem}" if mark else str(problem)


def first_problem(error: ValidationError, known: Sequence[str] | None = None) -> str:
    """The first mistake as `key.path: what is wrong (remedy)`; `known` are the keys there are."""
    problems = error.errors()
    # A misspelt key is both unknown and missing: what was written says more.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    # A wrong key stands before a mark of pydantic's.
    parts = [str(part) for part in first["loc"] if part != "[key]"]
    path = ".".join(one_line(part, 80) for part in parts)
    if first["type"] == "extra_forbidden":
        known = known or _known_keys(first["loc"])
        return f"unknown key {path!r}{_suggestion(parts[-1], known)}"
    if first["type"] == "missing":
        return f"missing key {path!r}; add it"
    problem = one_line(first["msg"].removeprefix("Value error, "))
    if first.get("ctx", {}).get("pattern") == f"^{NAME.pattern}$":
        problem = "should be a name: a letter, then up to 63 of a-z, 0-9, '_' and '-'"
    return f"{path}: {problem[0].lower() + problem[1:]} (got {shown(first['input'])})"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Names that are allowed where an unknown key stands."""
    models: dict[str, type[BaseModel]] = {
        "scales": Scale,
        "tasks": Task,
        "experiments": Experiment,
        "lora": Lora,
        "evaluation": Evaluation,
    }
    for part in reversed(location[:-1]):
        if part in models:
            return list(models[str(part)].model_fields)
    return list(Config.model_fields)


def _suggestion(name: str, available: Sequence[str]) -> str:
    close = difflib.get_close_matches(name[:100], available, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    names = sorted(available)
    return f" (available: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"


def _inconsistency(config: Config) -> str | None:
    """What pydantic cannot see: names that point to nothing, hyperparameters, numbers of no use."""
    from tafs import method as methods
    from tafs import worlds
    from tafs.rewards import METRICS

    if config.scale not in config.scales:
        return (
            f"scale: unknown scale {config.scale!r}{_suggestion(config.scale, list(config.scales))}"
        )
    for name, task in config.tasks.items():
        for reward in task.rewards:
            if reward not in METRICS:
                hint = _suggestion(reward, list(METRICS))
                return f"tasks.{name}.rewards: unknown reward {reward!r}{hint}"
        if not task.rewards:
            return f"tasks.{name}.rewards: at least one reward is needed"
    if BASE in config.methods:
        return f"methods.{BASE}: the name is taken by the untrained model"
    for key, scale in config.scales.items():
        for name in (*scale.methods, *scale.without):
            if name not in config.methods:
                hint = _suggestion(name, list(config.methods))
                return f"scales.{key}.methods: unknown method {name!r}{hint}"
        for variant in config.methods:
            own = f"scales.{key}." if variant in scale.methods else ""
            try:
                algorithm = methods.create(*_method_of(config, variant, scale))
                cost = algorithm.cost
            except NotImplementedError as error:
                return f"{own}methods.{variant}: {str(error) or 'is a stub'}"
            except Exception as error:  # whatever a method makes of its hyperparameters
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                return f"{own}methods.{variant}: {kind}{error}"
            if not cost > 0:
                return f"{own}methods.{variant}: its `cost` is {cost}; it must be above 0"
            # A method that one scale cannot share out may be tried at another.
            if key == config.scale and variant not in scale.without:
                problem = sharing_problem(
                    scale.prompts_per_iteration, algorithm.updates, scale.processes
                )
                if problem:
                    return f"scales.{key}: {variant}: {problem}"
    if config.reference not in config.methods:
        hint = _suggestion(config.reference, list(config.methods))
        return f"reference: unknown method {config.reference!r}{hint}"
    for name, experiment in config.experiments.items():
        problem = _experiment_inconsistency(config, name, experiment)
        if problem:
            return problem
    for name, scale in config.scales.items():
        for wanted in scale.experiments:
            if wanted not in config.experiments:
                hint = _suggestion(wanted, list(config.experiments))
                return f"scales.{name}.experiments: unknown experiment {wanted!r}{hint}"
            experiment = config.experiments[wanted]
            for part in experiment.backbones:
                if part not in scale.backbones:
                    hint = _suggestion(part, list(scale.backbones))
                    return (
                        f"experiments.{wanted}.backbones: scale {name!r} has no backbone for "
                        f"{part!r}{hint}"
                    )
            part = _prompts_of(config, experiment)
            if part not in scale.prompts:
                hint = _suggestion(part, list(scale.prompts))
                return f"scales.{name}.prompts: no prompt set for {part!r} of {wanted!r}{hint}"
            images = scale.evaluation.images_per_prompt
            if not isinstance(images, int) and part not in images:
                hint = _suggestion(part, list(images))
                return f"scales.{name}.evaluation.images_per_prompt: none for {part!r}{hint}"
        for model in (*scale.backbones.values(), *scale.models):
            if model not in models.read():
                hint = _suggestion(model, list(models.read()))
                return f"scales.{name}: unknown model {model!r}{hint}"
            if models.read()[model].world != scale.world:
                return f"scales.{name}: {model!r} is not of the world {scale.world!r}"
        for model in scale.backbones.values():
            if not models.read()[model].trainable:
                return f"scales.{name}.backbones: {model!r} cannot be trained, only compared"
        if scale.processes % scale.nodes:
            return (
                f"scales.{name}.nodes: {scale.nodes} cannot share {scale.processes} processes; "
                "choose a divisor"
            )
        if scale.evaluation.server and scale.world != "hub":
            return f"scales.{name}.evaluation.server: the world {scale.world!r} needs no server"
        for prompt_set in scale.prompts.values():
            if prompt_set not in worlds.PROMPTS[scale.world]:
                hint = _suggestion(prompt_set, list(worlds.PROMPTS[scale.world]))
                return f"scales.{name}.prompts: unknown prompt set {prompt_set!r}{hint}"
    if config.tuning is not None:
        return _tuning_inconsistency(config, config.tuning)
    return None


def sharing_problem(prompts: int, updates: int, processes: int) -> str | None:
    """Why an iteration's prompts cannot be shared out to its updates and their processes."""
    if prompts % updates:
        return (
            f"updates: {updates} does not divide prompts_per_iteration ({prompts}); "
            "choose a divisor"
        )
    if prompts // updates % processes:
        return (
            f"prompts_per_iteration: {prompts} prompts in {updates} updates cannot be shared by "
            f"{processes} processes; choose a divisor of {prompts // updates}"
        )
    return None


def _experiment_inconsistency(config: Config, name: str, experiment: Experiment) -> str | None:
    from tafs import method as methods
    from tafs.rewards import DIFFERENTIABLE

    where = f"experiments.{name}"
    known: dict[str, Mapping[str, Any]] = {
        "tasks": config.tasks,
        "methods": config.methods,
        "labels": config.methods,
        "backbones": {part: None for scale in config.scales.values() for part in scale.backbones},
    }
    for key, available in known.items():
        for entry in getattr(experiment, key):
            if entry not in available:
                hint = _suggestion(entry, list(available))
                return f"{where}.{key}: unknown {key.rstrip('s')} {entry!r}{hint}"
    for kind in experiment.figures:
        if kind not in FIGURES:
            return f"{where}.figures: unknown figure {kind!r}{_suggestion(kind, list(FIGURES))}"
    for key in ("tasks", "methods"):
        if bool(getattr(experiment, key)) == (experiment.kind == "correlation"):
            needed = "takes no" if experiment.kind == "correlation" else "needs at least one of its"
            return f"{where}.{key}: a table of kind {experiment.kind!r} {needed} {key}"
    parts = {config.tasks[task].prompts for task in experiment.tasks}
    if len(parts) > 1:
        return f"{where}.tasks: they have different prompts ({', '.join(sorted(parts))})"
    if bool(experiment.prompts) != (experiment.kind == "correlation"):
        needed = "needs" if experiment.kind == "correlation" else "takes no"
        return f"{where}.prompts: a table of kind {experiment.kind!r} {needed} prompts of its own"
    for variant in experiment.methods:
        algorithm = methods.create(*_method_of(config, variant))
        for task in experiment.tasks if algorithm.needs_reward_gradients else ():
            for reward in config.tasks[task].rewards:
                if reward not in DIFFERENTIABLE:
                    return (
                        f"{where}.methods: {variant!r} needs the rewards' gradients, and "
                        f"{reward!r} of task {task!r} has none"
                    )
    return None


def _prompts_of(config: Config, experiment: Experiment) -> str:
    """The part that a scale casts with a prompt set."""
    return experiment.prompts or config.tasks[experiment.tasks[0]].prompts


def _full_steps(evaluation: Evaluation, model: str) -> int:
    """A model's own number of steps; that of a base model can be the scale's."""
    facts = models.read()[model]
    return (facts.trainable and evaluation.base_nfe) or facts.steps


def _images_per_prompt(config: Config, experiment: Experiment) -> int:
    given = config.active.evaluation.images_per_prompt
    return given if isinstance(given, int) else given[_prompts_of(config, experiment)]


def _tuning_inconsistency(config: Config, tuning: Tuning) -> str | None:
    from tafs import method as methods

    trained = {v for e in config.experiments.values() if tuning.task in e.tasks for v in e.methods}
    for variant in tuning.grids:
        if variant not in trained:
            return (
                f"tuning.grids: no experiment trains {variant!r} on {tuning.task!r}"
                f"{_suggestion(variant, sorted(trained))}"
            )
        file, own = _method_of(config, variant)
        for key, value in ((k, v) for k, values in tuning.grids[variant].items() for v in values):
            try:
                methods.create(file, {**own, key: value})
            except ValueError as error:
                return f"tuning.grids.{variant}: {error}"
    sizes = {v: math.prod(len(values) for values in g.values()) for v, g in tuning.grids.items()}
    if len(set(sizes.values())) > 1:
        return f"tuning.grids: should give every method as many trials as the others ({sizes})"
    if any(tuning.seed in (*s.seeds, *s.ablation_seeds) for s in config.scales.values()):
        return f"tuning.seed: {tuning.seed} is one of the tables' seeds; choose another"
    return None


def _method_of(
    config: Config, variant: str, scale: Scale | None = None
) -> tuple[str, dict[str, Any]]:
    """(file name, hyperparameters) of a variant: its own, on top of those it starts from.

    What a scale (by default the active one) says of a method replaces what `methods` says of it.

    Raises:
        ValueError: its `method` leads back to itself.
    """
    at_scale = (scale or config.active).methods
    name, parameters = variant, dict[str, Any]()
    chain: list[str] = []
    while name in config.methods and name not in chain:
        chain.append(name)
        settings = config.methods[name] or Variant()
        parameters = {**(settings.model_extra or {}), **at_scale.get(name, {}), **parameters}
        name = settings.method or name
    if chain and name in chain[:-1]:
        raise ValueError(f"method: {' -> '.join([*chain, name])} leads round in a circle")
    return name, parameters


# -- runs --------------------------------------------------------------------------------------


# Settings of a scale that say which runs there are, how they are judged and on how many devices,
# not how one is trained.
SELECTION = {
    "backbones",
    "prompts",
    "models",
    "without",
    "methods",
    "seeds",
    "ablation_seeds",
    "experiments",
    "evaluation",
    "processes",
    "nodes",
    "memory_mb",
}
# Those that say how a model is trained, and nothing of one that is not.
TRAINING = {
    "iterations",
    "prompts_per_iteration",
    "group_size",
    "micro_batch",
    "checkpoint_every",
    "lora",
}


def runs(config: Config) -> dict[str, Run]:
    """Every run of the active scale's experiments, by name; shared runs appear once."""
    scale = config.active
    costs, titles = _costs(config), _titles(config)
    found: dict[str, Run] = {}

    def add(variant: str, task: str, model: str, prompts: str, seed: int) -> None:
        facts = models.read()[model]
        left_out = SELECTION | (TRAINING if variant == BASE else set())
        common: dict[str, Any] = {
            "backbone": model,
            "prompts": prompts,
            "model": facts.settings(),
            "seed": seed,
            "scale": config.scale,
            "settings": scale.model_dump(mode="json", exclude=left_out),
        }
        if variant == BASE:
            name = f"{BASE}.{prompts}.{model}"
            found[name] = Run(
                name, BASE, BASE, facts.title, "", rewards={}, hyperparameters={}, **common
            )
            return
        method, parameters = _method_of(config, variant)
        name = f"{variant}.{task}.{model}.{seed}"
        found[name] = Run(
            name,
            variant,
            method,
            titles[variant],
            task,
            rewards=config.tasks[task].rewards,
            hyperparameters=parameters,
            snapshots=_snapshots(config, costs, variant),
            **common,
        )

    for experiment in (config.experiments[name] for name in scale.experiments):
        prompts = scale.prompts[_prompts_of(config, experiment)]
        seeds = scale.ablation_seeds if experiment.ablation else scale.seeds
        for model in _untrained(scale, experiment):
            add(BASE, "", model, prompts, 0)
        for backbone in (scale.backbones[part] for part in experiment.backbones):
            for variant, task in _trained(scale, experiment):
                for seed in seeds:
                    add(variant, task, backbone, prompts, seed)
    return found


def _untrained(scale: Scale, experiment: Experiment) -> list[str]:
    """The base models of an experiment, which its figures need, and the models beside them."""
    return [
        *(scale.backbones[part] for part in experiment.backbones),
        *(scale.models if experiment.models else ()),
    ]


def _trained(scale: Scale, experiment: Experiment) -> list[tuple[str, str]]:
    """The (method, task) of an experiment that the scale trains."""
    kept = [variant for variant in experiment.methods if variant not in scale.without]
    return list(itertools.product(kept, experiment.tasks))


def _costs(config: Config) -> dict[str, float]:
    """Of every method an iteration's evaluations per image; see `Method.cost`."""
    from tafs import method as methods

    return {
        variant: methods.create(*_method_of(config, variant)).cost for variant in config.methods
    }


def _iterations_at(config: Config, costs: Mapping[str, float], variant: str, share: float) -> int:
    """How many iterations a share of the reference's training compute pays for."""
    iterations = config.active.iterations
    paid = iterations * share * costs[config.reference] / costs[variant]
    # The ratio of two equal costs is 1 up to rounding.
    return max(1, min(iterations, math.floor(paid + 1e-9)))


def _snapshots(config: Config, costs: Mapping[str, float], variant: str) -> tuple[int, ...]:
    found = {_iterations_at(config, costs, variant, share) for share in MARKS}
    return tuple(sorted(found - {config.active.iterations}))


def evaluations(config: Config) -> dict[str, dict[str, Any]]:
    """How each run is judged, as plain data: what evaluation.json holds.

    `settings` lists {sampler, nfe, images_per_prompt, iteration}; iteration None is the final
    model. A run is judged at the steps of every table that it stands in; the curves' points
    are judged on fewer images, since they only draw a line.
    """
    evaluation = config.active.evaluation
    served = evaluation.server
    found: dict[str, dict[tuple[str, int, int | None], int]] = {}
    all_runs = runs(config)
    described = {name: run.describe() for name, run in all_runs.items()}
    for table in tables(config):
        few = table["evaluation"]["few"]
        images = _images_per_prompt(config, config.experiments[table["name"]])
        for row in table["rows"] if table["kind"] != "correlation" else ():
            for name in row["runs"]:
                run = all_runs[name]
                wanted = found.setdefault(name, {})
                own = str(row["sampler"] or described[name]["sampler"])
                if "steps" in table["figures"] or "pareto" in table["figures"]:
                    for n in evaluation.curve_nfe:
                        wanted.setdefault((own, n, None), evaluation.curve_images_per_prompt)
                if "compute" in table["figures"]:
                    for iteration in run.snapshots:
                        wanted.setdefault((own, few, iteration), evaluation.curve_images_per_prompt)
                    wanted[own, few, None] = images
                kept = row["iteration"] if row["iteration"] in run.snapshots else None
                wanted[own, row["nfe"], kept] = images
    from tafs import worlds
    from tafs.rewards import SERVED

    settings = config.active.model_dump(mode="json")
    measured = {
        run.prompts: (*worlds.of(settings).metrics(run.prompts), *([SERVED] if served else []))
        for run in all_runs.values()
    }
    return {
        name: {
            **weights_of(settings, measured[all_runs[name].prompts]),
            "prompts": evaluation.prompts,
            "batch": evaluation.batch,
            "full": _full_steps(evaluation, all_runs[name].backbone),
            "resolution": evaluation.resolution or config.active.resolution,
            "server": bool(served),
            "correlation": {
                "nfe": evaluation.few_nfe,
                "prompts": evaluation.correlation_prompts,
            },
            "settings": [
                {"sampler": sampler, "nfe": n, "iteration": iteration, "images_per_prompt": count}
                for (sampler, n, iteration), count in sorted(
                    found.get(name, {}).items(), key=lambda item: (item[0][2] or 0, item[0][:2])
                )
            ],
        }
        for name in all_runs
    }


def _titles(config: Config) -> dict[str, str]:
    """Of every method."""
    from tafs import method as methods

    return {
        variant: (settings.title if settings else "")
        or methods.method_class(_method_of(config, variant)[0]).TITLE
        or variant
        for variant, settings in config.methods.items()
    }


def tables(config: Config) -> list[dict[str, Any]]:
    """What the active scale's tables and figures show, as plain data.

    Each has `name`, `kind`, `caption`, `header`, `figures`, `reference`, `without` (its methods
    that the scale leaves out), `evaluation` (the few and the curve's steps), and `rows` of {runs,
    variant, task, part, backbone, nfe, full, iteration, sampler, label, rule}: the names of the
    runs that a row stands for and what they share, at how many steps (and the model's full ones)
    and after which iteration (None: the last) and by which sampler they are judged (None: the run's
    own), the row's label, and whether a line separates it from the row above.
    """
    scale = config.active
    evaluation = scale.evaluation
    costs, titles = _costs(config), _titles(config)
    members: dict[tuple[str, str, str, str], list[str]] = {}
    for run in runs(config).values():
        key = (run.variant, run.task, run.prompts, run.backbone)
        members.setdefault(key, []).append(run.name)
    parts = {model: part for part, model in scale.backbones.items()}

    def common(model: str) -> dict[str, Any]:
        return {
            "part": parts.get(model, ""),
            "backbone": model,
            "full": _full_steps(evaluation, model),
            "iteration": None,
            "rule": False,
        }

    found = []
    for name in scale.experiments:
        experiment = config.experiments[name]
        few = experiment.nfe or (evaluation.few_nfe,)
        prompts = scale.prompts[_prompts_of(config, experiment)]
        rows: list[dict[str, Any]] = []
        for model in _untrained(scale, experiment):
            row = {
                **common(model),
                "variant": BASE,
                "task": "",
                "label": models.read()[model].title,
            }
            row["runs"] = members[BASE, "", prompts, model]
            if model in scale.models:
                rows.append({**row, "sampler": "pipeline", "nfe": row["full"]})
            elif experiment.base or experiment.kind == "correlation":
                first = row["full"] if experiment.kind == "scores" else evaluation.few_nfe
                for n in dict.fromkeys((first, evaluation.few_nfe)):
                    rows.append({**row, "sampler": "ode", "nfe": n})
        for part in experiment.backbones:
            backbone = scale.backbones[part]
            for number, (variant, task) in enumerate(_trained(scale, experiment)):
                label = experiment.labels.get(variant) or titles[variant]
                if len(experiment.tasks) > 1:
                    label = config.tasks[task].title or task
                if len(experiment.backbones) > 1:
                    facts = models.read()[backbone]
                    label = f"{label} + {facts.short or facts.title}"
                for n in few:
                    row = {**common(backbone), "variant": variant, "task": task, "nfe": n}
                    row |= {"label": label, "sampler": None}
                    row["rule"] = bool(rows) and number == 0 and n == few[0]
                    row["runs"] = members[variant, task, prompts, backbone]
                    if experiment.kind == "compute":
                        row["iteration"] = _iterations_at(config, costs, variant, 1.0)
                    rows.append(row)
        found.append(
            {
                "name": name,
                "kind": experiment.kind,
                "caption": experiment.caption,
                "header": experiment.header,
                "figures": experiment.figures,
                "reference": config.reference,
                "without": [name for name in experiment.methods if name in scale.without],
                "evaluation": {
                    "few": evaluation.few_nfe,
                    "curve": list(evaluation.curve_nfe),
                },
                "rows": rows,
            }
        )
    return found
