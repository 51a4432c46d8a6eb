"""scores."""

from __future__ import annotations

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
from tafs.evaluation.generate import Setting
from tafs.runtime import checkpoint, run_dir


class PartialScores:
    """What is known of a setting's images so far, on the disk too.

    Args:
        fingerprint: of all that decides the scores.
    """

    def __init__(self, run: run_dir.RunDir, setting: Setting, after: int, fingerprint: str) -> None:
        self.folder = run.judged / f"{setting.name}-{after}"
        self.after = after  # iterations of training
        self._fingerprint = fingerprint
        state = checkpoint.load(self.folder, fingerprint, self._lacks)
        self.done = 0 if state is None else state.iteration  # images
        kept = {} if state is None else state.tensors
        self.scores = {n[7:]: [t] for n, t in kept.items() if n.startswith("scores/")}
        self.first = {int(n[6:]): t for n, t in kept.items() if n.startswith("first/")}
        self.archives: dict[str, str] = {} if state is None else state.values["archives"]
        self.seconds: dict[str, float] = (
            {"sample": 0.0, "reward": 0.0} if state is None else state.values["seconds"]
        )

    def add(self, scores: Mapping[str, Tensor]) -> None:
        """A batch's, [b] each."""
        for name, values in scores.items():
            self.scores.setdefault(name, []).append(values.cpu())
        self.done += len(values)

    def save(self, archive: Path | None) -> None:
        """Keep it, and the archive of the images since the last time."""
        if archive is not None:
            self.archives[archive.name] = sha256(archive)
        tensors = {f"scores/{name}": torch.cat(parts) for name, parts in self.scores.items()}
        tensors |= {f"first/{prompt}": pixels for prompt, pixels in self.first.items()}
        values = {"archives": self.archives, "seconds": self.seconds}
        checkpoint.save(self.folder, self._fingerprint, self.done, tensors, values)

    def _lacks(self, state: checkpoint.State) -> str:
        for name, digest in state.values["archives"].items():
            file = self.folder / name
            if not file.is_file() or sha256(file) != digest:
                return f"{name} is damaged"
        return ""


def write(
    run: run_dir.RunDir,
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    found: Sequence[PartialScores],
    measured: Sequence[str],
) -> None:
    """Put what has been judged in its places."""
    shown = first_of_each(prompts, run_dir.SAMPLES_PER_TAG)
    samples = {"prompts": torch.tensor(shown)}
    tables = []
    for setting, judged in zip(settings, found, strict=True):
        scores = {name: torch.cat(judged.scores[name]) for name in measured}
        tables.append(_long(scores, prompts, setting, judged.after))
        if setting.iteration is None:
            samples[setting.name] = torch.stack([judged.first[p] for p in shown])
    if run.evaluation["server"]:
        archives = [judged.folder / name for judged in found for name in judged.archives]
        image_archive.join(archives, run.images)
    write_table(run, run.scores, pd.concat(tables, ignore_index=True))
    files.atomic_write(run.samples, lambda path: save_file(samples, path))


def write_table(run: run_dir.RunDir, file: Path, table: pd.DataFrame) -> None:
    """A long table with the run's name, method and seed in front."""
    for name in ("seed", "method", "run"):
        table.insert(0, name, run.name if name == "run" else run.description[name])
    table = table.astype({n: "category" for n in ("run", "method", "tag", "sampler", "metric")})
    files.atomic_write(file, lambda path: table.to_parquet(path, index=False))


def _long(
    scores: Mapping[str, Tensor], prompts: Sequence[Prompt], setting: Setting, iteration: int
) -> pd.DataFrame:
    """A setting's scores [prompts x images], a row each."""
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
