"""Images of any model for any prompts: a run's, or a base model with or without an adapter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tafs.assets import sources
from tafs.common.yaml_files import ConfigError, suggestion
from tafs.evaluation import checkpoint, generate, image_archive
from tafs.evaluation.protocol import Protocol
from tafs.experiment import run_inputs
from tafs.experiment.specs import PIPELINE, EvalSetting
from tafs.models import adapters
from tafs.models.sampling import SAMPLERS
from tafs.runtime import gpus, memory
from tafs.runtime.run_dir import RunDir

DEFAULT_SAMPLER = "ode"


@dataclass(frozen=True)
class Sampled:
    """A loaded model and what its images depend on."""

    title: str
    model: Any  # a Backbone or a ReferencePipeline
    assets: str  # of `tafs.data.prompt_sets.Assets`
    batch: int
    published: bool  # sampled by its own pipeline
    random_weights: tuple[str, ...]
    chosen: dict[int, str]  # the sampler that an evaluation chose, by the number of steps

    def sampler(self, given: str | None, steps: int) -> str:
        """The sampler of images with so many steps.

        Args:
            given: by the user; None: that of the run's evaluation, else DEFAULT_SAMPLER.

        Raises:
            ConfigError: there is no such sampler, or the model has its own.
        """
        if self.published:
            if given is not None:
                raise ConfigError(
                    f"--sampler: {self.title} is sampled as published, by its own pipeline; leave "
                    "the option out"
                )
            return PIPELINE
        if given is None:
            return self.chosen.get(steps, DEFAULT_SAMPLER)
        if given not in SAMPLERS:
            raise ConfigError(
                f"--sampler: unknown sampler {given!r}{suggestion(given, [*SAMPLERS])}"
            )
        return given


def of_run(folder: Path) -> Sampled:
    """The final model of a run, or the untrained one of a base run.

    Raises:
        FileNotFoundError, ValueError: not a run, or its adapter is missing or altered; names it.
    """
    run = RunDir(folder)
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    if spec.assets.device == "cuda":
        gpus.claim(1)
    chosen = {}
    if run.samplers.is_file():
        judged = json.loads(run.samplers.read_text(encoding="utf-8"))
        chosen = {x["nfe"]: x["sampler"] for x in judged if x["iteration"] == spec.iterations}
    return Sampled(
        title=spec.title,
        model=generate.load_model(run, spec, evaluation, None),
        assets=spec.assets.assets,
        batch=evaluation.batch,
        published=spec.sampler == PIPELINE,
        random_weights=spec.random_weights,
        chosen=chosen,
    )


def of_model(given: str, protocol: Protocol, adapter: Path | None) -> Sampled:
    """A model of the catalogue or a pipeline's folder, with the guidance and size of a protocol.

    Raises:
        FileNotFoundError, ValueError: as for `checkpoint.judge`.
    """
    content = None if adapter is None else adapters.read(adapter)
    target = checkpoint.target(given, protocol)
    if protocol.source.settings.device == "cuda":
        gpus.claim(1)
    model, title = target.load(), target.title
    if content is not None:
        title = checkpoint.label_of(content.path)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.safetensors"
            adapters.write(adapters.convert(content, model.pipeline), file)
            model.load_adapter(file)
    return Sampled(
        title=title,
        model=model,
        assets=protocol.content.assets,
        batch=protocol.content.batch,
        published=target.published_steps is not None,
        random_weights=target.random_weights,
        chosen={},
    )


def images(
    sampled: Sampled, texts: Sequence[str], steps: int, sampler: str, seed: int
) -> torch.Tensor:
    """One image per prompt, uint8 [prompts, H, W, 3]; the noise depends on `seed` only.

    Raises:
        ConfigError: the embedded models do not know a word of a prompt; names it.
        RunFailed: the GPU's memory does not suffice.
    """
    for text in texts:
        if problem := sources.text_problem(text, sampled.assets):
            raise ConfigError(f"--prompt {text!r}: {problem}")
    setting = EvalSetting(sampler=sampler, nfe=steps, images_per_prompt=1)
    with memory.reported("use a larger GPU"):
        found = generate.generate(sampled.model, texts, setting, sampled.batch, seed)
    return image_archive.pixels(found)
