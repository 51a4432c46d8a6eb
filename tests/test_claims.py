"""Claims get the verdict that their intervals carry, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic

from tafs import claims, config, tables

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"prompts": 36, "images": 2, "iterations": 12, "nfe": (4, 8)}
TAFS, FLOW = {"method": "tafs_grpo", "nfe": 4}, {"method": "flow_grpo", "nfe": 4}
BASE = {"method": "base", "nfe": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthetic.write_runs(tmp_path_factory.mktemp("runs"), seeds=3, **SMALL)


def verdict(runs: list[Path], **test: Any) -> claims.Verdict:
    claim = claims.Claim.model_validate(
        {"id": "one", "claim": "c", "source": "s", "experiment": "table2", **test}
    )
    spec = synthetic.table2(runs, few=(4, 8))
    for row in spec["rows"]:
        row["runs"] = [r.name for r in runs if r.name.startswith(row["variant"])]
    return claims.judge(claim, spec, tables.read_results(runs))


def test_the_shipped_claims_are_read_and_name_known_metrics_and_experiments() -> None:
    settings = config.read(ROOT / "config.yaml")
    stated = claims.read(ROOT / "claims.yaml")
    assert len({claim.id for claim in stated}) == len(stated) > 3
    assert {claim.experiment for claim in stated} <= set(settings.experiments)


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
    with pytest.raises(config.ConfigError, match=problem) as caught:
        claims.read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_verdicts_are_written_for_people_and_machines(runs: list[Path], tmp_path: Path) -> None:
    found = verdict(runs, better={"row": TAFS, "than": [BASE], "metrics": ["clip"]})
    claims.write([found], "shapes", tmp_path)
    assert "**reproduced**" in (tmp_path / "claims.md").read_text(encoding="utf-8")
    (record,) = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert (record["verdict"], record["comparisons"][0]["supports"]) == ("reproduced", 1)
    assert record["comparisons"][0]["n_seeds"] == 1
