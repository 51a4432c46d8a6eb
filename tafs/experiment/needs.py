"""What the outcome of each stage depends on; see `tafs.runtime.receipts`.

The workflow computes the needs from config.yaml, and a stage from the files that it reads. Where
both are equal, the stage's files are what another run would write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from tafs.assets import sources
from tafs.assets.sources import AssetSource
from tafs.common.files import sha256
from tafs.experiment import looks
from tafs.experiment.claims import CLAIMS, read
from tafs.experiment.specs import BEST, BaseCheckSpec, DecideSpec, EvalSpec, ReportSpec, RunSpec
from tafs.methods import registry
from tafs.rewards import golden, metrics
from tafs.rewards.metrics import METRICS
from tafs.runtime import receipts
from tafs.runtime.receipts import Needs
from tafs.runtime.run_dir import STAGES, RunDir

# Increased by every change of the code that changes adapters or scores.
NUMERICS = 3

REPORT = Path(__file__).parents[1] / "report"


def training(spec: RunSpec) -> Needs:
    """What a training's adapters depend on."""
    source = sha256(registry.source_file(spec.method))
    return {"numerics": NUMERICS, "method source": source, **spec.decisive()}


def served(run: RunDir, spec: RunSpec, judged: EvalSpec) -> Needs:
    """What the scores of a server depend on: the images as well, by their other scores."""
    receipt = receipts.read(run.folder, "evaluate")
    written = receipt.files.get(run.scores.name) if receipt else None
    return {**evaluation(run, spec, judged), "images": written.sha256 if written else None}


def evaluation(run: RunDir, spec: RunSpec, evaluation: EvalSpec) -> Needs:
    """What a run's scores depend on, its trained weights included."""
    settings = {
        f"settings.{s.name}.{'final' if s.iteration is None else s.iteration}": s.images_per_prompt
        for s in evaluation.settings
    }
    own: dict[str, JsonValue] = {"prompts_per_tag": evaluation.prompts_per_tag}
    if any(s.sampler == BEST for s in evaluation.settings):
        own["samplers"] = list(evaluation.samplers)
        own["validation_prompts"] = evaluation.validation_prompts
    return {**_judged(run, spec, evaluation), **own, **settings}


def trajectories(run: RunDir, spec: RunSpec, evaluation: EvalSpec) -> Needs:
    """What the rewards of a run's annealed trajectories depend on."""
    return {**_judged(run, spec, evaluation), **evaluation.trajectories.decisive()}


def _judged(run: RunDir, spec: RunSpec, evaluation: EvalSpec) -> dict[str, JsonValue]:
    """A run's models, and the metrics that judge them."""
    kept = ("method", "seed", "backbone", "model", "prompts", "weights", "assets")
    decisive = {k: v for k, v in spec.decisive().items() if k.split(".")[0] in kept}
    judges = {f"metrics.{name}": digest for name, digest in evaluation.weights.items()}
    trained: dict[str, JsonValue] = {}
    if spec.trained and (receipt := receipts.read(run.folder, "train")):
        timed = run.journal.name
        trained = {n: file.sha256 for n, file in receipt.files.items() if n != timed}
    own = {"numerics": NUMERICS, "resolution": evaluation.resolution}
    return {**own, **decisive, **judges, **trained}


def check_rewards(source: AssetSource, names: Iterable[str]) -> Needs:
    """What the check of some rewards depends on, their stored golden scores included."""
    digests = {name: source.reward_digest(name) for name in names}
    file = source.golden_scores
    stored = golden.stored(file, digests) if file is not None else {}
    own = hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()
    return {"golden scores": own, **{f"rewards.{name}": d for name, d in digests.items()}}


def checked_metrics(source: AssetSource, judged: EvalSpec, *, served: bool) -> list[str]:
    """The metrics of all prompt sets of an asset source, and with `served` the server's."""
    sets = sources.prompt_sets_of(source.settings.assets)
    own = {m for prompts in sets for m in source.metrics(prompts, judged.optional_metrics)}
    if served and judged.served:
        own.add(judged.judge)
    return [name for name in METRICS if name in own]


def tracking(root: Path, runs: Iterable[str]) -> Needs:
    """What the runs' copy in MLflow depends on: everything that they have written.

    Args:
        root: the results folder of a scale.
    """
    found: dict[str, JsonValue] = {}
    for name in runs:
        folder = root / "runs" / name
        described = [folder / "run.json", folder / "evaluation.json"]
        found |= {f"{name}/{file.name}": sha256(file) for file in described if file.is_file()}
        for stage in STAGES:
            receipt = receipts.read(folder, stage)
            for file, written in receipt.files.items() if receipt else ():
                found[f"{name}/{file}"] = written.sha256
    return found


def report(root: Path, spec: ReportSpec, claims: Path = CLAIMS) -> Needs:
    """What the tables, figures and claims of a results folder depend on."""
    code = hashlib.sha256()
    described = [metrics.PLUGINS.source(name) for name in METRICS]
    own_files = [f for f in REPORT.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    for file in [*sorted(own_files), *sorted(described), Path(metrics.__file__)]:
        code.update(file.read_bytes())
    own: dict[str, Any] = {
        "code of the report": code.hexdigest(),
        "report spec": hashlib.sha256(spec.to_json().encode()).hexdigest(),
        claims.name: sha256(claims),
    }
    runs = dict.fromkeys(name for table in spec.tables for name in table.runs)
    return {**own, **tracking(root, runs)}


def base_check(root: Path, spec: BaseCheckSpec) -> Needs:
    """What the check of the base models depends on."""
    own = hashlib.sha256(spec.to_json().encode()).hexdigest()
    return {"base check": own, **tracking(root, spec.runs)}


def look(root: Path, spec: DecideSpec, number: int, claims: Path = CLAIMS) -> Needs:
    """What the result of a look depends on: its runs and the look before it."""
    judged = looks.report_spec(root, spec, number, read(claims))
    before = looks.result(root, spec, number - 1)
    earlier = sha256(before) if number > 1 and before.is_file() else None
    at_first: list[JsonValue] = list(spec.claims)
    own: dict[str, JsonValue] = {"looks": list(spec.seeds), "earlier": earlier, "open": at_first}
    return {**own, **report(root, judged, claims)}
