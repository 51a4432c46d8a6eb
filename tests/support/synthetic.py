"""Run folders as training and evaluation leave them, with invented numbers of realistic size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from tafs.assets.sources import AssetSettings
from tafs.experiment.specs import EvalSetting, EvalSpec, RowSpec, RunSpec, TableSpec, TrajectorySpec
from tafs.report import results
from tafs.report.results import LoadedTable

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Mean at many steps, standard deviation over prompts, loss at one step.
SCORES = {
    "geneval": (0.72, 0.25, 0.5),
    "pickscore": (22.4, 0.8, 1.6),
    "clip": (27.5, 1.5, 4.0),
    "hpsv2": (0.30, 0.02, 0.06),
    "imagereward": (1.0, 0.5, 1.5),
    "unifiedreward": (3.45, 0.4, 0.8),
}
SERVED = "unifiedreward"  # scored by a server, where `served` is set
REFERENCE = "tafs_grpo"  # the method whose training compute is the budget
FEW, FULL = 4, 28  # steps
KEPT = 2  # prompts of each tag whose images samples.safetensors keeps


@dataclass(frozen=True)
class Invented:
    """A method: how much it gains, and how little few steps cost it."""

    title: str
    sampler: str = "ode"
    gain: float = 0.0
    steps: float = 1.0  # the loss of few steps is divided by nfe ** steps
    seconds: float = 0.0
    nfe_old: int = 0
    nfe_theta: int = 0

    @property
    def forward_equivalents(self) -> int:
        return self.nfe_old + 3 * self.nfe_theta

    def iterations_at(self, iterations: int, share: float) -> int:
        """How many iterations a share of the reference's training compute pays for."""
        budget = iterations * share * METHODS[REFERENCE].forward_equivalents
        return min(iterations, max(1, int(budget / self.forward_equivalents)))


METHODS = {
    "base": Invented("shapes-sd3"),
    "flow_grpo": Invented("Flow-GRPO", gain=0.3, steps=1.1, seconds=4.6, nfe_old=10, nfe_theta=6),
    "tafs_grpo": Invented(
        "TAFS-GRPO", "anneal", gain=0.55, steps=1.8, seconds=2.2, nfe_old=4, nfe_theta=3
    ),
}
ASSETS = AssetSettings(
    assets="shapes",
    lock="resources.lock.yaml",
    device="cpu",
    dtype="float32",
    gradient_checkpointing=False,
)
TRAINING = {"prompts_per_iteration": 8, "group_size": 10, "micro_batch": 48, "checkpoint_every": 5}
TRAINING |= {"lora": {"rank": 16, "alpha": 32}}


