"""What a run's folder refers to: its specs, assets and prompts."""

from __future__ import annotations

from pathlib import Path

from pydantic import JsonValue

from tafs.assets import sources
from tafs.assets.sources import AssetSource
from tafs.data import prompt_files, prompts
from tafs.experiment.specs import EvalSpec, RunSpec
from tafs.runtime.run_dir import RunDir


def run_spec(run: RunDir) -> RunSpec:
    """run.json; see `Spec.read` for its errors."""
    return RunSpec.read(run.folder / "run.json")


def eval_spec(run: RunDir) -> EvalSpec:
    """evaluation.json; see `Spec.read` for its errors."""
    return EvalSpec.read(run.folder / "evaluation.json")


def asset_source(spec: RunSpec, gpu: int = 0) -> AssetSource:
    """The source of the run's models, rewards and prompts.

    Raises:
        ValueError: a file of prompts is wrong, or has changed since the run was described.
    """
    files = spec.prompt_files
    if files and prompt_files.register([Path(file) for file in files]) != spec.prompts:
        raise ValueError(
            f"{' and '.join(files)}: changed since run.json was written; run snakemake"
        )
    return sources.of(spec.assets, gpu)


def test_prompts(spec: RunSpec, evaluation: EvalSpec) -> list[prompts.Prompt]:
    """The held-out prompts that the run is judged on."""
    found = asset_source(spec).prompts(spec.prompts, "test")
    return [found[i] for i in prompts.first_of_each(found, evaluation.prompts_per_tag)]


def memory_settings(spec: RunSpec, evaluation: EvalSpec) -> dict[str, JsonValue]:
    """What the memory of a run's evaluation depends on, besides its model and batch."""
    return {
        "dtype": spec.assets.dtype,
        "quantize": spec.assets.quantize,
        "resolution": evaluation.resolution,
        "prompts": spec.prompts,  # which decide the metrics
        "metrics": [*evaluation.optional_metrics],
    }
