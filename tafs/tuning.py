"""The hyperparameter search: `snakemake tune`, or `python -m tafs.tuning [--scale shapes]`.

Every method gets the same number of trials over its grid in config.yaml's `tuning`, on a seed that
no table uses. A trial's score is the mean total reward of its model at the tables' few steps on
training prompts with noise of their own, so the held-out prompts take no part in the choice.
Writes results/SCALE/tuning/METHOD.csv, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from tafs.assets import sources
from tafs.common import errors, files, yaml_files
from tafs.data import prompts
from tafs.experiment import runs, schema, validate
from tafs.runtime import gpus, run_dir
from tafs.runtime import main as main_

VALIDATION_PROMPTS = 96
COLUMNS = ("method", "hyperparameters", "nfe", "score", "base_score", "iteration_s", "seed")


def trials(settings: schema.Config) -> list[runs.Run]:
    """Every (method, point of its grid) as a run on the tuning seed."""
    if settings.tuning is None:
        raise yaml_files.ConfigError("config.yaml: missing key 'tuning'")
    found = []
    task = settings.tuning.task
    for variant, grid in settings.tuning.grids.items():
        base = next(
            r for r in runs.runs(settings).values() if r.variant == variant and r.task == task
        )
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            label = "_".join(f"{key}-{value:g}" for key, value in point.items())
            found.append(
                dataclasses.replace(
                    base,
                    name=f"{variant}.{task}.{base.backbone}.tuning.{label}",
                    seed=settings.tuning.seed,
                    hyperparameters={**base.hyperparameters, **point},
                    snapshots=(),
                )
            )
    return found


def score(description: dict[str, Any], nfe: int, batch: int, adapter: Path | None) -> float:
    """Mean total reward on training prompts, of a trained model or of the base."""
    from tafs.evaluation import generate

    settings, prompt_set = description["settings"], description["prompts"]
    world = sources.of(settings)
    backbone = world.model(description["backbone"], settings["resolution"])
    if adapter is not None:
        backbone.load_adapter(adapter)
    rng = np.random.default_rng(description["seed"])
    drawn = prompts.draw(world.prompts(prompt_set, "train"), VALIDATION_PROMPTS, rng)
    images = generate.generate(
        backbone,
        [p.text for p in drawn],
        generate.Setting(description["sampler"], nfe, images_per_prompt=2),
        batch=batch,
        seed=description["seed"],
    )
    rewards = world.rewards(list(description["rewards"]))
    scores = rewards.score(images, [p for p in drawn for _ in range(2)])
    total = sum(weight * scores[name].mean() for name, weight in description["rewards"].items())
    return float(total)


def is_trained(run: run_dir.RunDir) -> bool:
    """Whether the folder's adapter is of the present settings and method, not of earlier ones."""
    from tafs.runtime import journal

    if not (run.adapter.is_file() and run.journal.is_file()):
        return False
    return bool(journal.read(run.journal)[0]["fingerprint"] == run.fingerprint())


def score_base(trial: runs.Run, evaluation: schema.Evaluation) -> float:
    """The score of the model that a trial starts from, by its scheduler's own steps."""
    description = {**trial.describe(), "sampler": "ode"}
    return score(description, evaluation.few_nfe, evaluation.batch, None)


def run_trial(
    trial: runs.Run, folder: Path, evaluation: schema.Evaluation, base_score: float
) -> dict[str, Any]:
    """Train and score one point; a trial that was stopped continues."""
    from tafs.runtime import journal
    from tafs.training import train

    description = trial.describe()
    nfe, batch = evaluation.few_nfe, evaluation.batch
    run = run_dir.RunDir(folder / trial.name)
    files.atomic_text(run.folder / "run.json", runs.to_json(description))
    with run.alone("train"):
        if not is_trained(run):
            train.train(run)
        run.clear_state()
    records = journal.iterations(run.journal)
    return {
        "method": trial.variant,
        "hyperparameters": runs.to_json(dict(trial.hyperparameters)).strip(),
        "nfe": nfe,
        "score": round(score(description, nfe, batch, run.adapter), 4),
        "base_score": round(base_score, 4),
        "iteration_s": round(float(np.median([r["seconds"]["total"] for r in records])), 2),
        "seed": trial.seed,
    }


def search(settings: schema.Config, only: str | None) -> None:
    """Run every trial, or one method's, and write the tables after each.

    Raises:
        ConfigError: nothing is searched under that name.
    """
    known = trials(settings)
    chosen = [t for t in known if only in (None, t.variant)]
    if not chosen:
        searched = ", ".join(dict.fromkeys(t.variant for t in known))
        raise yaml_files.ConfigError(f"--only: no search of {only!r} (available: {searched})")
    if settings.active.device == "cuda":
        gpus.claim(1)
    folder = Path(settings.results) / settings.scale / "tuning"
    evaluation = settings.active.evaluation
    rows: dict[str, list[dict[str, Any]]] = {}
    base_score = 0.0
    for number, trial in enumerate(chosen, start=1):
        if trial.variant not in rows:
            base_score = score_base(trial, evaluation)
        found = rows.setdefault(trial.variant, [])
        found.append(run_trial(trial, folder, evaluation, base_score))
        print(f"{number}/{len(chosen)} {found[-1]}", flush=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        files.atomic_text(folder / f"{trial.variant}.csv", text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description="Search the methods' hyperparameters.")
    parser.add_argument("--scale", default="shapes")
    parser.add_argument("--results", help="default: config.yaml's")
    parser.add_argument("--only", metavar="METHOD", help="one method")
    arguments = parser.parse_args()
    given = {"results": arguments.results} if arguments.results else {}

    def work() -> None:
        main_.limit_threads()
        settings = validate.read(Path("config.yaml"), {"scale": arguments.scale, **given})
        search(settings, arguments.only)

    errors.run_cli("tune", work)


if __name__ == "__main__":
    main()
