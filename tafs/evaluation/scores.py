"""Scores of a run's images: the resumable state of each setting, and the tables made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from tafs.common import files
from tafs.common.files import sha256
from tafs.data.prompts import Prompt, first_of_each
from tafs.evaluation import image_archive
from tafs.experiment.specs import BEST, EvalSetting, RunSpec
from tafs.runtime import checkpoint
from tafs.runtime.receipts import Needs
from tafs.runtime.run_dir import SAMPLES_PER_TAG, RunDir

CAPTIONS = "captions"  # the metadata entry of samples.safetensors with the prompts' texts


class PartialScores:
    """The scores of one setting so far, which a later job continues.

    Args:
        after: iterations of training of the setting's model.
        needs: what the scores depend on.
    """

    def __init__(self, run: RunDir, setting: EvalSetting, after: int, needs: Needs) -> None:
        self.folder = run.eval_state / f"{setting.name}-{after}"
        self.setting = setting
        self.after = after
        self._needs = needs
        state = checkpoint.load(self.folder, needs, self._damaged_archive)
        self.done = 0 if state is None else state.iteration  # images
        kept = {} if state is None else state.tensors
        self.scores = {n[7:]: [t] for n, t in kept.items() if n.startswith("scores/")}
        self.first = {int(n[6:]): t for n, t in kept.items() if n.startswith("first/")}
        # The sampler of the images, and what the choice of it was based on.
        self.sampler: str = "" if state is None else state.values["sampler"]
        self.qualities: dict[str, float] = {} if state is None else state.values["qualities"]
        self.validation: dict[str, dict[str, Tensor]] = {}  # by sampler and metric, [images]
        for name, tensor in kept.items():
            kind, _, place = name.partition("/")
            if kind == "validation":
                sampler, metric = place.split("/")
                self.validation.setdefault(sampler, {})[metric] = tensor
        self.archives: dict[str, str] = {} if state is None else state.values["archives"]
        for left in self.folder.glob("*.zip"):  # by a kill, or of other settings
            if left.name not in self.archives:
                left.unlink()
        self.seconds: dict[str, float] = (
            {"choose": 0.0, "sample": 0.0, "reward": 0.0}
            if state is None
            else state.values["seconds"]
        )

    def add(self, scores: Mapping[str, Tensor]) -> None:
        """Add the scores of a batch, [b] each, on the CPU."""
        for name, values in scores.items():
            self.scores.setdefault(name, []).append(values)
        self.done += len(values)

    def has_images_of(self, setting: EvalSetting, after: int) -> bool:
        """Whether another setting of the model after these iterations draws the same images."""
        same = ("nfe", "images_per_prompt")
        return (self.sampler, self.after) == (setting.sampler, after) and all(
            getattr(self.setting, name) == getattr(setting, name) for name in same
        )

    def adopt(self, other: PartialScores) -> None:
        """Take all scores of a setting that draws the same images."""
        self.sampler, self.done = other.sampler, other.done
        self.scores, self.first = dict(other.scores), dict(other.first)

    def save(self, archive: Path | None) -> None:
        """Write the state, with the archive of the images since the last call if they are kept."""
        if archive is not None:
            self.archives[archive.name] = sha256(archive)
        tensors = {f"scores/{name}": torch.cat(parts) for name, parts in self.scores.items()}
        tensors |= {f"first/{prompt}": pixels for prompt, pixels in self.first.items()}
        tensors |= {
            f"validation/{sampler}/{metric}": values
            for sampler, scores in self.validation.items()
            for metric, values in scores.items()
        }
        values = {"archives": self.archives, "seconds": self.seconds}
        values |= {"sampler": self.sampler, "qualities": self.qualities}
        checkpoint.save(self.folder, self._needs, self.done, tensors, values)

    def _damaged_archive(self, state: checkpoint.State) -> str:
        """Name an archive that a state needs and that is damaged or missing; "" if none is."""
        for name, digest in state.values["archives"].items():
            file = self.folder / name
            if not file.is_file() or sha256(file) != digest:
                return f"{name} is damaged"
        return ""


def write(
    run: RunDir,
    spec: RunSpec,
    prompts: Sequence[Prompt],
    found: Sequence[PartialScores],
    metrics: Sequence[str],
) -> None:
    """Write scores.parquet, samples.safetensors, samplers.json, and images.json if images are kept.

    samples.safetensors holds the first image of SAMPLES_PER_TAG prompts of each tag for every
    setting, the indices of these prompts, and their texts in its metadata.
    """
    shown = first_of_each(prompts, SAMPLES_PER_TAG)
    samples = {"prompts": torch.tensor(shown)}
    tables = []
    for scored in found:
        scores = {name: torch.cat(scored.scores[name]) for name in metrics}
        tables.append(_long(scores, prompts, scored.setting, scored.after))
        samples[scored.setting.images] = torch.stack([scored.first[p] for p in shown])
    archives = [scored.folder / name for scored in found for name in scored.archives]
    if archives:
        image_archive.write_list(run.images, archives)
    write_table(run, spec, run.scores, pd.concat(tables, ignore_index=True))
    metadata = {CAPTIONS: json.dumps([prompts[p].text for p in shown])}
    files.atomic_write(run.samples, lambda path: save_file(samples, path, metadata))
    chosen = [
        {
            "iteration": scored.after,
            "nfe": scored.setting.nfe,
            "sampler": scored.sampler,
            "quality": scored.qualities,
        }
        for scored in found
        if scored.setting.sampler == BEST
    ]
    files.atomic_text(run.samplers, json.dumps(chosen, indent=1) + "\n")


def write_table(run: RunDir, spec: RunSpec, file: Path, table: pd.DataFrame) -> None:
    """Write a long table to `file`, with the run's name, method and seed as first columns."""
    for column, value in (("seed", spec.seed), ("method", spec.method), ("run", run.name)):
        table.insert(0, column, value)
    table = table.astype({n: "category" for n in ("run", "method", "tag", "sampler", "metric")})
    files.atomic_write(file, lambda path: table.to_parquet(path, index=False))


def _long(
    scores: Mapping[str, Tensor], prompts: Sequence[Prompt], setting: EvalSetting, iteration: int
) -> pd.DataFrame:
    """A row per metric and image; scores are [prompts x images] each."""
    count = setting.images_per_prompt
    axes = {
        "prompt": [i for i in range(len(prompts)) for _ in range(count)],
        "tag": [prompt.tag for prompt in prompts for _ in range(count)],
        "image": list(range(count)) * len(prompts),
        "iteration": iteration,
        "sampler": setting.sampler,
        "nfe": setting.nfe,
    }
    return pd.concat(
        pd.DataFrame({**axes, "metric": metric, "value": values.double().numpy()})
        for metric, values in scores.items()
    )
