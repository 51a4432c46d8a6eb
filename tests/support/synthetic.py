"""Runs as the training and the evaluation leave them, with invented numbers of realistic size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Mean at many steps, standard deviation over prompts, loss at one step.
METRICS = {
    "geneval": (0.72, 0.25, 0.5),
    "pickscore": (22.4, 0.8, 1.6),
    "clip": (27.5, 1.5, 4.0),
    "hpsv2": (0.30, 0.02, 0.06),
    "imagereward": (1.0, 0.5, 1.5),
    "unifiedreward": (3.45, 0.4, 0.8),
}


Setting = tuple[str, int, int | None]  # sampler, steps, a snapshot's iteration or None


@dataclass(frozen=True)
class Kind:
    """A method: how much it gains, and how little few steps cost it."""

    title: str
    sampler: str = "ode"
    gain: float = 0.0
    steps: float = 1.0  # the loss of few steps is divided by nfe ** steps
    seconds: float = 0.0
    nfe_old: int | None = None
    nfe_theta: int | None = None

    @property
    def forward_equivalents(self) -> int:
        """Network evaluations per image and iteration."""
        return (self.nfe_old or 0) + 3 * (self.nfe_theta or 0)


REFERENCE = "tafs_grpo"  # the method whose training compute is the measure
FEW, FULL = 4, 28  # steps


KINDS = {
    "base": Kind("shapes-sd3"),
    "flow_grpo": Kind("Flow-GRPO", gain=0.3, steps=1.1, seconds=4.6, nfe_old=10, nfe_theta=6),
    "tafs_grpo": Kind(
        "TAFS-GRPO", "anneal", gain=0.55, steps=1.8, seconds=2.2, nfe_old=4, nfe_theta=3
    ),
}


def captions(prompts: int = 105) -> list[str]:
    colours = ("red", "green", "blue", "yellow", "purple")
    shapes = ("circle", "square", "triangle", "star")
    return [
        f"a {colours[i % 5]} {shapes[i % 4]} to the left of a {colours[(i + 2) % 5]} "
        f"{shapes[(i + 1) % 4]}"
        if i % 2
        else f"a photo of a {colours[i % 5]} {shapes[i % 4]}"
        for i in range(prompts)
    ]


def iterations_at(kind: Kind, iterations: int, share: float) -> int:
    """How many iterations a share of the reference's training compute pays for."""
    return min(
        iterations,
        max(1, int(iterations * share * KINDS[REFERENCE].forward_equivalents / kind.forward_equivalents)),
    )


