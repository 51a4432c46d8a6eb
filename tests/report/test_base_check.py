"""Trainings wait until the base models score as the paper prints."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from support import synthetic

from tafs import experiment
from tafs.common.errors import RunFailed
from tafs.experiment.specs import BaseCheckSpec
from tafs.orchestration.graph import Graph, Job
from tafs.report import base_check
from tafs.rewards.metrics import METRICS

# FLUX.1-dev in Table 2.
PUBLISHED = {
    "pickscore": 21.68,
    "clip": 25.95,
    "hpsv2": 0.280,
    "imagereward": 0.848,
    "unifiedreward": 3.328,
}
SHIPPED = Path(__file__).resolve().parents[2] / "config.yaml"


@pytest.fixture
def spec(own_runs: list[Path]) -> BaseCheckSpec:
    """A base model whose CLIP is as published, and whose PickScore is 10 % below."""
    table = synthetic.table_spec(own_runs[:1])
    rows = [row for row in table.rows if row.nfe == row.full_steps]
    rows = [row.model_copy(update={"label": "FLUX.1-dev"}) for row in rows]

    def as_published(found: pd.DataFrame) -> pd.DataFrame:
        for metric, value in PUBLISHED.items():
            of_it = found["metric"] == metric
            wanted = (0.9 if metric == "pickscore" else 1.0) * value / METRICS[metric].factor
            ours = found.loc[of_it & (found["nfe"] == rows[0].nfe), "value"]
            found.loc[of_it, "value"] += wanted - ours.mean()
        return found

    synthetic.change_scores(own_runs[0], as_published)
    table = table.model_copy(update={"rows": tuple(rows)})
    return BaseCheckSpec(within=0.03, accepted=(), tables=(table,))


def test_a_base_model_that_scores_otherwise_stops_the_trainings_by_name(
    spec: BaseCheckSpec, tmp_path: Path
) -> None:
    with pytest.raises(RunFailed) as caught:
        base_check.check(tmp_path, spec)
    assert "shapes-sd3: PickScore 19.51, published 21.68 (table2)" in str(caught.value)
    assert "CLIP" not in str(caught.value) and "accept_base: [shapes-sd3]" in str(caught.value)
    assert not (tmp_path / "base_check.json").exists()


@pytest.mark.parametrize("changes", [{"accepted": ("shapes-sd3",)}, {"within": 0.11}])
def test_a_model_passes_that_is_accepted_or_near_enough(
    spec: BaseCheckSpec, tmp_path: Path, changes: dict[str, object]
) -> None:
    base_check.check(tmp_path, spec.model_copy(update=changes))
    found = json.loads((tmp_path / "base_check.json").read_text())
    by_metric = {one["metric"]: one for one in found["values"]}
    assert by_metric["CLIP"]["agrees"] and by_metric["CLIP"]["published"] == PUBLISHED["clip"]
    assert by_metric["PickScore"]["value"] == pytest.approx(0.9 * PUBLISHED["pickscore"])
    assert by_metric["PickScore"]["agrees"] == ("within" in changes)


def test_every_training_of_the_papers_scale_waits_for_the_check_of_all_base_models() -> None:
    graph = Graph(experiment.load({"scale": "paper"}, SHIPPED))
    assert graph.plan.base_check is not None
    bases = {"base.pickapic.flux-dev", "base.geneval.flux-dev", "base.geneval.sd35-medium"}
    assert set(graph.plan.base_check.runs) == bases
    trainings = [job for job in graph.jobs() if job.rule == "train"]
    assert trainings and all(Job("check_base") in graph.inputs(job) for job in trainings)
    judged = {job.target for job in graph.inputs(Job("check_base"))}
    assert judged == bases
    assert Graph(experiment.load({"scale": "paper-trial"}, SHIPPED)).base_check == []
