"""tables."""

from __future__ import annotations

from typing import Any

from tafs.experiment.runs import (
    _costs,
    _full_steps,
    _iterations_at,
    _prompts_of,
    _titles,
    _trained,
    _untrained,
    runs,
)
from tafs.experiment.schema import Config
from tafs.models import catalog
from tafs.runtime.run_dir import BASE


def tables(config: Config) -> list[dict[str, Any]]:
    """What the active scale's tables and figures show, as plain data.

    Each has `name`, `kind`, `caption`, `header`, `figures`, `reference`, `without` (its methods
    that the scale leaves out), `evaluation` (the few and the curve's steps), and `rows` of {runs,
    variant, task, part, backbone, nfe, full, iteration, sampler, label, rule}: the names of the
    runs that a row stands for and what they share, at how many steps (and the model's full ones)
    and after which iteration (None: the last) and by which sampler they are judged (None: the run's
    own), the row's label, and whether a line separates it from the row above.
    """
    scale = config.active
    evaluation = scale.evaluation
    costs, titles = _costs(config), _titles(config)
    members: dict[tuple[str, str, str, str], list[str]] = {}
    for run in runs(config).values():
        key = (run.variant, run.task, run.prompts, run.backbone)
        members.setdefault(key, []).append(run.name)
    parts = {model: part for part, model in scale.backbones.items()}

    def common(model: str) -> dict[str, Any]:
        return {
            "part": parts.get(model, ""),
            "backbone": model,
            "full": _full_steps(evaluation, model),
            "iteration": None,
            "rule": False,
        }

    found = []
    for name in scale.experiments:
        experiment = config.experiments[name]
        few = experiment.nfe or (evaluation.few_nfe,)
        prompts = scale.prompts[_prompts_of(config, experiment)]
        rows: list[dict[str, Any]] = []
        for model in _untrained(scale, experiment):
            row = {
                **common(model),
                "variant": BASE,
                "task": "",
                "label": catalog.read()[model].title,
            }
            row["runs"] = members[BASE, "", prompts, model]
            if model in scale.models:
                rows.append({**row, "sampler": "pipeline", "nfe": row["full"]})
            elif experiment.base or experiment.kind == "correlation":
                first = row["full"] if experiment.kind == "scores" else evaluation.few_nfe
                for n in dict.fromkeys((first, evaluation.few_nfe)):
                    rows.append({**row, "sampler": "ode", "nfe": n})
        for part in experiment.backbones:
            backbone = scale.backbones[part]
            for number, (variant, task) in enumerate(_trained(scale, experiment)):
                label = experiment.labels.get(variant) or titles[variant]
                if len(experiment.tasks) > 1:
                    label = config.tasks[task].title or task
                if len(experiment.backbones) > 1:
                    facts = catalog.read()[backbone]
                    label = f"{label} + {facts.short or facts.title}"
                for n in few:
                    row = {**common(backbone), "variant": variant, "task": task, "nfe": n}
                    row |= {"label": label, "sampler": None}
                    row["rule"] = bool(rows) and number == 0 and n == few[0]
                    row["runs"] = members[variant, task, prompts, backbone]
                    if experiment.kind == "compute":
                        row["iteration"] = _iterations_at(config, costs, variant, 1.0)
                    rows.append(row)
        found.append(
            {
                "name": name,
                "kind": experiment.kind,
                "caption": experiment.caption,
                "header": experiment.header,
                "figures": experiment.figures,
                "reference": config.reference,
                "without": [name for name in experiment.methods if name in scale.without],
                "evaluation": {
                    "few": evaluation.few_nfe,
                    "curve": list(evaluation.curve_nfe),
                },
                "rows": rows,
            }
        )
    return found
