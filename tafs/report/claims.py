"""The verdicts on the paper's claims (tafs/experiment/claims.py) from the runs of tables.

A claim is a family of comparisons, each with an effect and an interval. It is reproduced if every
comparison supports it at 5 %, which needs no correction for their number (an intersection-union
test; Berger, 1982). It is not reproduced if one contradicts it at 5 % after Holm's correction for
their number (1979): an advantage that is claimed is contradicted by the reverse and by one that
is shown to be negligible (an equivalence test; Schuirmann, 1987). Otherwise it is undecided, and
`Comparison` says what would decide it. Models trained with one seed decide nothing, because the
effect of another seed is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tafs.experiment.claims import Claim, Correlated, Differences, Faster, Predicate, RowName
from tafs.report import stats
from tafs.report.formats import markdown
from tafs.report.results import LoadedTable, check_paired, step_correlation
from tafs.report.sequential import ONCE, Judge
from tafs.report.stats import Estimate
from tafs.report.tables import Row
from tafs.rewards.metrics import METRICS

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"
NOT_TESTED = "not tested"  # the scale does not have the claim's table, methods or metrics


class Comparison(NamedTuple):
    """One comparison of a claim; `sign` is 1 for support, -1 for contradiction, 0 for neither."""

    what: str
    estimate: Estimate
    p_adjusted: float  # of the contradiction, for the claim's comparisons
    sign: int
    metric: str = ""  # comparisons of one metric share a scale
    supporting: tuple[float, float] = (0, np.inf)  # the effects that support the claim
    # The effect minus the advantage that counts as none; None: every advantage counts.
    excess: Estimate | None = None
    negligible: float = 0.0  # that advantage, in standard deviations

    @property
    def power(self) -> dict[str, float | None]:
        """The half width of the interval, the difference that this run shows with a power of 80 %,
        and how many seeds would show one as large as the estimate; None: unknown."""
        found = self.estimate
        numbers = {
            "half_width": (found.high - found.low) / 2,
            "detectable": stats.detectable(found),
        }
        known = {key: x if np.isfinite(x) else None for key, x in numbers.items()}
        return {**known, "seeds_to_show": stats.seeds_to_show(found)}

    @property
    def needed(self) -> str:
        """What would decide an open comparison."""
        power, found = self.power, self.estimate
        if found.n_seeds < 2 and np.isfinite(found.prompts_error):
            return "two seeds are the least"
        if power["detectable"] is None:
            return ""
        said = f"shows {power['detectable']:.3g} or more"
        said += f"; seeds to show {found.value:+.3g}: {_seeds(found)}"
        if self.excess is not None and self.excess.value < 0:
            said += f", less than {self.negligible:g} sd: {_seeds(self.excess)}"
        return said

    @property
    def is_negligible(self) -> bool:
        """Whether it contradicts because the advantage, if there is one, is negligible."""
        return self.sign < 0 and self.excess is not None and self.estimate.high >= 0


def _seeds(estimate: Estimate) -> str:
    seeds = stats.seeds_to_show(estimate)
    return f"over {stats.MOST_SEEDS}, or more prompts" if seeds is None else str(seeds)


class Verdict(NamedTuple):
    claim: Claim
    verdict: str
    comparisons: tuple[Comparison, ...]


def is_testable(claim: Claim, loaded: LoadedTable) -> bool:
    """Whether the scale has the table, the methods and the metrics of a claim."""
    if not claim.fits(loaded.spec, loaded.results[0].spec.assets.assets):
        return False
    correlation = loaded.spec.kind == "correlation"
    rewards = loaded.results[0].trajectory_rewards if correlation else None
    measured = loaded.metrics if rewards is None else rewards["metric"]
    return claim.metrics <= set(measured)


def assess_claim(claim: Claim, loaded: LoadedTable, judge: Judge = ONCE) -> Verdict:
    """The verdict on a claim from the runs of its experiment.

    Raises:
        ValueError: a row or a metric is missing; names it.
    """
    (test,) = claim.tests.values()
    comparisons = tuple(_compare(test, _Rows(claim, loaded, judge)))
    signs = {comparison.sign for comparison in comparisons}
    if -1 in signs:
        return Verdict(claim, NOT_REPRODUCED, comparisons)
    return Verdict(claim, REPRODUCED if signs == {1} else UNDECIDED, comparisons)


@singledispatch
def _compare(test: Predicate, rows: _Rows) -> list[Comparison]:
    raise TypeError(type(test))


@_compare.register(Differences)
def _differences(test: Differences, rows: _Rows) -> list[Comparison]:
    above, below = test.margins
    tested = [
        (metric, *rows.difference(*pair, metric, above), rows.difference(*pair, metric, below)[1])
        for metric in test.metrics
        for pair in test.pairs
    ]
    adjusted = stats.holm([excess.p_value for *_, excess in tested])
    comparisons = []
    for (metric, what, estimate, excess), p_value in zip(tested, adjusted, strict=True):
        sign = 0
        if estimate.n_seeds > 1:
            if estimate.value > 0 and estimate.p_value <= 1 - stats.LEVEL:
                sign = 1
            elif excess.value < 0 and p_value <= 1 - stats.LEVEL:
                sign = -1
        apart = excess if below > above else None
        found = Comparison(what, estimate, p_value, sign, metric, excess=apart, negligible=below)
        comparisons.append(found)
    return comparisons


@_compare.register(Faster)
def _faster(test: Faster, rows: _Rows) -> list[Comparison]:
    """The ratio of median iteration times."""
    systems = [rows.row(name).system for name in (test.row, test.than)]
    times = [[result.seconds() for result in system.results] for system in systems]
    estimate = stats.ratio_of_medians(*times, level=rows.judge.level)
    low, high = estimate.low, estimate.high
    least, most = test.share * (1 - test.within), test.share * (1 + test.within)
    sign = 1 if least <= low and high <= most else -1 if high < least or low > most else 0
    what = f"iteration time: published share {test.share:g} +- {100 * test.within:g} %"
    return [Comparison(what, estimate, 1.0, sign, supporting=(least, most))]


@_compare.register(Correlated)
def _correlated(test: Correlated, rows: _Rows) -> list[Comparison]:
    """Supported if the interval of r lies above the threshold, and contradicted below it."""
    (base,) = test.named
    system = rows.row(base).system
    comparisons = []
    for metric in test.metrics:
        r = step_correlation(system.results[0], metric, test.step)
        sign = 1 if r.low > test.above else -1 if r.high < test.above else 0
        title = METRICS[metric].title
        what = f"{title}: r of image {test.step} with the last (above {test.above:g})"
        supporting = (test.above, np.inf)
        comparisons.append(Comparison(what, r, r.p_value, sign, metric, supporting))
    return comparisons


class _Rows:
    """The rows of the claim's experiment, by the names that a claim uses."""

    def __init__(self, claim: Claim, loaded: LoadedTable, judge: Judge) -> None:
        self.claim, self.loaded, self.judge = claim, loaded, judge

    def row(self, name: RowName) -> Row:
        """The one row of this name.

        Raises:
            ValueError: none or several rows have it; names the claim and the experiment.
        """
        found = name.among(self.loaded.spec)
        if len(found) != 1:
            where = self.claim.experiment
            raise ValueError(f"claim {self.claim.id}: {len(found)} rows of {where} have {name}")
        return Row(found[0], self.loaded.systems[found[0]])

    def difference(
        self, one: RowName, other: RowName, metric: str, margin: float
    ) -> tuple[str, Estimate]:
        """(what is compared, how much more than a margin one row is better than another).

        Scores are on the reported scale; `margin` is in standard deviations of the other row's
        prompts.
        """
        left, right = self.row(one), self.row(other)
        a, b = left.system, right.system
        reference = METRICS[metric].factor * right.quality(metric)
        spread = float(np.nanstd(np.nanmean(reference, axis=(0, 2))))
        check_paired(a.scores, b.scores)
        difference = stats.paired_difference(
            METRICS[metric].factor * left.quality(metric) - margin * spread,
            reference,
            a.scores.tags,
            same_seeds=[r.run.folder for r in a.results] == [r.run.folder for r in b.results],
            macro=METRICS[metric].macro,
            level=self.judge.level,
        )
        # A base model is not trained, so it has no seeds to vary.
        trained = [system for system in (a, b) if system.spec.trained] or [a, b]
        seeds = min(len(system.results) for system in trained)
        allowed = f" {'-' if margin > 0 else '+'} {abs(margin):g} sd" if margin else ""
        what = f"{METRICS[metric].title}: {_in_words(left)}{allowed} - {_in_words(right)}"
        overall = self.judge.overall(difference.p_value)
        return what, difference._replace(n_seeds=seeds, p_value=overall)