def tags(prompts: int) -> list[str]:
    return [TAGS[i * len(TAGS) // prompts] for i in range(prompts)]


def write_run(
    root: Path,
    method: str,
    seed: int = 0,
    *,
    prompts: int = 105,
    images: int = 4,
    iterations: int = 60,
    nfe: Sequence[int] = range(1, 9),
    served: bool = False,
    **fields: Any,
) -> Path:
    """Write one run's folder; `fields` replaces fields of its RunSpec."""
    invented = METHODS[method]
    trained = bool(invented.seconds)
    shares = (0.25, 0.5, 0.75, 1.0) if trained else ()
    given = {
        "name": f"{method}-{seed}",
        "variant": method,
        "method": method,
        "title": invented.title,
        "task": "preference" if trained else "",
        "prompts": "shapes",
        "backbone": "shapes-sd3",
        "model": {},
        "seed": seed,
        "scale": "shapes",
        "assets": ASSETS,
        "resolution": 24,
        "training": {**TRAINING, "iterations": iterations} if trained else None,
        "rewards": {"pickscore": 1.0, "clip": 1.0} if trained else {},
        "sampler": invented.sampler,
        "nfe_old": invented.nfe_old or None,
        "nfe_theta": invented.nfe_theta or None,
        "forward_equivalents": float(invented.forward_equivalents),
        "snapshots": sorted({invented.iterations_at(iterations, s) for s in shares} - {iterations}),
    }
    run = RunSpec.model_validate(given | fields)
    points = [(n, None) for n in [*nfe, *([] if trained else [FULL])]]
    points += [(FEW, iteration) for iteration in run.snapshots]
    evaluation = EvalSpec(
        weights={"clip": "c" * 64},
        random_weights=(),
        prompts_per_tag=None,
        batch=64,
        full_steps=FULL,
        resolution=24,
        served=served,
        trajectories=TrajectorySpec(nfe=FEW, prompts=prompts),
        samplers=("ode",),
        validation_prompts=1,
        settings=tuple(
            EvalSetting(sampler=run.sampler, nfe=n, images_per_prompt=images, iteration=iteration)
            for n, iteration in points
        ),
    )
    folder = root / run.name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run.to_json(), encoding="utf-8")
    (folder / "evaluation.json").write_text(evaluation.to_json(), encoding="utf-8")
    # Every run has its own noise; what a prompt's images share comes from common streams.
    own = np.random.default_rng([1, sum(map(ord, method)), seed])
    _write_scores(folder, run, evaluation, prompts, own)
    _write_samples(folder, evaluation, prompts, own)
    if trained:
        _write_journal(folder, invented, iterations, own)
        save_file({"weight": own.normal(size=3)}, folder / "adapter.safetensors")
    else:
        _write_trajectory_rewards(folder, prompts, own)
    return folder


def write_runs(root: Path, seeds: int = 3, **options: Any) -> list[Path]:
    """Write a base model and every method with the seeds 0 to `seeds` - 1."""
    return [
        write_run(root, method, seed, **options)
        for method in METHODS
        for seed in range(1 if method == "base" else seeds)
    ]


def _write_scores(
    folder: Path, run: RunSpec, evaluation: EvalSpec, prompts: int, own: np.random.Generator
) -> None:
    invented = METHODS[run.method]
    shared = np.random.default_rng(0)
    images = evaluation.settings[0].images_per_prompt
    tables = []
    for metric, (mean, spread, loss) in SCORES.items():
        hard = shared.normal(size=(prompts, 1)) + 0.5 * shared.normal(size=(prompts, images))
        luck = 0.15 * own.normal() if invented.gain else 0.0
        for setting in evaluation.settings:
            after = run.iterations if setting.iteration is None else setting.iteration
            trained = after / run.iterations if run.iterations else 1.0
            value = mean + spread * (trained * (invented.gain + luck) + hard)
            value = value - loss / setting.nfe**invented.steps
            value = value + 0.4 * spread * own.normal(size=(prompts, images))
            if metric == "geneval":
                value = (value > 0.5).astype(float)
            if metric == SERVED:  # its answers cannot always be parsed
                value[own.random(value.shape) < 0.002] = np.nan
            columns = {
                "run": run.name,
                "method": run.method,
                "seed": run.seed,
                "prompt": np.repeat(np.arange(prompts), images),
                "tag": np.repeat(tags(prompts), images),
                "image": np.tile(np.arange(images), prompts),
                "iteration": after,
                "sampler": setting.sampler,
                "nfe": setting.nfe,
                "metric": metric,
                "value": value.ravel(),
            }
            tables.append(pd.DataFrame(columns))
    names = ("run", "method", "tag", "sampler", "metric")
    table = pd.concat(tables, ignore_index=True).astype(dict.fromkeys(names, "category"))
    by_server = (table["metric"] == SERVED) & evaluation.served
    table[~by_server].to_parquet(folder / "scores.parquet", index=False)
    if evaluation.served:
        table[by_server].to_parquet(folder / "served_scores.parquet", index=False)


def _write_samples(
    folder: Path, evaluation: EvalSpec, prompts: int, own: np.random.Generator
) -> None:
    """Discs on a dark ground, blurred by noise at few steps; the first KEPT prompts of each tag."""
    found = tags(prompts)
    kept = [i for i in range(prompts) if found[:i].count(found[i]) < KEPT]
    y, x = np.mgrid[:24, :24]
    shared = np.random.default_rng(1)
    centre = shared.integers(7, 17, size=(len(kept), 2, 1, 1))
    colour = shared.integers(80, 256, size=(len(kept), 1, 1, 3))
    disc = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < 30
    clean = np.where(disc[..., None], colour, 25)
    samples = {
        s.images: np.clip(clean + own.normal(size=clean.shape) * 120 / s.nfe, 0, 255).astype(
            np.uint8
        )
        for s in evaluation.settings
    }
    save_file(
        {"prompts": np.array(kept), **samples},
        folder / "samples.safetensors",
        {"captions": json.dumps([f"prompt {i}" for i in kept])},
    )


def _write_trajectory_rewards(folder: Path, prompts: int, own: np.random.Generator) -> None:
    """One trajectory per prompt: the earlier an image, the lower the correlation with the last."""
    steps = np.arange(1, FEW + 1)
    index = {"prompt": np.tile(np.arange(prompts), FEW), "step": np.repeat(steps, prompts)}
    tables = []
    for metric, (mean, spread, _) in SCORES.items():
        noise = own.normal(size=(FEW, prompts)) * 0.4 * (FEW - steps)[:, None]
        value = mean + spread * (own.normal(size=prompts) + noise)
        tables.append(pd.DataFrame({**index, "metric": metric, "value": value.ravel()}))
    table = pd.concat(tables, ignore_index=True).astype({"metric": "category"})
    table.to_parquet(folder / "trajectory_rewards.parquet", index=False)
    shown = np.arange(4)
    images = own.integers(0, 256, (len(shown), FEW, 24, 24, 3), dtype=np.uint8)
    texts = {"captions": [f"prompt {i}" for i in shown], "tags": tags(len(shown))}
    save_file(
        {"prompts": shown, "images": images},
        folder / "trajectories.safetensors",
        {key: json.dumps(values) for key, values in texts.items()},
    )


def _write_journal(
    folder: Path, invented: Invented, iterations: int, own: np.random.Generator
) -> None:
    start = {"fingerprint": f"of {folder.name}", "provenance": {"code": "abc"}}
    records: list[dict[str, Any]] = [{"kind": "start", "time": 0.0, **start}]
    for i in range(iterations):
        grown = invented.gain * (1 - np.exp(-i / 20))
        final = np.array([0.80 + 0.05 * grown, 0.25 + 0.03 * grown])
        steps = np.stack([final - 0.02, final + own.normal(size=2) * 0.003], axis=1)
        rewards = dict(zip(("pickscore", "clip"), steps.tolist(), strict=True))
        total = invented.seconds * float(own.uniform(0.95, 1.1))
        seconds = {"sample": total / 3, "reward": 0.1, "update": total / 2, "total": total}
        record = {"iteration": i, "time": float(i), "rewards": rewards, "reward_std": 0.1}
        records.append({"kind": "iteration", **record, "seconds": seconds})
    records.append({"kind": "end", "time": float(iterations)})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "journal.jsonl").write_text(lines, encoding="utf-8")


