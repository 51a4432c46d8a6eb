"""Looks share one error rate: their levels are the published ones, and wrong verdicts stay rare."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from support import synthetic

from tafs.experiment.claims import Claim
from tafs.report import claims, decide, sequential, stats
from tafs.report.results import LoadedTable, Result, Scores, System
from tafs.report.sequential import Judge

LOOKS = (3, 6, 12)


def obrien_fleming(share: float, alpha: float) -> float:
    """The spending function of Lan and DeMets (1983), for each side half of the level."""
    return float(4 * ndtr(ndtri(alpha / 4) / np.sqrt(share)))


# Bounds for equal looks at 5 %, two-sided, as ldbounds and East print them.
@pytest.mark.parametrize(
    ("spending", "bounds"),
    [
        (sequential.pocock, [2.1570, 2.2010]),
        (sequential.pocock, [2.4380, 2.4268, 2.4101, 2.3966, 2.3859]),
        (obrien_fleming, [2.9626, 1.9686]),
        (obrien_fleming, [3.7103, 2.5114, 1.9930]),
        (obrien_fleming, [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]),
    ],
)
def test_the_bounds_of_equal_looks_are_the_published_ones(
    spending: sequential.Spending, bounds: list[float]
) -> None:
    shares = [(look + 1) / len(bounds) for look in range(len(bounds))]
    levels = np.array(sequential.levels(shares, 0.05, spending))
    assert -ndtri(levels / 2) == pytest.approx(bounds, abs=2e-3)


@given(st.sets(st.integers(2, 40), min_size=1, max_size=5))
def test_one_look_has_the_whole_level_and_more_looks_share_it(numbers: set[int]) -> None:
    seeds = sorted(numbers)
    levels = [sequential.level(seeds, look + 1) for look in range(len(seeds))]
    assert sequential.spent(seeds, len(seeds)) == pytest.approx(0.05)
    assert levels[0] == pytest.approx(sequential.spent(seeds, 1))
    assert max(levels) <= 0.05 + 1e-9 <= sum(levels) + 1e-8


@given(st.floats(1e-4, 0.9), st.integers(1, 3))
def test_a_p_value_decides_exactly_if_it_is_below_the_level_of_its_look(
    p: float, look: int
) -> None:
    judge, level = sequential.judge(LOOKS, look), sequential.level(LOOKS, look)
    assert judge.level == pytest.approx(1 - level)
    if abs(p - level) > 1e-9:
        assert (judge.overall(p) <= 0.05) == (p < level)
    # The level of the whole test at which it would decide, so more than the p-value itself.
    assert p <= judge.overall(p) * (1 + 1e-9)
    assert sequential.judge((8,), 1).overall(p) == pytest.approx(p, rel=1e-9)


PROMPTS = 40
TAFS, FLOW = {"method": "tafs_grpo", "nfe": 4}, {"method": "flow_grpo", "nfe": 4}
CLAIM = Claim.model_validate(
    {
        "id": "one",
        "claim": "c",
        "source": "s",
        "experiment": "table2",
        "better": {"row": TAFS, "than": [FLOW], "negligible": 0, "metrics": ["clip", "pickscore"]},
    }
)
ONE = CLAIM.model_copy(update={"better": CLAIM.better.model_copy(update={"metrics": ("clip",)})})
NEGLIGIBLE = 0.5  # sd of the prompts
EQUIVALENCE = ONE.model_copy(
    update={"better": ONE.better.model_copy(update={"negligible": NEGLIGIBLE})}
)


unread = functools.cache(Result)  # building a folder's paths takes longer than judging it


@dataclass
class Table:
    """A table of two methods whose runs are in memory."""

    template: LoadedTable

    def loaded(self, values: dict[str, dict[str, np.ndarray]], seeds: int) -> LoadedTable:
        """With the first seeds of `values[method][metric]`, [seeds, prompts]."""
        systems = {}
        for row, system in self.template.systems.items():
            found = []
            for seed in range(seeds):
                result = copy.copy(unread(f"{row.variant}-{seed}"))
                result.spec = system.spec
                result.scores = Scores(
                    file=Path("scores.parquet"),
                    prompts=tuple(range(PROMPTS)),
                    tags=("a",) * PROMPTS,
                    images=(0,),
                    values={
                        (row.sampler, row.nfe, metric, system.spec.iterations): all_[seed][:, None]
                        for metric, all_ in values[row.variant].items()
                    },
                )
                found.append(result)
            systems[row] = System(system.label, tuple(found))
        return LoadedTable(self.template.spec, systems)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    small: dict[str, Any] = {"prompts": 6, "images": 1, "iterations": 12, "nfe": (4,)}
    runs = synthetic.write_runs(tmp_path_factory.mktemp("runs"), seeds=1, **small)
    return Table(synthetic.loaded(runs[1:]))


def drawn(
    rng: np.random.Generator, gain: float, metrics: Sequence[str], of_prompts: float
) -> dict[str, dict[str, np.ndarray]]:
    """Scores of crossed seeds and prompts: seeds and methods share the prompts' difficulty."""
    found: dict[str, dict[str, np.ndarray]] = {"tafs_grpo": {}, "flow_grpo": {}}
    for metric in metrics:
        hard = rng.normal(size=PROMPTS)
        for method, values in found.items():
            own = of_prompts * rng.normal(size=PROMPTS)
            seeds = 0.3 * rng.normal(size=(LOOKS[-1], 1))
            rest = 0.4 * rng.normal(size=(LOOKS[-1], PROMPTS))
            mean = gain if method == "tafs_grpo" else 0.0
            values[metric] = mean + hard + own + seeds + rest
    return found


