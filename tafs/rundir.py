"""A run's folder: its description, its files, and the models and prompts that it names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from tafs import config, failures, prompts, worlds

SAMPLES_PER_TAG = 8  # prompts of each tag whose images samples.safetensors keeps


class RunDir:
    """results/SCALE/runs/NAME."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.adapter = folder / "adapter.safetensors"
        self.journal = folder / "journal.jsonl"
        self.scores = folder / "scores.parquet"
        self.samples = folder / "samples.safetensors"
        self.images = folder / "images.zip"
        self.judgements = folder / "judgements.parquet"
        self.step_scores = folder / "step_scores.parquet"
        self.snapshots = folder / "snapshots"
        self.state = folder / ".state"
        self.checkpoints = self.state / "checkpoints"

    @cached_property
    def description(self) -> dict[str, Any]:
        """run.json.

        Raises:
            FileNotFoundError, ValueError: it is missing or no JSON object; names the file.
        """
        return read_json(self.folder / "run.json")

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json: how the run is judged; see `config.evaluations`.

        Raises:
            FileNotFoundError, ValueError: it is missing or no JSON object; names the file.
        """
        return read_json(self.folder / "evaluation.json")

    def snapshot(self, iteration: int) -> Path:
        """The adapter after so many iterations, one of run.json's `snapshots`."""
        return self.snapshots / f"{iteration}.safetensors"

    @cached_property
    def world(self) -> worlds.World:
        """Where its models, rewards and prompts come from."""
        return worlds.of(self.description["settings"])

    def test_prompts(self) -> list[prompts.Prompt]:
        """The held-out prompts that it is judged on."""
        found = self.world.prompts(self.description["prompts"], "test")
        return [found[i] for i in prompts.first_of_each(found, self.evaluation["prompts"])]

    @property
    def trained(self) -> bool:
        return bool(self.description["method"] != config.BASE)

    def fingerprint(self) -> str:
        """Of the description and of the method's source: what a resume state must match."""
        from tafs import method

        return config.fingerprint(self.description, method.source_file(self.description["method"]))

    def clear_state(self) -> None:
        from tafs import checkpoint

        checkpoint.clear(self.state)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object that snakemake wrote from config.yaml.

    Raises:
        FileNotFoundError, ValueError: it is missing or no JSON object; names the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; snakemake writes it from config.yaml")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no JSON object")
    return content


def limit_threads() -> None:
    """One thread a process unless TAFS_THREADS says more: two jobs with one thread each do more
    work than one job with two, and the sums do not depend on the machine's size."""
    import torch

    torch.set_num_threads(int(os.environ.get("TAFS_THREADS", "1")))


def run_stage(stage: str, work: Callable[[RunDir], None]) -> None:
    """`python -m tafs.STAGE RUN_DIR`, with one thread a process."""
    if len(sys.argv) != 2:
        print(f"usage: python -m tafs.{stage} RUN_DIR", file=sys.stderr)
        sys.exit(2)
    limit_threads()
    what = f"{stage} {sys.argv[1]}"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        what += f" (process {os.environ.get('RANK')})"

    def within_memory() -> None:
        import torch

        try:
            work(RunDir(Path(sys.argv[1])))
        except torch.OutOfMemoryError as error:
            raise failures.RunFailed(
                "the GPU's memory does not suffice; lower micro_batch (training) or "
                f"evaluation.batch in config.yaml ({str(error).splitlines()[0]})"
            ) from None

    failures.fail_in_one_line(what, within_memory)
