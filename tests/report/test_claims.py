"""A claim gets the verdict that its intervals support."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support import synthetic

from tafs.experiment.claims import Claim
from tafs.report import claims, stats
from tafs.report.claims import NOT_REPRODUCED, REPRODUCED, UNDECIDED
from tafs.report.tables import Row

SMALL: dict[str, Any] = {"prompts": 36, "images": 2, "iterations": 12, "nfe": (4, 8)}
TAFS, FLOW = {"method": "tafs_grpo", "nfe": 4}, {"method": "flow_grpo", "nfe": 4}
UNTRAINED = {"method": "base", "nfe": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthetic.write_runs(tmp_path_factory.mktemp("runs"), seeds=3, **SMALL)


def assess(runs: list[Path], options: dict[str, Any] | None = None, **test: Any) -> claims.Verdict:
    """The verdict on a claim about the table of `synthetic.loaded(runs, **options)`."""
    claim = Claim.model_validate(
        {"id": "one", "claim": "c", "source": "s", "experiment": "table2", **test}
    )
    return claims.assess_claim(claim, synthetic.loaded(runs, **(options or {"few": (4, 8)})))


def better(row: dict[str, Any], *than: dict[str, Any], metrics: Any = ("clip",)) -> dict[str, Any]:
    return {"row": row, "than": list(than), "metrics": list(metrics)}


BOTH, ONE = {"metrics": ["pickscore", "clip"]}, {"metrics": ["pickscore"]}
FASTER = {"row": TAFS, "than": FLOW, "within": 0.1}


@pytest.mark.parametrize(
    ("kind", "test", "signs", "expected"),
    [
        ("better", {"row": TAFS, "than": [UNTRAINED], **BOTH}, [1, 1], REPRODUCED),
        ("better", {"row": UNTRAINED, "than": [TAFS], **BOTH}, [-1, -1], NOT_REPRODUCED),
        ("better", {"row": TAFS, "than": [TAFS], **ONE}, [-1], NOT_REPRODUCED),
        ("better", {"row": TAFS, "than": [TAFS], "negligible": 0, **ONE}, [0], UNDECIDED),
        # One contradiction is enough.
        ("rising", {"rows": [UNTRAINED, TAFS, UNTRAINED], **ONE}, [1, -1], NOT_REPRODUCED),
        ("holds", {"row": UNTRAINED, "than": TAFS, "margin": 5, **ONE}, [1], REPRODUCED),
        ("holds", {"row": UNTRAINED, "than": TAFS, "margin": 1e-6, **ONE}, [-1], NOT_REPRODUCED),
        ("faster", {"share": 2.2 / 4.6, **FASTER}, [1], REPRODUCED),
        ("faster", {"share": 0.2, **FASTER}, [-1], NOT_REPRODUCED),
    ],
)
def test_verdicts_follow_the_signs_of_the_comparisons(
    runs: list[Path], kind: str, test: dict[str, Any], signs: list[int], expected: str
) -> None:
    found = assess(runs, **{kind: test})
    assert [comparison.sign for comparison in found.comparisons] == signs
    assert found.verdict == expected
    if kind == "better":  # however clear: with one seed, the effect of another is unknown
        single = [run for run in runs if run.name.endswith("-0")]
        assert assess(single, **{kind: test}).verdict == UNDECIDED


def test_p_values_are_adjusted_for_the_claims_own_comparisons(runs: list[Path]) -> None:
    (one,) = assess(runs, better=better(TAFS, FLOW)).comparisons
    two, _ = assess(runs, better=better(TAFS, FLOW, FLOW)).comparisons
    assert two.p_adjusted == pytest.approx(min(1, 2 * one.p_adjusted))


@pytest.mark.parametrize(
    ("p_values", "value", "expected"),
    [
        ((0.04, 0.04), 1.0, REPRODUCED),  # each holds, so all of them hold
        ((0.04, 0.06), 1.0, UNDECIDED),
        ((0.04, 0.04), -1.0, UNDECIDED),  # one of two is wrong by chance more often than one
        ((0.02, 0.5), -1.0, NOT_REPRODUCED),
    ],
)
@pytest.mark.parametrize("negligible", [0, 0.1])
def test_support_needs_every_comparison_and_contradiction_a_corrected_one(
    runs: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    p_values: tuple[float, ...],
    value: float,
    expected: str,
    negligible: float,
) -> None:
    # Of each pair, the difference and what it exceeds the negligible one by.
    found = iter([p for p in p_values for _ in range(2)])

    def difference(*_: Any, **__: Any) -> stats.Estimate:
        return stats.NOTHING._replace(value=value, p_value=next(found))

    monkeypatch.setattr(stats, "paired_difference", difference)
    test = {**better(TAFS, FLOW, FLOW), "negligible": negligible}
    assert assess(runs, better=test).verdict == expected


def test_an_advantage_is_contradicted_if_it_is_shown_to_be_negligible(runs: list[Path]) -> None:
    # An advantage above 0 supports the claim, however much would count as none.
    test = {**better(TAFS, UNTRAINED), "negligible": 100}
    assert [c.sign for c in assess(runs, better=test).comparisons] == [1]
    (reverse,) = assess(runs, better=better(UNTRAINED, TAFS)).comparisons
    assert (reverse.sign, reverse.is_negligible) == (-1, False)
    (same,) = assess(runs, better=better(TAFS, TAFS)).comparisons
    assert (same.sign, same.is_negligible, same.estimate.value) == (-1, True, 0)
    loaded = synthetic.loaded(runs, few=(4, 8))
    trained = next(row for row in loaded.systems if (row.variant, row.nfe) == ("tafs_grpo", 4))
    sd = np.std(Row(trained, loaded.systems[trained]).quality("clip").mean((0, 2)))
    assert same.excess is not None
    assert same.excess.value == pytest.approx(-0.1 * sd)


def test_times_of_the_embedded_models_are_not_tested(runs: list[Path]) -> None:
    test = {"faster": {"share": 0.5, **FASTER}}
    claim = Claim.model_validate(
        {"id": "one", "claim": "c", "source": "s", "experiment": "table2", **test}
    )
    assert not claims.is_testable(claim, synthetic.loaded(runs))
    hub = synthetic.ASSETS.model_copy(update={"assets": "hub"})
    loaded = synthetic.loaded(runs)
    for result in loaded.results:
        result.spec = result.spec.model_copy(update={"assets": hub})
    assert claims.is_testable(claim, loaded)


def test_an_open_comparison_says_what_would_decide_it(runs: list[Path], tmp_path: Path) -> None:
    found = assess(runs, better=better(TAFS, TAFS))
    (comparison,) = found.comparisons
    assert comparison.power == {"half_width": 0, "detectable": 0, "seeds_to_show": 2}
    single = [run for run in runs if run.name.endswith("-0")]
    one = assess(single, better=better(TAFS, FLOW))
    assert one.comparisons[0].needed == "two seeds are the least"
    assert one.comparisons[0].power["detectable"] is None
    claims.write([one], "shapes", tmp_path)
    assert "| two seeds are the least |" in (tmp_path / "claims.md").read_text(encoding="utf-8")
    (record,) = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert record["comparisons"][0]["needed"] == "two seeds are the least"
    assert record["comparisons"][0]["half_width"] > 0


@pytest.mark.parametrize(
    ("row", "than", "seeds"),
    [(TAFS, UNTRAINED, 3), (UNTRAINED, TAFS, 3), (TAFS, FLOW, 3), (UNTRAINED, UNTRAINED, 1)],
)
def test_seeds_of_base_models_are_not_counted(
    runs: list[Path], row: dict[str, Any], than: dict[str, Any], seeds: int
) -> None:
    (found,) = assess(runs, better=better(row, than)).comparisons
    assert found.estimate.n_seeds == seeds


@pytest.mark.parametrize(("said", "meant"), [("few", 4), ("full", 28)])
def test_few_and_full_are_the_steps_of_the_scale(runs: list[Path], said: str, meant: int) -> None:
    by_word = assess(runs, better=better(TAFS, {"method": "base", "nfe": said}))
    by_number = assess(runs, better=better(TAFS, {"method": "base", "nfe": meant}))
    assert by_word.comparisons == by_number.comparisons
    expected = f"CLIP: TAFS-GRPO at 4 steps - shapes-sd3 at {meant} steps"
    assert by_word.comparisons[0].what == expected


def test_a_row_of_equal_compute_is_a_snapshot(runs: list[Path]) -> None:
    test = better({"method": "tafs_grpo"}, {"method": "flow_grpo"})
    (found,) = assess(runs, {"kind": "compute"}, better=test).comparisons
    # Twelve iterations of 13 evaluations pay for five of 28.
    assert found.what.endswith("Flow-GRPO at 4 steps after 5 iterations")
    scores = pd.concat(pd.read_parquet(run / "scores.parquet") for run in runs)
    scores = scores[(scores["metric"] == "clip") & (scores["nfe"] == 4)]
    means = scores.groupby(["method", "iteration"], observed=True)["value"].mean()
    difference = means["tafs_grpo", 12] - means["flow_grpo", 5]
    assert found.estimate.value == pytest.approx(difference)


@pytest.mark.parametrize(
    ("test", "problem"),
    [
        (better({"method": "tafs"}, FLOW), "0 rows of table2 have method tafs"),
        (better({"method": "tafs_grpo"}, FLOW), "2 rows of table2 have method tafs_grpo"),
        (
            better(TAFS, {**UNTRAINED, "role": "flux"}),
            "0 rows of table2 have method base, role flux",
        ),
    ],
)
def test_a_claim_about_an_unknown_row_is_refused_by_name(
    runs: list[Path], test: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"claim one: {problem}"):
        assess(runs, better=test)
    assert assess(runs, better=better(TAFS, {**UNTRAINED, "role": "sd3"})).verdict == REPRODUCED


def rewards(r: float, metric: str = "clip", prompts: int = 100) -> pd.DataFrame:
    """Rewards of the images 2 and 4 with a correlation over the prompts of exactly r."""
    rng = np.random.default_rng(0)
    last = rng.normal(size=prompts)
    last = (last - last.mean()) / last.std()
    other = rng.normal(size=prompts)
    other -= other.mean() + (other @ last) / prompts * last
    early = r * last + np.sqrt(1 - r * r) * other / other.std()
    index = {"prompt": np.tile(np.arange(prompts), 2), "step": np.repeat([2, 4], prompts)}
    return pd.DataFrame({**index, "metric": metric, "value": np.concatenate([early, last])})


def assess_correlation(runs: list[Path], **test: Any) -> claims.Verdict:
    test = {"step": 2, "above": 0.65, "metrics": ["clip"], **test}
    return assess(runs, {"kind": "correlation"}, correlated=test)


@pytest.mark.parametrize(
    ("r", "signs", "expected"),
    [
        ((0.9,), [1], REPRODUCED),  # the whole interval is above 0.65
        ((0.2,), [-1], NOT_REPRODUCED),  # below
        ((0.66,), [0], UNDECIDED),  # on both sides, although r is above
        ((0.9, 0.2), [1, -1], NOT_REPRODUCED),  # of two metrics
    ],
)
def test_a_correlation_is_assessed_by_its_interval(
    tmp_path: Path, r: tuple[float, ...], signs: list[int], expected: str
) -> None:
    base = synthetic.write_run(tmp_path, "base", **SMALL)
    metrics = ["clip", "pickscore"][: len(r)]
    measured = pd.concat([rewards(*pair) for pair in zip(r, metrics, strict=True)])
    measured.to_parquet(base / "trajectory_rewards.parquet")
    found = assess_correlation([base], metrics=metrics)
    assert [comparison.sign for comparison in found.comparisons] == signs
    assert found.verdict == expected
    first = found.comparisons[0]
    assert first.estimate.value == pytest.approx(r[0])
    assert first.what == "CLIP: r of image 2 with the last (above 0.65)"


@pytest.mark.parametrize(
    ("test", "problem"),
    [
        ({"step": 5}, "base-0/trajectory_rewards.parquet: no clip of step 5"),
        ({"metrics": ["hpsv3"]}, "base-0/trajectory_rewards.parquet: no hpsv3 of step 2"),
        ({"role": "flux"}, "claim one: 0 rows of table2 have method base, role flux"),
    ],
)
def test_a_correlation_that_was_not_measured_is_refused_by_name(
    runs: list[Path], test: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        assess_correlation(runs, **test)


def test_verdicts_are_written_for_people_and_for_machines(runs: list[Path], tmp_path: Path) -> None:
    found = assess(runs, better=better(TAFS, UNTRAINED))
    found = found._replace(claim=found.claim.model_copy(update={"claim": "a | *b*"}))
    claims.write([found], "shapes", tmp_path)
    text = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert r"| a \| \*b\* | s | **reproduced** | CLIP: TAFS-GRPO at 4 steps - " in text
    (record,) = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert (record["verdict"], record["comparisons"][0]["supports"]) == ("reproduced", 1)
    assert record["comparisons"][0]["n_seeds"] == 3  # of the trained models
    claims.write([found], "paper", tmp_path, ["flux-dev"])
    text = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert "RANDOM WEIGHTS: flux-dev. These verdicts mean nothing." in text
    (record,) = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert record["random_weights"] == ["flux-dev"]