def _in_words(row: Row) -> str:
    after = "" if row.spec.iteration is None else f" after {row.spec.iteration} iterations"
    return f"{row.spec.label} at {row.spec.nfe} steps{after}"


def recorded(comparison: Comparison) -> dict[str, Any]:
    """A comparison as in claims.json."""
    estimate = comparison.estimate
    return {
        "what": comparison.what,
        **{key: getattr(estimate, key) for key in ("value", "low", "high", "n_seeds", "p_value")},
        "p_adjusted": comparison.p_adjusted,
        "supports": comparison.sign,
        "negligible": comparison.is_negligible,
        **comparison.power,
        "needed": comparison.needed,
    }


def head(record: Mapping[str, Any]) -> str:
    """The first cells of a claim's row: what it says, its source and the verdict."""
    said, source = markdown(record["claim"]), markdown(record["source"])
    return f"| {said} | {source} | **{record['verdict']}**"


def effects(record: Mapping[str, Any]) -> str:
    """The cell of a claim's effects with their intervals."""
    return "<br>".join(
        f"{markdown(c['what'])}: {c['value']:+.3g} [{c['low']:+.3g}, {c['high']:+.3g}]"
        f"{' (negligible)' if c['negligible'] else ''}"
        for c in record["comparisons"]
    )