def write_run(
    root: Path,
    method: str,
    seed: int = 0,
    *,
    prompts: int = 105,
    images: int = 4,
    iterations: int = 60,
    nfe: tuple[int, ...] = tuple(range(1, 9)),
    **info: Any,
) -> Path:
    """One run's folder; `info` replaces fields of run.json."""
    kind = KINDS[method]
    folder = root / info.get("name", f"{method}-{seed}")
    folder.mkdir(parents=True)
    marks = (
        {iterations_at(kind, iterations, q / 4) for q in (1, 2, 3, 4)} if kind.seconds else set()
    )
    described = {
        "name": folder.name,
        "method": method,
        "title": kind.title,
        "task": "preference",
        "prompts": "shapes",
        "backbone": "shapes-sd3",
        "seed": seed,
        "scale": "shapes",
        "sampler": kind.sampler,
        "nfe_old": kind.nfe_old,
        "nfe_theta": kind.nfe_theta,
        "forward_equivalents": kind.forward_equivalents,
        "rewards": {"pickscore": 1.0, "clip": 1.0},
        "iterations": iterations if kind.seconds else 0,
        "snapshots": sorted(marks - {iterations}),
        "settings": {"world": "shapes"},
        **info,
    }
    (folder / "run.json").write_text(json.dumps(described), encoding="utf-8")
    # One stream a run for its own noise; what the prompts share comes from a stream of theirs.
    own = np.random.default_rng([1, sum(map(ord, method)), seed])
    settings: list[Setting] = [(kind.sampler, n, None) for n in nfe]
    if method == "base":
        settings.append((kind.sampler, FULL, None))
    settings += [(kind.sampler, FEW, iteration) for iteration in described["snapshots"]]
    evaluation = {
        "prompts": None,
        "batch": 64,
        "full": FULL,
        "server": [],
        "correlation": {"nfe": FEW, "prompts": prompts},
        "settings": [
            {"sampler": s, "nfe": n, "iteration": iteration, "images_per_prompt": images}
            for s, n, iteration in settings
        ],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    _write_scores(folder, described, kind, settings, prompts, images, own)
    _write_samples(folder, settings, prompts, own)
    if kind.seconds:
        _write_journal(folder, kind, iterations, own)
        save_file({"weight": own.normal(size=3)}, folder / "adapter.safetensors")
    else:
        _write_step_scores(folder, prompts, own)
    return folder


def _write_scores(
    folder: Path,
    info: dict[str, Any],
    kind: Kind,
    settings: list[Setting],
    prompts: int,
    images: int,
    own: np.random.Generator,
) -> None:
    shared = np.random.default_rng(0)
    tables = []
    for metric, (mean, spread, loss) in METRICS.items():
        hard = shared.normal(size=(prompts, 1)) + 0.5 * shared.normal(size=(prompts, images))
        luck = 0.15 * own.normal() if kind.gain else 0.0
        for sampler, nfe, iteration in settings:
            trained = 1.0 if iteration is None else iteration / info["iterations"]
            value = mean + spread * (trained * (kind.gain + luck) + hard)
            value = (
                value - loss / nfe**kind.steps + 0.4 * spread * own.normal(size=(prompts, images))
            )
            if metric == "geneval":
                value = (value > 0.5).astype(float)
            if metric == "unifiedreward":
                value[own.random(value.shape) < 0.002] = np.nan
            tables.append(
                pd.DataFrame(
                    {
                        "run": info["name"],
                        "method": info["method"],
                        "seed": info["seed"],
                        "prompt": np.repeat(np.arange(prompts), images),
                        "tag": np.repeat(tags(prompts), images),
                        "image": np.tile(np.arange(images), prompts),
                        "iteration": info["iterations"] if iteration is None else iteration,
                        "sampler": sampler,
                        "nfe": nfe,
                        "metric": metric,
                        "value": value.ravel(),
                    }
                )
            )
    table = pd.concat(tables, ignore_index=True)
    table = table.astype({n: "category" for n in ("run", "method", "tag", "sampler", "metric")})
    table.to_parquet(folder / "scores.parquet", index=False)


def tags(prompts: int = 105) -> list[str]:
    return [TAGS[i * len(TAGS) // prompts] for i in range(prompts)]


def _write_samples(
    folder: Path, settings: list[Setting], prompts: int, own: np.random.Generator
) -> None:
    """Discs on a dark ground, blurred by noise at few steps."""
    y, x = np.mgrid[:24, :24]
    shared = np.random.default_rng(1)
    centre = shared.integers(7, 17, size=(prompts, 2, 1, 1))
    colour = shared.integers(80, 256, size=(prompts, 1, 1, 3))
    disc = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < 30
    clean = np.where(disc[..., None], colour, 25)
    save_file(
        {"prompts": np.arange(prompts)}
        | {
            f"{sampler}-{nfe}": np.clip(
                clean + own.normal(size=clean.shape) * 120 / nfe, 0, 255
            ).astype(np.uint8)
            for sampler, nfe, iteration in settings
            if iteration is None
        },
        folder / "samples.safetensors",
    )


def _write_step_scores(folder: Path, prompts: int, own: np.random.Generator) -> None:
    """One trajectory a prompt: the earlier an image, the less its reward says of the last one's."""
    steps = np.arange(1, FEW + 1)
    tables = []
    for metric, (mean, spread, _) in METRICS.items():
        noise = own.normal(size=(FEW, prompts)) * 0.4 * (FEW - steps)[:, None]
        value = mean + spread * (own.normal(size=prompts) + noise)
        index = {"prompt": np.tile(np.arange(prompts), FEW), "step": np.repeat(steps, prompts)}
        tables.append(pd.DataFrame({**index, "metric": metric, "value": value.ravel()}))
    table = pd.concat(tables, ignore_index=True).astype({"metric": "category"})
    table.to_parquet(folder / "trajectory_rewards.parquet", index=False)


def _write_journal(folder: Path, kind: Kind, iterations: int, own: np.random.Generator) -> None:
    start = {"fingerprint": f"of {folder.name}", "provenance": {"code": "abc"}}
    records: list[dict[str, Any]] = [{"kind": "start", "time": 0.0, **start}]
    for i in range(iterations):
        grown = kind.gain * (1 - np.exp(-i / 20))
        final = {"pickscore": 0.80 + 0.05 * grown, "clip": 0.25 + 0.03 * grown}
        noise = own.normal(size=2) * 0.003
        total = kind.seconds * float(own.uniform(0.95, 1.1))
        records.append(
            {
                "kind": "iteration",
                "iteration": i,
                "time": float(i),
                "rewards": {
                    name: [value - 0.02, value + float(e)]
                    for (name, value), e in zip(final.items(), noise, strict=True)
                },
                "reward_std": 0.1,
                "seconds": {
                    "sample": total / 3,
                    "reward": 0.1,
                    "update": total / 2,
                    "total": total,
                },
            }
        )
    records.append({"kind": "end", "time": float(iterations)})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "journal.jsonl").write_text(lines, encoding="utf-8")


def write_runs(root: Path, seeds: int = 3, **options: Any) -> list[Path]:
    """A base model and each method with `seeds` seeds."""
    return [
        write_run(root, method, seed, **options)
        for method in KINDS
        for seed in range(seeds if method != "base" else 1)
    ]


def table2(
    runs: Sequence[Path],
    few: Sequence[int] = (FEW,),
    full: int | None = FULL,
    kind: str = "scores",
    name: str = "table2",
) -> dict[str, Any]:
    """An entry of `config.tables` of these runs: base models, then methods in the order of KINDS.

    Runs that a test has damaged have no row.
    """
    infos = []
    for run in runs:
        try:
            info = json.loads((run / "run.json").read_text(encoding="utf-8"))
            infos += [info] if {"method", "title"} <= set(info) else []
        except (OSError, ValueError):
            continue
    infos.sort(key=lambda info: list(KINDS).index(info["method"]))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for steps in few:
        for info in infos:
            base = info["method"] == "base"
            if base and steps != few[0] or not base and kind == "correlation":
                continue
            kept = None
            if kind == "compute" and not base:
                kept = iterations_at(KINDS[info["method"]], info["iterations"], 1.0)
            for n in (full, *few) if base and kind == "scores" else (steps,):
                row = {
                    "variant": info.get("variant", info["method"]),
                    "task": info["task"],
                    "part": "sd3",
                    "backbone": info["backbone"],
                    "label": info["title"],
                    "nfe": n,
                    "full": full,
                    "iteration": kept,
                    "sampler": "ode" if base else None,
                    "rule": False,
                }
                row = rows.setdefault(tuple(row.values()), {**row, "runs": []})
                row["runs"].append(info["name"])
    return {
        "name": name,
        "kind": kind,
        "caption": "Alignment methods.",
        "header": "Method",
        "figures": {},
        "reference": REFERENCE,
        "without": [],
        "evaluation": {"few": FEW, "curve": list(range(1, 9))},
        "rows": [row for row in rows.values() if row["nfe"]],
    }
