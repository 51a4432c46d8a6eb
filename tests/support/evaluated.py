"""A trained smoke-scale run to evaluate: three settings, one of a snapshot; images are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from support.killable_training import ROOT, prepare, trained

from tafs import experiment
from tafs.experiment import run_inputs
from tafs.experiment.specs import EvalSpec
from tafs.runtime.run_dir import RunDir

BATCH = 2  # images; a setting has six


def ready(folder: Path) -> RunDir:
    """Train a run that is to be evaluated."""
    run = trained(prepare(folder / "run", 2, "tafs_grpo"))
    plan = experiment.load({"scale": "smoke"}, ROOT / "config.yaml")
    spec = next(e for name, e in plan.evaluations.items() if name.startswith("tafs_grpo"))
    settings = tuple(
        s.model_copy(update={"iteration": 1 if s.iteration else None}) for s in spec.settings
    )
    write(run, spec, settings=settings, batch=BATCH, served=True)
    return run


def write(run: RunDir, spec: EvalSpec | None = None, **fields: Any) -> None:
    """Write evaluation.json with some fields replaced; by default those of the present one."""
    changed = (spec or run_inputs.eval_spec(run)).model_copy(update=fields)
    (run.folder / "evaluation.json").write_text(changed.to_json(), encoding="utf-8")


def copied(run: RunDir, folder: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(run.folder, folder / "run")))