def needed(record: Mapping[str, Any]) -> str:
    """The cell that says what would decide an undecided claim."""
    open_ones = record["comparisons"] if record["verdict"] == UNDECIDED else ()
    still = [c["needed"] for c in open_ones if c["supports"] == 0]
    return "<br>".join(filter(None, dict.fromkeys(still)))


def write(
    verdicts: Sequence[Verdict], scale: str, out_dir: Path, random: Sequence[str] = ()
) -> list[Path]:
    """Write claims.md and claims.json; `random` names what is randomly initialised."""
    out_dir.mkdir(parents=True, exist_ok=True)
    record = [
        {
            **claim.model_dump(include={"id", "claim", "source"}),
            "scale": scale,
            **({"random_weights": list(random)} if random else {}),
            "verdict": verdict,
            "comparisons": [recorded(c) for c in comparisons],
        }
        for claim, verdict, comparisons in verdicts
    ]
    lines = [
        f"The paper's claims, tested at the scale `{scale}`. A claimed advantage is contradicted "
        "by the reverse, and by an advantage that is shown to be negligible: below 0.1 standard "
        "deviations of the prompts, or what claims.yaml says. A comparison of trained models with "
        "one seed is shown and decides nothing. An open comparison says which differences a run of "
        "this size shows with a power of 80 %, and how many seeds would show the one it found.",
        *([f"RANDOM WEIGHTS: {', '.join(random)}. These verdicts mean nothing."] if random else []),
        "",
        "| Claim | Source | Verdict | Effects with 95 % intervals | Seeds | What would decide it |",
        "| --- | --- | --- | --- | ---: | --- |",
    ]
    for one in record:
        seeds = min((c["n_seeds"] for c in one["comparisons"]), default="–")
        lines.append(f"{head(one)} | {effects(one)} | {seeds} | {needed(one)} |")
    files = [out_dir / "claims.md", out_dir / "claims.json"]
    files[0].write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    files[1].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    return files
