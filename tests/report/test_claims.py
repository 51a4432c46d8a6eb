"""Claims get the verdict that their intervals carry, and no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel
from support import synthetic

from tafs.common import yaml_files
from tafs.experiment import runs as runs_
from tafs.experiment import tables, validate
from tafs.report import claims
from tafs.report.results import read_results
from tafs.rewards.metrics import METRICS
from tafs.runtime import run_dir

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"prompts": 36, "images": 2, "iterations": 12, "nfe": (4, 8)}
TAFS, FLOW = {"method": "tafs_grpo", "nfe": 4}, {"method": "flow_grpo", "nfe": 4}
BASE = {"method": "base", "nfe": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthetic.write_runs(tmp_path_factory.mktemp("runs"), seeds=3, **SMALL)


def verdict(runs: list[Path], spec: dict[str, Any] | None = None, **test: Any) -> claims.Verdict:
    claim = claims.Claim.model_validate(
        {"id": "one", "claim": "c", "source": "s", "experiment": "table2", **test}
    )
    spec = spec or synthetic.table2(runs, few=(4, 8))
    return claims.assess_claim(claim, spec, read_results(runs))


def test_the_shipped_claims_are_read_and_name_known_metrics_and_experiments() -> None:
    settings = validate.read(ROOT / "config.yaml")
    stated = claims.read(ROOT / "claims.yaml")
    assert len({claim.id for claim in stated}) == len(stated) > 3
    assert {claim.experiment for claim in stated} <= set(settings.experiments)
    tested = [getattr(claim, kind) for claim in stated for kind in claims.KINDS]
    named = {metric for test in tested for metric in getattr(test, "metrics", ())}
    assert named <= set(METRICS)


def row_names(value: Any) -> Iterator[claims.RowName]:
    """Every row that a claim names, wherever it stands."""
    if isinstance(value, claims.RowName):
        yield value
    elif isinstance(value, claims.Correlated):
        yield claims.RowName(method=run_dir.BASE, backbone=value.backbone)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from row_names(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from row_names(item)


def test_every_row_of_the_shipped_claims_is_one_of_its_table() -> None:
    settings = validate.read(ROOT / "config.yaml", {"scale": "shapes"})
    specs = {spec["name"]: spec for spec in tables.tables(settings)}
    runs = [SimpleNamespace(info={"name": name}) for name in runs_.runs(settings)]
    for claim in claims.read(ROOT / "claims.yaml"):
        table = claims._Rows(claim, specs[claim.experiment], runs)  # type: ignore[arg-type]
        names = list(row_names(claim))
        assert names
        for name in names:
            assert table.system(name)[1]["variant"] == name.method


def test_one_seed_decides_nothing(runs: list[Path]) -> None:
    """However clear the difference: how much another seed would change is not known."""
    better = {"row": TAFS, "than": [BASE], "metrics": ["pickscore"]}
    single = [run for run in runs if run.name.endswith("-0")]
    assert verdict(single, better=better).verdict == claims.UNDECIDED
    assert verdict(single, better={**better, "row": BASE, "than": [TAFS]}).verdict == (
        claims.UNDECIDED
    )
    assert verdict(runs, better=better).verdict == claims.REPRODUCED


def test_a_clear_gain_is_reproduced_and_its_reverse_is_not(runs: list[Path]) -> None:
    metrics = ["pickscore", "clip"]
    assert verdict(runs, better={"row": TAFS, "than": [BASE], "metrics": metrics}).verdict == (
        claims.REPRODUCED
    )
    assert verdict(runs, better={"row": BASE, "than": [TAFS], "metrics": metrics}).verdict == (
        claims.NOT_REPRODUCED
    )


def test_a_model_is_neither_better_nor_worse_than_itself(runs: list[Path]) -> None:
    found = verdict(runs, better={"row": TAFS, "than": [TAFS], "metrics": ["clip"]})
    assert found.verdict == claims.UNDECIDED
    assert found.comparisons[0].estimate.value == 0


def test_one_contradiction_is_enough(runs: list[Path]) -> None:
    found = verdict(runs, rising={"rows": [BASE, TAFS, BASE], "metrics": ["pickscore"]})
    assert [c.sign for c in found.comparisons] == [1, -1]
    assert found.verdict == claims.NOT_REPRODUCED


@pytest.mark.parametrize(
    ("margin", "expected"), [(5.0, claims.REPRODUCED), (1e-6, claims.NOT_REPRODUCED)]
)
def test_quality_holds_within_its_margin(runs: list[Path], margin: float, expected: str) -> None:
    found = verdict(
        runs, holds={"row": BASE, "than": TAFS, "metrics": ["pickscore"], "margin": margin}
    )
    assert found.verdict == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [(2.2 / 4.6, claims.REPRODUCED), (0.2, claims.NOT_REPRODUCED)],
)
def test_a_share_of_the_iteration_time_is_compared_with_the_published_one(
    runs: list[Path], share: float, expected: str
) -> None:
    found = verdict(runs, faster={"row": TAFS, "than": FLOW, "share": share, "within": 0.1})
    assert found.comparisons[0].estimate.value == pytest.approx(2.2 / 4.6, rel=0.05)
    assert found.verdict == expected


def test_p_values_are_adjusted_for_the_claims_own_comparisons(runs: list[Path]) -> None:
    one = verdict(runs, better={"row": TAFS, "than": [FLOW], "metrics": ["clip"]})
    two = verdict(runs, better={"row": TAFS, "than": [FLOW, FLOW], "metrics": ["clip"]})
    raw = one.comparisons[0].p_value
    assert two.comparisons[0].p_value == pytest.approx(min(1, 2 * raw))


@pytest.mark.parametrize(
    ("test", "problem"),
    [
        ({"better": {"row": {"method": "tafs"}, "than": [FLOW], "metrics": ["clip"]}}, "0 rows"),
        (
            {"better": {"row": {"method": "tafs_grpo"}, "than": [FLOW], "metrics": ["clip"]}},
            "2 rows",
        ),
        ({"better": {"row": TAFS, "than": [FLOW], "metrics": ["clipp"]}}, "unknown metric 'clipp'"),
    ],
)
def test_a_claim_about_what_is_not_there_is_refused_by_name(
    runs: list[Path], test: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"claim one: {problem}"):
        verdict(runs, **test)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1", "holds no list"),
        ("- {id: x}", "claim x: missing key 'claim'"),
        (
            "- {id: x, claim: c, source: s, experiment: t, bettr: {}}",
            "claim x: unknown key 'bettr'",
        ),
        ("- {id: x, claim: c, source: s, experiment: t}", "claim x: tests nothing"),
    ],
)
def test_a_mistake_in_the_claims_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "claims.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(yaml_files.ConfigError, match=problem) as caught:
        claims.read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_verdicts_are_written_for_people_and_machines(runs: list[Path], tmp_path: Path) -> None:
    found = verdict(runs, better={"row": TAFS, "than": [BASE], "metrics": ["clip"]})
    claims.write([found], "shapes", tmp_path)
    assert "**reproduced**" in (tmp_path / "claims.md").read_text(encoding="utf-8")
    (record,) = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert (record["verdict"], record["comparisons"][0]["supports"]) == ("reproduced", 1)
    assert record["comparisons"][0]["n_seeds"] == 3  # of the trained side: the other has none


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "meant"), [("few", 4), ("full", 28)])
def test_few_and_full_are_the_scales_steps(runs: list[Path], said: str, meant: int) -> None:
    test = {"row": TAFS, "metrics": ["clip"]}
    by_word = verdict(runs, better={**test, "than": [{"method": "base", "nfe": said}]})
    by_number = verdict(runs, better={**test, "than": [{"method": "base", "nfe": meant}]})
    assert by_word.comparisons == by_number.comparisons
    assert (
        by_word.comparisons[0].what == f"CLIP: TAFS-GRPO at 4 steps - shapes-sd3 at {meant} steps"
    )


def test_a_claim_tells_the_methods_that_it_compares() -> None:
    stated = {claim.id: claim for claim in claims.read(ROOT / "claims.yaml")}
    assert stated["training_time"].methods == {"tafs_grpo", "flow_grpo"}
    assert stated["step_distillation"].methods == {"tafs_grpo", "step_distillation"}
    assert len(stated["out_of_domain"].methods) == 6
    assert stated["correlation"].methods == set()


def test_a_backbone_is_the_part_that_it_plays(runs: list[Path]) -> None:
    base = {**BASE, "backbone": "sd3"}
    found = verdict(runs, better={"row": TAFS, "than": [base], "metrics": ["clip"]})
    assert found.verdict == claims.REPRODUCED
    test = {"row": TAFS, "than": [{**BASE, "backbone": "shapes-sd3"}], "metrics": ["clip"]}
    with pytest.raises(ValueError, match="0 rows of table2 have nfe 4, .* part shapes-sd3"):
        verdict(runs, better=test)


def test_a_row_of_equal_compute_is_judged_by_its_snapshot(runs: list[Path]) -> None:
    spec = synthetic.table2(runs, kind="compute")
    test = {"row": {"method": "tafs_grpo"}, "than": [{"method": "flow_grpo"}], "metrics": ["clip"]}
    (found,) = verdict(runs, spec, better=test).comparisons
    # Twelve iterations of 13 evaluations pay for five of 28.
    assert found.what.endswith("Flow-GRPO at 4 steps after 5 iterations")
    scores = pd.concat(pd.read_parquet(run / "scores.parquet") for run in runs)
    scores = scores[(scores["metric"] == "clip") & (scores["nfe"] == 4)]
    means = scores.groupby(["method", "iteration"], observed=True)["value"].mean()
    difference = means["tafs_grpo", 12] - means["flow_grpo", 5]
    assert found.estimate.value == pytest.approx(difference)


@pytest.mark.parametrize(
    ("row", "than", "seeds"), [(TAFS, BASE, 3), (BASE, TAFS, 3), (TAFS, FLOW, 3), (BASE, BASE, 1)]
)
def test_a_base_model_has_no_seeds_to_count(
    runs: list[Path], row: dict[str, Any], than: dict[str, Any], seeds: int
) -> None:
    (found,) = verdict(runs, better={"row": row, "than": [than], "metrics": ["clip"]}).comparisons
    assert found.estimate.n_seeds == seeds


# -- correlations ----------------------------------------------------------------------------------


def correlated(r: float, prompts: int = 100) -> pd.DataFrame:
    """Rewards of the images 2 and 4 whose correlation over the prompts is r, exactly."""
    rng = np.random.default_rng(0)
    last = rng.normal(size=prompts)
    last = (last - last.mean()) / last.std()
    other = rng.normal(size=prompts)
    other -= other.mean() + (other @ last) / prompts * last
    early = r * last + np.sqrt(1 - r * r) * other / other.std()
    index = {"prompt": np.tile(np.arange(prompts), 2), "step": np.repeat([2, 4], prompts)}
    return pd.DataFrame({**index, "metric": "clip", "value": np.concatenate([early, last])})


def judge_correlation(runs: list[Path], **test: Any) -> claims.Verdict:
    spec = synthetic.table2(runs, kind="correlation", name="table7")
    return verdict(runs, spec, correlated={"step": 2, "metrics": ["clip"], **test})


@pytest.mark.parametrize(
    ("r", "expected", "sign"),
    [
        (0.9, claims.REPRODUCED, 1),  # the whole interval lies above 0.65
        (0.2, claims.NOT_REPRODUCED, -1),  # below
        (0.66, claims.UNDECIDED, 0),  # on both sides, although r is above
    ],
)
def test_a_correlation_is_judged_by_its_interval(
    tmp_path: Path, r: float, expected: str, sign: int
) -> None:
    base = synthetic.write_run(tmp_path, "base", **SMALL)
    correlated(r).to_parquet(base / "trajectory_rewards.parquet")
    found = judge_correlation([base], above=0.65)
    assert found.verdict == expected
    (comparison,) = found.comparisons
    assert comparison.estimate.value == pytest.approx(r)
    assert (comparison.sign, comparison.estimate.n_images) == (sign, 100)
    assert comparison.what == "CLIP: r of image 2 with the last (above 0.65)"


def test_every_metric_must_correlate(runs: list[Path], tmp_path: Path) -> None:
    base = synthetic.write_run(tmp_path, "base", **SMALL)
    weak = correlated(0.2).assign(metric="pickscore")
    pd.concat([correlated(0.9), weak]).to_parquet(base / "trajectory_rewards.parquet")
    found = judge_correlation([base], above=0.65, metrics=["clip", "pickscore"])
    assert [c.sign for c in found.comparisons] == [1, -1]
    assert found.verdict == claims.NOT_REPRODUCED


@pytest.mark.parametrize(
    ("test", "problem"),
    [
        ({"step": 5}, "base-0/trajectory_rewards.parquet: no clip of step 5"),
        ({"metrics": ["clipp"]}, "base-0/trajectory_rewards.parquet: no clipp of step 2"),
        ({"backbone": "flux"}, "claim one: 0 rows of table2 have variant base, part flux"),
    ],
)
def test_a_correlation_that_is_not_there_is_refused_by_name(
    runs: list[Path], test: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        judge_correlation(runs, above=0.5, **test)


def test_a_correlation_without_its_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    base = synthetic.write_run(tmp_path, "base", **SMALL)
    (base / "trajectory_rewards.parquet").unlink()
    with pytest.raises(ValueError, match="base-0/trajectory_rewards.parquet: not found") as caught:
        judge_correlation([base], above=0.5)
    assert "\n" not in str(caught.value)
