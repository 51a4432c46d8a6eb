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
    described = {
        "name": folder.name,
        "method": method,
        "title": kind.title,
        "task": "preference",
        "backbone": "shapes-sd3",
        "seed": seed,
        "scale": "shapes",
        "sampler": kind.sampler,
        "nfe_old": kind.nfe_old,
        "nfe_theta": kind.nfe_theta,
        "rewards": {"pickscore": 1.0, "clip": 1.0},
        "iterations": iterations if kind.seconds else 0,
        "settings": {
            "evaluation": {"table_nfe": [4], "curve_nfe": list(range(1, 9)), "base_nfe": 28}
        },
        **info,
    }
    (folder / "run.json").write_text(json.dumps(described), encoding="utf-8")
    # One stream a run for its own noise; what the prompts share comes from a stream of theirs.
    own = np.random.default_rng([1, sum(map(ord, method)), seed])
    settings = [("ode", n) for n in nfe]
    if kind.sampler != "ode":
        settings += [(kind.sampler, n) for n in nfe]
    if method == "base":
        settings.append(("ode", 28))
    _write_scores(folder, described, kind, settings, prompts, images, own)
    _write_samples(folder, settings, prompts, own)
    if kind.seconds:
        _write_journal(folder, kind, iterations, own)
    return folder


def _write_scores(
    folder: Path,
    info: dict[str, Any],
    kind: Kind,
    settings: list[tuple[str, int]],
    prompts: int,
    images: int,
    own: np.random.Generator,
) -> None:
    shared = np.random.default_rng(0)
    tables = []
    for metric, (mean, spread, loss) in METRICS.items():
        hard = shared.normal(size=(prompts, 1)) + 0.5 * shared.normal(size=(prompts, images))
        luck = 0.15 * own.normal()
        for sampler, nfe in settings:
            steps = kind.steps if sampler == kind.sampler else 0.8 * kind.steps
            value = mean + spread * (kind.gain + luck * (kind.gain > 0) + hard)
            value = value - loss / nfe**steps + 0.4 * spread * own.normal(size=(prompts, images))
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
    folder: Path, settings: list[tuple[str, int]], prompts: int, own: np.random.Generator
) -> None:
    """Discs on a dark ground, blurred by noise at few steps."""
    y, x = np.mgrid[:24, :24]
    shared = np.random.default_rng(1)
    centre = shared.integers(7, 17, size=(prompts, 2, 1, 1))
    colour = shared.integers(80, 256, size=(prompts, 1, 1, 3))
    disc = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < 30
    clean = np.where(disc[..., None], colour, 25)
    save_file(
        {
            f"{sampler}-{nfe}": np.clip(
                clean + own.normal(size=clean.shape) * 120 / nfe, 0, 255
            ).astype(np.uint8)
            for sampler, nfe in settings
        },
        folder / "samples.safetensors",
    )


def _write_journal(folder: Path, kind: Kind, iterations: int, own: np.random.Generator) -> None:
    records: list[dict[str, Any]] = [{"kind": "start", "time": 0.0}]
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
    runs: Sequence[Path], few: Sequence[int] = (4,), full: int | None = 28
) -> dict[str, Any]:
    """The contents of a table of these runs: base models, then methods in the order of KINDS.

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
    rows: list[dict[str, Any]] = []
    for steps in [(n,) for n in few]:
        for info in infos:
            base = info["method"] == "base"
            row = {
                "variant": info.get("variant", info["method"]),
                "task": info["task"],
                "backbone": info["backbone"],
                "label": info["title"],
            }
            nfes = [n for n in (full, *few) if n] if base else steps
            for n in nfes if not base or steps[0] == few[0] else ():
                extra = {"nfe": n, "sampler": "ode" if base else None, "rule": False}
                if {**row, **extra} not in rows:
                    rows.append({**row, **extra})
    caption = "Alignment methods."
    return {"name": "table2", "caption": caption, "header": "Method", "figures": [], "rows": rows}