def change_scores(run: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Replace the table of scores.parquet."""
    file = run / "scores.parquet"
    change(pd.read_parquet(file)).to_parquet(file, index=False)


def table_spec(
    runs: Sequence[Path],
    *,
    few: Sequence[int] = (FEW,),
    full: int = FULL,
    kind: str = "scores",
    **fields: Any,
) -> TableSpec:
    """A table of these runs: base models, then methods in the order of METHODS.

    `few` are the steps of the rows, `full` those of the base models' first row; `fields` replaces
    fields of the TableSpec.
    """
    specs = [RunSpec.read(run / "run.json") for run in runs]
    systems: dict[tuple[str, ...], list[RunSpec]] = {}
    for spec in sorted(specs, key=lambda spec: (list(METHODS).index(spec.method), spec.seed)):
        if kind != "correlation" or not spec.trained:
            systems.setdefault((spec.variant, spec.task, spec.backbone), []).append(spec)
    rows = []
    for group in systems.values():
        first = group[0]
        iterations_at = METHODS[first.method].iterations_at
        at = iterations_at(first.iterations, 1.0) if kind == "compute" and first.trained else None
        rows += [
            RowSpec(
                **first.model_dump(include={"variant", "task", "backbone", "sampler"}),
                label=first.title,
                runs=tuple(spec.name for spec in group),
                role="sd3",
                nfe=n,
                full_steps=full,
                iteration=at,
            )
            for n in [*([full] if kind == "scores" and not first.trained else []), *few]
        ]
    given = {
        "name": "table2",
        "kind": kind,
        "caption": "Alignment methods.",
        "header": "Method",
        "figures": {},
        "compute_reference": REFERENCE,
        "excluded_methods": (),
        "few_nfe": FEW,
        "curve_nfe": tuple(range(1, 9)),
        "rows": tuple(rows),
    }
    return TableSpec.model_validate(given | fields)


def load(spec: TableSpec, runs: Path) -> LoadedTable:
    """A table with the systems of its rows, from the folder of all runs."""
    (loaded,) = results.load_tables([spec], runs)
    return loaded


def loaded(runs: Sequence[Path], **options: Any) -> LoadedTable:
    """The loaded table of `table_spec`."""
    return load(table_spec(runs, **options), runs[0].parent)
