"""claims.yaml is checked with config.yaml: a mistake is one line, before anything runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tafs import experiment
from tafs.common.yaml_files import ConfigError
from tafs.experiment import claims

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "claims.yaml"


@pytest.mark.parametrize("scale", ["smoke", "shapes", "one-gpu", "paper"])
def test_the_shipped_claims_fit_the_tables_of_every_scale(scale: str) -> None:
    assert experiment.load({"scale": scale}, ROOT / "config.yaml").tables
    assert len(claims.read(SHIPPED)) > 3


def test_a_claim_knows_the_methods_and_metrics_that_it_compares() -> None:
    stated = {claim.id: claim for claim in claims.read(SHIPPED)}
    assert stated["training_time"].methods == {"tafs_grpo", "flow_grpo"}
    assert stated["step_distillation"].methods == {"tafs_grpo", "step_distillation"}
    assert len(stated["out_of_domain"].methods) == 6
    assert stated["correlation"].methods == set()
    assert stated["correlation"].metrics == {"pickscore", "clip"}
    assert stated["training_time"].metrics == set()


def text(experiment: str = "table2", **test: str) -> str:
    ((kind, value),) = test.items()
    return f"- {{id: x, claim: c, source: s, experiment: {experiment}, {kind}: {value}}}"


TWO = "row: {method: tafs_grpo}, than: [{method: flow_grpo}]"
GOOD = text(better=f"{{{TWO}, metrics: [clip]}}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: 1", "does not hold a list"),
        ("- {id: x}", "claim x: missing key 'claim'; add it"),
        (GOOD.replace("better", "bettr"), "claim x: unknown key 'bettr'; did you mean 'better'?"),
        (GOOD.replace("metrics", "metric"), "claim x: unknown key 'better.metric'; did you mean"),
        ("- {id: x, claim: c, source: s, experiment: t}", "claim x: tests nothing; give exactly o"),
        (f"{GOOD}\n{GOOD}", "claim x: its id is given twice; change one"),
        (GOOD.replace("table2", "tabel2"), "claim x: experiment: unknown table 'tabel2'; did you"),
        (GOOD.replace("clip", "clipp"), "claim x: better.metrics: unknown metric 'clipp'; did you"),
        (
            GOOD.replace("flow_grpo", "flow_gpo"),
            "claim x: better: table2 has no method 'flow_gpo'; did you mean 'flow_grpo'?",
        ),
        (
            GOOD.replace("flow_grpo}", "base, task: composition}"),
            "claim x: better: table2 has no task 'composition' (available: preference)",
        ),
        (
            GOOD.replace("flow_grpo}", "base, role: sd3}"),
            "claim x: better: table2 has no role 'sd3' (available: flux)",
        ),
        (
            GOOD.replace("flow_grpo", "base"),
            "claim x: better: 2 rows of table2 have method base; name one row of it",
        ),
        (
            GOOD.replace("flow_grpo}", "flow_grpo, nfe: 5}"),
            "claim x: better: 0 rows of table2 have method flow_grpo, nfe 5; name one row of it",
        ),
        # A table that the scale does not build is checked by names.
        (
            text("table3", better=f"{{{TWO}, metrics: [clip]}}"),
            "claim x: better: table3 has no method 'flow_grpo'; did you mean",
        ),
        (
            GOOD.replace("table2", "table7"),
            "claim x: better: can not be tested on a table of kind 'correlation', unlike table7",
        ),
        (
            text("table7", correlated="{step: 9, above: 0.5, metrics: [clip]}"),
            "claim x: correlated.step: 9 is above the trajectories' 4 steps (correlation_nfe)",
        ),
        (
            text("table2", correlated="{step: 2, above: 0.5, metrics: [clip]}"),
            "claim x: correlated: can only be tested on a table of kind 'correlation', unlike tab",
        ),
    ],
)
def test_a_mistake_in_the_claims_is_reported_in_one_line_before_anything_runs(
    tmp_path: Path, content: str, problem: str
) -> None:
    config = Path(shutil.copy(ROOT / "config.yaml", tmp_path))
    file = tmp_path / "claims.yaml"
    file.write_text(GOOD, encoding="utf-8")
    assert experiment.load({"scale": "smoke"}, config).runs
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        experiment.load({"scale": "smoke"}, config)
    assert str(caught.value).startswith(f"{file}: {problem}") and "\n" not in str(caught.value)


def test_a_claim_about_a_method_that_the_scale_leaves_out_is_not_refused() -> None:
    plan = experiment.load({"scale": "paper"}, ROOT / "config.yaml")
    (left_out,) = plan.config.active.exclude_methods
    assert any(left_out in claim.methods for claim in claims.read(SHIPPED))
