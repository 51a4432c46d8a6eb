"""evaluations."""

from __future__ import annotations

from typing import Any

from tafs.experiment.runs import _full_steps, _images_per_prompt, runs, weights_of
from tafs.experiment.schema import Config
from tafs.experiment.tables import tables


def evaluations(config: Config) -> dict[str, dict[str, Any]]:
    """How each run is judged, as plain data: what evaluation.json holds.

    `settings` lists {sampler, nfe, images_per_prompt, iteration}; iteration None is the final
    model. A run is judged at the steps of every table that it stands in; the curves' points
    are judged on fewer images, since they only draw a line.
    """
    evaluation = config.active.evaluation
    served = evaluation.server
    found: dict[str, dict[tuple[str, int, int | None], int]] = {}
    all_runs = runs(config)
    described = {name: run.describe() for name, run in all_runs.items()}
    for table in tables(config):
        few = table["evaluation"]["few"]
        images = _images_per_prompt(config, config.experiments[table["name"]])
        for row in table["rows"] if table["kind"] != "correlation" else ():
            for name in row["runs"]:
                run = all_runs[name]
                wanted = found.setdefault(name, {})
                own = str(row["sampler"] or described[name]["sampler"])
                if "steps" in table["figures"] or "pareto" in table["figures"]:
                    for n in evaluation.curve_nfe:
                        wanted.setdefault((own, n, None), evaluation.curve_images_per_prompt)
                if "compute" in table["figures"]:
                    for iteration in run.snapshots:
                        wanted.setdefault((own, few, iteration), evaluation.curve_images_per_prompt)
                    wanted[own, few, None] = images
                kept = row["iteration"] if row["iteration"] in run.snapshots else None
                wanted[own, row["nfe"], kept] = images
    from tafs.assets import sources
    from tafs.rewards.metrics import SERVED

    settings = config.active.model_dump(mode="json")
    measured = {
        run.prompts: (*sources.of(settings).metrics(run.prompts), *([SERVED] if served else []))
        for run in all_runs.values()
    }
    return {
        name: {
            **weights_of(settings, measured[all_runs[name].prompts]),
            "prompts": evaluation.prompts,
            "batch": evaluation.batch,
            "full": _full_steps(evaluation, all_runs[name].backbone),
            "resolution": evaluation.resolution or config.active.resolution,
            "server": bool(served),
            "correlation": {
                "nfe": evaluation.few_nfe,
                "prompts": evaluation.correlation_prompts,
            },
            "settings": [
                {"sampler": sampler, "nfe": n, "iteration": iteration, "images_per_prompt": count}
                for (sampler, n, iteration), count in sorted(
                    found.get(name, {}).items(), key=lambda item: (item[0][2] or 0, item[0][:2])
                )
            ],
        }
        for name in all_runs
    }
