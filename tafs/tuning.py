"""The hyperparameter search: `snakemake tune`, or `python -m tafs.tuning [--scale shapes]`.

Every method gets the same number of trials, the points of its grid in config.yaml's `tuning`, on a
seed that no table uses. A trial's score is the mean total reward of its model at the tables' few
steps, on training prompts with start noise from the tuning seed. The held-out prompts are not used.
Writes results/SCALE/tuning/METHOD.csv and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tafs import experiment
from tafs.common import errors, files
from tafs.common.yaml_files import ConfigError
from tafs.data import prompts
from tafs.evaluation import generate
from tafs.experiment import Plan, RunSpec, needs, run_inputs
from tafs.experiment.schema import Evaluation
from tafs.experiment.specs import EvalSetting
from tafs.runtime import gpus, journal, receipts
from tafs.runtime.main import limit_threads
from tafs.runtime.run_dir import RunDir
from tafs.training import train

VALIDATION_PROMPTS = 96
IMAGES_PER_PROMPT = 2
COLUMNS = ("method", "hyperparameters", "nfe", "score", "base_score", "iteration_s", "seed")


def trials(plan: Plan) -> list[RunSpec]:
    """Every method at every point of its grid, on the tuning seed."""
    tuning = plan.config.tuning
    if tuning is None:
        raise ConfigError("config.yaml: missing key 'tuning'")
    found = []
    for variant, grid in tuning.grids.items():
        base = next(
            run for run in plan.runs.values() if (run.variant, run.task) == (variant, tuning.task)
        )
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            label = "_".join(f"{key}-{value:g}" for key, value in point.items())
            changes = {
                "name": f"{variant}.{tuning.task}.{base.backbone}.tuning.{label}",
                "seed": tuning.seed,
                "hyperparameters": {**base.hyperparameters, **point},
                "snapshots": (),
            }
            found.append(base.model_copy(update=changes))
    return found


def score(trial: RunSpec, evaluation: Evaluation, adapter: Path | None = None) -> float:
    """The mean total reward on training prompts, with the best of the evaluation's samplers.

    Args:
        adapter: of the trained model; None: the untrained model.
    """
    source = run_inputs.asset_source(trial)
    backbone = source.model(trial.backbone, trial.resolution)
    if adapter is not None:
        backbone.load_adapter(adapter)
    rng = np.random.default_rng(trial.seed)
    drawn = prompts.draw(source.prompts(trial.prompts, "train"), VALIDATION_PROMPTS, rng)
    texts = [prompt.text for prompt in drawn]
    repeated = [p for p in drawn for _ in range(IMAGES_PER_PROMPT)]
    rewards = source.rewards(list(trial.rewards))

    def total(sampler: str) -> float:
        setting = EvalSetting(
            sampler=sampler, nfe=evaluation.few_nfe, images_per_prompt=IMAGES_PER_PROMPT
        )
        drawn = generate.generate(backbone, texts, setting, evaluation.batch, trial.seed)
        scores = rewards.score(drawn, repeated)
        return float(sum(weight * scores[name].mean() for name, weight in trial.rewards.items()))

    return max(map(total, evaluation.samplers))


def is_trained(run: RunDir, trial: RunSpec) -> bool:
    """Whether the folder's adapter was trained with the present settings and method."""
    receipt = receipts.read(run.folder, "train")
    if receipt is None or receipt.missing(run.folder):
        return False
    return not receipts.differences(receipt.needs, needs.training(trial))


def run_trial(
    trial: RunSpec, folder: Path, evaluation: Evaluation, base_score: float
) -> dict[str, Any]:
    """Train and score one point of a grid, or continue it; return its row of COLUMNS."""
    run = RunDir(folder / trial.name)
    files.atomic_text(run.folder / "run.json", trial.to_json())
    with run.alone("train"):
        if not is_trained(run, trial):
            train.train(run)
        run.clear_state()
    seconds = [record["seconds"]["total"] for record in journal.iterations(run.journal)]
    return {
        "method": trial.variant,
        "hyperparameters": json.dumps(trial.hyperparameters, sort_keys=True),
        "nfe": evaluation.few_nfe,
        "score": round(score(trial, evaluation, run.adapter), 4),
        "base_score": round(base_score, 4),
        "iteration_s": round(float(np.median(seconds)), 2),
        "seed": trial.seed,
    }


def search(plan: Plan, only: str | None = None) -> None:
    """Run the trials of all methods or of one; write their tables."""
    known = trials(plan)
    chosen = [trial for trial in known if only in (None, trial.variant)]
    if not chosen:
        searched = ", ".join(dict.fromkeys(trial.variant for trial in known))
        raise ConfigError(f"--only: {only!r} has no grid (available: {searched})")
    scale = plan.config.active
    if scale.device == "cuda":
        gpus.claim(1)
    folder = plan.root / "tuning"
    rows: dict[str, list[dict[str, Any]]] = {}
    base_score = 0.0
    for number, trial in enumerate(chosen, start=1):
        if trial.variant not in rows:
            base_score = score(trial, scale.evaluation)
        found = rows.setdefault(trial.variant, [])
        found.append(run_trial(trial, folder, scale.evaluation, base_score))
        print(f"{number}/{len(chosen)} {found[-1]}", flush=True)
    # At the end, because a table counts as a finished search.
    for variant, found in rows.items():
        table = pd.DataFrame(found, columns=COLUMNS).to_csv(index=False)
        files.atomic_text(folder / f"{variant}.csv", table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Search the methods' hyperparameters.")
    parser.add_argument("--scale", help="default: config.yaml's")
    parser.add_argument("--results", help="default: config.yaml's")
    parser.add_argument("--only", metavar="METHOD", help="search one method only")
    options = parser.parse_args()
    given = {"scale": options.scale, "results": options.results}
    overrides = {key: value for key, value in given.items() if value is not None}

    def work() -> None:
        limit_threads()
        search(experiment.load(overrides), options.only)

    errors.run_cli("tune", work)


if __name__ == "__main__":
    main()