def decisions(
    table: Table,
    claim: Claim,
    *,
    gain: float = 0.0,
    of_prompts: float = 0.1,
    replicates: int,
) -> Iterator[decide.Record]:
    """The record of the claim after the last look, for independent draws."""
    assert claim.better is not None
    rng = np.random.default_rng(0)
    first = {"id": "one", "verdict": claims.UNDECIDED, "open": True}
    for _ in range(replicates):
        values = drawn(rng, gain, claim.better.metrics, of_prompts)
        records: Sequence[decide.Record] = [first]
        for look, seeds in enumerate(LOOKS, start=1):
            loaded = table.loaded(values, seeds)
            records = decide.judged(records, [claim], [loaded], LOOKS, look)
        yield records[0]


def uncorrected(seeds: Sequence[int], look: int) -> Judge:
    return Judge()


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As fast as a simulation needs."""
    whole = stats.paired_difference
    by = stats.Resampling(500)
    monkeypatch.setattr(stats, "paired_difference", lambda *a, **k: whole(*a, by=by, **k))


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("claim", "of_prompts", "judge", "least", "most"),
    [
        (ONE, 0.1, sequential.judge, 0.02, 0.07),  # three standard errors above 5 %
        (ONE, 0.5, sequential.judge, 0.02, 0.07),  # the prompts, which all looks share, decide
        (CLAIM, 0.1, sequential.judge, 0.0, 0.07),  # one of two metrics may contradict
        (ONE, 0.1, uncorrected, 0.075, 0.15),
    ],
)
def test_true_null_differences_are_decided_in_at_most_five_per_cent_of_cases(
    table: Table,
    monkeypatch: pytest.MonkeyPatch,
    claim: Claim,
    of_prompts: float,
    judge: Callable[[Sequence[int], int], Judge],
    least: float,
    most: float,
) -> None:
    monkeypatch.setattr(sequential, "judge", judge)
    found = decisions(table, claim, of_prompts=of_prompts, replicates=1000)
    wrong = np.mean([one["verdict"] != claims.UNDECIDED for one in found])
    assert least <= wrong <= most


@pytest.mark.usefixtures("few_resamples")
def test_an_advantage_that_matters_is_seldom_called_negligible_and_none_often_is(
    table: Table,
) -> None:
    # The standard deviation of the prompts is about 1. Each side has 2.5 %; the bounds are three
    # standard errors above.
    at_limit = decisions(table, EQUIVALENCE, gain=NEGLIGIBLE, replicates=400)
    assert np.mean([one["verdict"] == claims.NOT_REPRODUCED for one in at_limit]) <= 0.05
    none = list(decisions(table, EQUIVALENCE, replicates=200))
    verdicts = [one["verdict"] for one in none]
    assert verdicts.count(claims.REPRODUCED) / len(none) <= 0.06
    assert verdicts.count(claims.NOT_REPRODUCED) / len(none) > stats.POWER


@pytest.mark.usefixtures("few_resamples")
def test_a_real_effect_is_found_with_fewer_seeds_than_the_budget(table: Table) -> None:
    found = list(decisions(table, ONE, gain=0.6, replicates=200))
    assert np.mean([one["verdict"] == claims.REPRODUCED for one in found]) > 0.9
    assert np.mean([one["seeds"] for one in found]) < 0.75 * LOOKS[-1]
    for one in found:
        assert one["seeds"] == LOOKS[one["look"] - 1]
        assert one["level_spent"] == pytest.approx(sequential.spent(LOOKS, one["look"]), abs=1e-6)
        assert (one["open"], one["look"] == 3 or one["verdict"] != claims.UNDECIDED) == (
            False,
            True,
        )


def test_a_decided_claim_is_not_judged_again(table: Table) -> None:
    rng = np.random.default_rng(0)
    better, worse = (table.loaded(drawn(rng, gain, ("clip",), 0.1), 3) for gain in (5.0, -5.0))
    first: decide.Record = {"id": "one", "verdict": claims.UNDECIDED, "open": True}
    decided = decide.judged([first], [ONE], [better], LOOKS, 1)
    assert (decided[0]["verdict"], decided[0]["look"]) == (claims.REPRODUCED, 1)
    assert decide.judged(decided, [ONE], [worse], LOOKS, 2) == decided
    # Its intervals are those of the look's level, so wider than at 5 %.
    (found,), (plain,) = decided[0]["comparisons"], claims.assess_claim(ONE, better).comparisons
    assert found["low"] < plain.estimate.low < plain.estimate.high < found["high"]
